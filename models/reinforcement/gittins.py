"""Gittins indices of a Bernoulli arm."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


@functools.cache
def gittins_indices(discount: float, pulls: int, rewards: int = 512, ahead: int | None = None) -> Tensor:
    """What a known arm would have to pay for an unknown one, uniform in [0, 1] at first, to be worth no more.

    By calibration (Gittins, Glazebrook and Weber, 2011, section 8.4): for each of a grid of rewards of a known arm, how
    much it is worth to play the unknown one as long as that is better, by dynamic programming over its successes and
    failures; the index is where playing it once more is worth nothing, linear between rewards of the grid.

    Args:
        discount: γ, in [0, 1).
        pulls: indices are wanted for up to so many successes and failures together.
        rewards: of the grid, over [0, 1].
        ahead: pulls beyond, at least 1, after which the arm is taken to be known; None: until they count for less than
            1e-4 of the first, but at most 2000.

    Returns:
        Indices (pulls + 1, pulls + 1), float64, by numbers of successes and failures; 0 beyond ``pulls`` in all.
    """
    if ahead is None:
        ahead = min(2000, math.ceil(math.log(1e-4) / math.log(discount))) if discount > 0 else 1
    known = torch.linspace(0, 1, rewards, dtype=torch.float64)
    table = torch.zeros(pulls + 1, pulls + 1, dtype=torch.float64)

    def pays(pulled: int) -> Tensor:  # with 0 to all successes, (pulled + 1, 1)
        return (torch.arange(pulled + 1, dtype=torch.float64)[:, None] + 1) / (pulled + 2)

    # In units of 1 / (1 - γ): how much more the best is worth than the known arm for ever, (pulled + 1, rewards).
    gain = (pays(pulls + ahead) - known).clamp_(min=0)
    for pulled in reversed(range(pulls + ahead)):
        success = pays(pulled)
        more = torch.lerp(gain[:-1], gain[1:], success)  # after a failure, after a success
        gain = more.mul_(discount).add_((1 - discount) * (success - known))
        if pulled <= pulls:
            table[range(pulled + 1), range(pulled, -1, -1)] = _zeros(gain, known)
        gain.clamp_(min=0)
    return table


def _zeros(falling: Tensor, at: Tensor) -> Tensor:
    """Where each row (…, K), which falls from above 0 to below, is 0, of its values at points (K,)."""
    after = (falling > 0).sum(-1).clamp(1, len(at) - 1)
    above, below = (falling.gather(-1, i[..., None]).squeeze(-1) for i in (after - 1, after))
    return at[after - 1] + (at[after] - at[after - 1]) * above / (above - below)
