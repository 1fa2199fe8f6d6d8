"""Paired comparisons: against the formulas written out, and refused where tasks are not the same."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app import compare as comparison
from app import evaluate
from app.compare import compare, difference, labels
from app.dashboard.callback import Dashboard
from app.plots import results, style
from app.runs.evaluation_record import (
    Evaluation,
    refuse_other_settings,
    refuse_other_tasks,
    save_tasks,
    settings,
)
from app.runs.recorder import Recorder
from datamodules import GymnasiumTasks, ImageFolder, Sinusoid
from datamodules.core.errors import ConfigError
from datamodules.core.metric import Metric
from models.core.checkpoint_io import AtomicCheckpointIO
from models.core.metrics import FINGERPRINT, TaskMetrics, calibration_error, classification_metrics
from models.core.task_kinds import KINDS
from tests.support.toy import ToyImages
from tests.support.trained import CLASSES, SIZE, picture_tree, train_on_pictures

# Lightning calls what jsonargparse 5 will not have.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


def pair(tasks: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Metrics of two learners to whom the same tasks are hard; the first is 0.02 better."""
    rng = np.random.default_rng(0)
    hardness = rng.normal(0, 0.1, tasks)
    return tuple(torch.from_numpy(0.7 + hardness + g + rng.normal(0, 0.02, tasks)) for g in (0.02, 0.0))  # pyright: ignore


