"""A memory of a stream's examples: of fixed size, a part of a learner's state."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from models.core.chance import Chance

Policy = Literal["reservoir", "balanced", "oldest"]
"""Which example gives way: "reservoir" keeps each one met so far with one probability (Vitter, TOMS 1985); "balanced"
gives each group as many places, the group's oldest goes; with "oldest" the oldest of all goes."""


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
        member = group[:, None] == torch.arange(len(self.met), device=y.device)  # (N, groups)
        number = self.met.sum() + torch.arange(len(y), device=y.device)  # of each example, from 0
        places = len(self.y)
        if policy == "reservoir":
            # The n-th of them, from 0, goes to a place among n + 1: to its own while there are more places.
            drawn, chance = chance.integers(number + 1, len(y))
            place = torch.where(number < places, number, torch.where(drawn < places, drawn, -1))
        elif policy == "balanced":
            each = places // len(self.met)
            before = (self.met + member.cumsum(0) - member.long())[torch.arange(len(y), device=y.device), group]
            place = group * each + before % each
        else:
            place = number % places
        # By each place the last example that goes there, -1 for none.
        goes = place[:, None] == torch.arange(places, device=y.device)
        last = torch.where(goes, torch.arange(len(y), device=y.device)[:, None], -1).amax(0)
        taken, source = last >= 0, last.clamp(min=0)
        return (
            Memory(
                torch.where(taken[:, None], x.flatten(1)[source].to(self.x.dtype), self.x),
                torch.where(taken, y[source], self.y),
                self.held | taken,
                self.met + member.sum(0),
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
