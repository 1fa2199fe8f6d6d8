"""A point on the plane that is to find its goal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.core.errors import at_least
from datamodules.core.streams import TaskStreams
from datamodules.reinforcement.environments import Environment, EnvironmentDataModule, Facts, Step

STRIDE = 0.1  # how far an action of 1 moves the point, in each direction


class DenseNavigation(Environment):
    """A point robot sees where it is, and is paid the negative distance to its goal. It starts anywhere on the square.

    Goals are uniform in the square [-1, 1]², as in the released code of PEARL.
    """

    observation_size, actions, discrete, start_draws, facts, looks = 2, 2, False, 2, 2, "plane"

    def __init__(self, horizon: int) -> None:
        self.horizon = horizon

    def parameters(self, rng: TaskStreams) -> dict[str, np.ndarray]:
        return {"goal": rng.uniform(-1.0, 1.0, 2)}

    def start(self, task: Facts, draws: Tensor) -> Tensor:
        return (2 * draws - 1).to(task["goal"].dtype)

    def observe(self, task: Facts, state: Tensor) -> Tensor:
        return state

    def step(self, task: Facts, state: Tensor, action: Tensor, draws: Tensor) -> Step:
        state = state + STRIDE * action.clamp(-1, 1)
        reward = -(state - task["goal"]).norm(dim=1)
        return Step(state, reward, reward)


class SparseNavigation(DenseNavigation):
    """Goals are on the upper half of the unit circle; only within a radius of the goal there is a reward.

    It is 1 less the distance there and 0 elsewhere; ``Step.shaped`` is the negative distance everywhere. The point
    starts at the centre.

    Args:
        horizon: steps of an episode.
        radius: of the goal.
    """

    radius: float

    def __init__(self, horizon: int, radius: float) -> None:
        super().__init__(horizon)
        self.radius = radius

    def shared(self) -> tuple[float, ...]:
        return self.horizon, self.radius

    def parameters(self, rng: TaskStreams) -> dict[str, np.ndarray]:
        angle = rng.uniform(0.0, math.pi)
        return {"goal": np.stack([np.cos(angle), np.sin(angle)], -1)}

    def start(self, task: Facts, draws: Tensor) -> Tensor:
        return torch.zeros_like(task["goal"])

    def step(self, task: Facts, state: Tensor, action: Tensor, draws: Tensor) -> Step:
        step = super().step(task, state, action, draws)
        near = step.shaped
        return step._replace(reward=torch.where(near >= -self.radius, 1 + near, 0.0))


class PointRobot(EnvironmentDataModule):
    """Navigation as in PEARL (Rakelly et al., ICML 2019): its ``point-robot``, or ``sparse-point-robot``.

    Args:
        sparse: reward only near the goal.
        radius: of the goal, where sparse.
        horizon: steps of an episode.
        episodes: of a trial.
        train_tasks: number of meta-training goals; 80 in the released code.
        **common: see EnvironmentDataModule.
    """

    def __init__(
        self,
        sparse: bool = False,
        radius: float = 0.2,
        horizon: int = 20,
        episodes: int = 3,
        train_tasks: int | None = 80,
        **common: Any,
    ) -> None:
        at_least(1, horizon=horizon)
        environment = SparseNavigation(horizon, radius) if sparse else DenseNavigation(horizon)
        super().__init__(environment, episodes, train_tasks=train_tasks, **common)
