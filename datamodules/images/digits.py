"""Digits: handwritten digits that scikit-learn installs, so that they need no download."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.core.errors import at_least
from datamodules.core.streams import SPLITS
from datamodules.images.preprocessing import ink, ink_form
from datamodules.images.tasks import ImageClasses, ImageDataModule, shuffled

STORED = 8  # height and width of scikit-learn's images, pixels of 17 shades
SHARES = (0.2, 0.4, 0.4)  # of every class's images, for meta-train, -val and -test


def enlarged(grey: Tensor, size: int) -> Tensor:
    """Images (N, 1, 8, 8) in [0, 255] as (N, 1, size, size) uint8."""
    return F.interpolate(grey, (size, size), mode="bilinear", antialias=True).round().clamp(0, 255).byte()


class Digits(ImageDataModule):
    """The 1,797 images of ten digits of Alpaydin and Kaynak (UCI 1998), as scikit-learn has them.

    The three splits have the same ten classes and other images of them: a fifth for meta-train, two fifths each for
    meta-val and meta-test, by a shuffle of ``seed``. That is what streams over the same classes need. Few-shot tasks of
    it ask about classes that meta-training knew, and are no measure of learning new ones.

    Args:
        size: height and width, pixels, to which the 8 × 8 images are enlarged (bilinear); 28 is MNIST's.
        common: see ImageDataModule.
    """

    def __init__(self, size: int = 28, **common: Any) -> None:
        super().__init__(**common)
        at_least(1, size=size)
        self.size = size

    @cached_property
    def images(self) -> tuple[Tensor, np.ndarray]:
        """All images (N, 1, size, size) uint8, and which digit each is."""
        from sklearn.datasets import load_digits  # takes a moment, which others need not wait

        shades, label = load_digits(return_X_y=True)
        grey = torch.from_numpy(shades).float().view(-1, 1, STORED, STORED) * (255 / 16)
        return enlarged(grey, self.size), np.asarray(label)

    def classes(self, split: str) -> ImageClasses:
        images, label = self.images
        rows, counts = [], []
        for digit in range(10):
            order = [int(name) for name in shuffled([str(i) for i in np.flatnonzero(label == digit)], self.seed)]
            ends = np.rint(np.cumsum((0, *SHARES)) * len(order)).astype(int)
            part = SPLITS.index(split)
            rows += order[ends[part] : ends[part + 1]]
            counts.append(int(ends[part + 1] - ends[part]))
        return ImageClasses(images[rows], np.array(counts), [f"digit/{k}" for k in range(10)], ["digit"] * 10)

    def to_store(self, image: Any) -> Tensor:
        return enlarged(ink(image, STORED)[None].float(), self.size)[0]

    @property
    def stored_form(self) -> str:
        return ink_form(self.size)
