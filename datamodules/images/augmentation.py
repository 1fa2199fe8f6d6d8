"""Random affine maps of training images: the same character, drawn a little differently."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.core.streams import TaskStreams


@dataclass(frozen=True)
class Warp:
    """How far each image of a meta-training task is warped, by a map of its own; uniform in both directions.

    Args:
        rotation: degrees.
        scale: fraction; width and height each change by a factor of their own, from 1 - ``scale`` to 1 + ``scale``.
        shear: sideways, fraction of the height.
        shift: pixels, each way.
    """

    rotation: float = 10.0
    scale: float = 0.2
    shear: float = 0.2
    shift: float = 2.0

    def __post_init__(self) -> None:
        for name in ("rotation", "scale", "shear", "shift"):
            if getattr(self, name) < 0:
                raise ValueError(f"warp.{name} is {getattr(self, name)}: it must be at least 0")
        if self.scale >= 1:
            raise ValueError(f"warp.scale is {self.scale}: it must be below 1, where nothing is left of an image")

    def maps(self, rng: TaskStreams, images: int, height: int, width: int) -> Tensor:
        """Where the pixels of the warped images are to be taken from, (T, images, 2, 3), in [-1, 1] by [-1, 1]."""
        u = rng.uniform(-1, 1, images, 6)
        angle = math.radians(self.rotation) * u[..., 0]
        stretch = 1 / (1 + self.scale * u[..., 1:3])
        shear = self.shear * u[..., 3]
        cos, sin = np.cos(angle), np.sin(angle)
        rows = (
            (stretch[..., 0] * cos, stretch[..., 0] * (shear * cos - sin), 2 * self.shift / width * u[..., 4]),
            (stretch[..., 1] * sin, stretch[..., 1] * (shear * sin + cos), 2 * self.shift / height * u[..., 5]),
        )
        return torch.from_numpy(np.stack([np.stack(row, -1) for row in rows], -2).astype(np.float32))

    def __call__(self, images: Tensor, rng: TaskStreams) -> Tensor:
        """Warped copies of uint8 images (T, N, C, H, W), by the tasks' streams."""
        maps = self.maps(rng, images.shape[1], *images.shape[-2:])
        return moved(images.flatten(0, 1).float(), maps.flatten(0, 1)).round().to(torch.uint8).view_as(images)


def moved(images: Tensor, maps: Tensor) -> Tensor:
    """Images (N, C, H, W) by affine maps (N, 2, 3) of where their pixels come from; outside, the edge repeats."""
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
