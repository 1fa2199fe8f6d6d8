"""Whether task embeddings know a task's alphabet: of Omniglot's tasks within alphabets the nearest, by any embedding.

    python -m benchmarks.retrieval --root data runs/a/checkpoints/best.ckpt runs/b/checkpoints/best.ckpt,labels=sampled

A query task is right where the nearest of the gallery's tasks is of its alphabet (precision at 1); mean average
precision is over all of the gallery. Gallery and queries share no character: each alphabet's characters are halved, by
turns. So what is found is an alphabet's look (with that of its drawers, of whom each alphabet has twenty of its own),
not a character met again. Alphabets are those of a split's meta-test, by default the 20 of Lake's evaluation set.

Rows: chance; pixels, the mean support image; and of each checkpoint its task embedding, by the learner's own distance,
and the mean of its features of the support set, where it has either. After a checkpoint settings of its learner may
follow. Intervals are of 95 %, by resampling alphabets, whose tasks are no independent trials.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

import models
from app.runs.leaks import trained_classes
from datamodules import Omniglot
from datamodules.core.episodes import Episodes, Task
from datamodules.core.errors import ConfigError, DataError
from datamodules.core.files import write_atomically
from models.core.checkpoint_io import load_checkpoint
from models.core.learner import MetaLearner

BATCH = 50  # tasks that are embedded together


@dataclass
class Row:
    """How well one embedding finds alphabets.

    Attributes:
        name: of what embeds.
        size: d.
        precision, mean_average: at 1, and mean average precision, each with the half-width of its interval.
        seconds: for a task.
        trained: how many of the characters it was trained on.
    """

    name: str
    size: int
    precision: tuple[float, float]
    mean_average: tuple[float, float]
    seconds: float
    trained: int = 0


def found(distances: np.ndarray, query: np.ndarray, gallery: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each query whether the nearest is of its group, and its average precision, (Q,) each.

    Args:
        distances: (Q, G).
        query, gallery: the group of each task.
    """
    order = distances.argsort(1, kind="stable")
    same = gallery[order] == query[:, None]
    ranks = np.arange(1, same.shape[1] + 1)
    average = (same * same.cumsum(1) / ranks).sum(1) / np.maximum(1, same.sum(1))
    return same[:, 0].astype(float), average


def over_groups(values: np.ndarray, groups: np.ndarray, resamples: int = 2000) -> tuple[float, float]:
    """The mean over groups' means and half the width of its 95 % interval, by resampling groups."""
    means = np.array([values[groups == g].mean() for g in np.unique(groups)])
    drawn = np.random.default_rng(0).integers(len(means), size=(resamples, len(means)))
    low, high = np.quantile(means[drawn].mean(1), (0.025, 0.975))
    return float(means.mean()), float(high - low) / 2


def halves(data: Omniglot, tasks: int) -> tuple[Episodes, Episodes]:
    """Query and gallery tasks, as many of each, of characters by turns."""
    classes = data.classes("test")
    place: dict[str, int] = {}
    side = [place.update({g: place.get(g, -1) + 1}) or place[g] % 2 for g in classes.groups]
    parts = [classes.select([i for i, of in enumerate(side) if of == half]) for half in (0, 1)]
    for part in parts:
        if small := [g for g in dict.fromkeys(part.groups) if part.groups.count(g) < data.ways]:
            raise DataError(f"half of {small[0]} has fewer than {data.ways} characters: lower --ways")
    query, gallery = (data.tasks(part, "test").sample(range(tasks)) for part in parts)
    assert query.task_groups == gallery.task_groups and query.task_groups is not None
    return query, gallery


def mean_features(learner: MetaLearner) -> Callable[[Task], Tensor] | None:
    """The mean embedding of a task's images; None where the learner embeds none."""
    probe = torch.zeros(2, 1, 28, 28)
    if learner.embeddings(probe) is None:
        return None

    def mean(task: Task) -> Tensor:
        z = learner.embeddings(task.support.x)
        assert z is not None
        return z.mean(0)

    return mean


