"""Random projections of vectors that are too long to keep."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BalancedSketch(nn.Module):
    """A random projection that takes one pass over a vector: every number gets a random sign and is added to a bucket.

    Inner products are kept in expectation (Charikar, Chen and Farach-Colton, 2002), and with a standard error of some
    (‖a‖² ‖b‖² / buckets)^½; buckets hold as many numbers each. Sums are in a fixed order, also on a GPU.

    Args:
        size: of a vector.
        buckets: of what it becomes.
        seed: of signs and buckets, which are buffers.
    """

    order: Tensor
    signs: Tensor

    def __init__(self, size: int, buckets: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.buckets, self.padding = buckets, -size % buckets
        # Places in the padded vector, in the order of the buckets' rows.
        self.register_buffer("order", torch.randperm(size + self.padding, generator=generator).int())
        self.register_buffer("signs", (2 * torch.randint(2, (size,), generator=generator) - 1).to(torch.int8))

    def forward(self, vector: Tensor) -> Tensor:
        """(size,) to (buckets,)."""
        signed = nn.functional.pad(vector * self.signs, (0, self.padding))
        return signed[self.order].view(-1, self.buckets).sum(0)
