"""The run directory, ``runs/<name>/``, and which checkpoint a run starts from."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from app.runs.claim import claim, holder
from datamodules.core.errors import ConfigError
from models.core.checkpoint_io import CHECKPOINTS, refuse_missing

EVALUATIONS = "evaluations"  # folder of a run
COMPARISONS, RECOMMENDATIONS = "comparisons", "recommendations"  # folders beside runs, of what is said of several
CONFIG, RESULTS = "config.yaml", "results.json"
TASKS_CSV, TASKS_NPZ = "test_tasks.csv", "test_tasks.npz"  # the metrics of every meta-test task, to read and to compare


def run_path(runs: Path, name: str) -> Path:
    """The first directory of a run's name, which may have parts: ``exp/seed0``.

    Raises:
        ConfigError: a name that would lead out of ``runs``, or to no folder of its own.
    """
    parts = name.split("/")
    if not name.strip() or any(part.strip() in ("", ".", "..") for part in parts):
        raise ConfigError(f"--name {name!r} is no name of a folder in {runs}: give one, as exp or exp/seed0")
    return runs.joinpath(*parts)


def _is_run(folder: Path) -> bool:
    """Whether a run left anything that is to be kept; its configuration may be lost."""
    return any((folder / name).exists() for name in (CONFIG, CHECKPOINTS, RESULTS))


def _versions(first: Path, name: str) -> list[Path]:
    """The directories of a run's name, oldest first: name, name-2, name-3, …; not those of a run that is named so."""
    pattern = re.compile(re.escape(first.name) + r"(?:-(\d+))?")
    found = []
    for path in first.parent.iterdir() if first.parent.is_dir() else []:
        match = pattern.fullmatch(path.name)
        if match and _is_run(path) and (match[1] is None or _name_of(path) == name):
            found.append((int(match[1] or 1), path))
    return [path for _, path in sorted(found)]


def _name_of(folder: Path) -> str | None:
    """The name that a run's configuration has; None where there is none to read."""
    try:
        line = re.search(r"^name: .*", (folder / CONFIG).read_text(), re.MULTILINE)
        return None if line is None else str(yaml.safe_load(line[0])["name"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None


def config_file(folder: Path, content: str) -> Path:
    """The file of a run's directory that has this configuration, or the one that is to: config.yaml, or
    config.resume-1.yaml and so on where the run was begun with another."""
    path, number = folder / CONFIG, 0
    while path.exists() and path.read_text() != content:
        number += 1
        path = folder / f"config.resume-{number}.yaml"
    return path


def choose_run(
    runs: Path, name: str, ckpt_path: str | None, stage: str, take: bool = False, configs: Sequence[Path] = ()
) -> tuple[Path, Path | None]:
    """Where a run lives and which checkpoint it starts from.

    Args:
        runs: the folder of all runs.
        name: of the run; with slashes, in folders of ``runs``.
        ckpt_path: None, "last", "best", or a file.
        stage: "fit" starts a new directory unless it goes on with "last"; others use the one that the checkpoint is
            of. Otherwise it is the one that a configuration was given of, or the newest one of the name.
        take: claim the directory that is trained in, see ``claim``: another start of the same name gets the next.
            Otherwise nothing is created.
        configs: configuration files that were given.

    Raises:
        ConfigError: a checkpoint that is asked for and not there, unless it is "last" for fit; a run that another
            process trains; a name or a folder that cannot be.
    """
    first = run_path(runs, name)
    versions = _versions(first, name)
    given = [v for v in versions if v.resolve() in {file.resolve().parent for file in configs}]
    newest = (given or versions or [first])[-1]
    take = take and stage == "fit"
    if ckpt_path in ("last", "best"):
        file = newest / CHECKPOINTS / f"{ckpt_path}.ckpt"
        if not (ckpt_path == "last" and stage == "fit"):
            refuse_missing(file, "train first, or give --ckpt_path a file", f"{ckpt_path} checkpoint")
        if take and not _claimed(newest):
            who = f"process {other.pid} of {other.host}" if (other := holder(newest)) else "another process"
            raise ConfigError(f"{newest} is trained by {who} just now: wait for it, or give another --name")
        return newest, file if file.is_file() else None  # None: killed before its first checkpoint, or never started
    file = None
    if ckpt_path:
        file = Path(ckpt_path)
        refuse_missing(file, "--ckpt_path takes last, best or an existing file")
    if stage != "fit":
        own = [folder for folder in versions if file and file.resolve().is_relative_to(folder.resolve())]
        return (own or [newest])[-1], file
    number = 1 if not versions else int(versions[-1].name[len(first.name) + 1 :] or 1) + 1
    while True:
        folder = first if number == 1 else first.with_name(f"{first.name}-{number}")
        # Who claimed it before may have ended without a trace, or begun in the meantime.
        if not take or (_claimed(folder) and not _is_run(folder)):
            return folder, file
        number += 1


def _claimed(folder: Path) -> bool:
    try:
        return claim(folder)
    except OSError as error:
        raise ConfigError(
            f"cannot write into {folder} ({error.strerror}): give --runs a folder that can be written"
        ) from error


def out_folder(given: str) -> Path:
    """What an option that takes a folder was given; ``Path`` alone takes nothing for the working directory."""
    if not given.strip():
        raise argparse.ArgumentTypeError("it is empty: give a folder, or leave it out")
    return Path(given)


def slug(words: Sequence[str]) -> str:
    """A folder's name of at most 80 characters out of the words of a command."""
    plain = [Path(word.removeprefix("--")).name if "/" in word else word.removeprefix("--") for word in words]
    # Only the last part of a dotted key, but a number is whole.
    plain = [word.rsplit(".", 1)[-1] if re.fullmatch(r"[A-Za-z_][\w.]*", word) else word for word in plain]
    return re.sub(r"[^\w.+-]+", "-", "-".join(plain)).strip("-.")[:80]
