"""Few-shot image classification: one contiguous store of images, episodes gathered from it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Episodes, TaskDistribution
from datamodules.core.errors import DataError, at_least
from datamodules.core.streams import TaskStreams
from datamodules.images.augmentation import Warp

DEFAULT_ROOT = "data"
Rotations = Literal["none", "random", "classes"]


@dataclass
class ImageClasses:
    """Images by class.

    Attributes:
        images: (N, C, H, W) uint8, the classes one after the other.
        counts: (K,) int64, images of each class.
        names: K class names, unique: "alphabet/character", or a folder's name.
        groups: K group names (alphabet, script), for episodes within one group; equal names are one group.
    """

    images: Tensor
    counts: np.ndarray
    names: list[str]
    groups: list[str]

    def __post_init__(self) -> None:
        self.counts = np.asarray(self.counts, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def digests(self, images: int = 4) -> frozenset[int]:
        """A number for each class, by its first so many images: the same for all of its turns, and for its negative."""
        found = set()
        for start, count in zip(self.starts.tolist(), self.counts.tolist(), strict=True):
            first = self.images[start : start + min(images, count)].numpy()
            turned = [np.rot90(first, k, (2, 3)) for k in range(4 if first.shape[2] == first.shape[3] else 1)]
            seen = (np.ascontiguousarray(x).tobytes() for one in turned for x in (one, 255 - one))
            least = min(hashlib.sha256(content).digest() for content in seen)
            found.add(int.from_bytes(least[:8], "big", signed=True))
        return frozenset(found)

    def select(self, classes: Sequence[int]) -> ImageClasses:
        """The named classes, in the order given."""
        rows = [np.arange(self.starts[c], self.starts[c] + self.counts[c]) for c in classes]
        return ImageClasses(
            self.images[torch.from_numpy(np.concatenate(rows) if rows else np.zeros(0, np.int64))],
            self.counts[list(classes)],
            [self.names[c] for c in classes],
            [self.groups[c] for c in classes],
        )


def shuffled(names: Sequence[str], seed: int) -> list[str]:
    """Names in an order of ``seed``'s own: that of their hashes, which is the same on every platform and version."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())


def refuse_overlap(splits: Mapping[str, Sequence[str]]) -> None:
    """Refuse class splits that share a class.

    Raises:
        DataError: naming the class and its splits.
    """
    home: dict[str, str] = {}
    for split, names in splits.items():
        for name in names:
            if (other := home.setdefault(name, split)) != split:
                raise DataError(f"class {name!r} is in both {other} and {split}: leave it in one of the two")


