"""Recommendations from what runs left behind, and for a folder of pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from app import compare as comparison
from app import evaluate, recommend
from app.dashboard.callback import Dashboard
from models import load
from models.networks.batch_norm import normalize_by
from tests.support.trained import CLASSES, picture_tree, train_on_pictures

# Lightning calls what jsonargparse 5 will not have.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs, tested on the same tasks; their pictures are gone."""
    folder = tmp_path_factory.mktemp("runs")
    root = picture_tree(folder.parent / "tree", CLASSES)
    short = ("--trainer.val_check_interval", "2", "--data.test_tasks", "40", "--model.batch_norm", "running")
    two = ("--trainer.max_steps", "2")
    train_on_pictures(folder, "brief", "models.ProtoNet", root, *short, *two)
    train_on_pictures(folder, "long", "models.ProtoNet", root, *short, "--trainer.max_steps", "30")
    train_on_pictures(folder, "maml", "models.MAML", root, "--model.outputs", "2", *short, *two)
    train_on_pictures(folder, "other", "models.ProtoNet", root, *short, *two, "--data.test_tasks", "41")
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(trained, tmp_path / "runs")


def given(runs: Path, *names: str) -> list[str]:
    return ["--runs", *(str(runs / name) for name in names or ("brief", "long", "maml"))]


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        recommend.main(list(args))
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


def by_hand(checkpoint: Path, root: Path, learned: np.ndarray) -> float:
    """Accuracy of a ProtoNet over divisions of a folder's pictures, without any of the code under test.

    Args:
        learned: of each division which pictures are learned from, (divisions, pictures) bool.
    """
    folders = sorted(root.iterdir())
    files = [(k, file) for k, folder in enumerate(folders) for file in sorted(folder.iterdir())]
    x = np.stack([np.asarray(Image.open(file)) for _, file in files]).transpose(0, 3, 1, 2) / 255
    label, right = np.array([k for k, _ in files]), [[] for _ in folders]
    with torch.no_grad(), normalize_by("running"):
        z = load(checkpoint).backbone(torch.tensor(x, dtype=torch.float32)).double().numpy()
    for part in learned:
        prototypes = np.stack([z[part & (label == k)].mean(0) for k in range(len(folders))])
        nearest = ((z[~part][:, None] - prototypes) ** 2).sum(-1).argmin(1)
        for k, predicted in zip(label[~part], nearest, strict=True):
            right[k].append(predicted == k)
    return float(np.mean([np.mean(of) for of in right]))


