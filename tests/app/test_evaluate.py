"""Evaluation from a checkpoint alone."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from app.cli.builder import main as train
from app.dashboard.callback import Dashboard
from app.evaluate import ReadyTasks, main, verdicts
from app.runs.directory import choose_run, slug
from datamodules import ImageFolder
from datamodules.core.errors import ConfigError
from models import MAML
from models.core.task_kinds import KINDS
from tests.support.toy import command
from tests.support.trained import CLASSES, SIZE, picture_tree, train_on_pictures

# Lightning calls what jsonargparse 5 will not have.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of pictures, and a ProtoNet and a MAML that were trained on it."""
    folder = tmp_path_factory.mktemp("runs")
    root = picture_tree(folder / "tree", CLASSES)
    train_on_pictures(folder, "protonet", "models.ProtoNet", root)
    train_on_pictures(folder, "maml", "models.MAML", root, "--model.outputs", "2", "--model.inner_rate", "0.1")
    return folder


@pytest.fixture(autouse=True)
def drawing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pictures take most of the time and are needed once: nothing is drawn; what draws."""
    draw = Dashboard._draw
    monkeypatch.setattr(Dashboard, "_draw", lambda *_: None)
    return draw


def evaluate(checkpoint: Path, *flags: str, out: Path | None = None) -> tuple[dict[str, Any], Path]:
    """results.json and the folder that it is in, the newest one unless ``out`` is given."""
    folders = checkpoint.parent.parent / "evaluations"
    before = set(folders.glob("*"))
    main(["--ckpt_path", str(checkpoint), *flags, *(("--out", str(out)) if out else ())])
    if out is None:
        (out,) = set(folders.glob("*")) - before
    return json.loads((out / "results.json").read_text()), out


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def checkpoint_of(runs: Path, name: str) -> Path:
    return runs / name / "checkpoints" / "best.ckpt"


def tasks_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "test_tasks.csv", newline="") as file:
        return list(csv.DictReader(file))


def settings(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "config.yaml").read_text())


@pytest.mark.parametrize("name", ["protonet", "maml"])
def test_a_lone_checkpoint_repeats_the_test_of_its_run(runs: Path, tmp_path: Path, name: str) -> None:
    """Other weights, tasks or settings than the run's own test had, or a need for more than the one file."""
    trained_test = json.loads((runs / name / "results.json").read_text())
    lone = tmp_path / "moved.ckpt"
    shutil.copy(checkpoint_of(runs, name), lone)
    found, folder = evaluate(lone, out=tmp_path / "out")
    same = ("metrics", "tasks", "ways", "shots", "queries", "algorithm", "data", "seed", "batch_norm", "transductive")
    assert {key: found[key] for key in same} == {key: trained_test[key] for key in same}
    assert found["checkpoint"] == str(lone)
    assert found["meta_steps"] in (20, 40)
    tasks = tasks_of(folder)
    assert [int(row["task"]) for row in tasks] == list(range(20))
    mean = sum(float(row["accuracy"]) for row in tasks) / 20
    assert mean == pytest.approx(found["metrics"]["accuracy"]["mean"], abs=1e-6)


