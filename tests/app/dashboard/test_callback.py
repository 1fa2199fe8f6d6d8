"""What is seen of a run: read back with W&B's own reader, from the run directory, and where W&B does not work."""

from __future__ import annotations

import csv
import functools
import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import wandb
import yaml
from PIL import Image

from app.cli.builder import MetaboltCLI, main
from app.dashboard import callback, few_shot
from app.dashboard import wandb as dashboard_wandb
from app.dashboard.callback import Dashboard
from app.dashboard.confusion import Confusions
from app.dashboard.wandb import WandbRun, wandb_logger
from app.runs.probe import Probe
from app.runs.recorder import Recorder
from datamodules.core.episodes import Episodes
from datamodules.images.tasks import ImageClasses, ImageDataModule
from models import MAML as Maml
from models.core.predictions import Mixture

# Lightning calls what jsonargparse 5 will not have.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

TESTS = 48  # tasks of a test


class Patterns(ImageDataModule):
    """Noisy pictures of random patterns: 8 classes in two groups, for every split."""

    def classes(self, split: str) -> ImageClasses:
        rng = np.random.default_rng([*split.encode()])
        pattern = rng.integers(0, 200, (8, 1, 1, 8, 8))
        images = (pattern + rng.integers(0, 56, (8, 6, 1, 8, 8))).reshape(48, 1, 8, 8).astype(np.uint8)
        names = [f"{'ab'[k // 4]}/{split}{k}" for k in range(8)]
        return ImageClasses(torch.from_numpy(images), np.full(8, 6), names, [n[0] for n in names])


def flags(runs: Path, algorithm: str, *others: str) -> list[str]:
    return [
        *("--runs", str(runs), "--model", f"models.{algorithm}", "--model.backbone", "models.Conv4"),
        *("--model.backbone.hidden", "4", "--model.backbone.image_size", "8", "--model.backbone.downsample", "stride"),
        *("--data", "tests.app.dashboard.test_callback.Patterns", "--data.ways", "3", "--data.queries", "3"),
        *("--data.meta_batch_size", "2", "--data.eval_batch_size", "5"),
        *("--data.val_tasks", "4", "--data.test_tasks", str(TESTS)),
        *("--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "2"),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", *others),
    ]


MAML = ("--model.outputs", "3", "--model.inner_steps", "2")


def read(path: Path, *options: str) -> list[dict[str, Any]]:
    """What W&B's own reader says of a run: one object with --summary, else one for each record."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [json.loads(done.stdout)] if "--summary" in options else [json.loads(x) for x in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a MAML run: four meta-updates, stopped, and four more after a resume."""
    runs = tmp_path_factory.mktemp("runs")
    with mock.patch.object(sys, "argv", ["train.py"]):
        main(flags(runs, "MAML", *MAML, "--wandb", "offline", "--project", "seen"))
        resumed = ("--trainer.max_steps", "8", "--ckpt_path", "last")
        main(flags(runs, "MAML", *MAML, "--wandb", "offline", "--project", "seen", *resumed))
    return runs / "run"


@pytest.fixture(scope="module")
def sessions(run: Path) -> list[Path]:
    """The folders that W&B made, in the order of time."""
    return sorted((run / "wandb").glob("offline-run-*"))


def test_a_resumed_run_is_the_same_run(run: Path, sessions: list[Path]):
    """Would catch: a new id after a resume, which splits the run in two on the web."""
    known = json.loads((run / "wandb.json").read_text())["id"]
    assert len(sessions) == 2
    assert [s.name.rsplit("-", 1)[1] for s in sessions] == [known, known]
    assert [read(s, "--summary")[0]["run_id"] for s in sessions] == [known, known]


