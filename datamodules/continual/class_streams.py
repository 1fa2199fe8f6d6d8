"""Class-incremental streams of images: every experience teaches a class that was not there before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.continual.streams import StreamDataModule, Streams, StreamTasks, enough, keys
from datamodules.core.episodes import checksum
from datamodules.core.errors import DataError, at_least
from datamodules.core.streams import TaskStreams
from datamodules.images.tasks import DEFAULT_ROOT, ImageClasses, ImageDataModule

Order = Literal["random", "stored", "groups"]
Remembered = Literal["all", "others", "first_half"]


class ClassStreamTasks(StreamTasks):
    """Streams of classes, drawn without replacement; the images of each are shuffled.

    Args:
        classes: of the split.
        experiences, shots, queries, points: see Streams: J, N, Q.
        order: in which a stream's classes arrive, see ClassStreams.
        remember: R.
        remember_from: see ClassStreams.
        own_labels: a class's label is its number in the split, the same in every stream; otherwise its place in the
            stream.
        seed, split: of the streams.

    Raises:
        DataError: too few classes, or images of a class.
    """

    def __init__(
        self,
        classes: ImageClasses,
        experiences: int,
        shots: int,
        queries: int,
        points: tuple[int, ...],
        *,
        order: Order,
        remember: int,
        remember_from: Remembered,
        own_labels: bool,
        seed: int,
        split: str,
    ) -> None:
        prefix = {"train": "train_", "val": "val_"}.get(split, "")
        halved = remember > 0 and remember_from == "first_half"
        self.first = len(classes) // 2 if halved else 0  # of the classes that streams are drawn from
        enough(len(classes) - self.first, experiences, split, "classes", f"{prefix}experiences")
        examples, k = "train_" if split == "train" else "", int(classes.counts.argmin())
        if (least := int(classes.counts[k])) < shots + queries:
            raise DataError(
                f"class {classes.names[k]!r} ({split}) has {least} images but an experience needs {shots} shots + "
                f"{queries} queries: lower {examples}shots or {examples}queries, or leave the class out"
            )
        if remember and remember_from == "others" and len(classes) == experiences:
            raise DataError(f"all {experiences} classes ({split}) are in a stream, none is left to remember: give more")
        self.classes, self.experiences, self.shots, self.queries = classes, experiences, shots, queries
        self.points, self.order, self.remember, self.remember_from = points, order, remember, remember_from
        self.own_labels, self.seed, self.split = own_labels, seed, split
        self.group = np.unique(classes.groups, return_inverse=True)[1]

    @property
    def class_names(self) -> list[str]:
        return self.classes.names

    @property
    def group_names(self) -> list[str]:
        return self.classes.groups

    def class_digests(self) -> frozenset[int]:
        return self.classes.digests()

    def sample(self, indices: Sequence[int]) -> Streams:
        # In random order all classes and images are, so that more experiences change none before them.
        rng = TaskStreams(self.seed, self.split, indices)
        chosen = self.first + np.argsort(rng.bits(len(self.classes) - self.first), -1)[:, : self.experiences]
        chosen = self.ordered(chosen)
        lots = rng.uniform(0.0, 1.0, self.experiences, int(self.classes.counts.max()))
        lots[np.arange(lots.shape[-1]) >= self.classes.counts[chosen][..., None]] = 2.0  # no such image
        taken = np.argsort(lots, -1, "stable")[..., : self.shots + self.queries]  # (T, J, N + Q)
        rows = self.classes.starts[chosen][..., None] + taken
        place = np.broadcast_to(np.arange(self.experiences), chosen.shape)
        label = torch.from_numpy(np.array(chosen if self.own_labels else place))[..., None]
        before = self.remembered(chosen, TaskStreams(self.seed, self.split, indices, 2))
        needed, numbered = np.unique(
            np.concatenate([rows.ravel(), *([] if before is None else [before[0].ravel()])]), return_inverse=True
        )
        among = torch.from_numpy(numbered)  # the inputs' rows, of which each is held once
        part = among[: rows.size].view(rows.shape)
        return Streams(
            inputs=self.classes.images[torch.from_numpy(needed)],
            rows=part[..., : self.shots],
            y=label.expand(-1, -1, self.shots),
            query_rows=part[..., self.shots :],
            query_y=label.expand(-1, -1, self.queries),
            index=torch.as_tensor(np.asarray(indices, np.int64)),
            key=keys(self.seed, self.split, indices),
            digest=checksum(torch.from_numpy(rows.reshape(len(rows), -1)) + 1),
            classes=len(self.classes) if self.own_labels else self.experiences,
            points=self.points,
            task={"classes": torch.from_numpy(chosen)},
            remembered_rows=None if before is None else among[rows.size :].view(before[0].shape),
            remembered_y=None if before is None else before[1],
        )

    def ordered(self, chosen: np.ndarray) -> np.ndarray:
        """Classes (T, J), drawn in random order, in that in which they arrive."""
        if self.order == "random":
            return chosen
        if self.order == "stored":
            return np.sort(chosen, -1)
        group = self.group[chosen]  # in the order of each group's first class, which is random
        first = (group[:, :, None] == group[:, None, :]).argmax(-1)
        return np.take_along_axis(chosen, np.argsort(first, -1, "stable"), -1)

    def remembered(self, chosen: np.ndarray, rng: TaskStreams) -> tuple[np.ndarray, Tensor] | None:
        """Rows of the split (T, R) and labels (T, R) of images of classes drawn with replacement; None for no R."""
        if not self.remember:
            return None
        if self.remember_from == "all":
            drawn = rng.integers(len(self.classes), self.remember)
        elif self.remember_from == "first_half":
            drawn = rng.integers(self.first, self.remember)
        else:
            drawn = rng.integers(len(self.classes) - self.experiences, self.remember)
            for one in np.sort(chosen, -1).T:  # count on past those of the stream, lowest first
                drawn = drawn + (drawn >= one[:, None])
        instance = rng.integers(self.classes.counts[drawn], self.remember)
        return self.classes.starts[drawn] + instance, torch.from_numpy(drawn)


class ClassStreams(StreamDataModule):
    """Class-incremental streams over the classes of an image data set.

    An experience is a class: ``shots`` images that are learned, one after another, and ``queries`` that are not. In
    meta-validation and meta-test a class's label is its place in the stream. Meta-training streams may be short, and
    have their classes' own labels, by which a head has a row for each class of the split (``own_labels``).

    Args:
        source: the images and their split into classes. Its ways, shots and queries are not used, its seed and, unless
            it names another, its root are this one's.
        order: of a stream's classes: "random"; "stored" as the source has them, so that those of one alphabet follow
            each other; "groups" all of a group (alphabet) together, groups in random order.
        remember: R, images in meta-training of what was learned before the stream.
        remember_from: which classes these are of: "all" of the split, "others" than the stream's, or the "first_half"
            of the split, where streams are of the second half alone.
        own_labels: whether meta-training streams have their classes' own labels; otherwise a class's label is its place
            in the stream there too, which is less to compute for a learner without a head of all classes.
        root: folder of the data and its cache.
        experiences, shots, queries and others: see StreamDataModule.
    """

    def __init__(
        self,
        source: ImageDataModule,
        experiences: int = 20,
        shots: int = 15,
        queries: int = 5,
        order: Order = "random",
        remember: int = 0,
        remember_from: Remembered = "all",
        own_labels: bool = True,
        root: str = DEFAULT_ROOT,
        **common: Any,
    ) -> None:
        super().__init__(experiences, shots, queries, **common)
        at_least(2, experiences=experiences)
        at_least(0, remember=remember)
        if remember and not own_labels:
            raise ValueError(f"own_labels is false but remember is {remember}: what is remembered has no other labels")
        source.seed = self.seed
        if source.root == DEFAULT_ROOT:
            source.root = root
        self.source, self.root, self.remember = source, root, remember
        self.order: Order = order
        self.remember_from: Remembered = remember_from
        self.own_labels = own_labels

    def prepare_data(self) -> None:
        self.source.trainer = self.trainer
        self.source.prepare_data()

    def network_settings(self) -> dict[str, Any]:
        known = self.source.network_settings()
        try:
            return known | {"classes": len(self.source.classes("train"))}
        except (DataError, NotImplementedError):  # not there yet
            return known

    @property
    def identity(self) -> str:
        return type(self.source).__name__

    def build(self, split: str) -> ClassStreamTasks:
        experiences, shots, queries, points = self.shape_of(split)
        train = split == "train"
        return ClassStreamTasks(
            self.source.classes(split),
            experiences,
            shots,
            queries,
            points,
            order="random" if train else self.order,
            remember=self.remember if train else 0,
            remember_from=self.remember_from,
            own_labels=train and self.own_labels,
            seed=self.seed,
            split=split,
        )

    def normalize(self, inputs: Tensor) -> Tensor:
        return self.source.normalize(inputs)