def test_a_difference_is_the_paired_t_interval():
    """Catches standard errors of the two added up, of the wrong number of tasks, or the second minus the first."""
    first, second = pair()
    mean, half = difference(Metric("higher", share=True), first, second)
    gaps = [a - b for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    expected = sum(gaps) / 300
    error = (sum((g - expected) ** 2 for g in gaps) / 299 / 300) ** 0.5
    assert mean == pytest.approx(expected)
    assert half == pytest.approx(1.96 * error)
    of_each = [1.96 * float(x.std()) / 300**0.5 for x in (first, second)]
    assert half < 0.4 * min(of_each)  # the two intervals overlap, and yet the difference is clear
    assert mean - half > 0


def test_pooled_differences_are_resampled_in_pairs():
    """Catches a bootstrap that resamples each learner on tasks of its own, or a mean of per-task errors."""
    torch.manual_seed(0)
    shift = 2 * torch.randn(150, 1, 1)  # of a task's logits: some are overconfident, for either learner
    logits, target = torch.randn(150, 20, 3) * shift.exp(), torch.randint(3, (150, 20))
    near = logits + 0.1 * torch.randn_like(logits)
    one, other = (classification_metrics(x, target)["bins"].double() for x in (logits, near))
    mean, half = difference(Metric("lower", pooled="ece"), one, other)
    assert mean == pytest.approx((calibration_error(one.sum(0)) - calibration_error(other.sum(0))).item())
    rng = np.random.default_rng(1)
    paired, apart = [], []
    for _ in range(400):
        i, j = (torch.from_numpy(rng.integers(150, size=150)) for _ in range(2))
        of_one = calibration_error(one[i].sum(0)).item()
        paired.append(of_one - calibration_error(other[i].sum(0)).item())
        apart.append(of_one - calibration_error(other[j].sum(0)).item())
    assert half == pytest.approx(1.96 * np.std(paired), rel=0.2)
    assert half < 0.5 * 1.96 * np.std(apart)


def guessed(folder: Path, data: Any, seed: int = 0, tasks: int = 12, **metrics: torch.Tensor) -> Evaluation:
    """A test of a learner that guesses, as a run leaves it."""
    torch.manual_seed(seed)
    batch = data.distribution("test").sample(range(tasks))
    metric = TaskMetrics(KINDS[data.kind].metrics)
    facts = batch.task | {FINGERPRINT: batch.fingerprint()}
    if batch.ways:
        logits = torch.randn(*batch.query_y.shape, batch.ways)
        metric.update(batch.index, classification_metrics(logits, batch.query_y), facts)
    else:
        metric.update(batch.index, {"mse": torch.rand(tasks)}, facts)
    metric.compute()
    metric.subset = metrics
    save_tasks(folder / "test_tasks.npz", data, "Guess", metric)
    return Evaluation.load(folder)


def toy(**others: Any) -> ToyImages:
    return ToyImages(**{"ways": 3, "queries": 2, "test_tasks": 12} | others)


def test_the_same_tasks_are_compared(tmp_path: Path):
    """Catches metrics of another learner in a row, or settings of training and speed taken for those of the tasks."""
    one = guessed(tmp_path / "a", toy(), 1, open_set_auroc=torch.rand(5))
    other = guessed(tmp_path / "b", toy(eval_batch_size=3, meta_batch_size=7, train_ways=5, root="x"), 2)
    content = compare([one, other])
    names = ["accuracy", "nll", "ece"]
    assert [learner["learner"] for learner in content["learners"]] == ["a", "b"]
    assert list(content["learners"][0]["metrics"]) == [*names, "open_set_auroc"]
    (between,) = content["differences"]
    assert list(between["metrics"]) == names  # the other learner has no open_set_auroc
    for name in names:
        means = [learner["metrics"][name]["mean"] for learner in content["learners"]]
        assert between["metrics"][name]["mean"] == pytest.approx(means[0] - means[1])
        assert between["metrics"][name]["ci95"] > 0
    mean = torch.cat([one.metrics["accuracy"]]).double().mean().item()
    assert content["learners"][0]["metrics"]["accuracy"]["mean"] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("others", "tasks", "what"),
    [
        ({"ways": 4}, 12, "ways 3 and 4; evaluate both with the same --ways"),
        ({"shots": 2}, 12, "shots 1 and 2"),
        ({"queries": 3}, 12, "queries 2 and 3"),
        ({"seed": 1}, 12, "seed 0 and 1"),
        ({}, 11, "tasks 12 and 11"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, others: dict[str, int], tasks: int, what: str):
    """Catches a paired interval of tasks that only share their numbers."""
    pair = [guessed(tmp_path / "a", toy()), guessed(tmp_path / "b", toy(**others), tasks=tasks)]
    with pytest.raises(ConfigError, match=what):
        refuse_other_tasks(pair)


class OtherImages(ToyImages):
    def classes(self, split: str) -> Any:
        known = super().classes(split)
        known.images = known.images.flip(-1)
        return known


class OtherNames(ToyImages):
    def classes(self, split: str) -> Any:
        known = super().classes(split)
        known.names = [f"other {name}" for name in known.names]
        return known


class OtherInstances(ToyImages):
    def classes(self, split: str) -> Any:
        known = super().classes(split)
        known.counts = np.array([20] * 11 + [19])  # from the last class fewer images are drawn
        known.images = known.images[:-1]
        return known


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (OtherImages, "the images differ"),
        (OtherNames, "the classes of the split differ"),
        (OtherInstances, "the fingerprint of task"),
    ],
)
def test_tasks_that_only_look_alike_are_refused(tmp_path: Path, data: type[ToyImages], what: str):
    """Catches data of the same numbers of classes and settings whose classes, images or draws are others."""
    data.__name__ = "ToyImages"
    other = data(ways=3, queries=2, test_tasks=12)
    with pytest.raises(ConfigError, match=what):
        refuse_other_tasks([guessed(tmp_path / "a", toy()), guessed(tmp_path / "b", other)])


