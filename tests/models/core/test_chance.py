"""Chance by numbers alone."""

import numpy as np
import torch
from torch.func import vmap

from models.core.chance import Chance

MASK = 2**64 - 1


def splitmix(key: int, count: int) -> list[float]:
    """The generator restated with Python's whole numbers."""

    def mixed(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    begin = mixed(key & MASK)
    return [(mixed((begin + i * 0x9E3779B97F4A7C15) & MASK) >> 11) * 2.0**-53 for i in range(1, count + 1)]


def test_is_splitmix_and_goes_on_where_it_was():
    """Catches signed shifts and products in the place of unsigned ones, and numbers drawn twice or left out."""
    for key in (0, 1, -1, 2**63 - 1, -(2**63), 123456789):
        first, after = Chance.of(torch.tensor(key)).uniform(2, 3)
        second, _ = after.uniform(4)
        assert torch.cat([first.flatten(), second]).tolist() == splitmix(key, 10)


def test_is_the_same_where_streams_are_mapped_over():
    """Catches chance that depends on which streams are mapped together."""
    keys = torch.tensor([5, -7, 11])
    mapped = vmap(lambda key: Chance.of(key).uniform(6)[0])(keys)
    assert torch.equal(mapped, torch.stack([Chance.of(key).uniform(6)[0] for key in keys]))
    assert len(mapped.unique()) == 18


def test_whole_numbers_are_uniform():
    """Catches an end of the range that is left out or met more often: χ² of 60,000 draws with 9 degrees of freedom."""
    drawn, _ = Chance.of(torch.tensor(3)).integers(10, 60_000)
    counts = np.bincount(drawn.numpy(), minlength=10)
    assert counts.sum() == 60_000 and len(counts) == 10
    assert ((counts - 6000) ** 2 / 6000).sum() < 27.9  # 0.1 %
