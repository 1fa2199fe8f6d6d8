"""Observations and rewards in units of their own, by what was met in meta-training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.reinforcement.trials import Trial

BOUND = 10.0  # of normalised observations, as is usual
LEAST = 1e-8  # variance


class RunningScale(nn.Module):
    """Observations with mean 0 and deviation 1, rewards with mean square 1, over all steps of meta-training so far.

    Rewards are divided and not shifted: what is paid at every step makes a long episode worth more. The numbers are
    kept in double precision whatever the network's, and are part of a checkpoint.

    Args:
        observations: numbers of an observation.
    """

    def __init__(self, observations: int) -> None:
        super().__init__()
        self.on = False
        # Count; mean square of rewards, and of what they are shaped to; mean and sum of squared deviations.
        self._state = torch.zeros(3 + 2 * observations, dtype=torch.float64)
        self._cast: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def begun(self) -> bool:
        """Whether it knows anything yet."""
        return bool(self._state[0])

    @property
    def waits(self) -> bool:
        """Whether it is to be shown trials before anything is learned from them."""
        return self.on and not self.begun

    def observation(self, x: Tensor) -> Tensor:
        """Observations (…, observations), within ``BOUND``; zeros before any was met, whatever its unit."""
        if not self.on:
            return x
        if not self.begun:
            return torch.zeros_like(x)
        mean, deviation, _ = self._like(x)
        return ((x - mean) / deviation).clamp(-BOUND, BOUND)

    def reward(self, r: Tensor) -> Tensor:
        """Rewards, of any shape; likewise."""
        return self._rewards(r, 0)

    def shaped(self, r: Tensor) -> Tensor:
        """What rewards are shaped to, of any shape; likewise."""
        return self._rewards(r, 1)

    def _rewards(self, r: Tensor, which: int) -> Tensor:
        if not self.on:
            return r
        return r / self._like(r)[2][which] if self.begun else torch.zeros_like(r)

    @torch.no_grad()
    def update(self, trial: Trial, total: Callable[[Tensor], Tensor] = lambda value: value) -> None:
        """Take in the steps of trials, those after an episode's end left out; nothing where it is off.

        Args:
            trial: of some environments.
            total: sum over processes that have others.
        """
        if not self.on:
            return
        alive = trial.seen.alive.double()[..., None]
        rewards = torch.stack([trial.reward, trial.shaped], -1).double()
        x = trial.seen.observation.double()
        sums = total(torch.cat([alive.sum((0, 1)), (alive * rewards.square()).sum((0, 1)), (alive * x).sum((0, 1))]))
        n, squares, mean = sums[:1], sums[1:3], sums[3:] / sums[:1]
        spread = total((alive * (x - mean).square()).sum((0, 1)))
        n, squares, mean, spread = (part.cpu() for part in (n, squares, mean, spread))
        count, before, old_mean, old_spread = self._state.split([1, 2, len(mean), len(mean)])
        both = count + n
        # Chan, Golub and LeVeque (1979): sums of squares about the common mean.
        self._state = torch.cat(
            [
                both,
                (count * before + squares) / both,
                old_mean + (mean - old_mean) * n / both,
                old_spread + spread + (mean - old_mean).square() * count * n / both,
            ]
        )
        self._cast.clear()

    def _like(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if (x.device, x.dtype) not in self._cast:
            size = (len(self._state) - 3) // 2
            count, rewards, mean, spread = self._state.split([1, 2, size, size])
            parts = mean, (spread / count).clamp(min=LEAST).sqrt(), rewards.clamp(min=LEAST).sqrt()
            self._cast[x.device, x.dtype] = tuple(part.to(x) for part in parts)  # pyright: ignore
        return self._cast[x.device, x.dtype]

    def get_extra_state(self) -> Tensor:
        return torch.cat([torch.tensor([float(self.on)], dtype=torch.float64), self._state])

    def set_extra_state(self, state: Tensor) -> None:
        self.on, self._state = bool(state[0]), state[1:].detach().cpu().double().clone()
        self._cast.clear()
