"""A checkpoint of long ago: it still loads, evaluates and predicts the same.

``tests/golden/`` holds a checkpoint of the toy's prototypical network, and what was measured with it when it was made.
Neither is ever made anew to make these tests pass: a change that they catch breaks the checkpoints of all users.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import models
from app.evaluate import main as evaluate
from app.predict import main as predict
from datamodules import Support
from tests.support.processes import ROOT
from tests.support.toy import ToyImages

GOLDEN = ROOT / "tests" / "golden"
CHECKPOINT = GOLDEN / "protonet.ckpt"


def measured(folder: Path) -> dict:
    """What is measured with the checkpoint now."""
    evaluate(["--ckpt_path", str(CHECKPOINT), "--out", str(folder / "evaluation"), "--pictures", "false"])
    images = ToyImages().classes("test").images
    for k in range(3):
        for part, numbers in (("support", (0, 1)), ("query", (5, 6, 7))):
            for n in numbers:
                path = folder / part / f"class{k}" / f"{n}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[20 * k + n, 0].numpy()).save(path)
    folders = ("--support", str(folder / "support"), "--query", str(folder / "query"))
    predict(["--ckpt_path", str(CHECKPOINT), *folders, "--out", str(folder / "predictions")])
    found = json.loads((folder / "predictions" / "predictions.json").read_text())["predictions"]
    return {
        "metrics": json.loads((folder / "evaluation" / "results.json").read_text())["metrics"],
        "predictions": {row["query"]: row["probabilities"] for row in found},
    }


def test_a_checkpoint_of_long_ago_measures_and_predicts_the_same(tmp_path: Path):
    """Catches a renamed class, setting or weight, other tasks of the same seed, and another reading of pictures."""
    was, now = json.loads((GOLDEN / "protonet.json").read_text()), measured(tmp_path)
    assert now["metrics"].keys() == was["metrics"].keys()
    for name, values in was["metrics"].items():
        assert now["metrics"][name] == pytest.approx(values, rel=1e-4), name  # processors round differently
    assert now["predictions"].keys() == was["predictions"].keys()
    for query, probabilities in was["predictions"].items():
        assert now["predictions"][query] == pytest.approx(probabilities, rel=1e-3, abs=1e-5), query


def test_it_loads_in_one_call():
    """Catches weights that do not arrive, by the class that each support picture is nearest to: its own."""
    learner = models.load(CHECKPOINT)
    assert not learner.training
    data = ToyImages(ways=3, shots=2, queries=2)
    task = data.on_device(data.distribution("test").sample([0]))[0]
    with torch.no_grad():
        state = learner.adapt(Support(task.support.x, task.support.y, 3))
        assert learner.predict(state, task.support.x).argmax(1).tolist() == task.support.y.tolist()


if __name__ == "__main__":  # what was measured when the checkpoint was made
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measured(Path(folder)), indent=1))
