"""Tabular Markov decision processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.core.errors import at_least
from datamodules.core.streams import TaskStreams
from datamodules.reinforcement.environments import Environment, EnvironmentDataModule, Facts, Step, normal


class TabularMDP(Environment):
    """Random transitions, Dirichlet(1, …, 1), and rewards N(mean, 1) with means N(1, 1) of each state and action.

    Every episode starts in state 0. The agent sees which state it is in, one-hot.
    """

    step_draws = 2  # the next state, the reward

    def __init__(self, states: int, actions: int, horizon: int) -> None:
        self.observation_size, self.actions, self.horizon = states, actions, horizon
        self.facts = states * actions * (states + 1)

    def parameters(self, rng: TaskStreams) -> dict[str, np.ndarray]:
        states, actions = self.observation_size, self.actions
        exponential = -np.log1p(-rng.uniform(0.0, 1.0, states, actions, states))
        return {
            "transitions": exponential / exponential.sum(-1, keepdims=True),
            "rewards": 1.0 + rng.normal(states, actions),
        }

    def start(self, task: Facts, draws: Tensor) -> Tensor:
        return torch.zeros(len(draws), dtype=torch.int64, device=draws.device)

    def observe(self, task: Facts, state: Tensor) -> Tensor:
        return F.one_hot(state, self.observation_size).to(task["rewards"].dtype)

    def step(self, task: Facts, state: Tensor, action: Tensor, draws: Tensor) -> Step:
        row = torch.arange(len(state), device=state.device)
        reward = task["rewards"][row, state, action] + normal(draws[:, 1]).to(task["rewards"].dtype)
        cumulated = task["transitions"][row, state, action].double().cumsum(1)
        following = (draws[:, :1] >= cumulated / cumulated[:, -1:]).sum(1)
        return Step(following, reward, reward)

    def optimum(self, task: Facts) -> Tensor:
        return plan(task["transitions"], task["rewards"], self.horizon)[0][:, 0, 0]


def plan(transitions: Tensor | Callable[[Tensor], Tensor], rewards: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """Value iteration for episodes of so many steps.

    Args:
        transitions: (N, S, A, S); or what is expected of the next state's value after each action, (N, S, A), from the
            values of the states, (N, S).
        rewards: mean rewards (N, S, A); or (N, horizon, S, A), where they differ by step.
        horizon: H.

    Returns:
        Values (N, H + 1, S) of the states at each step, 0 after the last, and those of the actions, (N, H, S, A).
    """
    of_step = rewards if rewards.dim() == 4 else rewards[:, None].expand(-1, horizon, -1, -1)
    values, of_actions = [torch.zeros_like(rewards[..., 0] if rewards.dim() == 3 else rewards[:, 0, :, 0])], []
    for h in reversed(range(horizon)):
        if callable(transitions):
            following = transitions(values[-1])
        else:
            following = torch.einsum("nsat,nt->nsa", transitions, values[-1])
        of_actions.append(of_step[:, h] + following)
        values.append(of_actions[-1].amax(-1))
    return torch.stack(values[::-1], 1), torch.stack(of_actions[::-1], 1)


class TabularMDPs(EnvironmentDataModule):
    """Random tabular MDPs as in RL² (Duan et al., 2016), section 3.2, after Osband and Van Roy (2017).

    Args:
        states, actions: 10 and 5 in the paper.
        horizon: steps of an episode, 10.
        episodes: of a trial; 10 to 100.
        **common: see EnvironmentDataModule.
    """

    def __init__(
        self, states: int = 10, actions: int = 5, horizon: int = 10, episodes: int = 10, **common: Any
    ) -> None:
        at_least(1, states=states, actions=actions, horizon=horizon)
        super().__init__(TabularMDP(states, actions, horizon), episodes, **common)
