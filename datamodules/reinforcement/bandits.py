"""Bernoulli bandits."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from datamodules.core.errors import at_least
from datamodules.core.streams import TaskStreams
from datamodules.reinforcement.environments import Environment, EnvironmentDataModule, Facts, Step


class BernoulliBandit(Environment):
    """Arms that pay 1 with a probability of their own, uniform in [0, 1], or nothing; an episode is one pull."""

    observation_size, horizon, step_draws, looks = 0, 1, 1, "arms"

    def __init__(self, arms: int) -> None:
        self.actions = self.facts = arms

    def parameters(self, rng: TaskStreams) -> dict[str, np.ndarray]:
        return {"arms": rng.uniform(0.0, 1.0, self.actions)}

    def start(self, task: Facts, draws: Tensor) -> None:
        return None

    def observe(self, task: Facts, state: Any) -> Tensor:
        return task["arms"][:, :0]

    def step(self, task: Facts, state: Any, action: Tensor, draws: Tensor) -> Step:
        paid = (draws[:, 0] < task["arms"].gather(1, action[:, None]).squeeze(1)).to(task["arms"].dtype)
        return Step(None, paid, paid)

    def optimum(self, task: Facts) -> Tensor:
        return task["arms"].amax(1)

    def chance(self, task: Facts) -> Tensor:
        return task["arms"].mean(1)


class Bandits(EnvironmentDataModule):
    """Bernoulli bandits as in RL² (Duan et al., 2016), section 3.1: a trial is a number of pulls of one bandit.

    Args:
        arms: k.
        episodes: n, the pulls of a trial.
        **common: see EnvironmentDataModule.
    """

    def __init__(self, arms: int = 5, episodes: int = 10, **common: Any) -> None:
        at_least(1, arms=arms)
        super().__init__(BernoulliBandit(arms), episodes, **common)