@pytest.mark.parametrize(
    ("others", "what"),
    [({"noise": 0.001}, "fingerprint"), ({"x_range": (-5, 5.01)}, "fingerprint"), ({"amplitude": (0, 5)}, "amplitude")],
)
def test_functions_are_known_by_their_parameters_and_points(tmp_path: Path, others: dict[str, Any], what: str):
    """Catches the same functions observed elsewhere, or with noise; and a difference of rounding that is refused."""
    one, other = (Sinusoid(test_tasks=12, **more) for more in ({}, others))
    first = guessed(tmp_path / "a", one)
    rounded = dataclasses.replace(first, folder=tmp_path / "c", facts={n: v.clone() for n, v in first.facts.items()})
    rounded.facts["fingerprint"].mul_(1 + 1e-6)
    refuse_other_tasks([first, rounded])
    with pytest.raises(ConfigError, match=f"the {what} of task"):
        refuse_other_tasks([first, guessed(tmp_path / "b", other)])


def test_the_fingerprint_tells_which_images_in_which_order():
    """Catches sums that an exchange of two images leaves, or that support and query share."""
    batch = toy().distribution("test").sample(range(50))
    marks = batch.fingerprint()
    assert len(marks.unique()) == 50
    assert torch.equal(toy().distribution("test").sample([7, 3]).fingerprint(), marks[[7, 3]])
    assert batch.query_rows is not None and batch.support_rows is not None
    turned = batch.query_rows.clone()
    turned[:, [0, 1]] = turned[:, [1, 0]]
    assert (dataclasses.replace(batch, query_rows=turned).fingerprint() != marks).all()


def test_labels_are_short_and_unique():
    """Catches two learners of one name, or names as long as paths."""
    runs = Path("runs")
    assert labels([runs / "a", runs / "b"]) == ["a", "b"]
    of_one = [runs / "a", runs / "a" / "evaluations" / "best-tasks-5"]
    assert labels(of_one) == ["a", "a best-tasks-5"]
    of_two = [runs / "a" / "evaluations" / f"{c}-tasks-5" for c in ("best", "last")]
    assert labels(of_two) == ["a best", "a last"]
    assert labels([Path("x/a"), Path("y/a")]) == ["x/a", "y/a"]


def test_the_picture_shows_every_learner_and_pair():
    """Catches intervals of other learners, a missing metric that shifts the rest, or a difference without its zero."""
    numbers = [{"mean": 0.1 * k, "ci95": 0.01 * (k + 1)} for k in range(4)]
    learners = [
        {"learner": "one", "metrics": {"mse": numbers[0]}},
        {"learner": "two", "metrics": {"mse": numbers[1], "coverage": numbers[2]}},
    ]
    between = [{"learner": "one", "minus": "two", "metrics": {"mse": numbers[3]}}]
    figure = results.comparison(learners, between, KINDS["regression"].metrics, "Data")
    mse, gap, coverage, none = figure.axes
    assert [float(c.lines[0].get_xdata()[0]) for c in mse.containers] == [0.0, 0.1]
    ends = [c.lines[1][1].get_xdata()[0] - c.lines[0].get_xdata()[0] for c in mse.containers]
    assert ends == pytest.approx([0.01, 0.02])
    assert [t.get_text() for t in mse.get_yticklabels()] == ["one", "two"]
    assert [(float(c.lines[0].get_xdata()[0]), c.lines[0].get_ydata()[0]) for c in coverage.containers] == [(0.2, 1)]
    assert float(gap.containers[0].lines[0].get_xdata()[0]) == pytest.approx(0.3)
    assert not none.containers
    assert style.png(figure, 40).startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    root = picture_tree(folder / "tree", CLASSES)
    short = ("--trainer.max_steps", "2", "--trainer.val_check_interval", "2")
    train_on_pictures(folder, "protonet", "models.ProtoNet", root, *short)
    train_on_pictures(folder, "maml", "models.MAML", root, "--model.outputs", "2", *short)
    return folder


def told(capsys: pytest.CaptureFixture[str], main: Any, *args: str) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


