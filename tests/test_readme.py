"""The README's commands run as they stand, made small; those that need many GPUs or an account are parsed."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import yaml
from PIL import Image

from app.cli.builder import main
from tests.support.fixtures import fake_omniglot
from tests.support.processes import ROOT, build

BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
MANY = ("torchrun", "srun", "--trainer.devices 8")
DEBUG = ("--config", str(ROOT / "configs" / "overlays" / "debug.yaml"))


def starting_with(*words: str) -> list[str]:
    return [c for c in COMMANDS if c.startswith(words)]


def test_every_command_is_covered():
    """Catches a command that no test below looks at."""
    known = ("make ", "python train.py", "python -m app.", "wandb ", "torchrun ", "srun ")
    assert [c for c in COMMANDS if not c.startswith(known)] == []
    assert len(COMMANDS) > 12


@pytest.mark.parametrize("command", [c for c in COMMANDS if any(m in c for m in MANY)])
def test_commands_for_many_gpus_name_what_exists(command):
    """Catches a flag or a configuration that is gone."""
    flags = shlex.split(command[command.index("train.py") :])[1:]
    cpu = ("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.num_nodes", "1")
    cli = build(*flags, *cpu)
    assert cli.trainer.max_steps > 0


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("wandb sweep")])
def test_sweeps_exist(command):
    """Catches a sweep that was moved."""
    assert yaml.safe_load((ROOT / shlex.split(command)[2]).read_text())["program"] == "train.py"


@pytest.mark.parametrize("command", starting_with("make "))
def test_make_targets_exist(command):
    """Catches a renamed target."""
    done = subprocess.run(["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_lists_every_target():
    """Catches a target without a word of help."""
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("train", "test", "test-all", "format", "check", "bench"):
        assert f"make {target} " in done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder as a user has it after the quickstart: the project, a cache of characters, pictures of their own."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "app", "datamodules", "models", "train.py"):
        (folder / name).symlink_to(ROOT / name)
    (ROOT / "data").mkdir(exist_ok=True)
    (folder / "data").symlink_to(ROOT / "data")  # characters take half a minute to draw
    shades = {"lines": 60, "dots": 160, "rings": 220}
    for part, numbers in (("support", range(2)), ("queries", range(2, 4)), ("images", range(30))):
        for k, shade in enumerate(shades.values() if part != "images" else range(0, 250, 12)):
            for n in numbers:
                path = folder / "my" / part / f"class{k}" / f"{n}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.linear_gradient("L").rotate(7 * n + shade).resize((40 + n, 50)).save(path)
    return folder


def run(place: Path, command: str, *more: str) -> str:
    """What a command prints, by a process of its own."""
    words = [sys.executable if w == "python" else w for w in shlex.split(command)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "COLUMNS": "200"}
    done = subprocess.run([*words, *more], cwd=place, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_here(place: Path, command: str, *more: str) -> str:
    """What a command prints, by this process: started as a module or a file, by its words, where a user starts it."""
    _, *words = shlex.split(command)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), warnings.catch_warnings():
        patch.chdir(place)
        patch.setenv("COLUMNS", "200")
        warnings.simplefilter("default")  # as in a process of its own
        module = words.pop(0) == "-m"
        patch.setattr(sys, "argv", [*words, *more] if module else ["train.py", *words, *more])
        if module:
            with mock.patch.dict(sys.modules):
                sys.modules.pop(words[0], None)  # which runpy would rather not find
                runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path("train.py", run_name="__main__")
    return printed.getvalue()


def test_train_resume_evaluate_and_predict(place):
    """Catches a first hour that ends in an error: the commands in the order of the page, with a few steps each."""
    train = [c for c in starting_with("python train.py") if not any(m in c for m in MANY)]
    small = ("--data.init_args.meta_batch_size", "2", "--trainer.accelerator", "cpu")
    quick = next(c for c in train if c.endswith("configs/quickstart.yaml"))
    assert "±" in run(place, quick, *DEBUG, "--wandb", "offline", *small)
    resume = next(c for c in train if "--ckpt_path last" in c)
    run_here(place, resume, *DEBUG, *small, "--trainer.max_steps", "6")
    assert (place / "runs" / "quickstart" / "config.resume-1.yaml").is_file()
    for command in starting_with("python -m app.evaluate"):
        assert "±" in run_here(place, command, "--tasks", "8")
    # Without the dashboard's own files, which its process may still move.
    shutil.copytree(
        place / "runs" / "quickstart", place / "runs" / "my-protonet", ignore=shutil.ignore_patterns("wandb")
    )
    assert "Paired differences" in run_here(place, starting_with("python -m app.compare")[0])
    predict = starting_with("python -m app.predict")[0]
    assert "class2" in run_here(place, predict)
    # The tests above were of too few tasks to learn from.
    both = [f"runs/{name}" for name in ("quickstart", "my-protonet")]
    checkpoints = " ".join(f"{of}/checkpoints/best.ckpt" for of in both)
    run_here(place, f"python -m app.evaluate --ckpt_path {checkpoints} --tasks 40")
    folders = [f"{of}/evaluations/best-tasks-40" for of in both]
    for command in starting_with("python -m app.recommend"):
        runs = " ".join(shlex.split(command)[4:6])
        assert "interval" in run_here(place, command.replace(runs, " ".join(folders)))


@pytest.mark.slow
def test_the_other_trainings(place):
    """Catches an example that does not train."""
    for command in starting_with("python train.py"):
        if any(m in command for m in MANY) or "omniglot" in command or "quickstart" in command:
            continue
        more = (*DEBUG, "--data.init_args.meta_batch_size", "2", "--trainer.max_steps", "4")
        assert "±" in run(place, command, *more)


def test_omniglot_trains_from_local_archives(place, monkeypatch, tmp_path):
    """Catches a configuration that works with the real data alone: generated archives, a few steps."""

    import datamodules

    monkeypatch.setattr(datamodules, "Omniglot", fake_omniglot(tmp_path / "data"))
    flags = ("--data.init_args.root", str(tmp_path / "data"), "--data.init_args.train_ways", "5")
    flags += ("--data.init_args.train_queries", "1", "--data.init_args.queries", "1", "--runs", str(tmp_path))
    main(["--config", str(ROOT / "configs/metric/protonet/omniglot-60way-1shot.yaml"), *DEBUG, *flags])
    assert (tmp_path / "protonet-omniglot-60way-1shot" / "results.json").is_file()