def test_the_summary_has_everything(run: Path, sessions: list[Path]):
    """Would catch: no interval in the summary, part of the configuration missing, a run that counts as crashed."""
    summary = read(sessions[-1], "--summary")[0]
    assert (summary["project"], summary["name"], summary["state"]) == ("seen", "run", "finished")
    config = yaml.safe_load((run / "config.resume-1.yaml").read_text())
    assert summary["config"] == config
    assert config["model"]["init_args"]["inner_steps"] == 2  # and so on: it is the whole file
    result, seen = json.loads((run / "results.json").read_text()), summary["summary"]
    for name in ("accuracy", "nll", "ece", "known_entropy", "unknown_entropy", "open_set_auroc"):
        assert seen[f"test/{name}"] == pytest.approx(result["metrics"][name]["mean"])
        assert seen[f"test/{name}_ci95"] == pytest.approx(result["metrics"][name]["ci95"])
    assert seen["test/tasks"] == TESTS
    assert seen["test/transductive"] is True
    accuracy = result["metrics"]["accuracy"]
    assert seen["test/result"] == f"{100 * accuracy['mean']:.2f} ± {100 * accuracy['ci95']:.2f} %"
    assert seen["test/per_task"]["_type"] == "table-file"
    assert seen["test/per_task"]["nrows"] == TESTS


def test_metrics_stand_against_tasks_seen_without_a_gap(sessions: list[Path]):
    """Would catch: steps for an axis, a resume that starts at 0 again, or validations that are lost."""
    records = [read(s) for s in sessions]
    for session in records:
        axis = next(r["metric"] for r in session if r["type"] == "metric" and r["metric"].get("glob_name") == "*")
        assert axis["step_metric"] == "tasks_seen"
    rows = [r["history"]["item"] for session in records for r in session if r["type"] == "history"]
    assert all("tasks_seen" in row for row in rows)
    validations = {row["tasks_seen"] for row in rows if "val/accuracy" in row}
    assert validations == {4, 8, 12, 16}
    assert {row["tasks_seen"] for row in rows if "train/accuracy" in row} == {4, 8, 12, 16}
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))  # W&B ignores what goes back


def test_pictures_are_in_the_run_and_in_wandb(run: Path, sessions: list[Path]):
    """Would catch: pictures that only one of the two has, or that are not pictures."""
    tested = {"histogram", "reliability", "open_set", "adaptation", "training", "episode", "worst_episode", "confusion"}
    seen = read(sessions[-1], "--summary")[0]["summary"]
    for name in (*(f"test/{n}" for n in tested), "test/results"):
        assert seen[name]["_type"] == "image-file"
        with Image.open(sessions[-1] / "files" / seen[name]["path"]) as image:
            assert min(image.size) > 100
    assert {f"test_{n}" for n in tested} <= {p.stem for p in (run / "figures").glob("*.png")}
    assert {"val_episode", "val_adaptation"} <= {p.stem for p in (run / "figures").glob("*.png")}
    assert (run / "results.png").is_file()
    first = [r["history"]["item"] for r in read(sessions[0]) if r["type"] == "history"]
    assert any("val/episode._type" in row or "val/episode" in row for row in first)


