"""Reinforcement learning: every task is an environment, many of which act in step as rows of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import MetaBatch, TaskDistribution
from datamodules.core.errors import at_least
from datamodules.core.streams import TaskStreams

Facts = dict[str, Tensor]
SUCCESS = "success"  # a number of a step that says whether the task is done


def normal(draws: Tensor) -> Tensor:
    """Standard normal numbers from uniform ones in [0, 1), float64."""
    # Uniform numbers are multiples of 2^-53: 0 is one, and 1 - 2^-53 must not be rounded to 1.
    return torch.special.ndtri(draws.double().clamp(min=2.0**-54))


class Step(NamedTuple):
    """What an action led to, for each of N environments.

    Attributes:
        state: the next one.
        reward: (N,), what the agent is given and what counts.
        shaped: (N,), what meta-training may learn from instead; the same unless the reward is sparse.
        terminated: (N,), 1 where nothing follows, from the step that ends an episode to the horizon; None ends none.
        info: further numbers of the step, by name, each (N,).
    """

    state: Any
    reward: Tensor
    shaped: Tensor
    terminated: Tensor | None = None
    info: Mapping[str, Tensor] = MappingProxyType({})


class Environment:
    """A family of Markov decision processes with episodes of one length, N of which go on in step.

    Functions of their arguments alone: chance comes as uniform numbers in [0, 1), float64.

    Attributes:
        observation_size: numbers of an observation, without what ``revealed`` adds.
        actions: how many there are to choose from, where ``discrete``; otherwise numbers of an action, in [-1, 1].
        horizon: steps of an episode.
        start_draws, step_draws: uniform numbers that the start of an episode and a step take.
        facts: numbers of what tells the tasks apart, as ``describe`` has it.
        revealed: the agent sees what tells the tasks apart, beside each observation: an oracle.
        unscaled: observations and rewards are in units of any size, which learners do well to normalise.
        looks: what figures show of it: "arms" that are pulled, or positions on the "plane" that observations begin with
            and the fact "goal" lies on, within a ``radius`` of which there is a reward.
    """

    observation_size: int
    actions: int
    discrete: bool = True
    horizon: int
    start_draws: int = 0
    step_draws: int = 0
    facts: int
    revealed: bool = False
    unscaled: bool = False
    looks: Literal["arms", "plane"] | None = None
    radius: float | None = None

    @property
    def identity(self) -> str:
        """Which environments these are, whatever the task."""
        return type(self).__name__

    @property
    def title(self) -> str:
        """What figures call them."""
        return self.identity

    def parameters(self, rng: TaskStreams) -> dict[str, np.ndarray]:
        """What tells the drawn tasks apart, by name, each (T, …)."""
        raise NotImplementedError

    def start(self, task: Facts, draws: Tensor) -> Any:
        """States at the start of an episode, from facts (N, …) and draws (N, start_draws)."""
        raise NotImplementedError

    def observe(self, task: Facts, state: Any) -> Tensor:
        """Observations (N, observation_size)."""
        raise NotImplementedError

    def step(self, task: Facts, state: Any, action: Tensor, draws: Tensor) -> Step:
        """From actions, (N,) int64 or (N, actions), and draws (N, step_draws)."""
        raise NotImplementedError

    def optimum(self, task: Facts) -> Tensor | None:
        """Expected return of an episode by the best policy there is for each task, (N,), where it is known."""
        return None

    def chance(self, task: Facts) -> Tensor | None:
        """Expected return of an episode of random actions, (N,), where it is known."""
        return None

    def rendering(self) -> Environment | None:
        """The same with a method ``render`` and the frames per second ``fps``; None where it cannot be rendered."""
        return None

    def describe(self, task: Facts) -> Tensor:
        """What tells the tasks apart as numbers, (N, facts)."""
        return torch.cat([value.reshape(len(value), -1).float() for value in task.values()], 1)

    def shared(self) -> tuple[float, ...]:
        """Numbers, none below 0, of what all tasks share and what returns are not comparable without."""
        return (self.horizon,)

    def seen(self, task: Facts, state: Any) -> Tensor:
        """What the agent sees, (N, seen_size)."""
        observation = self.observe(task, state)
        return torch.cat([observation, self.describe(task).to(observation)], 1) if self.revealed else observation

    @property
    def seen_size(self) -> int:
        """Numbers of what the agent sees."""
        return self.observation_size + self.facts * self.revealed


@dataclass
class Environments(MetaBatch):
    """A meta-batch of T environments of one family.

    Attributes:
        environment: the family.
        index: (T,) int64, each task's number within its split.
        seed, split: of the tasks.
        episodes: of a trial.
        meta_batch: number of tasks of the whole meta-batch, over all processes.
        task: what tells the tasks apart, name to (T, …).
        replica: (T,) int64, tells environments of one task apart; None where each task has one.
        number: (T,) int64, which of finitely many tasks each is; None where each is another.
    """

    environment: Environment
    index: Tensor
    seed: int
    split: str
    episodes: int
    meta_batch: int = 0
    task: Facts = field(default_factory=dict)
    replica: Tensor | None = None
    number: Tensor | None = None

    def draws(self, *shape: int, purpose: int = 1) -> Tensor:
        """Uniform numbers in [0, 1), (T, *shape) float64, by (seed, split, index, purpose, replica) alone."""
        replica = () if self.replica is None else (self.replica.cpu().numpy(),)
        rng = TaskStreams(self.seed, self.split, self.index.cpu().numpy(), purpose, *replica)
        return torch.from_numpy(rng.uniform(0.0, 1.0, *shape)).to(self.index.device)

    def repeated(self, times: int) -> Environments:
        """Every environment so many times, (T times,), one task's after another's, each with chance of its own."""
        replica = torch.arange(times, device=self.index.device).repeat(len(self))
        task = {name: value.repeat_interleave(times, 0) for name, value in self.task.items()}
        number = None if self.number is None else self.number.repeat_interleave(times)
        return replace(self, index=self.index.repeat_interleave(times), task=task, replica=replica, number=number)

    def fingerprint(self) -> Tensor:
        # Other than a plain sum of squares it depends on the order, and is not 1 wherever goals are on a circle.
        facts = self.environment.describe(self.task).double()
        shared = torch.tensor(self.environment.shared()).to(facts).log1p()
        numbers = torch.cat([facts, shared.expand(len(facts), -1)], 1)
        return (numbers + 1).square() @ torch.arange(1, numbers.shape[1] + 1).to(facts).sqrt()


class EnvironmentTasks(TaskDistribution):
    """Environments of a family; task i is a pure function of (seed, split, i).

    Args:
        environment: the family.
        episodes: of a trial.
        tasks: number of different environments; task i is one of them, drawn at random. None: each is another.
        seed, split: of the tasks.
    """

    seed: int

    def __init__(self, environment: Environment, episodes: int, tasks: int | None, seed: int, split: str) -> None:
        self.environment, self.episodes, self.tasks = environment, episodes, tasks
        self.seed, self.split = seed, split

    def sample(self, indices: Sequence[int]) -> Environments:
        index = np.asarray(indices, np.int64)
        if self.tasks is None:
            return self._environments(index, self.facts(index))
        number = TaskStreams(self.seed, self.split, index, 0).integers(self.tasks)
        return replace(self._environments(index, self.facts(number)), number=torch.from_numpy(number))

    def facts(self, numbers: np.ndarray) -> Facts:
        """What tells the environments of these numbers apart, name to (T, …)."""
        drawn = self.environment.parameters(TaskStreams(self.seed, self.split, numbers))
        return {name: torch.from_numpy(np.ascontiguousarray(value)).float() for name, value in drawn.items()}

    def _environments(self, index: np.ndarray, task: Facts) -> Environments:
        return Environments(self.environment, torch.from_numpy(index), self.seed, self.split, self.episodes, task=task)


class EnvironmentDataModule(EpisodicDataModule):
    """Hands out environments by index. A task distribution names the family.

    Args:
        environment: the family.
        episodes: of a trial, within which the agent may learn.
        train_tasks: number of meta-training environments, each met again and again (None: no limit).
        revealed: show the agent what tells the tasks apart, beside each observation: an oracle.
        meta_batch_size, val_tasks, test_tasks, eval_batch_size, workers, seed: see EpisodicDataModule.
    """

    kind = "reinforcement"

    def __init__(
        self,
        environment: Environment,
        episodes: int,
        train_tasks: int | None = None,
        revealed: bool = False,
        meta_batch_size: int = 100,
        val_tasks: int = 1000,
        test_tasks: int = 1000,
        eval_batch_size: int = 1000,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(meta_batch_size, val_tasks, test_tasks, eval_batch_size, workers, seed)
        at_least(1, episodes=episodes, train_tasks=train_tasks)
        environment.revealed = revealed
        self.environment = environment
        self.episodes, self.train_tasks, self.revealed = episodes, train_tasks, revealed

    def task_shape(self) -> dict[str, int]:
        return {"episodes": self.episodes}

    @property
    def identity(self) -> str:
        return self.environment.identity

    def network_settings(self) -> dict[str, Any]:
        own = self.environment
        return {"observations": own.seen_size, "actions": own.actions, "discrete": own.discrete}

    def build(self, split: str) -> EnvironmentTasks:
        tasks = self.train_tasks if split == "train" else None
        return EnvironmentTasks(self.environment, self.episodes, tasks, self.seed, split)
