"""What a test leaves of every task, and whether two tests were on the same tasks."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.runs.directory import CONFIG, EVALUATIONS, TASKS_NPZ
from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Episodes, TaskDistribution
from datamodules.core.errors import ConfigError
from datamodules.core.files import write_atomically
from datamodules.core.metric import Metric
from models.core.metrics import EMBEDDING, FINGERPRINT, TaskMetrics

# What of the data makes its tasks, and which option of an evaluation changes it.
SETTINGS = {name: f"--{name}" for name in ("data", "ways", "shots", "queries", "episodes", "seed", "tasks")}
SETTINGS |= {"environment": "--data and its settings"}
# Facts of two tests are the same tasks' where they are this close; sums over a task differ by machine.
ROUNDING = 1e-5


def settings(data: EpisodicDataModule, seed: int | None = None) -> dict[str, Any]:
    """What makes the meta-test tasks; ``seed`` of the tasks, where it is another than the data's."""
    return {
        "data": type(data).__name__,
        "environment": data.identity,
        **data.task_shape(),
        "seed": data.seed if seed is None else seed,
        "tasks": data.test_tasks,
    }


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def about(data: EpisodicDataModule, algorithm: str, metric: TaskMetrics) -> dict[str, Any]:
    """What is kept of a test beside its metrics: what tells whether another one was on the same tasks.

    The facts of the tasks are numbers of classes and of images, so it takes the names of the classes, and what the
    first task's images look like, to know that they number the same.
    """
    tasks: Any = data.distribution("test")
    names = tasks.class_names
    first = tasks.sample([0])
    inputs = (first.support_x, first.query_x) if isinstance(first, Episodes) else ()
    images = [t.numpy().tobytes() for t in inputs if t.dtype == torch.uint8]
    return {
        "algorithm": algorithm,
        **settings(data, tasks.seed),
        "tasks": len(metric.all_tasks["index"]),
        "classes": None if names is None else _digest(*map(os.fsencode, names)),
        "images": _digest(*images) if images else None,
        "metrics": {name: asdict(metric.declared[name]) for name in metric.names},
        "facts": metric.facts,
        "subset": {name: asdict(metric.declared[name]) for name in metric.subset},
    }


def columns(tasks: TaskDistribution, kept: dict[str, Tensor]) -> dict[str, list[Any]]:
    """Of every task its metrics and facts of one number, and the names of its classes, by column.

    Args:
        tasks: of the test.
        kept: of each task, name to (T, …), see ``TaskMetrics.table``.
    """
    found: dict[str, list[Any]] = {"task": kept["index"].tolist()}
    found |= {n: v.tolist() for n, v in kept.items() if n not in ("index", FINGERPRINT) and v.dim() == 1}
    if "classes" in kept:
        known, row = kept["classes"].unique(return_inverse=True)
        of_ids = tasks.class_names
        names = [str(k) if of_ids is None else of_ids[k] for k in known.tolist()]
        found["classes"] = [", ".join(names[k] for k in of_task) for of_task in row.tolist()]
    return found


def save_table(path: Path, tasks: TaskDistribution, kept: dict[str, Tensor]) -> None:
    """Write ``columns`` as CSV, atomically.

    Raises:
        OSError: it cannot be written.
    """
    table, text = columns(tasks, kept), io.StringIO()
    csv.writer(text).writerows([table, *zip(*table.values(), strict=True)])
    write_atomically(path, text.getvalue())


def save_tasks(path: Path, data: EpisodicDataModule, algorithm: str, metric: TaskMetrics) -> None:
    """Write a test's metrics of every task, atomically.

    Raises:
        OSError: it cannot be written.
    """
    content = io.BytesIO()
    arrays = {name: values.cpu().numpy() for name, values in (metric.all_tasks | metric.subset).items()}
    np.savez_compressed(content, **arrays, about=np.array(json.dumps(about(data, algorithm, metric))))
    write_atomically(path, content.getvalue())


