"""Chance that is a function of numbers alone: the same on every device, and where tasks are mapped over."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), its constants as signed words.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def _shifted(word: Tensor, by: int) -> Tensor:
    """A logical shift to the right, where torch's keeps the sign."""
    return (word >> by) & ((1 << (64 - by)) - 1)


def _mixed(word: Tensor) -> Tensor:
    word = (word ^ _shifted(word, 30)) * _FIRST
    word = (word ^ _shifted(word, 27)) * _SECOND
    return word ^ _shifted(word, 31)


class Chance(NamedTuple):
    """Where a stream of chance has got to; a part of the state of whoever draws from it.

    Attributes:
        key: of the stream, () int64.
        drawn: numbers taken so far, () int64.
    """

    key: Tensor
    drawn: Tensor

    @classmethod
    def of(cls, key: Tensor) -> Chance:
        """The beginning of the stream of this key."""
        return cls(key, torch.zeros_like(key))

    def uniform(self, *shape: int) -> tuple[Tensor, Chance]:
        """Numbers in [0, 1), (*shape) float64 (float32 on MPS), and where the stream is after them."""
        count = 1
        for size in shape:
            count *= size
        place = self.drawn + torch.arange(1, count + 1, device=self.key.device)
        bits = _shifted(_mixed(_mixed(self.key) + place * _GOLDEN), 11)
        precise = torch.float32 if bits.device.type == "mps" else torch.float64
        return (bits.to(precise) * 2.0**-53).reshape(shape), Chance(self.key, self.drawn + count)

    def integers(self, high: Tensor | int, *shape: int) -> tuple[Tensor, Chance]:
        """Whole numbers in [0, high), (*shape) int64; ``high`` broadcasts against the result."""
        values, after = self.uniform(*shape)
        return torch.minimum((values * high).long(), torch.as_tensor(high, device=values.device) - 1), after