def test_the_table_of_tasks_is_that_of_the_result(run: Path, sessions: list[Path]):
    """Would catch: tasks missing or repeated, columns mixed up, or a table on the web unlike the one on disk."""
    with open(run / "test_tasks.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["task"]) for r in rows] == list(range(TESTS))
    result = json.loads((run / "results.json").read_text())["metrics"]
    for name in ("accuracy", "nll"):
        assert np.mean([float(r[name]) for r in rows]) == pytest.approx(result[name]["mean"], rel=1e-5)
    data = Patterns(ways=3, queries=3)
    stored = data.distribution("test").sample(range(TESTS))
    names = data.distribution("test").class_names
    assert [r["classes"] for r in rows] == [", ".join(names[k] for k in t) for t in stored.task["classes"].tolist()]
    (file,) = (sessions[-1] / "files" / "media" / "table" / "test").glob("per_task*.json")
    table = json.loads(file.read_text())
    assert table["columns"] == list(rows[0])
    assert [[str(v) for v in row] for row in table["data"]] == [list(r.values()) for r in rows]


def test_without_a_logger_everything_but_wandb_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Would catch: W&B touched with --wandb off, pictures that need it, or an embedding without its picture."""
    monkeypatch.setattr(wandb, "init", mock.Mock(side_effect=AssertionError("W&B was started")))
    main(flags(tmp_path, "ProtoNet", "--wandb", "off"))
    there = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"results.png", "test_tasks.csv", "figures", "metrics.csv", "results.json"} <= there
    assert not {"wandb", "wandb.json"} & there
    assert (tmp_path / "run" / "figures" / "test_embedding.png").is_file()
    assert not (tmp_path / "run" / "figures" / "test_adaptation.png").is_file()  # no inner steps


def test_functions_are_drawn_for_regression(tmp_path: Path):
    """Would catch: pictures of images asked of numbers, or none at all."""
    main(
        [
            *("--runs", str(tmp_path), "--wandb", "off", "--model", "models.MAML", "--model.outputs", "1"),
            *("--model.backbone", "models.MLP", "--model.backbone.in_features", "1", "--model.backbone.hidden", "[4]"),
            *("--data", "datamodules.Sinusoid", "--data.val_tasks", "4", "--data.test_tasks", "6"),
            *("--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--trainer.accelerator", "cpu"),
            *("--trainer.enable_progress_bar", "false"),
        ]
    )
    drawn = {p.stem for p in (tmp_path / "run" / "figures").glob("test_*.png")}
    assert drawn == {"test_fits", "test_adaptation", "test_histogram", "test_training"}
    assert (tmp_path / "run" / "results.png").is_file()
    header = (tmp_path / "run" / "test_tasks.csv").read_text().splitlines()[0]
    assert header == "task,mse,amplitude,phase,frequency"


class Spread(Maml):
    """MAML whose prediction is three Gaussians about its value."""

    def predict(self, state: Any, query_x: torch.Tensor) -> Any:
        value = super().predict(state, query_x)
        mean = value + torch.tensor([-1.0, 0.0, 1.0])[:, None, None] * query_x
        return Mixture(mean, torch.full_like(mean, 0.5))


REGRESSION = (
    *("--model.outputs", "1", "--model.inner_rate", "0.01", "--model.inner_steps", "2"),
    *("--model.backbone", "models.MLP", "--model.backbone.in_features", "1", "--model.backbone.hidden", "[4]"),
    *("--data", "datamodules.Sinusoid", "--data.val_tasks", "4", "--data.test_tasks", "6"),
    *("--data.queries", "20", "--trainer.max_steps", "4", "--trainer.val_check_interval", "2"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
)


def test_predictive_distributions_go_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Would catch: a distribution that a picture, the table or W&B cannot take, or metrics that differ among them."""
    main(
        [
            "--runs",
            str(tmp_path),
            "--wandb",
            "offline",
            "--model",
            "tests.app.dashboard.test_callback.Spread",
            *REGRESSION,
        ],
    )
    run = tmp_path / "run"
    drawn = {p.stem for p in (run / "figures").glob("*.png")}
    assert drawn >= {"val_fits", "test_fits", "test_reliability", "test_adaptation", "test_histogram"}
    result = json.loads((run / "results.json").read_text())["metrics"]
    assert list(result) == ["mse", "nll", "coverage", "coverage_error", "width"]
    assert [n for n in result if "worst_decile" in result[n]] == ["mse", "nll"]
    with open(run / "test_tasks.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:5] == ["task", "mse", "nll", "coverage", "width"]
    (session,) = (run / "wandb").glob("offline-run-*")
    seen = read(session, "--summary")[0]["summary"]
    for name, metric in result.items():
        assert seen[f"test/{name}"] == pytest.approx(metric["mean"])
        assert seen[f"test/{name}_ci95"] == pytest.approx(metric["ci95"])
        if name in rows[0]:
            assert np.mean([float(r[name]) for r in rows]) == pytest.approx(metric["mean"], rel=1e-5)
    assert seen["test/fits"]["_type"] == "image-file"
    assert f"{100 * result['coverage']['mean']:.2f} ±" in capsys.readouterr().out


def test_intervals_along_the_steps_are_those_of_each_states_distribution(tmp_path: Path):
    """Would catch: means, parts and steps mixed up on the way to the picture, or another interval than 95 %."""
    flags = [
        "--runs",
        str(tmp_path),
        "--wandb",
        "off",
        "--model",
        "tests.app.dashboard.test_callback.Spread",
        *REGRESSION,
    ]
    cli = MetaboltCLI(flags)
    learner = cli.model.eval()
    probe = Probe(learner, cli.datamodule, "test")
    with torch.inference_mode():
        grid, _, support_x, _, predictions, bands = few_shot.fitted(probe, 3)
        assert predictions.shape == (3, 3, 200)
        assert bands.shape == (3, 3, 2, 200)
        _, ready = probe.sample(range(3))
        for task in range(3):
            for step, state in enumerate(learner.adaptation(ready[task].support)):
                mixture = learner.predict(state, grid[:, None])
                assert torch.allclose(predictions[task, step], mixture.mean.mean(0)[:, 0], atol=1e-5)
                at = torch.stack([mixture.cdf(end[:, None])[:, 0] for end in bands[task, step]])
                assert torch.allclose(at, torch.tensor([[0.025], [0.975]]).expand(2, 200), atol=2e-3)
        curve = probe.adaptation(3)
        assert curve is not None
        tested = learner.per_task(probe.predict(ready), ready.query_y)["mse"]
    assert [x.shape for x in support_x] == [(10,)] * 3
    assert np.allclose(curve[:, -1], tested, rtol=1e-4)


def test_a_picture_that_fails_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Would catch: a training that dies of its pictures, or a line at every validation."""
    both = functools.partialmethod(Dashboard.__init__, share=1e9, curve_tasks=2, confusion_tasks=2)  # validations
    monkeypatch.setattr(Dashboard, "__init__", both)
    monkeypatch.setattr(few_shot.plots, "episode", mock.Mock(side_effect=RuntimeError("no\nfont")))
    monkeypatch.setattr(Confusions, "of", mock.Mock(side_effect=torch.cuda.OutOfMemoryError("full")))
    monkeypatch.setattr(Dashboard, "_summarise", mock.Mock(side_effect=OSError("disk full")))
    with caplog.at_level(logging.WARNING, "app.dashboard"):
        main(flags(tmp_path, "ProtoNet", "--wandb", "off"))
    told = [r.message for r in caplog.records if r.name.startswith("app.dashboard")]
    assert told == [
        "val/episode not made, the run goes on: RuntimeError: no font",
        "test/episode not made, the run goes on: RuntimeError: no font",
        "test/worst_episode not made, the run goes on: RuntimeError: no font",
        "confusions not made, the run goes on: OutOfMemoryError: full",
        "summary not made, the run goes on: OSError: disk full",
    ]
    assert (tmp_path / "run" / "results.json").is_file()
    assert (tmp_path / "run" / "figures" / "test_embedding.png").is_file()


@pytest.mark.parametrize("during", ["Recorder._measure_open_set", "Dashboard._draw"])
def test_a_process_killed_after_the_test_leaves_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str):
    """Would catch: what hours of testing measured, written only after minutes of pictures."""

    def killed(self: Any, trainer: Any, learner: Any, split: str = "test") -> None:
        if split == "test":
            raise KeyboardInterrupt

    of, method = during.split(".")
    monkeypatch.setattr({"Recorder": Recorder, "Dashboard": Dashboard}[of], method, killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(flags(tmp_path, "ProtoNet", "--wandb", "off"))
    assert len((tmp_path / "run" / "test_tasks.csv").read_text().splitlines()) > 2
    assert (tmp_path / "run" / "test_tasks.npz").is_file()


def test_nothing_is_written_before_the_run(tmp_path: Path):
    """Would catch: a run directory made while other processes still choose theirs."""
    MetaboltCLI(flags(tmp_path / "runs", "MAML", *MAML, "--wandb", "offline"))
    assert not (tmp_path / "runs").exists()


def logger_of(folder: Path, mode: Any = "offline") -> WandbRun:
    logger = wandb_logger(mode, "seen", "run", folder, {"a": {"b": [1, None]}})
    assert isinstance(logger, WandbRun)
    return logger


def test_a_later_test_continues_steps_and_tasks(tmp_path: Path):
    """Would catch: a test on its own, whose trainer counts from 0, that W&B ignores or puts before the training."""
    for metrics, step in (({"val/accuracy": 0.5, "tasks_seen": 64.0}, 30), ({"test/accuracy": 0.6}, 0)):
        logger = logger_of(tmp_path)
        logger.log_metrics(metrics, step=step)
        logger.close()
    first, last = (
        next(r["history"]["item"] for r in read(session) if r["type"] == "history")
        for session in sorted((tmp_path / "wandb").glob("offline-run-*"))
    )
    assert (first["_step"], first["tasks_seen"]) == (30, 64)
    assert last["_step"] > 30
    assert last["tasks_seen"] == 64


def test_a_run_without_network_goes_on_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Would catch: a training that dies, waits for minutes, or loses its id where W&B cannot be reached."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1.5")
    wandb.teardown()  # it has read the environment
    try:
        logger = logger_of(tmp_path, "auto")
        logger.log_metrics({"val/accuracy": 0.5, "tasks_seen": 8.0}, step=3)
        logger.close()
    finally:
        wandb.teardown()
    told = [r.message for r in caplog.records if r.name.startswith("app.dashboard")]
    assert len(told) == 1
    assert told[0].startswith("W&B cannot be reached, the run is kept offline in ")
    (session,) = (tmp_path / "wandb").glob("*run-2*")
    assert session.name.startswith("offline-run-")
    seen = read(session, "--summary")[0]
    assert seen["run_id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert seen["summary"]["val/accuracy"] == 0.5
    assert seen["config"] == {"a": {"b": [1, None]}}
    assert any("wandb sync" in hint for hint in logger.hints())


def test_wandb_that_breaks_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Would catch: an exception of W&B's in the middle of a training, or one line per metric from then on."""
    broken = SimpleNamespace(step=0, log=mock.Mock(side_effect=OSError("the service is gone")), define_metric=print)
    broken.settings, broken.finish = SimpleNamespace(mode="offline"), mock.Mock()
    for fault in ({"side_effect": RuntimeError("cannot start")}, {"return_value": broken}):
        caplog.clear()
        monkeypatch.setattr(wandb, "init", mock.Mock(**fault))
        logger = logger_of(tmp_path)
        logger.log_metrics({"val/accuracy": 0.5}, step=1)
        logger.log_metrics({"val/accuracy": 0.6}, step=2)
        logger.experiment.log({"from": "a user's callback"})
        logger.close()
        ours = [r.message.split(":")[0] for r in caplog.records if r.name.startswith("app.")]  # W&B tells of its own
        assert ours == ["W&B does not work, going on without it"]
        assert logger.hints() == []


def test_wandb_that_is_not_installed_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Would catch: a run that needs W&B."""
    monkeypatch.setattr("pytorch_lightning.loggers.wandb._WANDB_AVAILABLE", False)
    assert wandb_logger("auto", "seen", "run", tmp_path, {}) is None
    assert "wandb is not installed" in caplog.text


def test_the_mode_follows_key_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Would catch: a prompt for a key, a key in netrc that is overlooked, or WANDB_MODE without effect."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert dashboard_wandb._mode("auto") == "offline"
    assert not caplog.records
    assert dashboard_wandb._mode("online") == "offline"
    assert "no W&B API key" in caplog.text
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password " + "a" * 40 + "\n")
    assert dashboard_wandb._mode("auto") == "online"
    assert dashboard_wandb._mode("offline") == "offline"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert dashboard_wandb._mode("auto") == "offline"
    assert dashboard_wandb._mode("online") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert dashboard_wandb._mode("auto") == "off"
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert dashboard_wandb._mode("auto") == "online"


@pytest.mark.parametrize(("share", "times"), [(0.0, 1), (1e9, 5)])
def test_drawing_keeps_to_its_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, times: int
):
    """Would catch: pictures at every validation of a run that validates often."""
    draw = mock.Mock(side_effect=lambda *_: None)
    monkeypatch.setattr(Dashboard, "_draw", draw)
    monkeypatch.setattr(callback.time, "monotonic", mock.Mock(side_effect=range(100)))
    dashboard = Dashboard(tmp_path, share=share)
    trainer = SimpleNamespace(
        is_global_zero=True, state=SimpleNamespace(fn="fit"), sanity_checking=False, fast_dev_run=False, loggers=[]
    )
    dashboard.on_train_start(trainer, None)
    for _ in range(5):
        dashboard.on_validation_end(trainer, None)
    assert draw.call_count == times
    trainer.is_global_zero = False
    dashboard.on_validation_end(trainer, None)
    dashboard.on_test_end(trainer, None)
    assert draw.call_count == times  # the other processes never draw


class Oracle(torch.nn.Module):
    """Stands for a learner that is right, but takes every class 5 for class 2 where it can."""

    device, dtype = torch.device("cpu"), torch.float32


def test_confusions_count_who_was_offered_whom():
    """Would catch: labels of episodes taken for classes, or pairs that met often held for confused ones."""
    data = Patterns(ways=4, queries=2, eval_batch_size=7)
    data.prepare_data()
    probe = Probe(Oracle(), data, "test")

    def predict(ready: Episodes) -> torch.Tensor:
        label = ready.query_y.clone()
        for i, classes in enumerate(ready.task["classes"].tolist()):
            if 5 in classes and 2 in classes:
                label[i, label[i] == classes.index(5)] = classes.index(2)
        return torch.nn.functional.one_hot(label, 4).float()

    probe.predict = predict
    confusions = Confusions.of(probe, 20)
    assert confusions is not None
    asked = np.zeros((8, 8))
    for classes in data.distribution("test").sample(range(20)).task["classes"].tolist():
        for one in classes:
            for other in classes:
                asked[one, other] += 2 * (one != other)
    assert confusions.ids == list(range(8))
    assert np.array_equal(confusions.asked, asked)
    assert np.argwhere(confusions.wrong).tolist() == [[5, 2]]
    assert confusions.wrong[5, 2] == asked[5, 2] > 0
    assert confusions.worst_pairs(10) == [(2, 5, int(asked[5, 2]), int(2 * asked[5, 2]))]
    wrong, offered, names = confusions.by(probe.groups(confusions.ids) or [])
    assert names == ["a", "b"]
    assert wrong.tolist() == [[0, 0], [confusions.wrong[5, 2], 0]]
    assert offered.sum() == asked.sum()
    pattern = data.classes("test").select([5]).images.float().mean(0)
    assert (confusions.image[5].float() - pattern).abs().max() < 56  # an image of that class


def test_the_adaptation_curve_ends_where_the_test_is(tmp_path: Path):
    """Would catch: states off by one step, a curve of the support, or of other tasks than those tested."""
    cli = MetaboltCLI(flags(tmp_path, "MAML", *MAML, "--wandb", "off"))
    learner = cli.model.eval()
    probe = Probe(learner, cli.datamodule, "test")
    with torch.inference_mode():
        curve = probe.adaptation(5)
        _, ready = probe.sample(range(5))
        correct = probe.predict(ready).argmax(-1) == ready.query_y
        before = [learner.predict(next(iter(learner.adaptation(ready[i].support))), ready[i].query_x) for i in range(5)]
    assert curve is not None
    assert curve.shape == (5, 3)
    assert np.allclose(curve[:, -1], correct.float().mean(1))
    hits = torch.stack(before).argmax(-1) == ready.query_y
    assert np.allclose(curve[:, 0], hits.float().mean(1))


@pytest.mark.slow
def test_two_processes_leave_one_run_with_all_tasks(tmp_path: Path):
    """Would catch: a table of one process's tasks alone, two W&B runs, or processes that wait for each other."""
    root = Path(__file__).resolve().parents[1]
    many = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--wandb", "offline")
    script = tmp_path / "train.py"  # Lightning starts the other process from a file
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(root)!r}, {str(root / 'tests')!r}]\n"
        "from app.cli import main\nmain(sys.argv[1:])\n"
    )
    command = [sys.executable, str(script), *flags(tmp_path / "runs", "MAML", *MAML, *many)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "run"
    with open(run / "test_tasks.csv", newline="") as file:
        assert [int(r["task"]) for r in csv.DictReader(file)] == list(range(TESTS))
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1