def test_a_folder_of_pictures_gets_a_recommendation(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a learner whose measurement is another's, pictures that are learned from and asked about, or a table that
    is not by what is expected."""
    support = picture_tree(tmp_path / "support", {"a": 4, "b": 3, "c": 2}, first=20)
    out = tmp_path / "out"
    recommend.main([*given(runs), "--support", str(support), "--probes", "2", "--splits", "6", "--out", str(out)])
    content = json.loads((out / "recommendation.json").read_text())
    learners = content["learners"]
    assert sorted(row["learner"] for row in learners) == ["brief", "long", "maml"]
    expected = [row["expected"] for row in learners]
    assert expected == sorted(expected, reverse=True)
    assert all(0 <= row["low"] <= row["expected"] <= row["high"] <= 1 for row in learners)
    assert sum(row["best_with"] for row in learners) == pytest.approx(1, abs=1e-5)
    assert len(content["probed"]) == 2
    of_table = {row["learner"]: row["measured"] for row in learners if row["measured"] is not None}
    assert of_table == {row["learner"]: row["measured"] for row in content["probed"]}
    pictures = recommend.Pictures.load(support, 1, 6, 0)
    learned = pictures.splits.numpy()
    assert (learned.sum(1) == 3).all()
    assert [sorted({int(n) for n in learned[:, part].sum(1)}) for part in (slice(4), slice(4, 7), slice(7, 9))] == [
        [1]
    ] * 3
    assert len({tuple(row) for row in learned}) > 3
    for row in content["probed"]:
        if row["learner"] != "maml":
            checkpoint = runs / row["learner"] / "checkpoints" / "best.ckpt"
            assert row["measured"] == pytest.approx(by_hand(checkpoint, support, learned))
    assert content["classes"] == {"a": 4, "b": 3, "c": 2}
    assert "known tasks have 2 classes and 1 support pictures of each, this one 3 and 1" in content["notes"][0]
    assert len(content["nearest"]) == 3
    assert "c0" in content["nearest"][0]["task"] or "c1" in content["nearest"][0]["task"]
    assert (out / "recommendation.png").read_bytes().startswith(b"\x89PNG")
    with np.load(out / "task_factors.npz") as kept, np.load(runs / "brief" / "test_tasks.npz") as tasks:
        assert kept["factors"].shape[0] == 40
        np.testing.assert_array_equal(kept["fingerprint"], tasks["fingerprint"])
        assert kept["learners"].tolist() == ["brief", "long", "maml"]
    shown = capsys.readouterr().out
    assert f"recommended: {learners[0]['learner']}" in shown
    # Learners that were measured are told with what was expected of them before.
    assert shown.count("expected before") == 2


def test_the_same_command_tells_the_same(runs: Path, tmp_path: Path) -> None:
    """Catches divisions or models by chance of their own."""
    support, told = picture_tree(tmp_path / "support", {"a": 3, "b": 3}, first=20), []
    for by in ("pmf", "gplvm", "pmf"):
        recommend.main([*given(runs), "--support", str(support), "--by", by, "--splits", "2", "--probes", "1"])
        told.append(json.loads((runs / "recommendations" / "support" / "recommendation.json").read_text())["learners"])
    assert told[0] == told[2]
    assert [row["expected"] for row in told[0]] != [row["expected"] for row in told[1]]


def test_held_out_tasks_tell_what_recommendations_cost(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches known tasks among those that are tried, regrets of other learners, or gains of the wrong sign."""
    recommend.main([*given(runs), "--held_out", "0.4", "--probes", "1"])
    content = json.loads((runs / "recommendations" / "held-out" / "regret.json").read_text())
    assert (content["known"], content["held_out"]) == (24, 16)
    rows = {row["way"]: row for row in content["ways_to_decide"]}
    assert rows["oracle"]["regret"] == {"mean": 0, "ci95": 0}
    for row in rows.values():
        assert row["regret"]["mean"] == pytest.approx(rows["oracle"]["accuracy"]["mean"] - row["accuracy"]["mean"])
        assert row["gain"]["mean"] == pytest.approx(
            row["accuracy"]["mean"] - rows["best on average"]["accuracy"]["mean"]
        )
    accuracy = []
    for name in ("brief", "long", "maml"):
        with np.load(runs / name / "test_tasks.npz") as tasks:
            accuracy.append(tasks["accuracy"])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).numpy()
    known, new = np.array(accuracy)[:, order[16:]], np.array(accuracy)[:, order[:16]]
    assert content["best_on_average"] == ("brief", "long", "maml")[known.mean(1).argmax()]
    mean, half = rows["random learner"]["accuracy"].values()
    assert abs(mean - new.mean()) < half  # judged by two of four queries
    assert set(content["models"]) == {"matrix factorisation", "GP latent variables"}
    shown = capsys.readouterr().out
    assert "gain over the best" in shown
    assert "in their 95 % intervals" in shown
    # What lies beside the runs is none.
    assert recommend.tested([runs / "brief", runs / "long", runs / "recommendations"], "this") == [
        runs / "brief",
        runs / "long",
    ]
    comparison.main([str(runs / n) for n in ("brief", "long", "recommendations")])


