"""Memories of a stream."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch.func import vmap

from models.continual.memory import Memory
from models.core.chance import Chance


def after(policy: str, numbers: list[int], places: int, groups: int = 1, batch: int = 7, streams: int = 1) -> Memory:
    """Memories (T, …) of the numbers, which arrive in batches; a number's label is its remainder by the groups."""

    def one(key):
        memory, chance = Memory.empty(places, 1, groups, torch.zeros(())), Chance.of(key)
        for part in torch.tensor(numbers).split(batch):
            memory, chance = memory.written(part[:, None].float(), part % groups, policy, chance)
        return memory

    return vmap(one)(torch.arange(streams) * 7919)


@pytest.mark.parametrize("batch", [1, 7])
def test_a_reservoir_keeps_every_example_with_one_probability(batch):
    """Catches an index that is off by one, by which the memory prefers late or early examples: χ² over 4,000 streams.

    How often each of 30 was kept in 10 places; drawing up to and including the number met gives late ones less.
    """
    kept = after("reservoir", list(range(30)), 10, batch=batch, streams=4000).x[..., 0].long()
    assert all(len(set(row)) == 10 for row in kept.tolist())
    counts = np.bincount(kept.flatten(), minlength=30)
    # Of 10 without replacement each count varies 1 - 10/30 times as much as a multinomial's.
    statistic = chisquare(counts).statistic / (20 / 29)
    assert statistic < 58.3  # 99.9 % of χ² with 29 degrees of freedom


def reference(policy: str, numbers: list[int], places: int, groups: int) -> list[int | None]:
    """Written as one says it: a queue for each group, or one for all."""
    slots: list[int | None] = [None] * places
    met = [0] * groups
    for n in numbers:
        if policy == "oldest":
            slots[sum(met) % places] = n
        else:
            slots[(n % groups) * (places // groups) + met[n % groups] % (places // groups)] = n
        met[n % groups] += 1
    return slots


@pytest.mark.parametrize("policy", ["balanced", "oldest"])
@pytest.mark.parametrize("batch", [1, 5, 40])
def test_queues_are_those_of_a_list(policy, batch):
    """Catches a batch that overtakes itself: two examples of a group in one place, or the earlier one staying."""
    numbers = torch.randint(50, (33,), generator=torch.Generator().manual_seed(1)).tolist()
    for length in (4, 33):
        memory = after(policy, numbers[:length], 12, groups=3, batch=batch)
        expected = reference(policy, numbers[:length], 12, 3)
        assert [n if h else None for n, h in zip(memory.x[0, :, 0].tolist(), memory.held[0], strict=True)] == expected
        assert memory.y[0][memory.held[0]].tolist() == [n % 3 for n in expected if n is not None]


def test_draws_are_of_what_is_there_without_replacement_and_all_alike():
    """Catches empty places that are learned from, examples drawn twice, and a memory read from its beginning."""
    memory = Memory(*(m[0] for m in after("reservoir", list(range(6)), 9)))
    keys = torch.arange(3000)
    (x, _, there), _ = vmap(lambda key: memory.drawn(4, Chance.of(key)))(keys)
    assert there.all() and all(len(set(row)) == 4 for row in x[..., 0].tolist())
    assert chisquare(np.bincount(x[:, 0, 0].long())).pvalue > 1e-3  # the first drawn is any of the six
    (x, _, there), _ = memory.drawn(9, Chance.of(keys[5]))
    assert there.tolist() == [True] * 6 + [False] * 3 and sorted(x[:6, 0].tolist()) == [0, 1, 2, 3, 4, 5]
    (x, _, there), _ = memory.drawn(9, Chance.of(keys[5]), torch.arange(9) < 2)
    assert there.sum() == 2 and sorted(x[:2, 0].tolist()) == [0, 1]


def test_a_memory_that_is_held_does_not_change():
    """Catches the memory of earlier experiences being the one that the current experience is written to."""
    empty, chance = Memory.empty(5, 1, 1, torch.zeros(())), Chance.of(torch.tensor(1))
    first, chance = empty.written(torch.arange(3.0)[:, None], torch.zeros(3).long(), "reservoir", chance)
    before = [m.clone() for m in first]
    first.written(100 + torch.arange(40.0)[:, None], torch.zeros(40).long(), "reservoir", chance)
    assert all(torch.equal(a, b) for a, b in zip(first, before, strict=True)) and not empty.held.any()
