"""An error is one line that names the setting, or says that the program is at fault; --debug adds the traceback."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from app.cli.builder import main
from app.cli.failures import one_line_errors
from datamodules.core.errors import DataError
from models import ProtoNet
from tests.support.toy import command


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


@pytest.mark.parametrize("content", [b"model: [a\n  b: {c\n", "name: x\n".encode("utf-16"), None])
def test_which_configuration_is_wrong(content: bytes | None, capsys, tmp_path: Path) -> None:
    """Several --config files, one of which is no YAML, no UTF-8 or a dead link, and no word about which."""
    bad = tmp_path / "bad.yaml"
    bad.symlink_to(tmp_path / "gone") if content is None else bad.write_bytes(content)
    (tmp_path / "good.yaml").write_text("name: x\n")
    code, line = ended(capsys, "--config", str(tmp_path / "good.yaml"), "--config", str(bad))
    assert code == 2 and "bad.yaml" in line


class Broken(ProtoNet):
    """Has an error of its own."""

    def loss(self, prediction, target):
        return {}["nothing"]


def test_an_error_of_the_program_is_visible_as_one(capsys, tmp_path: Path) -> None:
    """An error of the program that passes for one of the user's, or that cannot be found."""
    args = [*command("ProtoNet", tmp_path), "--model", f"{__name__}.Broken"]
    code, line = ended(capsys, *args)
    assert code == 1
    assert line.startswith("error: internal error (KeyError in test_failures.py:") and "--debug" in line
    with pytest.raises(SystemExit):
        main([*args, "--debug"])
    assert "Traceback" in (said := capsys.readouterr().err) and 'return {}["nothing"]' in said
    assert said.splitlines()[-1] == line


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
