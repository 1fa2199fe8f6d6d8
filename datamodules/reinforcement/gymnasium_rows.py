"""Environments of gymnasium in step, in this process or shared among several. Imported where they are made."""

from __future__ import annotations

import importlib
import os
import re
import signal
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv

from datamodules.core.errors import DataError

CURE = 'pip install "gymnasium[mujoco]"'  # brings what gymnasium's own environments need
EnvTask = dict[str, Any]


class Interface(NamedTuple):
    """What goes in and out of an environment.

    Attributes:
        observation: numbers of a flattened observation.
        actions: how many there are to choose from, where ``discrete``; otherwise numbers of an action.
        discrete: whether actions are chosen from finitely many.
    """

    observation: int
    actions: int
    discrete: bool

    @classmethod
    def of(cls, env: gymnasium.Env, name: str) -> Interface:
        """Of this environment.

        Raises:
            DataError: there is no fixed number of observations, or actions are neither discrete nor bounded numbers.
        """
        try:
            observation = spaces.flatten_space(env.observation_space).shape
        except NotImplementedError:
            observation = None
        if not observation:
            raise DataError(f"{name} observes {env.observation_space}, which is no fixed number of numbers: wrap it")
        action = env.action_space
        if isinstance(action, spaces.Discrete):
            return cls(observation[0], int(action.n), True)
        if isinstance(action, spaces.Box) and action.is_bounded():
            return cls(observation[0], int(np.prod(action.shape)), False)
        raise DataError(f"{name} takes {action}, but actions must be discrete or numbers with bounds: wrap it")


def make(name: str, arguments: dict[str, Any]) -> gymnasium.Env:
    """An environment from the path of its class or from its id.

    Raises:
        DataError: there is none of that name, something that it needs is not installed, or it has no tasks.
    """
    try:
        if re.fullmatch(r"\w+(\.\w+)+", name):
            module, leaf = name.rsplit(".", 1)
            found = getattr(importlib.import_module(module), leaf, None)
            if found is None:
                raise DataError(f"env is {name!r} but {module} has no {leaf}: give the path of a class")
            env = found(**arguments)
        else:
            env = gymnasium.make(name, disable_env_checker=True, **arguments)
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        said = " ".join(str(error).split())
        absent = getattr(error, "name", None)
        if absent and name.startswith(absent):
            raise DataError(
                f"env is {name!r} but {said}: give the path of a class, from where the run starts"
            ) from error
        raise DataError(f"{name} needs what is not installed ({said}): {CURE}") from error
    except gymnasium.error.Error as error:
        said = " ".join(str(error).split())
        raise DataError(f"env is {name!r} but {said}: give the path of a class or a registered id") from error
    for hook in ("sample_task", "set_task"):
        if not env.has_wrapper_attr(hook):
            env.close()
            raise DataError(f"{name} has no {hook}: see datamodules.GymnasiumTasks for what an environment needs")
    return env


