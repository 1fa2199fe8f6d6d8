"""Trials: an agent in environments, its memory kept from the first episode to the last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from datamodules.reinforcement.environments import SUCCESS, Environment, Environments, Facts
from models.reinforcement.policies import encode


class Seen(NamedTuple):
    """What an agent knows when it acts, of each of N environments.

    Attributes:
        observation: (N, seen_size).
        action: the previous one, (N, actions), one-hot where discrete; zeros at the start of the trial.
        reward: that it brought, (N,).
        done: (N,), 1 where it was the last of an episode, or came after the last.
        reached: the observation that it led to, (N, seen_size): another than ``observation`` where an episode starts.
        alive: (N,), 0 where the episode has terminated, so that what is done now has no effect.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    done: Tensor
    reached: Tensor
    alive: Tensor


class Trial(NamedTuple):
    """Episodes one after another in each of N environments.

    Attributes:
        seen: before each action, each part (steps, N, …).
        action: (steps, N), or (steps, N, actions) where continuous.
        reward, shaped: (steps, N).
        reached: the observation that each action led to, (steps, N, seen_size).
        terminated: (steps, N), 1 where nothing follows, see Step.
        info: further numbers of the steps, by name, each (steps, N).
        extras: what the agent left of each step, each tensor (steps, N, …).
    """

    seen: Seen
    action: Tensor
    reward: Tensor
    shaped: Tensor
    reached: Tensor
    terminated: Tensor
    info: Mapping[str, Tensor]
    extras: Any

    def returns(self, episodes: int) -> Tensor:
        """Undiscounted returns of each episode, (N, episodes)."""
        return self.reward.unflatten(0, (episodes, -1)).sum(1).T

    def last_info(self, episodes: int) -> dict[str, Tensor]:
        """What ``info`` came to in the last episode, by name, each (N,): whether it was a success at any of its steps,
        of other numbers the mean over its steps; of those steps that told."""
        last = len(self.reward) // episodes
        alive = self.seen.alive[-last:].bool()
        found = {}
        for name, value in self.info.items():
            value = value[-last:].where(alive, torch.nan)
            told = value.nan_to_num(-torch.inf).amax(0).clamp(min=0) if name == SUCCESS else value.nanmean(0)
            found[name] = told
        return found


class Agent(Protocol):
    """Acts in N environments at a time.

    Attributes:
        draws: uniform numbers that an action takes.
    """

    draws: int

    def begin(self, environment: Environment, task: Facts) -> Any:
        """The memory at the start of a trial; only an oracle looks at facts (N, …) for more than their number."""
        ...

    def act(self, memory: Any, seen: Seen, draws: Tensor) -> tuple[Any, Tensor, Any]:
        """The next memory, actions (N,) or (N, actions), and tensors (N, …) to keep of the step, in any structure."""
        ...


def run_trial(batch: Environments, agent: Agent, episodes: int | None = None, purpose: int = 0) -> Trial:
    """A trial of so many episodes in each environment of the batch; the agent's memory lasts from end to end.

    Args:
        batch: the environments.
        agent: acts.
        episodes: None for those of the batch.
        purpose: tells trials of the same tasks apart: chance is a function of it and of the tasks' numbers.
    """
    environment, task, episodes = batch.environment, batch.task, episodes or batch.episodes
    steps = episodes * environment.horizon
    starts = batch.draws(episodes, environment.start_draws, purpose=3 * purpose + 1)
    moves = batch.draws(steps, environment.step_draws, purpose=3 * purpose + 2)
    choices = batch.draws(steps, agent.draws, purpose=3 * purpose + 3)
    memory, state, kept = agent.begin(environment, task), None, []
    observation, action, reward, done, alive = None, None, None, None, None
    for t in range(steps):
        first = t % environment.horizon == 0
        reached = observation
        if first:
            alive = None
            state = environment.start(task, starts[:, t // environment.horizon])
            observation = environment.seen(task, state)
        assert observation is not None
        if action is None:
            action = observation.new_zeros(len(batch), environment.actions)
            reward, done, reached = *observation.new_zeros(2, len(batch)), observation
        assert reward is not None and done is not None and reached is not None
        alive = torch.ones_like(reward) if alive is None else alive
        seen = Seen(observation, action, reward, done, reached, alive)
        memory, chosen, extras = agent.act(memory, seen, choices[:, t])
        state, reward, shaped, ended, info = environment.step(task, state, chosen, moves[:, t])
        ended = torch.zeros_like(reward) if ended is None else ended.to(reward)
        observation = environment.seen(task, state)
        kept.append(Trial(seen, chosen, reward, shaped, observation, ended, dict(info), extras))
        action = encode(chosen, environment.actions, environment.discrete).to(observation)
        alive, last = 1 - ended, (t + 1) % environment.horizon == 0
        done = torch.ones_like(reward) if last else ended
    return tree_map(lambda *parts: torch.stack(parts), *kept)
