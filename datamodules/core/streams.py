"""One random stream per task: what makes an episode a pure function of (seed, split, index)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

SPLITS = ("train", "val", "test")
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014): a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class TaskStreams:
    """Independent SplitMix64 streams, one for each task of a meta-batch, drawn from together.

    A stream depends on (seed, split, index) alone: not on the other tasks of the batch, nor on the process that
    draws it. All results have the tasks as their first dimension.

    Args:
        seed: the data seed of the run, any integer.
        split: "train", "val" or "test".
        indices: the episodes' numbers, (T,), each >= 0.
        more: further numbers that tell streams of the same episodes apart, each >= 0 and the same for all or (T,).
    """

    def __init__(
        self, seed: int, split: str, indices: Sequence[int] | np.ndarray, *more: int | Sequence[int] | np.ndarray
    ) -> None:
        self.split = split
        index = np.asarray(indices, dtype=np.uint64)
        key = np.zeros(1, np.uint64)
        further = (np.asarray(word, dtype=np.uint64) for word in more)
        for word in (np.uint64(seed & (2**64 - 1)), np.uint64(SPLITS.index(split)), index, *further):
            key = _mix((key ^ word) + _GOLDEN)
        self._key = np.broadcast_to(key, index.shape)
        self._drawn = 0

    def bits(self, *shape: int) -> np.ndarray:
        """Uniform 64-bit words, (T, *shape)."""
        count = int(np.prod(shape, dtype=np.int64))
        counter = np.arange(self._drawn + 1, self._drawn + count + 1, dtype=np.uint64)
        self._drawn += count
        return _mix(self._key[:, None] + counter * _GOLDEN).reshape(len(self._key), *shape)

    def uniform(self, low: float = 0.0, high: float = 1.0, *shape: int) -> np.ndarray:
        """Uniform float64 in [low, high), (T, *shape)."""
        return low + (high - low) * ((self.bits(*shape) >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def normal(self, *shape: int) -> np.ndarray:
        """Standard normal float64 by Box and Muller, (T, *shape)."""
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(0.0, 1.0, *shape)))
        return radius * np.cos(2.0 * np.pi * self.uniform(0.0, 1.0, *shape))

    def integers(self, high: int | np.ndarray, *shape: int) -> np.ndarray:
        """Uniform int64 in [0, high), (T, *shape); ``high`` broadcasts against the result."""
        high = np.asarray(high)
        return np.minimum((self.uniform(0.0, 1.0, *shape) * high).astype(np.int64), high - 1)

    def choice(self, n: int | np.ndarray, k: int, *shape: int) -> np.ndarray:
        """k distinct integers of [0, n) in random order, (T, *shape, k).

        Floyd's algorithm (Bentley and Floyd, CACM 1987) over all rows at once, then a random order: its cost does
        not grow with n, which is the number of classes. ``n`` may differ by row, (T, *shape), each >= k.
        """
        n = np.broadcast_to(np.asarray(n), (len(self._key), *shape))
        fractions = self.uniform(0.0, 1.0, *shape, k)
        chosen = np.empty((*n.shape, k), np.int64)
        for i in range(k):
            last = n - k + i  # this draw is from [0, last]
            draw = np.minimum((fractions[..., i] * (last + 1)).astype(np.int64), last)
            taken = (chosen[..., :i] == draw[..., None]).any(-1)
            chosen[..., i] = np.where(taken, last, draw)
        order = np.argsort(self.bits(*shape, k), axis=-1)
        return np.take_along_axis(chosen, order, -1)

    def of(self, tasks: np.ndarray) -> TaskStreams:
        """The streams of some of the tasks, by their places, going on from here."""
        some = copy.copy(self)
        some._key = self._key[tasks]
        return some