class ImageTasks(TaskDistribution):
    """Ways-way tasks over a set of classes; episode i is a pure function of (seed, split, i).

    Args:
        classes: the split's classes.
        ways, shots, queries: classes per task; support and query images per class.
        rotations: "none"; "random" turns each class of a task by a random multiple of 90° (support and query
            alike); "classes" makes each turn of a character a class of its own (4 times as many).
        within_group: all classes of a task come from one group (an alphabet's own characters), whose number is in
            ``Episodes.task["group"]``.
        groups: names of all groups by their numbers, those of other splits too; None numbers the split's own.
        aligned: the j-th image of every class has one number, another for each j: where images are numbered by who
            drew them, one drawer's characters are the support and another's the queries.
        warp: how the images are warped; None leaves them as they are.
        seed, split: of the episodes.
        max_shots: where given, every meta-batch has as many shots as its number draws from ``shots`` to this.
        meta_batch: tasks of a meta-batch: episode i is of number i // ``meta_batch``.
        unlabelled: further images per class without labels; support and queries are the same for any number.

    Raises:
        DataError: fewer classes than ways, or a class with fewer images than shots + queries + unlabelled.
    """

    seed: int

    def __init__(
        self,
        classes: ImageClasses,
        ways: int,
        shots: int,
        queries: int,
        *,
        seed: int,
        split: str,
        rotations: Rotations = "none",
        within_group: bool = False,
        groups: Sequence[str] | None = None,
        aligned: bool = False,
        warp: Warp | None = None,
        max_shots: int | None = None,
        meta_batch: int = 1,
        unlabelled: int = 0,
    ) -> None:
        self.aligned, self.warp = aligned, warp
        self.classes, self.ways, self.shots, self.queries = classes, ways, shots, queries
        self.unlabelled = unlabelled
        self.max_shots, self.meta_batch = max_shots or shots, meta_batch
        self.seed, self.split, self.rotations = seed, split, rotations
        self.turns = 1 if rotations == "none" else 4
        total = len(classes) * (4 if rotations == "classes" else 1)
        if total < ways:
            cure = "give the split more classes" + (f", or lower ways to {total}" if total > 1 else "")
            raise DataError(f"the {split} split has {total} classes but a task needs {ways}: {cure}")
        if (short := classes.counts < self.max_shots + queries + unlabelled).any():
            k = int(np.flatnonzero(short)[0])
            raise DataError(
                f"class {classes.names[k]!r} ({split}) has {classes.counts[k]} images but a task needs "
                f"{self.max_shots} shots + {queries} queries{f' + {unlabelled} unlabelled' if unlabelled else ''} of "
                "each class: lower them, add images, or leave the class out"
            )
        self.members: list[np.ndarray] | None = None
        if within_group:
            names, own = np.array(classes.groups), tuple(dict.fromkeys(classes.groups))
            self.members = [np.flatnonzero(names == g) for g in own]
            self.task_groups = ("group", own if groups is None else tuple(groups))
            self.numbers = np.array([self.task_groups[1].index(g) for g in own])
            factor = 4 if rotations == "classes" else 1
            for group in self.members:
                if len(group) * factor < ways:
                    raise DataError(
                        f"group {classes.groups[group[0]]!r} ({split}) has {len(group) * factor} classes but a task "
                        f"within one group needs {ways}: lower ways"
                    )
        images = classes.images
        self.images = images if self.turns == 1 else torch.cat([torch.rot90(images, r, (2, 3)) for r in range(4)])

    @property
    def class_names(self) -> list[str]:
        """Names by the class ids of ``Episodes.task["classes"]``."""
        turns = range(4) if self.rotations == "classes" else range(1)
        return [f"{n}@{90 * r}" if r else n for r in turns for n in self.classes.names]

    @property
    def group_names(self) -> list[str]:
        """Groups by the class ids of ``Episodes.task["classes"]``."""
        return self.classes.groups * (4 if self.rotations == "classes" else 1)

    def class_digests(self) -> frozenset[int]:
        return self.classes.digests()

    def shots_of(self, indices: Sequence[int]) -> int:
        """The shots of the meta-batch that these episodes are of.

        Raises:
            ValueError: they are of several, which may have different shots.
        """
        if self.max_shots == self.shots:
            return self.shots
        first, *others = {int(i) // self.meta_batch for i in indices}
        if others:
            raise ValueError("shots differ from one meta-batch to the next: sample the tasks of one at a time")
        # A stream that is no episode's: meta-batches are numbered where episodes never get to.
        rng = TaskStreams(self.seed, self.split, [2**63 + first])
        return self.shots + int(rng.integers(self.max_shots - self.shots + 1)[0])

    def sample(self, indices: Sequence[int]) -> Episodes:
        return self.draw(indices, TaskStreams(self.seed, self.split, indices))

    def draw(self, indices: Sequence[int], rng: TaskStreams) -> Episodes:
        """The episodes of these numbers, as their streams have them."""
        shots = self.shots_of(indices)
        tasks, per_class = len(indices), shots + self.queries
        factor = 4 if self.rotations == "classes" else 1
        facts = {}
        if self.members is None:
            drawn = rng.choice(len(self.classes) * factor, self.ways)
            base, turn = drawn % len(self.classes), drawn // len(self.classes)
        else:
            group = rng.integers(len(self.members))
            facts["group"] = torch.from_numpy(self.numbers[group])
            sizes = np.array([len(m) for m in self.members])[group]
            drawn = rng.choice(sizes * factor, self.ways)
            turn = drawn // sizes[:, None]
            base = np.stack([self.members[g][d] for g, d in zip(group, drawn % sizes[:, None], strict=True)])
        ids = base + turn * len(self.classes)
        if self.rotations == "random":
            turn = rng.integers(4, self.ways)
        counts = self.classes.counts[base]
        if self.aligned:
            instance = rng.choice(counts.min(1), per_class)[:, None].repeat(self.ways, 1)
        else:
            instance = rng.choice(counts, per_class, self.ways)  # (T, ways, shots + queries)
        first_row = (self.classes.starts[base] + turn * len(self.classes.images))[..., None]
        rows = first_row + instance
        images = self.images[torch.from_numpy(rows.reshape(-1))]
        images = self.warped(images.view(tasks, -1, *images.shape[1:]), rng).unflatten(1, (self.ways, per_class))
        label = torch.arange(self.ways)
        return Episodes(
            support_x=images[:, :, :shots].flatten(1, 2),
            support_y=label.repeat_interleave(shots).expand(tasks, -1),
            query_x=images[:, :, shots:].flatten(1, 2),
            query_y=label.repeat_interleave(self.queries).expand(tasks, -1),
            index=torch.as_tensor(np.asarray(indices, np.int64)),
            ways=self.ways,
            task={"classes": torch.from_numpy(ids), **facts},
            # A warped image is none of the split's.
            support_rows=torch.from_numpy(rows[:, :, :shots]).flatten(1) if self.warp is None else None,
            query_rows=torch.from_numpy(rows[:, :, shots:]).flatten(1) if self.warp is None else None,
            unlabelled_x=self.unlabelled_images(rng, counts, instance, first_row),
            task_groups=self.task_groups,
        )

    def unlabelled_images(
        self, rng: TaskStreams, counts: np.ndarray, taken: np.ndarray, first_row: np.ndarray
    ) -> Tensor | None:
        """Images (T, ways * unlabelled, C, H, W) besides those taken, in random order; None where none are asked for.

        Args:
            rng: drawn from after all else, so that nothing else depends on these.
            counts: images of each class, (T, ways).
            taken: the instances of the labelled images, (T, ways, n).
            first_row: of each class, (T, ways, 1).
        """
        if not self.unlabelled:
            return None
        instance = rng.choice(counts - taken.shape[-1], self.unlabelled, self.ways)
        for one in np.moveaxis(np.sort(taken, -1), -1, 0):  # count on past those that are taken, lowest first
            instance = instance + (instance >= one[..., None])
        rows = (first_row + instance).reshape(len(taken), -1)
        rows = np.take_along_axis(rows, np.argsort(rng.bits(rows.shape[1]), -1), -1)  # or their places were labels
        return self.warped(self.images[torch.from_numpy(rows)], rng)

    def warped(self, images: Tensor, rng: TaskStreams) -> Tensor:
        return images if self.warp is None else self.warp(images, rng)


class ImageDataModule(EpisodicDataModule):
    """Few-shot image classification. Subclasses say what the classes of each split are.

    Args:
        ways: classes per task.
        shots: support images per class.
        queries: query images per class in meta-validation and meta-test.
        train_ways, train_shots, train_queries: of meta-training tasks, where they differ (None: the same).
        max_train_shots: draw the shots of every training meta-batch, the same for all of its tasks, uniformly from
            ``train_shots`` to this; None for ``train_shots`` always.
        warp: warp the images of meta-training tasks at random; None leaves them as they are.
        unlabelled: further images per class that a task shows without their labels, in every split; for learners that
            use them. Support and queries are the same for any number.
        root: folder of the data and its cache.
        meta_batch_size, val_tasks, test_tasks, eval_batch_size, workers, seed: see EpisodicDataModule.
    """

    rotations: dict[str, Rotations] = {}
    within_group = False
    groups: Sequence[str] | None = None
    """Names of the groups of all splits, by the numbers that tasks within one tell; None numbers each split's own."""
    aligned = False

    def __init__(
        self,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        train_ways: int | None = None,
        train_shots: int | None = None,
        train_queries: int | None = None,
        max_train_shots: int | None = None,
        warp: Warp | None = None,
        unlabelled: int = 0,
        root: str = DEFAULT_ROOT,
        meta_batch_size: int = 32,
        val_tasks: int = 600,
        test_tasks: int = 10_000,
        eval_batch_size: int = 50,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(meta_batch_size, val_tasks, test_tasks, eval_batch_size, workers, seed)
        at_least(2, ways=ways, train_ways=train_ways)
        at_least(1, shots=shots, queries=queries, train_shots=train_shots, train_queries=train_queries)
        self.ways, self.shots, self.queries = ways, shots, queries
        self.train_ways = train_ways or ways
        self.train_shots = train_shots or shots
        self.train_queries = train_queries or queries
        at_least(self.train_shots, max_train_shots=max_train_shots)
        self.max_train_shots = max_train_shots
        self.warp = warp
        at_least(0, unlabelled=unlabelled)
        self.unlabelled = unlabelled
        self.root = root

    def network_settings(self) -> dict[str, Any]:
        from PIL import Image  # not for those who have no pictures

        try:
            channels, size, _ = self.to_store(Image.new("RGB", (64, 64))).shape
        except NotImplementedError:
            return {}
        return {"in_channels": channels, "image_size": size, "input_shape": [channels, size, size]}

    def task_shape(self) -> dict[str, int]:
        return {"ways": self.ways, "shots": self.shots, "queries": self.queries}

    def classes(self, split: str) -> ImageClasses:
        """The classes of one split."""
        raise NotImplementedError

    def to_store(self, image) -> Tensor:
        """A user's picture (PIL.Image) as this data stores its own: (C, H, W) uint8, same size and polarity."""
        raise NotImplementedError

    @property
    def stored_form(self) -> str:
        """What ``to_store`` makes of pictures, as the end of a sentence."""
        return f"what {type(self).__name__} stores"

    def build(self, split: str) -> ImageTasks:
        return self.tasks(self.classes(split), split)

    def tasks(self, classes: ImageClasses, split: str) -> ImageTasks:
        """The tasks of one split, over given classes."""
        train = split == "train"
        return ImageTasks(
            classes,
            self.train_ways if train else self.ways,
            self.train_shots if train else self.shots,
            self.train_queries if train else self.queries,
            seed=self.seed,
            split=split,
            rotations=self.rotations.get(split, "none"),
            within_group=self.within_group,
            groups=self.groups,
            aligned=self.aligned,
            warp=self.warp if train else None,
            max_shots=self.max_train_shots if train else None,
            meta_batch=self.meta_batch_size,
            unlabelled=self.unlabelled,
        )

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images of any leading shape to what the backbone sees: float32 in [0, 1]."""
        return images.float() / 255

    def on_device(self, episodes: Episodes) -> Episodes:
        names = ("support_x", "query_x", "unlabelled_x")
        images = {name: self.normalize(x) for name in names if (x := getattr(episodes, name)) is not None}
        return dataclasses.replace(episodes, **images)