def embedded(learner: MetaLearner, function: Callable[[Task], Tensor], data: Omniglot, episodes: Episodes) -> Tensor:
    """Of every task, (T, d)."""
    parts = torch.arange(len(episodes)).split(BATCH)
    ready = (data.on_device(episodes.apply(lambda t, rows=rows: t[rows])) for rows in parts)
    return torch.cat([learner.map(function, part) for part in ready]).double()


def embeddings(paths: Sequence[str], data: Omniglot) -> Iterator[tuple[str, int, MetaLearner, Any, Any]]:
    """What embeds: its name, trained characters, the learner that maps, the function of a task, and the distance."""
    plain = models.NearestNeighbour()
    yield "pixels", 0, plain, lambda task: task.support.x.mean(0).flatten(), torch.cdist
    asked = data.distribution("test").class_digests()
    for given in paths:
        path, *settings = given.split(",")
        chosen = {name: yaml.safe_load(value) for name, value in (setting.split("=", 1) for setting in settings)}
        learner = models.load(path, **chosen)
        trained = len(asked & trained_classes(load_checkpoint(path)))
        name = ", ".join([f"{type(learner).__name__} ({Path(path).parents[1].name})", *settings])
        if learner.embedding_size:
            yield (
                name,
                trained,
                learner,
                lambda task, own=learner: own.embed_task(task.support),
                (learner.embedding_distances),
            )
        if (mean := mean_features(learner)) is not None:
            yield f"{name}: mean of features", trained, learner, mean, torch.cdist


def rows(paths: Sequence[str], data: Omniglot, tasks: int) -> Iterator[Row]:
    """The rows of the table."""
    query, gallery = halves(data, tasks)
    of_query, of_gallery = (np.asarray(e.groups) for e in (query, gallery))

    def row(name: str, distances: np.ndarray, *others: Any) -> Row:
        right, average = found(distances, of_query, of_gallery)
        size, seconds, trained = others
        return Row(name, size, over_groups(right, of_query), over_groups(average, of_query), seconds, trained)

    yield row("chance", np.random.default_rng(0).random((tasks, tasks)), 0, 0.0, 0)
    for name, trained, learner, function, distance in embeddings(paths, data):
        with torch.inference_mode():
            begin = time.perf_counter()
            a, b = (embedded(learner, function, data, episodes) for episodes in (query, gallery))
            seconds = (time.perf_counter() - begin) / (2 * tasks)
            yield row(name, distance(a, b).numpy(), a.shape[1], seconds, trained)


def main() -> int:
    parser = argparse.ArgumentParser(description="Retrieval of a task's alphabet by task embeddings.")
    parser.add_argument("checkpoints", nargs="*", help="PATH, or PATH,setting=value of its learner")
    parser.add_argument("--root", default="data", help="folder of Omniglot")
    parser.add_argument("--protocol", default="alphabets", help="whose meta-test characters (default: alphabets)")
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=400, help="queries, and tasks of the gallery")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file of the table")
    args = parser.parse_args()
    try:
        within: Any = {"within_alphabets": True, "rotations": "none", "download": False, "root": args.root}
        shape: Any = {"ways": args.ways, "shots": args.shots, "queries": 1, "seed": args.seed}
        data = Omniglot(args.protocol, **within, **shape)
        print(f"{args.tasks} queries in {args.tasks} tasks, {args.ways}-way {args.shots}-shot, no character in common")
        print(f"{'embedding':<64}{'d':>6}{'precision at 1':>18}{'mean average':>18}{'ms a task':>11}{'trained on':>12}")
        table = []
        for row in rows(args.checkpoints, data, args.tasks):
            table.append(row)
            told = [f"{100 * mean:.1f} ± {100 * half:.1f} %" for mean, half in (row.precision, row.mean_average)]
            cells = f"{row.size:>6}{told[0]:>18}{told[1]:>18}{1e3 * row.seconds:>11.1f}{row.trained:>12}"
            print(f"{row.name[:63]:<64}{cells}", flush=True)
    except (ConfigError, DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.out is not None:
        write_atomically(args.out, json.dumps([asdict(row) for row in table], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