def test_several_checkpoints_are_evaluated_once_and_compared(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Catches metrics unlike those of each alone, an evaluation that is done again, or one that is out of date."""
    monkeypatch.setattr(Dashboard, "_draw", lambda *_: None)
    checkpoints = [runs / name / "checkpoints" / "best.ckpt" for name in ("protonet", "maml")]
    args = ["--ckpt_path", *map(str, checkpoints), "--tasks", "15"]
    evaluate.main(args)
    out = runs / "comparisons" / "protonet-maml"
    content = json.loads((out / "comparison.json").read_text())
    folders = [runs / name / "evaluations" / "best-tasks-15" for name in ("protonet", "maml")]
    for learner, folder in zip(content["learners"], folders, strict=True):
        alone = json.loads((folder / "results.json").read_text())["metrics"]
        assert learner["folder"] == str(folder)
        for name, metric in learner["metrics"].items():
            assert metric == {key: pytest.approx(alone[name][key]) for key in ("mean", "ci95")}
    columns = [[float(row["accuracy"]) for row in csv.DictReader((f / "test_tasks.csv").open())] for f in folders]
    gaps = np.subtract(*columns)
    (between,) = content["differences"]
    assert between["metrics"]["accuracy"]["mean"] == pytest.approx(gaps.mean(), abs=1e-7)
    assert between["metrics"]["accuracy"]["ci95"] == pytest.approx(1.96 * gaps.std(ddof=1) / 15**0.5)
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    lines = list(csv.DictReader((out / "comparison.csv").open()))
    assert [(x["learner"], x["minus"]) for x in lines if x["metric"] == "ece"] == [
        ("protonet", ""),
        ("maml", ""),
        ("protonet", "maml"),
    ]
    shown = capsys.readouterr().out
    assert "Paired differences" in shown

    done: list[str] = []
    real = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda cli, text: (done.append(cli.run_dir.name), real(cli, text)))
    evaluate.main(args)
    assert done == []
    os.utime(checkpoints[0])
    evaluate.main([*args, "--out", str(tmp_path / "out")])
    assert done == []
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["differences"] == content["differences"]


@pytest.fixture
def evaluated(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Callable[[], list[str]]]:
    """A folder of runs of which two checkpoints are evaluated, and what evaluates them again: folders where it was."""
    monkeypatch.setattr(Dashboard, "_draw", lambda *_: None)
    for name in ("protonet", "maml"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        shutil.copy(runs / name / "checkpoints" / "best.ckpt", tmp_path / name / "checkpoints")
    args = [str(tmp_path / name / "checkpoints" / "best.ckpt") for name in ("protonet", "maml")]
    done: list[str] = []
    real = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda cli, text: (done.append(cli.run_dir.parts[-3]), real(cli, text)))

    def again() -> list[str]:
        done.clear()
        evaluate.main(["--ckpt_path", *args, "--tasks", "5"])
        return list(done)

    assert again() == ["protonet", "maml"]
    return tmp_path, again


def test_another_checkpoint_of_the_same_name_is_evaluated(evaluated: tuple[Path, Callable[[], list[str]]]):
    """Catches metrics of the weights that a file had before, where the new file has an older date, as copies do."""
    folder, again = evaluated
    checkpoint = folder / "maml" / "checkpoints" / "best.ckpt"
    before = (folder / "maml" / "evaluations" / "best-tasks-5" / "test_tasks.npz").read_bytes()
    content = torch.load(checkpoint, weights_only=True)
    for value in content["state_dict"].values():
        value.mul_(2)
    AtomicCheckpointIO().save_checkpoint(content, checkpoint)
    os.utime(checkpoint, (0, 0))
    assert again() == ["maml"]
    assert (folder / "maml" / "evaluations" / "best-tasks-5" / "test_tasks.npz").read_bytes() != before
    assert again() == []
    torch.save(content, checkpoint)  # as another program writes it, without a seal
    assert again() == ["maml"]
    assert again() == []


def test_an_evaluation_that_was_killed_is_not_trusted(
    evaluated: tuple[Path, Callable[[], list[str]]], monkeypatch: pytest.MonkeyPatch
):
    """Catches results of one evaluation beside the tasks of another, and half of one that counts as finished."""
    folder, again = evaluated
    place = folder / "maml" / "evaluations" / "best-tasks-5"
    (place / "results.json").unlink()  # killed after the test's tasks were written, before the end
    assert again() == ["maml"]
    (place / "results.json").write_text('{"checkpoint_sha2')
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "write_evaluation", lambda *_: sys.exit(137))
        with pytest.raises(SystemExit):
            again()
        assert not (place / "results.json").exists()
    # A record that could not be written is not that of the test before.
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "_save", lambda *_: None)
        with pytest.raises(SystemExit):
            again()
        assert not (place / "test_tasks.npz").exists()
    assert again() == ["maml"]


def test_finished_runs_are_compared_as_they_are(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Catches a comparison of runs that computes, or needs, more than what their tests left."""
    for name in ("protonet", "maml"):
        (tmp_path / name).mkdir()
        shutil.copy(runs / name / "test_tasks.npz", tmp_path / name)
    comparison.main([str(tmp_path / "protonet"), str(tmp_path / "maml")])
    content = json.loads((tmp_path / "comparisons" / "protonet-maml" / "comparison.json").read_text())
    result = json.loads((runs / "maml" / "results.json").read_text())["metrics"]
    assert content["learners"][1]["metrics"]["nll"]["mean"] == pytest.approx(result["nll"]["mean"])
    assert "is no run and no evaluation" in told(capsys, comparison.main, str(tmp_path / "maml"), str(tmp_path))
    (tmp_path / "untested").mkdir()
    shutil.copy(runs / "maml" / "config.yaml", tmp_path / "untested")
    line = told(capsys, comparison.main, str(tmp_path / "maml"), str(tmp_path / "untested"))
    assert f"train.py --config {tmp_path / 'untested' / 'config.yaml'} --stage test" in line
    # What the first comparison left lies beside the runs: as runs/* names it, too.
    comparison.main([str(tmp_path / name) for name in ("comparisons", "maml", "protonet")])
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "test_tasks.npz").write_bytes((runs / "maml" / "test_tasks.npz").read_bytes()[:200])
    assert "cannot be read" in told(capsys, comparison.main, str(tmp_path / "maml"), str(tmp_path / "half"))
    assert "each of them once" in told(capsys, comparison.main, str(tmp_path / "maml"), str(tmp_path / "maml"))
    with pytest.raises(SystemExit):  # not into the working directory
        comparison.main([str(tmp_path / "maml"), str(tmp_path / "protonet"), "--out", ""])
    assert "argument --out: it is empty" in capsys.readouterr().err


