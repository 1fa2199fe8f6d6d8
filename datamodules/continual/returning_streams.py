"""Streams of groups of classes, as alphabets, that return: what was learned of one is of use again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.continual.streams import StreamDataModule, Streams, StreamTasks, enough, keys
from datamodules.core.episodes import checksum
from datamodules.core.errors import DataError, at_least
from datamodules.core.streams import TaskStreams
from datamodules.images.tasks import DEFAULT_ROOT, ImageClasses, ImageDataModule

_CLASSES, _VISITS = 2, 3  # purposes of random numbers; 1 is that of the learner's own chance


class ReturningStreamTasks(StreamTasks):
    """Streams of visits to groups of classes.

    Args:
        classes: of the split.
        groups: of a stream, A.
        ways: classes of a group.
        experiences: visits, J.
        shots, queries: images of each class, see ReturningStreams.
        points: see Streams.
        returns: probability of a return; None visits all groups in turn.
        seed, split: of the streams.

    Raises:
        DataError: too few groups, or images of a class.
    """

    def __init__(
        self,
        classes: ImageClasses,
        groups: int,
        ways: int,
        experiences: int,
        shots: int,
        queries: int,
        points: tuple[int, ...],
        *,
        returns: float | None,
        seed: int,
        split: str,
    ) -> None:
        names = np.array(classes.groups)
        own = [np.flatnonzero(names == g) for g in dict.fromkeys(classes.groups)]
        self.members = [of_group for of_group in own if len(of_group) >= ways]
        prefix = {"train": "train_", "val": "val_"}.get(split, "")
        enough(len(self.members), groups, split, f"groups of {ways} or more classes", f"{prefix}groups")
        met = np.concatenate(self.members)
        k = int(met[classes.counts[met].argmin()])
        self.visits = int(classes.counts[k] - queries) // shots  # that each group has images for
        if groups * max(self.visits, 0) < experiences:
            raise DataError(
                f"class {classes.names[k]!r} ({split}) has {classes.counts[k]} images, {queries} queries and "
                f"{max(self.visits, 0)} visits of {shots} shots, so that {groups} groups have less than "
                f"{experiences} visits: lower experiences, shots or queries, or leave the class out"
            )
        self.classes, self.groups, self.ways, self.experiences = classes, groups, ways, experiences
        self.shots, self.queries, self.points, self.returns = shots, queries, points, returns
        self.seed, self.split = seed, split

    @property
    def class_names(self) -> list[str]:
        return self.classes.names

    @property
    def group_names(self) -> list[str]:
        return self.classes.groups

    def class_digests(self) -> frozenset[int]:
        return self.classes.digests()

    def sample(self, indices: Sequence[int]) -> Streams:
        # What is drawn of classes and images does not depend on experiences, and of a visit not on those after it.
        rng = TaskStreams(self.seed, self.split, indices, _CLASSES)
        own = np.argsort(rng.bits(len(self.members)), -1)[:, : self.groups]  # (T, A)
        lots = rng.uniform(0.0, 1.0, len(self.classes))
        ids = np.stack(
            [
                np.stack([self.members[g][np.argsort(row[self.members[g]])[: self.ways]] for g in of_stream])
                for of_stream, row in zip(own, lots, strict=True)
            ]
        )  # (T, A, ways)
        images = rng.uniform(0.0, 1.0, self.groups, self.ways, int(self.classes.counts.max()))
        images[np.arange(images.shape[-1]) >= self.classes.counts[ids][..., None]] = 2.0  # no such image
        rows = self.classes.starts[ids][..., None] + np.argsort(images, -1, "stable")  # (T, A, ways, images)
        visits, order = self.schedule(TaskStreams(self.seed, self.split, indices, _VISITS))
        met = (visits[..., None] == np.arange(self.groups)).cumsum(1)  # (T, J, A)
        number = np.take_along_axis(met, visits[..., None], -1)[..., 0] - 1  # visits to the same group before
        t = np.arange(len(rows))[:, None]
        shown = rows[t, visits]  # (T, J, ways, images)
        place = self.queries + number[..., None] * self.shots + np.arange(self.shots)  # (T, J, N)
        taught = np.take_along_axis(shown, np.broadcast_to(place[:, :, None], (*shown.shape[:3], self.shots)), -1)
        label = visits[:, :, None] * self.ways + np.arange(self.ways)
        learned, y = taught.reshape(*visits.shape, -1), label.repeat(self.shots, -1)
        learned, y = (np.take_along_axis(values, order, -1) for values in (learned, y))
        asked = shown[..., : self.queries].reshape(*visits.shape, -1)
        needed, among = np.unique(np.concatenate([learned.ravel(), asked.ravel()]), return_inverse=True)
        digest = np.concatenate([learned.reshape(len(rows), -1), asked.reshape(len(rows), -1)], -1)
        return Streams(
            inputs=self.classes.images[torch.from_numpy(needed)],
            rows=torch.from_numpy(among[: learned.size].reshape(learned.shape)),
            y=torch.from_numpy(y),
            query_rows=torch.from_numpy(among[learned.size :].reshape(asked.shape)),
            query_y=torch.from_numpy(label.repeat(self.queries, -1)),
            index=torch.as_tensor(np.asarray(indices, np.int64)),
            key=keys(self.seed, self.split, indices),
            digest=checksum(torch.from_numpy(digest) + 1),
            classes=self.groups * self.ways,
            points=self.points,
            task={
                "classes": torch.from_numpy(ids.reshape(len(rows), -1)),
                "visits": torch.from_numpy(visits),
                "returns": torch.from_numpy((number > 0).astype(np.int64)),
            },
        )

    def schedule(self, rng: TaskStreams) -> tuple[np.ndarray, np.ndarray]:
        """Which of a stream's groups is visited when, (T, J), and the order of a visit's examples, (T, J, ways · N)."""
        rounds = -(-self.experiences // self.groups)
        lots = rng.uniform(0.0, 1.0, rounds * self.groups, 2 + self.ways * self.shots)
        order = np.argsort(lots[:, : self.experiences, 2:], -1)
        if self.returns is None:
            turns = np.argsort(lots[..., 1].reshape(len(lots), rounds, self.groups), -1)
            return turns.reshape(len(lots), -1)[:, : self.experiences], order
        return np.stack([self._wander(of_stream) for of_stream in lots[:, : self.experiences, :2]]), order

    def _wander(self, lots: np.ndarray) -> np.ndarray:
        """Groups, numbered as they are first visited, by two lots for each visit: whether to return, and whereto."""
        assert self.returns is not None
        visits: list[int] = []
        left = [self.visits] * self.groups
        for again, which in lots:
            known = max(visits, default=-1) + 1
            back = [g for g in range(known) if left[g] and g != visits[-1]]
            if known < self.groups and not (back and again < self.returns):
                chosen = known
            else:
                back = back or [visits[-1]]
                chosen = back[min(int(which * len(back)), len(back) - 1)]
            left[chosen] -= 1
            visits.append(chosen)
        return np.array(visits)


class ReturningStreams(StreamDataModule):
    """Streams over the groups of an image data set, as Omniglot's alphabets, in which groups return.

    An experience is a visit to a group: ``shots`` images of each of ``ways`` of its classes, in random order. At every
    visit these are the same classes, and other images. ``queries`` images of each class are asked about at all of its
    visits and never learned. A label tells group and class: group · ways + class, by the group's place in the stream.
    ``Streams.task`` has the group of each visit by that place ("visits") and whether it was there before ("returns").

    Args:
        source: the images and their split into classes. Its ways, shots and queries are not used, its seed and, unless
            it names another, its root are this one's.
        groups: of a stream, drawn from the split.
        train_groups, val_groups: of meta-training and meta-validation, where they differ (None: the same).
        ways: classes of a group, drawn for each stream.
        experiences: J, visits of a stream.
        shots, queries: of each class.
        returns: probability with which a visit is a return to a group other than the last one's, all alike; where it
            is none, and some are left, a new one is visited. A group is visited no more than it has new images for.
            None visits all groups in turn, in another order in each of experiences / groups rounds.
        root: folder of the data and its cache.
        common: see StreamDataModule; its shots and queries are of each class here.
    """

    def __init__(
        self,
        source: ImageDataModule,
        groups: int = 5,
        ways: int = 5,
        experiences: int = 20,
        shots: int = 1,
        queries: int = 5,
        returns: float | None = 0.5,
        train_groups: int | None = None,
        val_groups: int | None = None,
        root: str = DEFAULT_ROOT,
        **common: Any,
    ) -> None:
        super().__init__(experiences, shots, queries, **common)
        at_least(2, ways=ways)
        at_least(1, groups=groups, train_groups=train_groups, val_groups=val_groups)
        at_least(1, train_queries=self.train_queries)
        if returns is not None and not 0 <= returns <= 1:
            raise ValueError(f"returns is {returns} but must be a probability between 0 and 1")
        source.seed = self.seed
        if source.root == DEFAULT_ROOT:
            source.root = root
        self.source, self.root, self.ways, self.returns = source, root, ways, returns
        self.groups = {"train": train_groups or groups, "val": val_groups or groups, "test": groups}

    def prepare_data(self) -> None:
        self.source.trainer = self.trainer
        self.source.prepare_data()

    def network_settings(self) -> dict[str, Any]:
        return self.source.network_settings()

    @property
    def identity(self) -> str:
        return f"{type(self.source).__name__}, {self.groups['test']} groups, returns {self.returns}"

    def task_shape(self) -> dict[str, int]:
        return {"ways": self.ways, **super().task_shape()}

    def build(self, split: str) -> ReturningStreamTasks:
        experiences, shots, queries, points = self.shape_of(split)
        return ReturningStreamTasks(
            self.source.classes(split),
            self.groups[split],
            self.ways,
            experiences,
            shots,
            queries,
            points,
            returns=self.returns,
            seed=self.seed,
            split=split,
        )

    def normalize(self, inputs: Tensor) -> Tensor:
        return self.source.normalize(inputs)
