"""Streams: sequences of experiences, each a few labelled examples, that arrive one after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import MetaBatch, Support, TaskDistribution
from datamodules.core.errors import DataError, at_least
from datamodules.core.streams import TaskStreams

FULL = 20  # experiences up to which a stream is tested after each one
DECADES = (1, 2, 5)


def usual_points(experiences: int) -> tuple[int, ...]:
    """After how many experiences all so far is tested: after each of a few, of many after 1, 2, 5, 10, … and all."""
    if experiences <= FULL:
        return tuple(range(1, experiences + 1))
    rising = (d * 10**power for power in range(len(str(experiences))) for d in DECADES)
    return (*(n for n in rising if n < experiences), experiences)


@dataclass
class Streams(MetaBatch):
    """A meta-batch of T streams of one shape: J experiences of N examples, and Q further ones of each to test it by.

    Inputs are held once, however many streams show them.

    Attributes:
        inputs: (P, *input), what ``rows`` number; images are uint8 until they are on the device, then float32.
        rows: (T, J, N) int64, the examples of each experience, in the order in which they arrive.
        y: (T, J, N) int64 in [0, classes), or (T, J, N, out) float32.
        query_rows, query_y: (T, J, Q) and (T, J, Q, …), which arrive never.
        index: (T,) int64, each stream's number within its split.
        key: (T,) int64, what a learner's own chance on the stream is drawn by, see ``models.core.chance``.
        classes: that labels go up to; 0 for regression.
        points: after how many experiences all so far is tested, rising; the last is J.
        meta_batch: number of streams of the whole meta-batch, over all processes.
        task: what the sampler knows of each stream, name to (T, …): the classes of its experiences.
        remembered_rows, remembered_y: (T, R) and (T, R, …), examples of what was learned before the stream; in
            meta-training alone, None without.
        digest: (T,) int64, to know each stream again by.
    """

    inputs: Tensor
    rows: Tensor
    y: Tensor
    query_rows: Tensor
    query_y: Tensor
    index: Tensor
    key: Tensor
    digest: Tensor
    classes: int = 0
    points: tuple[int, ...] = ()
    meta_batch: int = 0
    task: dict[str, Tensor] = field(default_factory=dict)
    remembered_rows: Tensor | None = None
    remembered_y: Tensor | None = None

    @property
    def experiences(self) -> int:
        """J."""
        return self.rows.shape[1]

    def fingerprint(self) -> Tensor:
        return self.digest

    def experience(self, stream: int, number: int) -> Support:
        """What arrives at one moment of a stream."""
        return Support(self.inputs[self.rows[stream, number]], self.y[stream, number], self.classes)


class StreamTasks(TaskDistribution):
    """Streams: experience j of stream i is a pure function of (seed, split, i, j).

    Attributes:
        points: after how many experiences all so far is tested.
    """

    seed: int
    points: tuple[int, ...]

    def sample(self, indices: Sequence[int]) -> Streams:
        raise NotImplementedError


class OnlineExperiences(StreamTasks):
    """The first stream of a distribution, experience by experience: number s is a stream of experience s alone.

    Args:
        whole: the distribution.
    """

    def __init__(self, whole: StreamTasks) -> None:
        self.whole, self.seed, self.points = whole, whole.seed, (1,)
        self._stream: Streams | None = None

    @property
    def class_names(self) -> list[str] | None:
        return self.whole.class_names

    @property
    def group_names(self) -> list[str] | None:
        return self.whole.group_names

    def sample(self, indices: Sequence[int]) -> Streams:
        if self._stream is None:
            self._stream = self.whole.sample([0])
        stream, (index,) = self._stream, indices
        number = min(index, stream.experiences - 1)  # loaders ask for one more than a run takes
        rows, query_rows = (r[:, number : number + 1] for r in (stream.rows, stream.query_rows))
        needed, among = torch.cat([rows.flatten(), query_rows.flatten()]).unique(return_inverse=True)
        return dataclasses.replace(
            stream,
            inputs=stream.inputs[needed],
            rows=among[: rows.numel()].view(rows.shape),
            y=stream.y[:, number : number + 1],
            query_rows=among[rows.numel() :].view(query_rows.shape),
            query_y=stream.query_y[:, number : number + 1],
            index=torch.tensor([index]),
            points=(1,),
            task={},
        )


def keys(seed: int, split: str, indices: Sequence[int], purpose: int = 1) -> Tensor:
    """A number for each stream, (T,) int64, that no other stream, split, seed or purpose has."""
    # Streams of chance of the same tasks: ``purpose`` tells them from those that examples are drawn by.
    return torch.from_numpy(TaskStreams(seed, split, indices, purpose).bits(1)[:, 0].view(np.int64).copy())


class StreamDataModule(EpisodicDataModule):
    """Hands out streams by index. A distribution of streams overrides ``build``.

    Args:
        experiences: J of meta-validation and meta-test.
        val_experiences: J of meta-validation, where its split has fewer classes (None: the same).
        shots, queries: N and Q, the examples that an experience teaches, and those that it is tested by.
        train_experiences, train_shots, train_queries: of meta-training, where they differ (None: the same).
        points: after how many experiences all so far is tested; None: see ``usual_points``.
        online: a run is one stream, the first of the meta-test split: its experience s is what training step s is
            given, and what is validated and tested is what it has come to. For ``models.Online``.
        meta_batch_size, val_tasks, test_tasks, eval_batch_size, workers, seed: see EpisodicDataModule; of streams.
    """

    kind = "stream"

    def __init__(
        self,
        experiences: int,
        shots: int,
        queries: int,
        train_experiences: int | None = None,
        train_shots: int | None = None,
        train_queries: int | None = None,
        val_experiences: int | None = None,
        points: list[int] | None = None,
        online: bool = False,
        meta_batch_size: int = 1,
        val_tasks: int = 10,
        test_tasks: int = 50,
        eval_batch_size: int = 10,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        if online:
            if meta_batch_size > 1:
                raise ValueError(
                    f"meta_batch_size is {meta_batch_size} but an online run takes one experience at a time: set it to "
                    "1, or online to false"
                )
            val_tasks = test_tasks = 1
        super().__init__(meta_batch_size, val_tasks, test_tasks, eval_batch_size, workers, seed)
        self.online = online
        at_least(1, experiences=experiences, shots=shots, queries=queries)
        at_least(1, train_experiences=train_experiences, train_shots=train_shots, val_experiences=val_experiences)
        at_least(0, train_queries=train_queries)
        self.experiences, self.shots, self.queries = experiences, shots, queries
        self.train_experiences = train_experiences or experiences
        self.val_experiences = val_experiences or experiences
        self.train_shots = train_shots or shots
        self.train_queries = queries if train_queries is None else train_queries
        if points is not None and not (points and sorted(set(points)) == points and points[0] >= 1):
            raise ValueError(f"points is {points} but must be rising numbers of experiences from 1 on")
        if points is not None and points[-1] > experiences:
            raise ValueError(
                f"points go up to {points[-1]} but a stream has {experiences} experiences: raise experiences"
            )
        self.points = points

    @property
    def selects(self) -> bool:
        return not self.online  # what was learned so far is all that there is

    def distribution(self, split: str) -> TaskDistribution:
        if not self.online:
            return super().distribution(split)
        whole: Any = super().distribution("test")
        return OnlineExperiences(whole) if split == "train" else whole

    def task_shape(self) -> dict[str, int]:
        return {"experiences": self.experiences, "shots": self.shots, "queries": self.queries}

    def shape_of(self, split: str) -> tuple[int, int, int, tuple[int, ...]]:
        """J, N, Q and the points of a split."""
        if split == "train":
            j = self.train_experiences
            return j, self.train_shots, self.train_queries, (j,)
        j = self.val_experiences if split == "val" else self.experiences
        own = usual_points(j) if self.points is None else (*(p for p in self.points if p < j), j)
        return j, self.shots, self.queries, own

    def normalize(self, inputs: Tensor) -> Tensor:
        """Inputs as they are stored to what a learner sees."""
        return inputs

    def on_device(self, episodes: Any) -> Any:
        return dataclasses.replace(episodes, inputs=self.normalize(episodes.inputs))


def enough(have: int, need: int, split: str, what: str, setting: str) -> None:
    """Refuse streams that need more than there is.

    Raises:
        DataError: naming the setting.
    """
    if have < need:
        raise DataError(f"the {split} split has {have} {what} but a stream needs {need}: lower {setting} to {have}")
