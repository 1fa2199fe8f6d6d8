"""Whatever is given on a command line, it runs or ends with one line; it neither shows a traceback nor hangs."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pytorch_lightning.strategies.launchers import multiprocessing, subprocess_script

import datamodules
import models
from app import evaluate, predict
from app.cli import builder
from app.cli.base_configs import whole
from datamodules.core.download import DownloadError
from datamodules.core.errors import ConfigError
from datamodules.images import omniglot
from tests.support.processes import ROOT
from tests.support.trained import CLASSES, picture_tree, train_on_pictures

CASES = int(os.environ.get("METABOLT_FUZZ_CASES", "300"))
SEED = int(os.environ.get("METABOLT_FUZZ_SEED", "0"))
TIMEOUT_S = 30

# Real configurations that need no download, with what makes each small.
SMALL = ["--wandb", "off", "--pictures", "false", "--trainer.enable_progress_bar", "false", "--checkpoint_every", "1"]
SMALL += ["--trainer.max_steps", "2", "--trainer.val_check_interval", "1", "--trainer.accelerator", "cpu"]
SMALL += ["--data.val_tasks", "2", "--data.test_tasks", "2", "--data.meta_batch_size", "2"]
FEWER = ["--data.train_ways", "5", "--data.queries", "2"]
CONFIGURATIONS = {
    "quickstart.yaml": FEWER,
    "optimization/maml/sinusoid-10shot.yaml": [],
    "optimization/maml/glyphs-5way-1shot.yaml": ["--data.queries", "1"],
    "optimization/reptile/sinusoid-10shot.yaml": [],
    "bayesian/bmaml/sinusoid-10shot.yaml": [],
    "reinforcement/rl2/bandit-10pulls-5arms-short.yaml": ["--data.meta_batch_size", "4"],
}
# Keys whose large values mean no more than a long run.
LONG = re.compile(
    r"steps|epochs|tasks|episodes|interval|every|horizon|limit_|rollouts|particles|updates|iterations|overfit|max_time"
    r"|follow|fast_dev|draws|samples|num_nodes|sanity|queries|num_layers|layers"
)
VALUES = [
    *("null", "nan", "inf", "-inf", "-1", "0", "1", "2", "3", "0.5", "-0.5", "1e30", "1e-30", "true", "false", "x", ""),
    *(
        "{{{{",
        "[1, 2]",
        "[]",
        "{}",
        "{a: 1}",
        "[null]",
        "10000000000",
        "99999999999999999999",
        "!!python/name:os.system",
    ),
    *("é", "a b", "../x", "a/b", "/dev/null", "/nonexistent/x", "*", "~", "models.MAML", "datamodules.Omniglot"),
    *("torch.optim.Adam", "os.system", "models.Nothing", "Protonet", "Omniglott", "-", "--", "0x10", "1_000", "1,2"),
    *("[[[[", "b'x'", "@file", "a: b: c", "dead", "utf16.yaml", "folder"),
]
NUMBERS = ["0", "1", "2", "3", "5", "0.1", "0.5", "true", "false", "-1", "null", "1000000000"]
FITTING = {
    bool: ["true", "false"],
    int: ["0", "1", "2", "3", "4", "5", "7", "16", "-1", "1000000000"],
    float: ["0", "1e-3", "0.1", "0.5", "1", "2", "-1", "1e9"],
}
OF_KEY = {
    "trainer.accelerator": ["tpu", "gpu", "hpu", "mps", "auto"],
    "trainer.devices": ["x", "[1, 2]", "null", "0", "-1", "3", "auto"],
    "trainer.strategy": ["ddp", "fsdp", "deepspeed", "ddp_spawn", "ddp_notebook", "dp", "auto", "horovod"],
    "trainer.precision": ["16-mixed", "bf16-true", "64-true", "64", "transformer-engine"],
    "trainer.limit_train_batches": ["0.5", "1.0", "0"],
    "trainer.callbacks": [
        *("LearningRateMonitor", "LearningRateFinder", "ModelCheckpoint", "RichProgressBar", "BatchSizeFinder"),
        "{class_path: EarlyStopping, init_args: {monitor: nothing}}",
        "[{class_path: pytorch_lightning.callbacks.EarlyStopping, init_args: {monitor: val/loss}}]",
        "StochasticWeightAveraging",
    ],
    "trainer.fast_dev_run": ["true", "1"],
    "trainer.profiler": ["simple", "advanced", "pytorch"],
    "trainer.plugins": ["x", "[x]"],
    "trainer.log_every_n_steps": ["0"],
    "trainer.gradient_clip_algorithm": ["norm", "value"],
    "model.init_args.optimizer": ["torch.optim.SGD", "torch.optim.LBFGS", "torch.optim.SparseAdam", "Adamm"],
    "model.init_args.optimizer.init_args.betas": ["[2, 3]", "[0.9]", "0.9"],
    "model.init_args.optimizer.init_args.eps": ["-1", "null"],
    "model.init_args.optimizer.init_args.capturable": ["true"],
    "model.init_args.scheduler": [
        *("torch.optim.lr_scheduler.ReduceLROnPlateau", "torch.optim.lr_scheduler.StepLR"),
        "{class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 0}}",
        "{class_path: torch.optim.lr_scheduler.ExponentialLR, init_args: {gamma: 0.9, last_epoch: 0}}",
        "{class_path: torch.optim.lr_scheduler.OneCycleLR, init_args: {max_lr: 1}}",
    ],
    "data.init_args.workers": ["1000000"],
    "data.init_args.meta_batch_size": ["10000000000", "1000000000"],
    "runs": ["/proc/nowhere", "/dev/null/x", "dead", "folder"],
    "ckpt_path": ["last", "best", "dead", "utf16.yaml", "folder", "/dev/null"],
    "config": [
        "dead",
        "utf16.yaml",
        "folder",
        "broken.yaml",
        "list.yaml",
        "empty.yaml",
        "[1, 2]",
        "a: b: c",
        "/dev/null",
    ],
    "stage": ["test", "validate"],
}
TOP = ["name", "runs", "stage", "ckpt_path", "checkpoint_every", "project", "pictures", "seed_everything", "config"]


class Hang(BaseException):
    """A case took longer than ``TIMEOUT_S``; no handler of Exception may take it for an error of its own."""


def keys(path: Path) -> dict[str, Any]:
    """Dotted keys that a configuration may be given, each with a value that it takes: its own keys, the Trainer's and
    those of the classes it names."""
    found: dict[str, Any] = dict.fromkeys(TOP, "x")

    def settings_of(constructor: Any, prefix: str) -> None:
        for name, parameter in inspect.signature(constructor).parameters.items():
            if name not in ("self", "args", "kwargs", "others", "common"):
                found.setdefault(prefix + name, parameter.default)

    settings_of(pl.Trainer.__init__, "trainer.")

    def walk(part: Any, prefix: str) -> None:
        if isinstance(part, dict):
            for key, value in part.items():
                found[f"{prefix}{key}"] = value
                walk(value, f"{prefix}{key}.")
            if isinstance(name := part.get("class_path"), str):
                module, _, name = name.rpartition(".")
                home = {"models": models, "datamodules": datamodules, "torch.optim": torch.optim}
                cls = getattr(home.get(module, torch.optim.lr_scheduler), name)
                for base in inspect.getmro(cls):
                    settings_of(base.__init__, f"{prefix}init_args.")

    walk(whole(path), "")
    found.pop("data.init_args.root", None)  # characters are drawn again for each, which takes as long as a timeout
    return dict(sorted(found.items()))


KEYS = {name: keys(ROOT / "configs" / name) for name in CONFIGURATIONS}


def flags(chance: Random, of: dict[str, Any]) -> list[str]:
    """One or two flags: settings with values of all kinds, misspelt keys, keys without a value."""
    result = []
    for _ in range(chance.choice([1, 1, 2])):
        key = chance.choice([chance.choice(list(of)), chance.choice([k for k in of if k in OF_KEY] or list(of))])
        fitting = FITTING.get(type(of[key]), NUMBERS)
        pools = [VALUES, fitting, fitting, OF_KEY.get(key, NUMBERS)]
        text = "".join(chr(chance.choice([chance.randrange(1, 128), chance.randrange(0xA0, 0x3000)])) for _ in range(4))
        value = chance.choice([text, *(chance.choice(pool) for pool in pools for _ in range(2))])
        if LONG.search(key.rsplit(".", 1)[-1]) and re.fullmatch(r"\+?[\d_.e+]{3,}|inf|-1", value.strip()):
            value = "2"
        kind = chance.choice(["set"] * 12 + ["joined", "misspelt", "bare"])
        if kind == "misspelt":
            at = chance.randrange(len(key))
            key = key[:at] + key[at + 1 :]
        result += [f"--{key}={value}"] if kind == "joined" else [f"--{key}"] if kind == "bare" else [f"--{key}", value]
    return result


OPTIONS: dict[str, Any] = dict.fromkeys(["ckpt_path", "data", "batch_norm", "out", "support", "query", "device"], "x")
OPTIONS |= dict.fromkeys(["inner_steps", "ways", "shots", "seed", "queries", "tasks", "data.init_args.size"], 2)
OPTIONS |= {"model.init_args.backbone.init_args.hidden": 4, "trainer.precision": "32-true"}


def case_of(chance: Random) -> tuple[str, str, list[str]]:
    """A command, the configuration it starts from, and what is given anew."""
    command = chance.choice(["train"] * 8 + ["evaluate", "predict"])
    name = chance.choice(sorted(CONFIGURATIONS)) if command == "train" else ""
    return command, name, flags(chance, KEYS[name] if name else OPTIONS)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with files that are no configurations, and no way out to processes and the network."""
    inner = tmp_path / "one" / "two"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    (inner / "dead").symlink_to(inner / "nowhere")
    (inner / "utf16.yaml").write_text("name: x\n", encoding="utf-16")
    (inner / "broken.yaml").write_text("model: [a\n  b: {c\n")
    (inner / "list.yaml").write_text("- 1\n- 2\n")
    (inner / "empty.yaml").write_text("")
    (inner / "folder").mkdir()

    def alone(*_: Any, **__: Any) -> None:
        raise ConfigError("no further processes in this test")

    def offline(*_: Any, **__: Any) -> None:
        raise DownloadError("no network in this test")

    monkeypatch.setattr(subprocess_script._SubprocessScriptLauncher, "launch", alone)
    monkeypatch.setattr(multiprocessing._MultiProcessingLauncher, "launch", alone)
    monkeypatch.setattr(omniglot, "download", offline)
    return inner