@dataclass(frozen=True)
class Evaluation:
    """A finished test.

    Attributes:
        folder: that it was left in.
        about: see ``about``.
        metrics: of each task, name to (T, …); those of the first tasks alone are shorter.
        declared: what each of them is.
        facts: of each task, name to (T, …); its number is ``index``.
        embedding: of each task, (T, d); None where the learner has none.
    """

    folder: Path
    about: dict[str, Any]
    metrics: dict[str, Tensor]
    declared: dict[str, Metric]
    facts: dict[str, Tensor]
    embedding: Tensor | None = None

    @classmethod
    def load(cls, folder: Path) -> Evaluation:
        """What a test left in its folder.

        Raises:
            ConfigError: nothing, or what cannot be read.
        """
        path = folder / TASKS_NPZ
        if not path.is_file():
            if not (folder / CONFIG).is_file():
                raise ConfigError(f"{folder} is no run and no evaluation: give a folder that has {TASKS_NPZ}")
            cure = f"python train.py --config {folder / CONFIG} --stage test"
            if others := sorted(path.parent for path in (folder / EVALUATIONS).glob(f"*/{TASKS_NPZ}")):
                cure += f", or give an evaluation of it, as {others[0]}"
            raise ConfigError(f"{folder} was not tested: {cure}")
        try:
            with np.load(path, allow_pickle=False) as content:
                told = json.loads(str(content["about"]))
                arrays = {name: torch.from_numpy(content[name]) for name in content.files if name != "about"}
            declared = {name: Metric(**settings) for name, settings in (told["metrics"] | told["subset"]).items()}
            facts = {name: arrays[name] for name in ("index", *told["facts"])}
            metrics = {name: arrays[name] for name in declared}
            return cls(folder, told, metrics, declared, facts, arrays.get(EMBEDDING))
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise ConfigError(f"{path} cannot be read ({' '.join(str(error).split())}): test again") from error


def refuse_other_settings(told: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Refuse tests of other tasks, by what makes tasks.

    Raises:
        ConfigError: naming what differs.
    """
    for one, name in zip(told[1:], names[1:], strict=True):
        for key, option in SETTINGS.items():
            if one.get(key) != told[0].get(key):
                values = f"{told[0].get(key)} and {one.get(key)}"
                _refuse(
                    names[0],
                    name,
                    f"{key} {values}; evaluate both with the same {option}, and compare the folders of the evaluations",
                )


def _refuse(first: str, second: str, what: str) -> None:
    raise ConfigError(f"{first} and {second} were not tested on the same tasks: {what}")


def refuse_other_tasks(evaluations: Sequence[Evaluation]) -> None:
    """Refuse tests that were not on exactly the same tasks.

    Raises:
        ConfigError: naming what differs.
    """
    names = [str(e.folder) for e in evaluations]
    refuse_other_settings([e.about for e in evaluations], names)
    first = evaluations[0]
    for one in evaluations[1:]:
        for key, what in (("classes", "the classes of the split"), ("images", "the images")):
            if one.about[key] != first.about[key]:
                _refuse(names[0], str(one.folder), f"{what} differ")
        if one.facts.keys() != first.facts.keys():
            _refuse(names[0], str(one.folder), "other things are known of them")
        for name, values in first.facts.items():
            same = _same(values, one.facts[name])
            if not same.all():
                place = int(first.facts["index"][int(same.int().argmin())])
                _refuse(names[0], str(one.folder), f"the {name} of task {place} differs")


def _same(one: Tensor, other: Tensor) -> Tensor:
    """Which tasks two facts (T, …) agree on, (T,)."""
    if one.shape != other.shape:
        return torch.zeros(1, dtype=torch.bool)
    exact = not one.is_floating_point()
    equal = one == other if exact else torch.isclose(one.double(), other.double(), rtol=ROUNDING, atol=ROUNDING**2)
    return equal.flatten(1).all(1) if equal.dim() > 1 else equal
