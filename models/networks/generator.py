"""A network from vectors to images."""

from __future__ import annotations

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class Generator(nn.Module):
    """G: vectors to images in [0, 1], by transposed convolutions that double the maps.

    Args:
        shape: (channels, height, width) of an image.
        widths: channels before each of them, the last one first.
        inputs: size of a vector.
    """

    def __init__(self, shape: tuple[int, ...], widths: list[int], inputs: int) -> None:
        super().__init__()
        self.shape = shape
        self.start = (widths[-1], *(-(-side // 2 ** len(widths)) for side in shape[1:]))
        self.linear = nn.Linear(inputs, math.prod(self.start))
        channels = [*reversed(widths), shape[0]]
        self.convs = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(channels))
        # Of each image by itself, so that a fake depends on no other.
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for width in channels[:-1])

    def logits(self, z: Tensor) -> Tensor:
        """Of images (n, C, H, W), from vectors (n, inputs)."""
        x = self.linear(z).unflatten(-1, self.start)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = conv(F.relu(norm(x)))
        return x[..., : self.shape[1], : self.shape[2]]

    def forward(self, z: Tensor) -> Tensor:
        """Images (n, C, H, W) of vectors (n, inputs)."""
        return self.logits(z).sigmoid()