class Rows(gymnasium.Env):
    """Sub-environments that act one after another, as rows of arrays.

    One that terminates or is truncated waits: its observation stays, without reward, until all begin again. For
    gymnasium's AsyncVectorEnv a process's rows are one environment.

    Args:
        factory: makes a sub-environment.
        interface: of these.
        capacity: most rows of a process; any number where there is one process alone.
        part: which of the processes' shares is this one's.
        parent: the process that started this one, so that a child knows itself.
    """

    metadata = {"render_modes": []}

    def __init__(
        self,
        factory: Callable[[], gymnasium.Env],
        interface: Interface,
        capacity: int = 0,
        part: int = 0,
        parent: int | None = None,
    ) -> None:
        self.factory, self.interface, self.part = factory, interface, part
        self.envs: list[gymnasium.Env] = []
        self.ended: list[bool] = []
        shape = (capacity,) if interface.discrete else (capacity, interface.actions)
        self.action_space = spaces.Box(-np.inf, np.inf, shape, np.float64)
        self.observation_space = spaces.Box(-np.inf, np.inf, (capacity, interface.observation), np.float64)
        self.observation = np.zeros((capacity, interface.observation))
        if parent not in (None, os.getpid()):
            # A fork inherits handlers that wait for the training to save itself: it would never end.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def begin(self, tasks: Sequence[EnvTask], seeds: Sequence[int]) -> np.ndarray:
        """New episodes of these tasks: observations (N, observation)."""
        while len(self.envs) < len(tasks):
            self.envs.append(self.factory())
        self.ended = [False] * len(tasks)
        if len(self.observation) < len(tasks):
            self.observation = np.zeros((len(tasks), self.interface.observation))
        for i, (env, task, seed) in enumerate(zip(self.envs, tasks, seeds, strict=False)):
            env.get_wrapper_attr("set_task")(task)
            observation, _ = env.reset(seed=seed)
            self.observation[i] = spaces.flatten(env.observation_space, observation)
        return self.observation[: len(tasks)].copy()

    def act(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """From actions (N,) or (N, actions) in [-1, 1]: observations (N, observation) and rewards (N,), float64."""
        rows = len(self.ended)
        rewards = np.zeros(rows)
        chosen = self._chosen(actions[:rows]) if rows else actions
        for i, env in enumerate(self.envs[:rows]):
            if not self.ended[i]:
                observation, rewards[i], terminated, truncated, _ = env.step(chosen[i])
                self.observation[i] = spaces.flatten(env.observation_space, observation)
                self.ended[i] = bool(terminated or truncated)
        return self.observation[:rows].copy(), rewards

    def _chosen(self, actions: np.ndarray) -> Any:
        space: Any = self.envs[0].action_space
        if self.interface.discrete:
            return [int(a) + int(space.start) for a in actions]
        # In this order nothing is rounded where the bounds are -1 and 1.
        centre, reach = (space.high.astype(float) + space.low) / 2, (space.high.astype(float) - space.low) / 2
        scaled = centre + reach * np.clip(actions, -1.0, 1.0).reshape(-1, *space.shape)
        return scaled.astype(space.dtype)

    def render(self) -> Any:
        """A picture of the first row, (height, width, 3) uint8."""
        return self.envs[0].render()

    def close(self) -> None:
        for env in self.envs:
            env.close()
        self.envs.clear()

    # As one environment of AsyncVectorEnv -----------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        assert options is not None
        self.begin(*options["parts"][self.part])
        return self.observation, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict]:
        rewards = np.zeros(len(self.observation))
        rewards[: len(self.ended)] = self.act(action)[1]
        return self.observation, rewards, False, False, {}


class Processes:
    """Rows that several processes share, through gymnasium's AsyncVectorEnv; methods as ``Rows``.

    Args:
        factory: makes a sub-environment.
        interface: of these.
        processes: their number.
    """

    def __init__(self, factory: Callable[[], gymnasium.Env], interface: Interface, processes: int) -> None:
        self.factory, self.interface, self.processes = factory, interface, processes
        self.vector: AsyncVectorEnv | None = None
        self.capacity = self.rows = 0

    def begin(self, tasks: Sequence[EnvTask], seeds: Sequence[int]) -> np.ndarray:
        self.rows, share = len(tasks), -(-len(tasks) // self.processes)
        if self.vector is None or share > self.capacity:
            self.close()
            self.capacity = share
            self.vector = AsyncVectorEnv(
                [
                    partial(Rows, self.factory, self.interface, self.capacity, part, os.getpid())
                    for part in range(self.processes)
                ]
            )
        self.share = share
        bounds = [slice(p * share, (p + 1) * share) for p in range(self.processes)]
        observation, _ = self.vector.reset(options={"parts": [(tasks[b], seeds[b]) for b in bounds]})
        return self._rows(observation)

    def act(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert self.vector is not None
        shares = np.zeros(self.vector.action_space.shape)  # pyright: ignore[reportArgumentType]
        for part in range(self.processes):
            own = actions[part * self.share : (part + 1) * self.share]
            shares[part, : len(own)] = own
        observation, rewards, *_ = self.vector.step(shares)
        return self._rows(observation), self._rows(rewards)

    def _rows(self, of_processes: np.ndarray) -> np.ndarray:
        return of_processes[:, : self.share].reshape(-1, *of_processes.shape[2:])[: self.rows]

    def render(self) -> Any:
        raise NotImplementedError("other processes show nothing")

    def close(self) -> None:
        if self.vector is not None:
            vector, self.vector = self.vector, None
            vector.close(timeout=10)
