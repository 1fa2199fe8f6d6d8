"""Streams of single examples of a few classes that return: the one-shot stream of memory-augmented networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from datamodules.continual.streams import StreamDataModule, Streams, StreamTasks, enough, keys
from datamodules.core.episodes import checksum
from datamodules.core.errors import DataError, at_least
from datamodules.core.streams import TaskStreams
from datamodules.images.tasks import DEFAULT_ROOT, ImageClasses, ImageDataModule


def with_turns(classes: ImageClasses) -> ImageClasses:
    """Every turn by a multiple of 90° as a class of its own, four times as many."""
    turned = [torch.rot90(classes.images, k, (2, 3)) for k in range(4)]
    names = [f"{name}@{90 * k}" if k else name for k in range(4) for name in classes.names]
    return ImageClasses(torch.cat(turned), np.tile(classes.counts, 4), names, classes.groups * 4)


class InstanceStreamTasks(StreamTasks):
    """Every class of a stream comes so often, all in random order, each time with another image.

    Labels are drawn for each stream: nothing but the stream itself tells which class has which.

    Args:
        classes: of the split.
        ways: classes of a stream.
        instances: of each class.
        seed, split: of the streams.
    """

    def __init__(self, classes: ImageClasses, ways: int, instances: int, *, seed: int, split: str) -> None:
        enough(len(classes), ways, split, "classes", "ways")
        k = int(classes.counts.argmin())
        if (least := int(classes.counts[k])) <= instances:
            raise DataError(
                f"class {classes.names[k]!r} ({split}) has {least} images but a stream shows {instances} and asks "
                f"about one that it did not show: lower instances to {least - 1}, or leave the class out"
            )
        self.classes, self.ways, self.instances, self.seed, self.split = classes, ways, instances, seed, split
        self.points = (ways * instances,)

    @property
    def class_names(self) -> list[str]:
        return self.classes.names

    @property
    def group_names(self) -> list[str]:
        return self.classes.groups

    def class_digests(self) -> frozenset[int]:
        return self.classes.digests()

    def sample(self, indices: Sequence[int]) -> Streams:
        rng = TaskStreams(self.seed, self.split, indices)
        chosen = rng.choice(len(self.classes), self.ways)  # (T, ways), in the order of their labels
        counts = self.classes.counts[chosen]
        shown = rng.choice(counts, self.instances + 1, self.ways)  # the last is asked about
        rows = self.classes.starts[chosen][..., None] + shown
        order = np.argsort(rng.bits(self.ways * self.instances), -1)
        label = np.take_along_axis(np.arange(self.ways).repeat(self.instances)[None].repeat(len(rows), 0), order, 1)
        arriving = np.take_along_axis(rows[..., :-1].reshape(len(rows), -1), order, 1)
        asked = np.take_along_axis(rows[..., -1], label, 1)
        needed, numbered = np.unique(np.concatenate([arriving.ravel(), asked.ravel()]), return_inverse=True)
        among = torch.from_numpy(numbered).view(2, *arriving.shape, 1)
        y = torch.from_numpy(label)[..., None]
        return Streams(
            inputs=self.classes.images[torch.from_numpy(needed)],
            rows=among[0],
            y=y,
            query_rows=among[1],
            query_y=y,
            index=torch.as_tensor(np.asarray(indices, np.int64)),
            key=keys(self.seed, self.split, indices),
            digest=checksum(torch.from_numpy(np.concatenate([arriving, asked, label], 1)) + 1),
            classes=self.ways,
            points=self.points,
            task={"classes": torch.from_numpy(chosen)},
        )


class InstanceStreams(StreamDataModule):
    """Streams in which a few classes of images return: each experience is one image (Santoro et al., ICML 2016).

    What a learner says of an image before it is told its label is measured by how often it has seen its class
    (``instances``): from chance at the first time on.

    Args:
        source: the images and their split into classes. Its ways, shots and queries are not used, its seed and, unless
            it names another, its root are this one's.
        ways: classes of a stream.
        instances: of each class, in random order.
        train_ways, train_instances: of meta-training, where they differ (None: the same).
        turns: in meta-training, every turn by a multiple of 90° is a class of its own.
        root: folder of the data and its cache.
        **common: see StreamDataModule.
    """

    def __init__(
        self,
        source: ImageDataModule,
        ways: int = 5,
        instances: int = 10,
        train_ways: int | None = None,
        train_instances: int | None = None,
        turns: bool = False,
        root: str = DEFAULT_ROOT,
        **common: Any,
    ) -> None:
        at_least(2, ways=ways, train_ways=train_ways)
        at_least(1, instances=instances, train_instances=train_instances)
        super().__init__(ways * instances, 1, 1, **common)
        self.ways, self.instances = ways, instances
        self.train_ways, self.train_instances = train_ways or ways, train_instances or instances
        source.seed = self.seed
        if source.root == DEFAULT_ROOT:
            source.root = root
        self.source, self.turns, self.root = source, turns, root

    def prepare_data(self) -> None:
        self.source.trainer = self.trainer
        self.source.prepare_data()

    def task_shape(self) -> dict[str, int]:
        return {"ways": self.ways, "experiences": self.ways * self.instances}

    def network_settings(self) -> dict[str, Any]:
        return self.source.network_settings() | {"ways": self.ways}

    @property
    def identity(self) -> str:
        return type(self.source).__name__

    def build(self, split: str) -> InstanceStreamTasks:
        classes, train = self.source.classes(split), split == "train"
        return InstanceStreamTasks(
            with_turns(classes) if self.turns and train else classes,
            self.train_ways if train else self.ways,
            self.train_instances if train else self.instances,
            seed=self.seed,
            split=split,
        )

    def normalize(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.source.normalize(inputs)
