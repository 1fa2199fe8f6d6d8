"""Runs that are one stream."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from app.cli.builder import main
from datamodules import ReturningStreams
from datamodules.core.errors import ConfigError
from models import Conv4, NearestClassMean, Online, TaskMemory
from models.core.checkpoint_io import load_checkpoint
from tests.support.processes import start, wait_for_step
from tests.support.toy import TRAINER, ToyAlphabets, train_for, under

LEARNED = under(
    "learner",
    [
        *("--model.backbone", "models.Conv4", "--model.backbone.hidden", "4", "--model.backbone.image_size", "16"),
        *("--model.keep", "9", "--model.retrieve", "4", "--model.steps", "2", "--model.local", "2"),
    ],
)


def command(runs: Path, steps: int, *flags: str) -> list[str]:
    """Arguments of train.py: a task memory along one stream of the toy alphabets."""
    return [
        *("--model", "models.Online", "--model.learner", "models.TaskMemory", *LEARNED),
        *("--data", "datamodules.ReturningStreams", "--data.source", "tests.support.toy.ToyAlphabets"),
        *("--data.online", "true", "--data.groups", "2", "--data.ways", "2", "--data.experiences", "36"),
        *("--data.queries", "2", "--data.points", "[3, 6]"),
        *(*TRAINER, "--runs", str(runs), "--name", "online", "--trainer.max_steps", str(steps)),
        *("--trainer.val_check_interval", "3", "--checkpoint_every", "2", *flags),
    ]


def data() -> ReturningStreams:
    return ReturningStreams(ToyAlphabets(), groups=2, ways=2, experiences=8, queries=2, points=[2, 4], online=True)


def backbone() -> Conv4:
    torch.manual_seed(0)
    return Conv4(hidden=4, image_size=16)


@pytest.mark.parametrize("on_disk", [None, False, True])
def test_is_the_learner_along_the_stream(on_disk, tmp_path):
    """Catches experiences in another order or twice, a learner in training mode, what is asked after it was learned,
    and a memory on disk that differs by a bit from one in the state."""
    settings = {"keep": 5, "retrieve": 3, "steps": 2, "local": 2}
    plain = NearestClassMean(backbone()) if on_disk is None else TaskMemory(backbone(), **settings)
    learner = plain if on_disk is None else TaskMemory(backbone(), **settings, on_disk=on_disk)
    given = data()
    settings = {"default_root_dir": str(tmp_path), "limit_val_batches": 1, "val_check_interval": 2}
    model = train_for(Online(learner), given, 8, **settings, num_sanity_val_steps=0)
    assert isinstance(model, Online) and model.experiences == 8
    assert (tmp_path / "memory" / "records.bin").exists() == bool(on_disk)
    whole = given.on_device(given.distribution("test").sample([0]))
    plain.eval().chunk = 1
    with torch.inference_mode():
        found = plain.followed(whole)
    for name, values in zip(("first", "before", "after", "online"), model.history, strict=True):
        torch.testing.assert_close(values, found[name][0], rtol=0, atol=1e-6)
    assert sorted(model.rows) == [2, 4, 8]
    for k, point in enumerate((2, 4, 8)):
        of_point = torch.stack([found["matrix"][0, k, :point], found["learned"][0, k, :point]])
        torch.testing.assert_close(model.rows[point], of_point, rtol=0, atol=1e-6)
    if on_disk is not None:
        assert torch.equal(torch.stack(model.noted["retrieved"]), found["retrieved"][0])
        assert 0 < model.history[2].mean() < 1


def state_of(checkpoint: Path) -> dict:
    return load_checkpoint(checkpoint)["online"]


def same(a: dict, b: dict) -> None:
    """Two checkpoints of a stream are the same to the bit."""
    for name in ("state", "rows"):
        assert all(torch.equal(x, y) for x, y in zip(a[name], b[name], strict=True)), name
    assert torch.equal(a["history"], b["history"]) and a["experiences"] == b["experiences"] and a["store"] == b["store"]
    assert all(torch.equal(values, b["noted"][n]) for n, values in a["noted"].items()) and a["points"] == b["points"]


@pytest.mark.parametrize("on_disk", ["false", "true"])
def test_goes_on_in_mid_stream_to_the_bit(on_disk, tmp_path):
    """Catches a state, a chance or a record on disk that a resumed run does not have, and metrics of less than all."""
    disk = ("--model.learner.on_disk", on_disk)
    main(command(tmp_path / "whole", 8, *disk))
    main(command(tmp_path / "cut", 5, *disk))
    main(command(tmp_path / "cut", 8, *disk, "--ckpt_path", "last"))
    whole, cut = (tmp_path / name / "online" for name in ("whole", "cut"))
    same(*(state_of(run / "checkpoints" / "last.ckpt") for run in (whole, cut)))
    results = [json.loads((run / "results.json").read_text())["metrics"] for run in (whole, cut)]
    assert results[0] == results[1] and {"online", "return_accuracy", "backward_transfer"} <= results[0].keys()
    matrix = np.load(whole / "test_tasks.npz")["matrix"]
    assert matrix.shape == (1, 3, 36) and np.isfinite(matrix[0, :2]).sum() == 3 + 6
    assert not (whole / "checkpoints" / "best.ckpt").exists()
    main([*command(tmp_path / "cut", 8, *disk), "--stage", "test"])  # from its last checkpoint, which reads the file
    assert json.loads((cut / "results.json").read_text())["metrics"] == results[0]


def killed(tmp_path: Path, times: int, steps: int) -> None:
    rng = random.Random(times)
    disk = ("--model.learner.on_disk", "true", "--trainer.val_check_interval", "12")
    main(command(tmp_path / "whole", steps, *disk))
    reference = state_of(tmp_path / "whole" / "online" / "checkpoints" / "last.ckpt")
    for k in range(times):
        runs = tmp_path / f"killed{k}"
        last = runs / "online" / "checkpoints" / "last.ckpt"
        process = start(*command(runs, steps, *disk))
        wait_for_step(last, rng.randrange(2, 12), process)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.communicate()
        assert load_checkpoint(last)["global_step"] < steps, "it ended before it was killed: the test tests nothing"
        main(command(runs, steps, *disk, "--ckpt_path", "last"))
        same(reference, state_of(last))


def test_survives_kills(tmp_path):
    """Catches a memory on disk that a kill leaves with what its checkpoint does not know of."""
    killed(tmp_path, 2, 36)


@pytest.mark.slow
def test_survives_many_kills(tmp_path):
    """Catches the same at rarer moments."""
    killed(tmp_path, 20, 36)


def test_refuses_in_one_line(tmp_path):
    """Catches a run past the end of its stream, data without a stream to learn, and a meta-training on one stream."""
    model = Online(NearestClassMean(backbone()))
    with pytest.raises(ConfigError, match=r"give --trainer.max_steps 8"):
        train_for(model, data(), 9, default_root_dir=str(tmp_path))
    assert "set data.online to true" in (model.check(ReturningStreams(ToyAlphabets(), groups=2, ways=2)) or "")
    with pytest.raises(ConfigError, match=r"give models.Online"):
        train_for(NearestClassMean(backbone()), data(), 1, default_root_dir=str(tmp_path))