def test_the_run_keeps_its_results(runs: Path, drawing, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation that writes over the run's files, leaves one of its own out, or puts them elsewhere."""
    monkeypatch.setattr(Dashboard, "_draw", drawing)
    run = runs / "protonet"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    found, folder = evaluate(checkpoint_of(runs, "protonet"), "--tasks", "5")
    assert folder == run / "evaluations" / "best-tasks-5"
    assert found["tasks"] == 5
    assert {p.name for p in folder.iterdir()} >= {"results.json", "config.yaml", "test_tasks.csv", "results.png"}
    assert {path: path.read_bytes() for path in before} == before
    assert not [path for path in run.glob("*") if path.is_file() and path not in before]


def test_flags_win_over_options_and_options_over_the_checkpoint(runs: Path) -> None:
    """A setting of the checkpoint that overrides what was asked for, silently, or an option that changes nothing."""
    checkpoint = checkpoint_of(runs, "maml")
    _, none = evaluate(checkpoint, "--inner_steps", "0")
    _, option = evaluate(checkpoint, "--inner_steps", "2")
    _, flag = evaluate(checkpoint, "--model.init_args.eval_inner_steps", "3", "--inner_steps", "2")
    _, leaf = evaluate(checkpoint, "--model.eval_inner_steps", "3", "--inner_steps=4")
    steps = [settings(f)["model"]["init_args"]["eval_inner_steps"] for f in (none, option, flag, leaf)]
    assert steps == [0, 2, 3, 3]
    losses = [[row["nll"] for row in tasks_of(folder)] for folder in (none, option, flag, leaf)]
    assert losses[2] == losses[3]
    assert losses[0] != losses[1] != losses[2] != losses[0]


@pytest.mark.parametrize(("name", "ways"), [("protonet", 5), ("maml", 5), ("maml", 4)])
def test_other_tasks_than_in_training(runs: Path, name: str, ways: int) -> None:
    """Ways, shots, queries or the number of tasks that do not arrive; a head that is bound to its trained ways."""
    flags = ["--ways", str(ways), "--shots", "3", "--queries", "1", "--tasks", "40"]
    flags += ["--inner_steps", "10", "--model.inner_rate", "0.5"] if name == "maml" else []
    found, folder = evaluate(checkpoint_of(runs, name), *flags)
    assert [found[key] for key in ("ways", "shots", "queries", "tasks")] == [ways, 3, 1, 40]
    assert len(tasks_of(folder)) == 40
    accuracies = {round(float(row["accuracy"]) * ways, 4) for row in tasks_of(folder)}
    assert accuracies <= set(range(ways + 1))  # one query of each class
    assert found["metrics"]["accuracy"]["mean"] > 1.2 / ways  # the classes' colours are easily told apart


def test_batch_norm_is_chosen_and_stated(runs: Path) -> None:
    """Results that are called transductive when they are not, or a mode that does not reach the learner."""
    as_trained = json.loads((runs / "maml" / "results.json").read_text())
    found, _ = evaluate(checkpoint_of(runs, "maml"), "--batch_norm", "support")
    assert (as_trained["batch_norm"], as_trained["transductive"]) == ("transductive", True)
    assert (found["batch_norm"], found["transductive"]) == ("support", False)
    assert found["metrics"]["nll"] != as_trained["metrics"]["nll"]


def test_a_seed_gives_other_tasks_of_the_same_classes(runs: Path) -> None:
    """A seed that splits the classes anew, so that the test is on classes that were trained on."""
    data = ImageFolder(root=str(runs / "tree"), size=SIZE, ways=2, queries=2)
    data.prepare_data()
    usual = data.build("test")
    ReadyTasks(7).setup(SimpleNamespace(datamodule=data), torch.nn.Module(), "test")
    changed = data.distribution("test")
    assert changed.classes.names == usual.classes.names
    assert not torch.equal(changed.sample(range(9)).task["classes"], usual.sample(range(9)).task["classes"])
    found, folder = evaluate(checkpoint_of(runs, "protonet"), "--seed", "7")
    again, _ = evaluate(checkpoint_of(runs, "protonet"), "--seed", "8")
    assert found["seed"] == 7
    assert "seed-7" in folder.name
    assert found["metrics"] != again["metrics"]


def test_another_data_set(runs: Path, tmp_path: Path) -> None:
    """Another data set that inherits the first one's root or splits, or is not fitted to the network and the tasks."""
    other = picture_tree(tmp_path / "other", {f"d{i}": 4 for i in range(12)}, size=40)
    checkpoint = checkpoint_of(runs, "protonet")
    for given in ("ImageFolder", "datamodules.ImageFolder"):
        flags = ["--data", given, "--data.root", str(other), "--shots", "2"]
        found, folder = evaluate(checkpoint, *flags, out=tmp_path / given)
        assert (found["tasks"], found["ways"], found["queries"], found["shots"]) == (20, 2, 2, 2)
        data = settings(folder)["data"]["init_args"]
        assert (data["size"], data["channels"], data["root"]) == (SIZE, 3, str(other))
        assert data["fractions"] == [0.64, 0.16, 0.2]
        assert all(name.startswith("d") for row in tasks_of(folder) for name in row["classes"].split(", "))
    part = {"class_path": "datamodules.ImageFolder", "init_args": {"root": str(other), "fractions": [0.3, 0.2, 0.5]}}
    for content in (part, {"data": part, "name": "another"}):
        (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
        _, folder = evaluate(checkpoint, "--data", str(tmp_path / "data.yaml"), "--tasks", "9", out=tmp_path / "yaml")
        assert settings(folder)["data"]["init_args"]["fractions"] == [0.3, 0.2, 0.5]
    # Catches a file over a base that is read as if it had none.
    (tmp_path / "over.yaml").write_text("base: data.yaml\ndata: {init_args: {fractions: [0.2, 0.2, 0.6]}}\n")
    _, folder = evaluate(checkpoint, "--data", str(tmp_path / "over.yaml"), "--tasks", "9", out=tmp_path / "over")
    data = settings(folder)["data"]["init_args"]
    assert (data["fractions"], data["root"]) == ([0.2, 0.2, 0.6], str(other))


def test_each_evaluation_has_a_folder(runs: Path, tmp_path: Path) -> None:
    """An evaluation that another one of the same words overwrites, or one folder more for each repetition."""
    first, second = (picture_tree(tmp_path / name / "tree", CLASSES) for name in "ab")
    base = ["--ckpt_path", str(checkpoint_of(runs, "protonet")), "--data.root"]
    for root in (first, second, first):
        main([*base, str(root)])
    folders = sorted((runs / "protonet" / "evaluations").glob("best-root-tree*"))
    assert [folder.name for folder in folders] == ["best-root-tree", "best-root-tree-2"]
    assert [settings(folder)["data"]["init_args"]["root"] for folder in folders] == [str(first), str(second)]


def test_slug() -> None:
    """A name that the file system refuses, hides, or that two values share."""
    assert slug(["best", "--model.init_args.inner_rate", "0.1"]) == "best-inner_rate-0.1"
    assert slug(["last", "--data.root=/a/b c", "../x"]) == "last-b-c-x"
    assert len(slug(["x" * 300])) == 80


def test_what_belongs_to_the_training_machine_stays_there(runs: Path, tmp_path: Path) -> None:
    """A checkpoint of another machine that asks for its devices, or tests on the part of the tasks its training did."""
    content = torch.load(checkpoint_of(runs, "protonet"), weights_only=True)
    config = yaml.safe_load(content["config"])
    config["trainer"] |= {"accelerator": "tpu", "devices": 8, "limit_test_batches": 1, "fast_dev_run": True}
    config["trainer"] |= {"precision": "bf16-mixed"}
    config["data"]["init_args"]["eval_batch_size"] = 4
    content["config"] = yaml.safe_dump(config)
    torch.save(content, tmp_path / "foreign.ckpt")
    found, folder = evaluate(tmp_path / "foreign.ckpt", out=tmp_path / "out")
    assert found["tasks"] == 20
    assert settings(folder)["trainer"]["precision"] == "bf16-mixed"


def test_a_configuration_beside_the_checkpoint(runs: Path, tmp_path: Path, capsys) -> None:
    """A checkpoint without its configuration that is refused beside it, or guessed at without it."""
    content = torch.load(checkpoint_of(runs, "protonet"), weights_only=True)
    content.pop("config")
    (tmp_path / "checkpoints").mkdir()
    torch.save(content, tmp_path / "checkpoints" / "best.ckpt")
    args = ["--ckpt_path", str(tmp_path / "checkpoints" / "best.ckpt"), "--tasks", "3"]
    assert "no configuration" in refused(capsys, *args)
    shutil.copy(runs / "protonet" / "config.yaml", tmp_path)
    main(args)
    assert (tmp_path / "evaluations" / "best-tasks-3" / "results.json").is_file()


def test_no_checkpoint(runs: Path, tmp_path: Path, capsys) -> None:
    """A traceback, or a guess, for a file that is no checkpoint of a run."""
    torch.save({"weights": torch.zeros(2)}, tmp_path / "weights.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    for text in ("hello", "test", "a", "(1, 2)", "import os\n", ""):
        (tmp_path / "text.ckpt").write_text(text)
        assert "text.ckpt is not a" in refused(capsys, "--ckpt_path", str(tmp_path / "text.ckpt"))
    whole = checkpoint_of(runs, "maml").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    assert "half.ckpt is not a" in refused(capsys, "--ckpt_path", str(tmp_path / "half.ckpt"))
    assert "no state_dict" in refused(capsys, "--ckpt_path", str(tmp_path / "weights.ckpt"))
    assert "no state_dict" in refused(capsys, "--ckpt_path", str(tmp_path / "list.ckpt"))
    assert "no checkpoint at" in refused(capsys, "--ckpt_path", str(tmp_path / "none.ckpt"))
    assert "no checkpoint at" in refused(capsys, "--ckpt_path", str(tmp_path))
    assert "--ckpt_path" in refused(capsys)


def test_another_checkpoint_of_the_run_is_named(runs: Path, tmp_path: Path, capsys) -> None:
    """Catches a user who is told what is missing, and not what is there."""
    place = tmp_path / "run" / "checkpoints"
    place.mkdir(parents=True)
    shutil.copy(checkpoint_of(runs, "maml"), place / "last.ckpt")
    for given in (place / "best.ckpt", tmp_path / "run", place, place / "step=5.ckpt"):
        line = refused(capsys, "--ckpt_path", str(given))
        assert line == f"error: no checkpoint at {given}: give {place / 'last.ckpt'}, which is there"
    with pytest.raises(ConfigError, match=r"no checkpoint at .*best.ckpt: give .*last.ckpt"):
        MAML.load_from_checkpoint(place / "best.ckpt")
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"no best checkpoint at .*best.ckpt: give .*last.ckpt"):
        choose_run(tmp_path, "run", "best", "test")


def test_settings_that_cannot_be(runs: Path, tmp_path: Path, capsys) -> None:
    """A traceback, a silent default, or a message without the cure for a setting that cannot work."""
    protonet = ["--ckpt_path", str(checkpoint_of(runs, "protonet"))]
    (tmp_path / "file").write_text("")
    (tmp_path / "data.yaml").write_text("root: here\n")
    (tmp_path / "number.yaml").write_text("class_path: 5\n")
    (tmp_path / "list.yaml").write_text("class_path: datamodules.ImageFolder\ninit_args: [1]\n")
    for flags, words in (
        (["--inner_steps", "3"], "leave out --inner_steps"),
        (["--way", "3"], "did you mean --ways?"),
        (["--ways", "three"], "invalid int value: 'three'"),
        (["--ways", "1"], "ways is 1 but must be at least 2"),
        (["--ways", "9"], "lower ways to"),
        (["--batch_norm", "batch"], "invalid choice: 'batch'"),
        (["--model.init_args.distence", "cosine"], "did you mean"),
        (["--model.init_args.backbone.init_args.hidden", "8"], "does not fit the model"),
        (["--data.size", "32"], "inputs are 3×32×32 but the network takes 3×16×16"),
        (["--data", "datamodules.ImageFolders"], "did you mean 'datamodules.ImageFolder'"),
        (["--data", "datamodules.Sinusoid"], "choose another"),
        (["--data", str(tmp_path / "none.yaml")], "correct --data"),
        (["--data", str(tmp_path / "data.yaml")], "give it a class_path"),
        (["--data", "ImageFolder", "--data.root", str(tmp_path / "nowhere")], "set root"),
        (["--data", "os.path"], "unknown class 'os.path'"),
        (["--data", "..x"], "unknown class '..x'"),
        (["--data", "models.MAML"], "subclass of EpisodicDataModule"),
        (["--data", str(tmp_path / "number.yaml")], "give it a class_path"),
        (["--data", str(tmp_path / "list.yaml")], "give it settings"),
        (["--out", ""], "argument --out: it is empty"),
        (["--out", str(runs / "protonet")], "give another --out"),
        (["--out", str(tmp_path / "file")], "give --out a folder"),
    ):
        assert words in refused(capsys, *protonet, *flags), flags


def test_controls_of_a_decorative_embedding(tmp_path, caplog):
    """Catches controls that are of another test or in one folder: with the modulation at zero all three are equal."""
    train(command("Conditioned", tmp_path, steps=6))
    checkpoint = tmp_path / "conditioned" / "checkpoints" / "last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["conditioning.generator.weight"].zero_()
    torch.save(content, checkpoint)
    caplog.set_level("INFO")
    main(["--ckpt_path", str(checkpoint), "--controls", "--out", str(tmp_path / "out")])
    told = [r.getMessage() for r in caplog.records if "task embedding" in r.getMessage()]
    assert len(told) == 2 and all("+0.00 ± 0.00 % of accuracy; the task embedding is decorative" in t for t in told)
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [one["learner"].split()[-1] for one in found["learners"]][1:] == ["last-shuffled", "last-constant"]
    folders = [Path(one["folder"]) for one in found["learners"]]
    assert [json.loads((f / "results.json").read_text()).get("control") for f in folders] == [
        None,
        "shuffled",
        "constant",
    ]


@pytest.mark.parametrize(("kind", "better", "worse"), [("classification", 0.8, 0.6), ("regression", 0.6, 0.8)])
def test_an_embedding_matters_where_a_control_is_worse(kind, better, worse):
    """Catches a verdict on unpaired intervals, or one that takes a higher error for a loss of nothing."""
    metric = KINDS[kind].headline
    noise = torch.randn(
        50, generator=torch.Generator().manual_seed(0)
    )  # far more than the difference, the same for both

    def one(name: str, mean: float) -> Any:
        table = {metric: noise + mean + 0.01 * torch.arange(50).remainder(2)}
        return SimpleNamespace(folder=Path("runs/a/evaluations") / name, metrics=table, declared=KINDS[kind].metrics)

    clis: list[Any] = [
        SimpleNamespace(control=control, datamodule=SimpleNamespace(kind=kind))
        for control in (None, "shuffled", "constant")
    ]
    shuffled, constant = verdicts(
        clis, [one("best", better), one("best-shuffled", worse), one("best-constant", better)]
    )
    assert "a best: own - shuffled" in shuffled and shuffled.endswith("matters")
    assert "decorative" in constant


def test_controls_of_a_learner_without_an_embedding_are_refused(runs, capsys):
    """Catches a comparison of a learner with itself."""
    line = refused(capsys, "--ckpt_path", str(runs / "maml" / "checkpoints" / "last.ckpt"), "--controls")
    assert "leave out --controls" in line
