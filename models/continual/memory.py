"""A memory of a stream's examples: of fixed size, a part of a learner's state."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from models.core.chance import Chance

Policy = Literal["reservoir", "balanced", "oldest"]
"""Which example gives way: "reservoir" keeps each one met so far with one probability (Vitter, TOMS 1985); "balanced"
gives each group as many places, the group's oldest goes; with "oldest" the oldest of all goes."""


def places(policy: Policy, met: Tensor, size: int, group: Tensor, chance: Chance) -> tuple[Tensor, Tensor, Chance]:
    """Where examples go that arrive one after another, (N,), -1 for those that are not kept.

    Args:
        policy: which one gives way.
        met: examples of each group before them, (groups,).
        size: M, places of the memory.
        group: of each example, (N,) int64.
        chance: that a reservoir draws from.

    Returns:
        The places, ``met`` after them, and the chance after what was drawn.
    """
    device = group.device
    member = group[:, None] == torch.arange(len(met), device=device)  # (N, groups)
    number = met.sum() + torch.arange(len(group), device=device)  # of each example, from 0
    if policy == "reservoir":
        # The n-th of them, from 0, goes to a place among n + 1: to its own while there are more places.
        drawn, chance = chance.integers(number + 1, len(group))
        place = torch.where(number < size, number, torch.where(drawn < size, drawn, -1))
    elif policy == "balanced":
        each = size // len(met)
        before = (met + member.cumsum(0) - member.long())[torch.arange(len(group), device=device), group]
        place = group * each + before % each
    else:
        place = number % size
    return place, met + member.sum(0), chance


def arrivals(place: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Of examples that go to places (N,), one after another: which places are taken, (M,) bool, and by which, (M,)."""
    # By each place the last example that goes there, -1 for none.
    goes = place[:, None] == torch.arange(size, device=place.device)
    last = torch.where(goes, torch.arange(len(place), device=place.device)[:, None], -1).amax(0)
    return last >= 0, last.clamp(min=0)


class Memory(NamedTuple):
    """M places for examples of ONE stream. Nothing is written in place: who holds a memory holds it as it was.

    Attributes:
        x: inputs, flattened, (M, features).
        y: labels, (M,) int64.
        held: which places are taken, (M,) bool.
        met: examples of each group so far, whether kept or not, (groups,) int64.
    """

    x: Tensor
    y: Tensor
    held: Tensor
    met: Tensor

    @classmethod
    def empty(cls, size: int, features: int, groups: int, like: Tensor) -> Memory:
        """Nothing yet; tensors of the device and precision of ``like``."""
        integers = like.new_zeros(size, dtype=torch.int64)
        return cls(like.new_zeros(size, features), integers, integers.bool(), integers.new_zeros(groups))

    def written(
        self, x: Tensor, y: Tensor, policy: Policy, chance: Chance, group: Tensor | None = None
    ) -> tuple[Memory, Chance]:
        """This memory after examples (N, *input) and (N,), one after another.

        Args:
            x, y: the examples.
            policy: which one gives way.
            chance: that a reservoir draws from.
            group: of each example, (N,) int64, below the number of groups; None: its label.
        """
        group = y if group is None else group
        place, met, chance = places(policy, self.met, len(self.y), group, chance)
        taken, source = arrivals(place, len(self.y))
        return (
            Memory(
                torch.where(taken[:, None], x.flatten(1)[source].to(self.x.dtype), self.x),
                torch.where(taken, y[source], self.y),
                self.held | taken,
                met,
            ),
            chance,
        )

    def drawn(
        self, count: int, chance: Chance, among: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Chance]:
        """So many examples without replacement, or all M.

        Args:
            count: R.
            chance: to draw from.
            among: places to draw from, (M,) bool; None: all that are taken.

        Returns:
            x (R, features), y (R,) and which of them there are, (R,) bool: the others' places were empty.
        """
        there = self.held if among is None else self.held & among
        lots, chance = chance.uniform(len(self.y))
        chosen = torch.where(there, lots, 2.0).argsort()[:count]
        return (self.x[chosen], self.y[chosen], there[chosen]), chance