def test_evaluations_are_measured_as_they_were_tested(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a probe of the training's settings where others were tested, and a checkpoint that changed since."""
    monkeypatch.setattr(Dashboard, "_draw", lambda *_: None)
    tree = picture_tree(tmp_path / "tree", CLASSES)
    checkpoint = str(runs / "maml" / "checkpoints" / "best.ckpt")
    folders = []
    for steps in ("0", "8"):
        args = ["--ckpt_path", checkpoint, "--inner_steps", steps, "--data.init_args.root", str(tree)]
        evaluate.main([*args, "--out", str(tmp_path / "evaluations" / f"steps-{steps}")])
        folders.append(str(tmp_path / "evaluations" / f"steps-{steps}"))
    support = picture_tree(tmp_path / "support", {"a": 6, "b": 6}, first=20)
    args = ["--runs", *folders, "--support", str(support), "--probes", "2", "--out", str(tmp_path / "out")]
    recommend.main(args)
    content = json.loads((tmp_path / "out" / "recommendation.json").read_text())
    measured = {row["learner"]: row["measured"] for row in content["learners"]}
    assert len(set(measured.values())) == 2
    shutil.copy(runs / "long" / "checkpoints" / "best.ckpt", checkpoint)
    assert "is not the checkpoint any more that" in refused(capsys, *args)


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["--runs", "{runs}/nothing-*", "--held_out", "0.4"], "needs two or more folders"),
        (["--runs", "{runs}/nothing", "{runs}/long", "--held_out", "0.4"], "nothing is no run and no evaluation"),
        (
            ["--runs", "{runs}/brief", "--held_out", "0.4"],
            "a recommendation needs two or more folders, each of them once",
        ),
        (["--runs", "{runs}/brief", "{runs}/other", "--held_out", "0.4"], "tasks 40 and 41"),
        (["--runs", "{runs}/brief", "{runs}/long"], "give --support, a folder of pictures, or --held_out"),
        (["--runs", "{runs}/brief", "{runs}/long", "--held_out", "0.9"], "leaves 4 to learn from and 36 to try"),
        (["--runs", "{runs}/brief", "{runs}/long", "--held_out", "nan"], "--held_out is nan"),
        (["--runs", "{runs}/brief", "{runs}/long", "--held_out", "0.4", "--probes", "0"], "--probes is 0 but must be"),
        (["--runs", "{runs}/brief", "{runs}/long", "--support", "{runs}/none"], "there is no folder"),
        (["--runs", "{runs}/brief", "{runs}/long", "--support", "{runs}/one"], "class 'b' of"),
    ],
)
def test_what_cannot_be_is_one_line(runs: Path, args: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback, or an error after minutes of measuring."""
    picture_tree(runs / "one", {"a": 2, "b": 1})
    assert what in refused(capsys, *(arg.format(runs=runs) for arg in args))


def test_damaged_records_and_lost_checkpoints_are_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a record that ends in the middle of nowhere, or a learner that is recommended and not there."""
    support = picture_tree(tmp_path / "support", {"a": 2, "b": 2})
    args = [*given(runs), "--support", str(support), "--splits", "1", "--probes", "1"]
    content = json.loads((runs / "long" / "results.json").read_text())
    shutil.rmtree(runs / "long" / "checkpoints")
    (runs / "long" / "results.json").write_text(json.dumps(content | {"checkpoint": "moved/best.ckpt"}))
    assert "the checkpoint moved/best.ckpt that" in (line := refused(capsys, *args)) and "is gone" in line
    (runs / "long" / "results.json").write_text("{")
    assert "results.json cannot be read" in refused(capsys, *args)
    (runs / "long" / "results.json").write_text(json.dumps(content | {"checkpoint": None}))
    assert "was tested without a checkpoint" in refused(capsys, *args)
    record = runs / "long" / "test_tasks.npz"
    record.write_bytes(record.read_bytes()[:300])
    assert "test_tasks.npz cannot be read" in refused(capsys, *args)
    with pytest.raises(SystemExit):
        recommend.main([*given(runs, "brief", "maml"), "--held_out", "0.4", "--out", "/dev/null/none"])
    assert "give another --out" in capsys.readouterr().err


def save(runs: Path, name: str, **changed: Any) -> None:
    """Change arrays of a test's record."""
    path = runs / name / "test_tasks.npz"
    with np.load(path) as content:
        arrays = dict(content)
    np.savez_compressed(path, **(arrays | changed))


def test_learners_that_predict_nothing_are_told_by_name(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a learner that diverged and takes all expectations with it."""
    save(runs, "long", accuracy=np.full(40, np.nan, np.float32))
    args = [*given(runs), "--held_out", "0.4"]
    assert "predicted nothing on 40 of 40 tasks" in refused(capsys, *args)
    few = np.linspace(0.3, 0.9, 40, dtype=np.float32)
    few[:5] = np.nan
    save(runs, "long", accuracy=few)
    recommend.main(args)
    content = json.loads((runs / "recommendations" / "held-out" / "regret.json").read_text())
    assert all(np.isfinite(row["regret"]["mean"]) for row in content["ways_to_decide"])
