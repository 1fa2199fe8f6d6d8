"""The run directory, ``runs/<name>/``, and which checkpoint a run starts from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from datamodules.core.errors import ConfigError
from models.core.checkpoint_io import CHECKPOINTS

EVALUATIONS = "evaluations"  # folder of a run
TASKS_CSV, TASKS_NPZ = "test_tasks.csv", "test_tasks.npz"  # the metrics of every meta-test task, to read and to compare


def _versions(runs: Path, name: str) -> list[Path]:
    """The directories of a run's name, oldest first: name, name-2, name-3, …"""
    pattern = re.compile(re.escape(name) + r"(?:-(\d+))?")
    found = []
    for path in runs.iterdir() if runs.is_dir() else []:
        match = pattern.fullmatch(path.name)
        if match and (path / "config.yaml").is_file():
            found.append((int(match[1] or 1), path))
    return [path for _, path in sorted(found)]


def choose_run(runs: Path, name: str, ckpt_path: str | None, stage: str) -> tuple[Path, Path | None]:
    """Where a run lives and which checkpoint it starts from.

    Nothing is created here: processes that start together must all see the same directories, and none writes before
    all have joined.

    Args:
        runs: the folder of all runs.
        name: of the run.
        ckpt_path: None, "last", "best", or a file.
        stage: "fit" starts a new directory unless it goes on with "last"; others use the newest one of the name.

    Raises:
        ConfigError: a checkpoint that is asked for and not there, unless it is "last" for fit.
    """
    versions = _versions(runs, name)
    newest = versions[-1] if versions else runs / name
    fresh = runs / name if not versions else runs / _next(versions[-1].name, name)
    if ckpt_path in ("last", "best"):
        file = newest / CHECKPOINTS / f"{ckpt_path}.ckpt"
        if file.is_file():
            return newest, file
        if ckpt_path == "last" and stage == "fit":
            return newest, None  # killed before its first checkpoint, or never started
        raise ConfigError(f"no {ckpt_path} checkpoint at {file}: train first, or give --ckpt_path a file")
    if ckpt_path:
        file = Path(ckpt_path)
        if not file.is_file():
            raise ConfigError(f"no checkpoint at {file}: --ckpt_path takes last, best or an existing file")
        return (fresh if stage == "fit" else newest), file
    return (fresh if stage == "fit" else newest), None


def _next(newest: str, name: str) -> str:
    number = newest[len(name) + 1 :]
    return f"{name}-{int(number or 1) + 1}"


def slug(words: Sequence[str]) -> str:
    """A folder's name of at most 80 characters out of the words of a command."""
    plain = [Path(word.removeprefix("--")).name if "/" in word else word.removeprefix("--") for word in words]
    # Only the last part of a dotted key, but a number is whole.
    plain = [word.rsplit(".", 1)[-1] if re.fullmatch(r"[A-Za-z_][\w.]*", word) else word for word in plain]
    return re.sub(r"[^\w.+-]+", "-", "-".join(plain)).strip("-.")[:80]
