"""An error is one line that names the setting, or says that the program is at fault; --debug adds the traceback."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from pytorch_lightning.utilities.exceptions import MisconfigurationException

import models
from app.cli.builder import main
from app.cli.failures import one_line_errors, refusal
from app.evaluate import main as evaluate
from app.predict import main as predict
from datamodules.core.episodes import TaskDistribution
from datamodules.core.errors import ConfigError, DataError
from models import ProtoNet
from models.core.checkpoint_io import load_checkpoint
from tests.support.toy import ToyImages, command


def ended(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    """Exit code and the one line that a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in text
    return int(stop.value.code or 0), lines[0]


STEP = "torch.optim.lr_scheduler.StepLR"
CALLBACK = "pytorch_lightning.callbacks"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model.inner_steps", "null"), "model.init_args.inner_steps is null but must be int"),
        (("--data.shots", "null"), "data.init_args.shots is null but must be int"),
        (("--trainer.devices", "null"), "trainer.devices"),
        (("--trainer.devices", "x"), "trainer.devices"),
        (("--trainer.devices", "1000000000"), "trainer.devices is 1000000000"),
        (("--trainer.callbacks", "LearningRateFinder"), "learning rate finder"),
        (("--trainer.accelerator", "tpu"), "torch_xla"),
        (("--trainer.log_every_n_steps", "0"), "log_every_n_steps is 0"),
        (("--trainer.limit_train_batches", "0.5"), "limit_train_batches"),
        (("--model.optimizer.betas", "[2, 3]"), "model.init_args.optimizer.init_args.betas is (2.0, 3.0)"),
        (("--model.optimizer.eps", "-1"), "eps"),
        (("--model.optimizer.capturable", "true"), "capturable"),
        (("--model.scheduler", STEP, "--model.scheduler.step_size", "0"), "model.init_args.scheduler"),
        (
            ("--model.scheduler", STEP, "--model.scheduler.step_size", "1", "--model.scheduler.last_epoch", "0"),
            "last_epoch is 0",
        ),
        (("--trainer.callbacks", f"[{{class_path: {CALLBACK}.EarlyStopping, init_args: {{monitor: no}}}}]"), "monitor"),
        (("--trainer.callbacks+", f"{CALLBACK}.LearningRateMonitor", "--trainer.fast_dev_run", "true"), "logger"),
        (("--data.meta_batch_size", "10000000000"), "meta_batch_size is 10000000000, which takes"),
        (("--data.workers", "1000000"), "workers is 1000000 but this machine has"),
        (("--data.shots", "1000000000000"), "shots is 1000000000000, more than memory holds"),
        (("--data.class_path", "null"), "data.class_path is null but must be a class"),
        (("--model.backbone.hidden", "1000000"), "model.init_args.backbone.init_args.hidden"),
    ],
    ids=lambda value: " ".join(value)[-60:] if isinstance(value, tuple) else "",
)
def test_settings_that_fail_late_are_named(flags: tuple[str, ...], words: str, capsys, tmp_path: Path) -> None:
    """Tracebacks of Lightning, torch and the allocator where one line names the setting; processes started for ever."""
    code, line = ended(capsys, *command("MAML", tmp_path), *flags)
    assert code == 2 and words in line


def test_a_folder_that_cannot_be_written(capsys, tmp_path: Path) -> None:
    """A traceback for --runs in a file, or without permission."""
    (tmp_path / "file").write_text("")
    code, line = ended(capsys, *command("ProtoNet", tmp_path / "file" / "runs"))
    assert code == 2 and str(tmp_path / "file") in line and "runs" in line


