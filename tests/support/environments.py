"""Environments that end before their horizon, and whose rewards have any size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.core.streams import TaskStreams
from datamodules.reinforcement.environments import Environment, EnvironmentDataModule, Facts, Step


class Ledge(Environment):
    """Every step up to a fall pays; an action below the task's edge is one. Observed: whether it fell, and the step.

    Args:
        horizon: steps of an episode.
        pay: of a step.
        offset: added to what is observed, in units of ``pay``.
    """

    observation_size, actions, facts, discrete = 2, 1, 1, False

    def __init__(self, horizon: int = 8, pay: float = 1.0, offset: float = 0.0) -> None:
        self.horizon, self.pay, self.offset = horizon, pay, offset

    def parameters(self, rng: TaskStreams) -> dict[str, np.ndarray]:
        return {"edge": rng.uniform(0.05, 0.15)}

    def start(self, task: Facts, draws: Tensor) -> Any:
        return torch.ones_like(task["edge"]), 0

    def observe(self, task: Facts, state: Any) -> Tensor:
        up, step = state
        return self.pay * (torch.stack([up, torch.full_like(up, step / self.horizon)], -1) + self.offset)

    def step(self, task: Facts, state: Any, action: Tensor, draws: Tensor) -> Step:
        up, step = state
        stays = up * (action[:, 0] >= task["edge"])
        reward = self.pay * up  # of the step that falls, too: only what comes after is lost
        return Step((stays, step + 1), reward, reward, 1 - stays, {"height": stays + step, "success": stays})


class Ledges(EnvironmentDataModule):
    """See Ledge."""

    def __init__(
        self, horizon: int = 8, pay: float = 1.0, offset: float = 0.0, episodes: int = 2, **common: Any
    ) -> None:
        super().__init__(Ledge(horizon, pay, offset), episodes, **common)

    @property
    def own_metrics(self) -> dict[str, Any]:
        from datamodules.core.metric import Metric

        return {"height": Metric(), "success": Metric("higher", share=True)}