def test_checkpoints_of_other_tasks_are_refused_before_any_work(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Catches an hour of evaluation that ends in a refusal."""
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("evaluated"))
    content = torch.load(runs / "maml" / "checkpoints" / "best.ckpt", weights_only=True)
    content["config"] = content["config"].replace("queries: 2", "queries: 3")
    torch.save(content, tmp_path / "other.ckpt")
    one = str(runs / "protonet" / "checkpoints" / "best.ckpt")
    line = told(capsys, evaluate.main, "--ckpt_path", one, str(tmp_path / "other.ckpt"))
    assert "not tested on the same tasks: queries 2 and 3" in line
    assert "give each once" in told(capsys, evaluate.main, "--ckpt_path", one, one)
    line = told(capsys, evaluate.main, "--ckpt_path", one, str(tmp_path / "other.ckpt"), "--out", str(runs / "maml"))
    assert "give another --out" in line


def test_a_seed_given_to_the_evaluation_is_that_of_the_tasks(runs: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches tasks of another seed that count as those of the data's, where facts alone would tell."""
    monkeypatch.setattr(Dashboard, "_draw", lambda *_: None)
    checkpoint = runs / "protonet" / "checkpoints" / "best.ckpt"
    evaluate.main(["--ckpt_path", str(checkpoint), "--seed", "7"])
    other = Evaluation.load(runs / "protonet" / "evaluations" / "best-seed-7")
    assert other.about["seed"] == 7
    with pytest.raises(ConfigError, match="seed 0 and 7"):
        refuse_other_tasks([Evaluation.load(runs / "protonet"), other])
    data = ImageFolder(root=str(runs / "tree"), size=SIZE, ways=2, queries=2, fractions=(0.3, 0.35, 0.35))
    data.prepare_data()
    tasks = data.distribution("test")
    tasks.seed = 7
    assert torch.equal(tasks.sample(range(20)).fingerprint(), other.facts["fingerprint"])


def test_environments_of_other_arguments_are_refused(tmp_path: Path):
    """Catches two environments of one class of tasks, or two ends of one corridor, that pass for the same tasks."""
    corridor = "tests.datamodules.reinforcement.test_gymnasium_tasks.Corridor"
    told = [
        settings(GymnasiumTasks(corridor, 7, arguments={"end": end}, val_tasks=2, test_tasks=2))
        for end in (3.0, 3.0, 8.0)
    ]
    refuse_other_settings(told[:2], ["a", "b"])
    with pytest.raises(ConfigError, match=r"environment .*Corridor"):
        refuse_other_settings(told[1:], ["b", "c"])


def test_runs_that_differ_by_seed_are_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Catches seeds that are counted as tasks, runs of other settings in one mean, and differences that are not of the
    same tasks: by NumPy from the tables."""
    data, g, tables = toy(), torch.Generator().manual_seed(0), {}
    for rate in (0.1, 0.2):
        for seed in (1, 2, 3):
            folder = tmp_path / f"maml-{rate}-seed{seed}"
            tables[rate, seed] = torch.rand(12, generator=g)
            guessed(folder, data, accuracy=tables[rate, seed])
            (folder / "config.yaml").write_text(
                f"seed_everything: {seed}\nname: {folder.name}\nmodel: {{rate: {rate}}}\n"
            )
    guessed(tmp_path / "alone", data, accuracy=torch.rand(12, generator=g))
    (tmp_path / "alone" / "config.yaml").write_text("seed_everything: 1\nmodel: {rate: 0.3}\n")
    # The same seed twice, and one that was resumed with another rate, are no seeds of anything.
    for name, rate in (("twice-a", 0.4), ("twice-b", 0.4), ("resumed", 0.1)):
        guessed(tmp_path / name, data, accuracy=torch.rand(12, generator=g))
        seed = 9 if name == "resumed" else 1
        (tmp_path / name / "config.yaml").write_text(f"seed_everything: {seed}\nmodel: {{rate: {rate}}}\n")
    (tmp_path / "resumed" / "config.resume-1.yaml").write_text("seed_everything: 9\nmodel: {rate: 0.7}\n")
    content = compare([Evaluation.load(folder) for folder in sorted(tmp_path.iterdir())])
    assert [row["learner"] for row in content["over_seeds"]] == ["maml-0.1-seed ×3", "maml-0.2-seed ×3"]
    by_task = [np.mean([tables[rate, seed].double().numpy() for seed in (1, 2, 3)], 0) for rate in (0.1, 0.2)]
    for row, rate, mean in zip(content["over_seeds"], (0.1, 0.2), by_task, strict=True):
        told = row["metrics"]["accuracy"]
        assert told["mean"] == pytest.approx(mean.mean())
        half = 1.96 * mean.std(ddof=1) / 12**0.5
        assert told["ci95"] == pytest.approx(half, rel=1e-3)
        of_seeds = [tables[rate, seed].double().mean().item() for seed in (1, 2, 3)]
        assert told["seed_deviation"] == pytest.approx(np.std(of_seeds, ddof=1))
    (difference_of,) = content["seed_differences"]
    apart = by_task[0] - by_task[1]
    assert difference_of["metrics"]["accuracy"]["mean"] == pytest.approx(apart.mean())
    half = 1.96 * apart.std(ddof=1) / 12**0.5
    assert difference_of["metrics"]["accuracy"]["ci95"] == pytest.approx(half, rel=1e-3)
