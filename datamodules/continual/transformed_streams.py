"""Domain-incremental streams of images: every experience has the same classes, seen in another way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.continual.streams import StreamDataModule, Streams, StreamTasks, enough, keys
from datamodules.core.episodes import checksum
from datamodules.core.errors import DataError, at_least
from datamodules.core.streams import TaskStreams
from datamodules.images.tasks import DEFAULT_ROOT, ImageClasses, ImageDataModule

Transform = Literal["rotation", "permutation"]
_EXPERIENCES, _TRANSFORMS = 2, 3  # what the streams of chance of an experience are drawn for


def rotated(images: Tensor, degrees: float) -> Tensor:
    """Images (N, C, H, W) uint8 turned anticlockwise about their middle, bilinear, black where nothing was."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    h, w = images.shape[-2:]
    # By pixels: what is not square is turned and not sheared.
    back = torch.tensor([[c, -s * h / w, 0.0], [s * w / h, c, 0.0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(back, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False).round().clamp(0, 255).byte()


class TransformedStreamTasks(StreamTasks):
    """Streams over the same classes; see TransformedStreams for what an experience is.

    Args:
        classes: of the split.
        ways: classes of a stream.
        experiences, shots, queries, points: see Streams: J, N, Q.
        transform, degrees, held_out: see TransformedStreams.
        seed, split: of the streams.

    Raises:
        DataError: too few classes or images.
    """

    def __init__(
        self,
        classes: ImageClasses,
        ways: int,
        experiences: int,
        shots: int,
        queries: int,
        points: tuple[int, ...],
        *,
        transform: Transform,
        degrees: float,
        held_out: float,
        seed: int,
        split: str,
    ) -> None:
        prefix = "train_" if split == "train" else ""
        enough(len(classes), ways, split, "classes", "classes")
        least = int(np.sort(classes.counts)[:ways].sum())  # images of the smallest classes, which a stream may have
        asked = round(held_out * least)
        for have, need, what, setting in (
            (least - asked, shots, "images to learn from", f"{prefix}shots"),
            (asked, queries, "images to ask about", f"{prefix}queries"),
        ):
            if have < need:
                raise DataError(
                    f"{ways} classes ({split}) have {have} {what} but an experience needs {need}: "
                    f"lower {setting} to {have}, or change held_out, which is {held_out}"
                )
        self.classes, self.ways, self.experiences, self.shots, self.queries = classes, ways, experiences, shots, queries
        self.points, self.transform, self.degrees, self.held_out = points, transform, degrees, held_out
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
        t, j, n = len(indices), self.experiences, self.shots + self.queries
        chosen = np.sort(TaskStreams(self.seed, self.split, indices).choice(len(self.classes), self.ways), -1)
        angles = np.stack([self.angles(number, indices) for number in range(j)], 1)
        taken, labels, inputs, marks = [], [], [], []
        for place, index in enumerate(indices):
            learned, asked, label = self.parts(int(index), chosen[place])
            for number in range(j):
                rng = TaskStreams(self.seed, self.split, [index], _EXPERIENCES, number)
                mine = learned[np.argsort(rng.bits(len(learned))[0])[: self.shots]]
                other = asked[np.argsort(rng.bits(len(asked))[0])[: self.queries]]
                rows = np.concatenate([mine, other])
                images = self.classes.images[torch.from_numpy(rows)]
                if self.transform == "rotation":
                    inputs.append(rotated(images, angles[place, number]))
                    marks.append(np.array([angles[place, number]]).view(np.int64))
                else:
                    order = self.permutation(number, int(index))
                    inputs.append(images.flatten(2)[..., torch.from_numpy(order)].view_as(images))
                    marks.append(order)
                taken.append(rows)
                labels.append(label[rows])
        numbers = np.concatenate([np.stack(taken) + 1, np.stack(marks)], 1).reshape(t, -1)
        place = torch.arange(t * j * n).view(t, j, n)  # a transformed image is met once
        y = torch.from_numpy(np.stack(labels)).view(t, j, n)
        return Streams(
            inputs=torch.cat(inputs),
            rows=place[..., : self.shots],
            y=y[..., : self.shots],
            query_rows=place[..., self.shots :],
            query_y=y[..., self.shots :],
            index=torch.as_tensor(np.asarray(indices, np.int64)),
            key=keys(self.seed, self.split, indices),
            digest=checksum(torch.from_numpy(numbers)),
            classes=self.ways,
            points=self.points,
            task={"angles": torch.from_numpy(angles)} if self.transform == "rotation" else {},
        )

    def parts(self, index: int, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of the split that a stream teaches, others that it asks about, and each row's label in the stream."""
        label = np.full(len(self.classes.images), -1)
        for k, one in enumerate(chosen):
            start = self.classes.starts[one]
            label[start : start + self.classes.counts[one]] = k
        rows = np.flatnonzero(label >= 0)
        shuffled = rows[np.argsort(TaskStreams(self.seed, self.split, [index], _EXPERIENCES).bits(len(rows))[0])]
        asked = round(self.held_out * len(rows))
        return shuffled[asked:], shuffled[:asked], label

    def angles(self, number: int, indices: Sequence[int]) -> np.ndarray:
        """By how much an experience's images are turned, degrees, (T,)."""
        within = TaskStreams(self.seed, self.split, indices, _TRANSFORMS, number).uniform(0.0, 1.0, 1)[:, 0]
        return (number + within) * self.degrees / self.experiences

    def permutation(self, number: int, index: int) -> np.ndarray:
        """Where an experience's images have each pixel from, (H · W,)."""
        pixels = math.prod(self.classes.images.shape[2:])
        return np.argsort(TaskStreams(self.seed, self.split, [index], _TRANSFORMS, number).bits(pixels)[0])


class TransformedStreams(StreamDataModule):
    """Domain-incremental streams over an image data set: MNIST Rotations and Permutations, of whatever images.

    All experiences of a stream have the same classes, and labels mean the same in all of them. An experience is
    ``shots`` images of any of these classes that are learned and ``queries`` that are not, all turned by one angle or
    with their pixels permuted alike. Angles lie, one each, anywhere in as many equal parts of ``degrees`` as there are
    experiences, in rising order (Lopez-Paz and Ranzato, NeurIPS 2017, their data files; Riemer et al., ICLR 2019). No
    image that a stream asks about is learned in it, turned in whatever way. Meta-train, -val and -test have the
    source's splits, and transforms of their own.

    Args:
        source: the images. Its ways, shots and queries are not used, its seed and, unless it names another, its root
            are this one's.
        transform: "rotation" or "permutation".
        experiences: J (20).
        shots, queries: N and Q of an experience, over all classes (1,000 of MNIST's images are learned, or 200).
        classes: of a stream, drawn from the split.
        degrees: the range of angles.
        held_out: share of the split's images that a stream asks about, another for every stream.
        root: folder of the data and its cache.
        common: see StreamDataModule.
    """

    def __init__(
        self,
        source: ImageDataModule,
        transform: Transform = "rotation",
        experiences: int = 20,
        shots: int = 1000,
        queries: int = 200,
        classes: int = 10,
        degrees: float = 180.0,
        held_out: float = 0.25,
        root: str = DEFAULT_ROOT,
        **common: Any,
    ) -> None:
        super().__init__(experiences, shots, queries, **common)
        at_least(2, experiences=experiences, classes=classes)
        if not 0 < held_out < 1:
            raise ValueError(f"held_out is {held_out} but must be a share between 0 and 1")
        if not 0 < degrees <= 360:
            raise ValueError(f"degrees is {degrees} but must be above 0 and at most 360")
        source.seed = self.seed
        if source.root == DEFAULT_ROOT:
            source.root = root
        self.source, self.root, self.classes = source, root, classes
        self.transform: Transform = transform
        self.degrees, self.held_out = degrees, held_out

    def prepare_data(self) -> None:
        self.source.trainer = self.trainer
        self.source.prepare_data()

    def network_settings(self) -> dict[str, Any]:
        return self.source.network_settings()

    @property
    def identity(self) -> str:
        return f"{type(self.source).__name__}, {self.transform}"

    def build(self, split: str) -> TransformedStreamTasks:
        experiences, shots, queries, points = self.shape_of(split)
        return TransformedStreamTasks(
            self.source.classes(split),
            self.classes,
            experiences,
            shots,
            queries,
            points,
            transform=self.transform,
            degrees=self.degrees,
            held_out=self.held_out,
            seed=self.seed,
            split=split,
        )

    def normalize(self, inputs: Tensor) -> Tensor:
        return self.source.normalize(inputs)
