"""Learning to remember rare events."""

import pytest
import torch
import torch.nn.functional as F

from models import MLP, RareEvents
from models.continual.rare_events import EMPTY, KeyValueMemory
from models.core.chance import Chance


class Listed:
    """The memory as lists: every slot looked at, one after another."""

    def __init__(self, slots: int, key: int) -> None:
        self.keys, self.values, self.ages = [None] * slots, [None] * slots, [0] * slots
        self.chance = Chance.of(torch.tensor(key))

    def nearest(self, query: list[float]) -> int | None:
        best = None
        for slot, key in enumerate(self.keys):
            if key is not None:
                s = sum(a * b for a, b in zip(key, query, strict=True))
                if best is None or s > best[0]:
                    best = (s, slot)
        return None if best is None else best[1]

    def write(self, query: list[float], label: int, spread: int) -> None:
        noise, self.chance = self.chance.uniform(len(self.ages))
        near = self.nearest(query)
        if near is not None and self.values[near] == label:
            place = near
            together = [a + b for a, b in zip(self.keys[near], query, strict=True)]
            length = sum(a * a for a in together) ** 0.5
            key = [a / length for a in together]
        else:
            old = [age + spread * (2 * n - 1) for age, n in zip(self.ages, noise.tolist(), strict=True)]
            empty = [slot for slot, value in enumerate(self.values) if value is None]
            place = max(empty or range(len(old)), key=lambda slot: old[slot])
            key = query
        self.ages = [age + 1 for age in self.ages]
        self.keys[place], self.values[place], self.ages[place] = key, label, 0


@pytest.mark.parametrize("slots", [1, 6, 300])
def test_is_a_memory_of_lists(slots):
    """Catches class 0 that is known before it was met, negative similarities below those of empty slots, ties, ages and
    overwriting of a full memory: against lists, over 200 random operations with keys that repeat."""
    generator = torch.Generator().manual_seed(slots)
    some = F.normalize(torch.randn(9, 3, generator=generator, dtype=torch.float64), dim=1)
    some[3], some[4] = F.normalize(0.1 * some[2] - some[0], dim=0), some[1]
    like = some.new_zeros(())
    memory, listed = KeyValueMemory.of(slots, 3, 4, like, Chance.of(torch.tensor(7))), Listed(slots, 7)
    for number in range(200):
        which, label = torch.randint(9, (), generator=generator), torch.randint(4, (), generator=generator)
        query = some[which]
        near = listed.nearest(query.tolist())
        answer = EMPTY if near is None else listed.values[near]
        assert memory.values[memory.nearest(query)] == answer, number
        memory = memory.written(query, label, 8)
        listed.write(query.tolist(), int(label), 8)
        assert memory.values.tolist() == [EMPTY if v is None else v for v in listed.values], number
        assert memory.ages.tolist() == listed.ages, number
        for key, expected in zip(memory.keys, listed.keys, strict=True):
            torch.testing.assert_close(key, key.new_zeros(3) if expected is None else key.new_tensor(expected))
    assert int(memory.counts.sum()) == 200


def test_nothing_written_predicts_nothing():
    """Catches an empty memory that answers with a class."""
    learner = RareEvents(MLP(2, (3,)), size=4, slots=5)
    state = learner.begin(3, Chance.of(torch.tensor(0)))
    assert (learner.predict(state, torch.randn(2, 4)) == -torch.inf).all()


def test_loss_is_that_of_a_margin_within_the_nearest():
    """Catches a margin the wrong way round, a nearest key outside of the pool, and a loss where there is no pair."""
    learner = RareEvents(MLP(2, (3,)), size=2, slots=8, nearest=2, margin=0.1)
    memory = KeyValueMemory.of(8, 2, 2, torch.zeros(()), Chance.of(torch.tensor(0)))
    angles = torch.tensor([0.3, 0.5, -0.2])
    keys = torch.stack([angles.cos(), angles.sin()], 1)
    for key, label in zip(keys, (0, 1, 1), strict=True):
        memory = memory.written(key, torch.tensor(label), 0)
    query = torch.tensor([1.0, 0.0])
    loss, both = learner.margin_loss(memory, query, torch.tensor(1))
    torch.testing.assert_close(loss, torch.tensor(0.3).cos() - torch.tensor(0.2).cos() + 0.1)  # right -.2, wrong .3
    assert both
    loss, both = learner.margin_loss(memory, query, torch.tensor(0))
    torch.testing.assert_close(loss, torch.tensor(0.2).cos() - torch.tensor(0.3).cos() + 0.1)
    far = torch.tensor([torch.tensor(1.5).cos(), torch.tensor(1.5).sin()])
    assert learner.margin_loss(memory, far, torch.tensor(1))[1]  # .5 and .3 are nearest: a right and a wrong one
    assert not learner.margin_loss(memory, far, torch.tensor(2))[1]