@contextlib.contextmanager
def within(limit_s: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit_s)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(main: Callable[[list[str]], None], args: list[str]) -> tuple[str, str]:
    """What a command line comes to: "ran", "refused", "hang" or "traceback", and what it says."""
    environment, said = dict(os.environ), io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            with within(TIMEOUT_S):
                main(args)
        return "ran", ""
    except SystemExit as stop:
        text = said.getvalue()
        lines = [line for line in text.splitlines() if line.startswith("error: ")]
        if stop.code in (0, None):
            return "ran", ""
        if stop.code == 2 and len(lines) == 1 and text.rstrip().endswith(lines[0]):
            return "refused", lines[0]
        return "traceback", text[-2000:]
    except Hang:
        return "hang", traceback.format_exc()[-1500:]
    except BaseException:
        return "traceback", traceback.format_exc()[-3000:]
    finally:
        os.environ.clear()
        os.environ.update(environment)
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_no_command_line_ends_in_a_traceback_or_hangs(place: Path, tmp_path: Path) -> None:
    """Catches settings, files and machines that a user can get wrong and that nothing answers in one line."""
    root = picture_tree(tmp_path / "tree", CLASSES)
    datamodules.Glyphs().prepare_data()  # drawn once
    two = ("--trainer.max_steps", "2", "--trainer.val_check_interval", "2")
    checkpoint = str(train_on_pictures(tmp_path / "runs", "protonet", "models.ProtoNet", root, *two))
    picture_tree(place / "support", {"a": 2, "b": 2})
    picture_tree(place / "query", {"a": 1})
    wrong: list[str] = []
    count = {"ran": 0, "refused": 0, "hang": 0, "traceback": 0}

    @seed(SEED)
    @settings(
        max_examples=CASES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**64 - 1))  # drawn key by key, the cases are too much alike
    def run(number: int) -> None:
        command, name, given_anew = case_of(Random(number))
        if command == "train":
            own = ["--config", str(ROOT / "configs" / name), *SMALL, *CONFIGURATIONS[name], "--runs", "runs"]
            main: Callable[..., None] = builder.main
        elif command == "evaluate":
            own, main = ["--ckpt_path", checkpoint, "--tasks", "2"], evaluate.main
        else:
            own, main = ["--ckpt_path", checkpoint, "--support", "support", "--query", "query"], predict.main
        start = time.monotonic()
        found, said = outcome(main, [*own, *given_anew])
        count[found] += 1
        if log := os.environ.get("METABOLT_FUZZ_LOG"):
            with open(log, "a") as file:
                file.write(f"{found} {time.monotonic() - start:.1f} s {command} {name} {given_anew!r}\n{said}\n")
        if found in ("hang", "traceback"):
            wrong.append(f"{command} {name} {given_anew!r}: {found}\n{said}")

    run()
    print(count)
    assert not wrong, f"{count}\n" + "\n\n".join(wrong)