@pytest.mark.parametrize(
    ("error", "cure"),
    [(errno.ENOSPC, "No space left on device: free some space"), (errno.EROFS, "Read-only file system: make it")],
)
@pytest.mark.filterwarnings("ignore:could not write")
def test_a_file_that_cannot_be_written_is_named(error, cure, capsys, tmp_path: Path, monkeypatch) -> None:
    """Catches a full disk in the test that names no file, or the part of one, and no cure."""
    main(command("ProtoNet", tmp_path, steps=2))

    def full(descriptor: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", full)
    code, line = ended(capsys, *command("ProtoNet", tmp_path, "--stage", "test"))
    assert code == 2
    assert re.fullmatch(rf"error: {tmp_path}/protonet/results.json: {cure}.*, or give another --runs", line)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("content", [b"model: [a\n  b: {c\n", "name: x\n".encode("utf-16"), None])
def test_which_configuration_is_wrong(content: bytes | None, capsys, tmp_path: Path) -> None:
    """Several --config files, one of which is no YAML, no UTF-8 or a dead link, and no word about which."""
    bad = tmp_path / "bad.yaml"
    bad.symlink_to(tmp_path / "gone") if content is None else bad.write_bytes(content)
    (tmp_path / "good.yaml").write_text("name: x\n")
    code, line = ended(capsys, "--config", str(tmp_path / "good.yaml"), "--config", str(bad))
    assert code == 2 and "bad.yaml" in line


def test_an_error_of_the_program_is_visible_as_one(capsys, tmp_path: Path, monkeypatch) -> None:
    """An error of the program that passes for one of the user's, or that cannot be found."""
    monkeypatch.setattr(ProtoNet, "summarize", None)
    args = command("ProtoNet", tmp_path)
    code, line = ended(capsys, *args)
    assert code == 1
    assert line.startswith("error: internal error (TypeError in ") and "--debug" in line
    with pytest.raises(SystemExit):
        main([*args, "--debug"])
    assert "Traceback" in (said := capsys.readouterr().err) and "self.summarize(" in said
    assert said.splitlines()[-1] == line


class Broken(ProtoNet):
    """Has an error of its own, as a user's learner may."""

    def loss(self, prediction, target):
        return {}["nothing"]


class Detached(ProtoNet):
    """Has nothing to go backwards from."""

    def compare(self, summary, z):
        return super().compare(summary, z).detach()


class Floating(ProtoNet):
    """Has an objective that is no tensor."""

    def loss(self, prediction, target):
        return 0.5


class Mismatched(ProtoNet):
    """Calls a library with what does not fit."""

    def compare(self, summary, z):
        return torch.zeros(2, 3) @ torch.zeros(2, 3)


class BrokenTasks(ToyImages):
    """Has an error of its own, as a user's data may; in another process with workers."""

    def distribution(self, split):
        return BrokenDistribution() if split == "train" else super().distribution(split)


class BrokenDistribution(TaskDistribution):
    """Gives one task, by which it is seen whether it fits."""

    def sample(self, indices):
        if len(indices) == 1:
            return ToyImages(ways=3, queries=2).distribution("train").sample(indices)
        return {}["nothing"]


@pytest.mark.parametrize(
    ("flags", "place", "words"),
    [
        (("--model", "Broken"), 'return {}["nothing"]', "KeyError: 'nothing'"),
        (("--model", "Detached"), "class Detached", "RuntimeError: element 0 of tensors does not require grad"),
        (("--model", "Floating", "--model.chunk", "4"), "class Floating", "ValueError: vmap(one, ...)"),
        (("--model", "Mismatched"), "torch.zeros(2, 3) @", "RuntimeError: mat1 and mat2"),
        (("--data", "BrokenTasks"), 'return {}["nothing"]', "KeyError: 'nothing'"),
        (("--data", "BrokenTasks", "--data.workers", "1"), 'return {}["nothing"]', "KeyError: 'nothing'"),
    ],
    ids=lambda value: value[1] + "-".join(value[2:]) if isinstance(value, tuple) else "",
)
def test_an_error_in_a_users_own_file_is_told_with_its_place(flags, place, words, capsys, tmp_path: Path) -> None:
    """Catches a mistake in a user's learner or data that is put down to the optimizer's settings or to the program."""
    flags = (flags[0], f"{__name__}.{flags[1]}", *flags[2:])
    code, line = ended(capsys, *command("ProtoNet", tmp_path), *flags)
    number = int(re.search(r"error: test_failures.py:(\d+)", line)[1])
    assert code == 1 and place in Path(__file__).read_text().splitlines()[number - 1]
    assert f"raised {words}" in line and line.endswith("; --debug shows the traceback")


@pytest.mark.parametrize(
    ("text", "named"),
    [("no answer from 127.0.0.1:80", False), ("1.0.0 or -0.0 or 0.05", False), ("got 0.0, or [0.0].", True)],
)
def test_a_number_is_not_found_inside_another(text: str, named: bool) -> None:
    """Catches an address, or a longer number, that is taken for a setting's value."""
    told = str(refusal(MisconfigurationException(text), {"model": {"init_args": {"dropout": 0.0}}}))
    assert ("dropout" in told) == named


def test_debug_shows_where_a_setting_is_refused_and_is_not_kept(capsys, tmp_path: Path) -> None:
    """A flag that does nothing for errors of the user, or that every later run of the configuration has."""
    with pytest.raises(SystemExit):
        main([*command("MAML", tmp_path), "--data.ways", "1", "--debug"])
    said = capsys.readouterr().err
    assert "Traceback" in said and said.splitlines()[-1] == "error: ways is 1 but must be at least 2"
    main(command("ProtoNet", tmp_path, "--debug", steps=1))
    assert "debug:" not in (tmp_path / "protonet" / "config.yaml").read_text()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_interruptions_pass(stop: type[BaseException]) -> None:
    """A Ctrl-C that becomes an error of the program."""
    with pytest.raises(stop), one_line_errors():
        raise stop


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (DataError("no images"), 2, "error: no images"),
        (PermissionError(13, "Permission denied", "/a/b"), 2, "/a/b: Permission denied"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "not UTF-8 text"),
        (ModuleNotFoundError("No module named 'mujoco'", name="mujoco"), 2, "install what is missing"),
        (ModuleNotFoundError("No module named 'models.x'", name="models.x"), 1, "internal error"),
        (MemoryError(), 2, "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "not enough memory"),
        (RuntimeError("Error(s) in loading state_dict for X: size mismatch"), 2, "state_dict"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 1, "internal error (RuntimeError"),
        (AssertionError(), 1, "internal error (AssertionError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_whose_fault_it_is(error: Exception, code: int, words: str, capsys) -> None:
    """Files, memory and missing packages told as errors of the program, and errors of the program as the user's."""
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise error
    assert stop.value.code == code
    assert words in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_fast_dev_run_points_to_no_folder(capsys, tmp_path: Path) -> None:
    """A folder that is not there, and a command that runs what is not there again."""
    main(command("ProtoNet", tmp_path, "--trainer.fast_dev_run", "true"))
    out = capsys.readouterr().out
    assert "run folder" not in out and "again:" not in out and not os.listdir(tmp_path)


@pytest.mark.parametrize("algorithm", ["RL2", "MAMLPolicy"])
def test_advice_is_one_that_the_learner_takes(algorithm: str, capsys, tmp_path: Path) -> None:
    """Advice to clip gradients by a setting that is refused in turn."""
    code, line = ended(capsys, *command(algorithm, tmp_path), "--trainer.gradient_clip_val", "1")
    assert code == 2
    if "max_grad_norm" in line:
        advised = command(algorithm, tmp_path, "--model.max_grad_norm", "1", steps=1)
        main([*advised, "--trainer.fast_dev_run", "true"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--trainer.strategy", "ddp_spawn", "--trainer.devices", "2"],
            "processes of --trainer.strategy ddp_spawn: give ddp",
        ),
        (
            ["--trainer.callbacks", "StochasticWeightAveraging", "--trainer.callbacks.swa_lrs", "0.01"],
            "a run is one stream of tasks: give EMAWeightAveraging",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:(?s).*Unable to serialize instance")  # the device among its settings
def test_what_would_lose_its_results_is_refused(flags, said, tmp_path, capsys):
    """Catches a training whose results are lost at its end, and averages that never begin."""
    with pytest.raises(SystemExit):
        main(command("ProtoNet", tmp_path, *flags))
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_averaged_weights_are_what_is_tested(tmp_path):
    """Catches an average of weights that is trained and thrown away."""
    average = ["--trainer.callbacks", "EMAWeightAveraging", "--trainer.callbacks.decay", "0.5"]
    main(command("ProtoNet", tmp_path / "plain", steps=8))
    main(command("ProtoNet", tmp_path / "mean", *average, steps=8))
    plain, mean = (
        json.loads((tmp_path / run / "protonet" / "results.json").read_text())["metrics"]["nll"]["mean"]
        for run in ("plain", "mean")
    )
    assert plain != mean


@pytest.mark.parametrize("kind", [models.ProtoNet, models.MAML])
def test_lightnings_own_way_to_load(kind, tmp_path):
    """Catches a checkpoint that Lightning's method loads for want of nothing, or as another learner."""
    main(command("ProtoNet", tmp_path, steps=2))
    path = tmp_path / "protonet" / "checkpoints" / "last.ckpt"
    if kind is models.ProtoNet:
        learner = kind.load_from_checkpoint(path)
        assert all(torch.equal(v, load_checkpoint(path)["state_dict"][n]) for n, v in learner.state_dict().items())
    else:
        with pytest.raises(ConfigError, match="does not make a MAML"):
            kind.load_from_checkpoint(path)


DAMAGES = {
    "no text": lambda c: c | {"config": 3},
    "not YAML": lambda c: c | {"config": "{: ["},
    "a number": lambda c: c | {"config": "7"},
    "nothing": lambda c: c | {"config": ""},
    "no configuration": lambda c: {k: v for k, v in c.items() if k != "config"},
    "no model": lambda c: c | {"config": "data: {}"},
    "model null": lambda c: c | {"config": re.sub(r"(?ms)^model:.*?(?=^\w)", "model: null\n", c["config"])},
    "a list": lambda c: c | {"config": "- model\n- data"},
    "settings a list": lambda c: c | {"config": "model:\n  class_path: models.ProtoNet\n  init_args: [1]\ndata: []\n"},
    "python tag": lambda c: (
        c | {"config": "model: !!python/object/apply:pathlib.Path.touch [executed]\n" + c["config"]}
    ),
    "another learner": lambda c: c | {"config": c["config"].replace("models.ProtoNet", "models.RelationNet")},
    "unknown learner": lambda c: c | {"config": c["config"].replace("models.ProtoNet", "models.Nothing")},
    "unknown data": lambda c: c | {"config": c["config"].replace("tests.support.toy.ToyImages", "datamodules.Nothing")},
    "another shape": lambda c: (
        c | {"state_dict": {k: v.repeat(2) if v.dim() == 1 else v for k, v in c["state_dict"].items()}}
    ),
    "fewer tensors": lambda c: c | {"state_dict": dict(list(c["state_dict"].items())[1:])},
    "no tensors": lambda c: c | {"state_dict": None},
    "no state": lambda c: {k: v for k, v in c.items() if k != "state_dict"},
    "a list of all": lambda c: [c],
    "step a text": lambda c: c | {"global_step": "x"},
    "loops a text": lambda c: c | {"loops": "x"},
    "no callbacks": lambda c: c | {"callbacks": None},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_foreign_and_damaged_configurations_are_one_line(damage, tmp_path, monkeypatch, capsys):
    """Catches a traceback for a checkpoint that is not what it should be, and above all one whose configuration is
    executed: a marker file would be there."""
    monkeypatch.chdir(tmp_path)
    main(command("ProtoNet", tmp_path / "runs", steps=2))
    path = tmp_path / "runs" / "protonet" / "checkpoints" / "last.ckpt"
    content = DAMAGES[damage](load_checkpoint(path))
    foreign = tmp_path / "foreign.ckpt"
    torch.save(content, foreign)
    (tmp_path / "support" / "a").mkdir(parents=True)
    Image.new("L", (16, 16)).save(tmp_path / "support" / "a" / "1.png")
    commands = {
        "evaluate": lambda: evaluate(["--ckpt_path", str(foreign), "--out", "out"]),
        "predict": lambda: predict(["--ckpt_path", str(foreign), "--support", "support", "--query", "support"]),
        "resume": lambda: main(command("ProtoNet", tmp_path / "more", "--ckpt_path", str(foreign), steps=4)),
        "load": lambda: models.load(foreign),
    }
    capsys.readouterr()
    for which, run in commands.items():
        # A resume builds what the command line says, not the checkpoint's configuration.
        if which == "resume" and damage in ("another learner", "unknown learner", "unknown data"):
            continue
        if which == "load":
            if damage != "unknown data":
                with pytest.raises(ConfigError) as refused:
                    run()
                assert "\n" not in str(refused.value)
            continue
        with pytest.raises(SystemExit) as stopped:
            run()
        said = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2, (which, said)
        assert said[-1].startswith("error: ") and not any("Traceback" in line for line in said), (which, said)
    assert not (tmp_path / "executed").exists()


LACKS = {
    "trained_classes are no list": ("fit", "test", lambda c: c | {"trained_classes": [1]}),
    "trained_classes are no list of": ("fit", "test", lambda c: c | {"trained_classes": torch.zeros(2, 2)}),
    "no pytorch-lightning_version": ("fit", "test", lambda c: c.pop("pytorch-lightning_version") and c),
    "no optimizer_states": ("fit", lambda c: c.pop("optimizer_states") and c),
    "no loops": ("fit", lambda c: c.pop("loops") and c),
}


@pytest.mark.parametrize("lack", LACKS)
def test_a_checkpoint_that_lacks_what_a_run_needs_is_one_line(lack, tmp_path, capsys):
    """Catches an error of the program, or a training that begins anew from the weights, for an edited checkpoint."""
    main(command("ProtoNet", tmp_path, steps=2))
    *stages, damage = LACKS[lack]
    torch.save(damage(load_checkpoint(tmp_path / "protonet" / "checkpoints" / "last.ckpt")), tmp_path / "x.ckpt")
    for stage in stages:
        flags = ("--ckpt_path", str(tmp_path / "x.ckpt"), "--stage", stage)
        code, line = ended(capsys, *command("ProtoNet", tmp_path, *flags, steps=4))
        assert code == 2 and lack in line
