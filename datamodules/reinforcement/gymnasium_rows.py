"""Environments of gymnasium in step, in this process or shared among several. Imported where they are made."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv

from datamodules.core.errors import DataError

CURE = 'pip install "gymnasium[mujoco]"'  # brings what gymnasium's own environments need
EnvTask = dict[str, Any]


class Acted(NamedTuple):
    """What came of a step of N sub-environments.

    Attributes:
        observation: (N, observation), float64.
        reward: (N,).
        terminated: (N,), 1 from the step that ended an episode on.
        info: (N, names), numbers that were asked for; NaN where there was none.
    """

    observation: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    info: np.ndarray


class Interface(NamedTuple):
    """What goes in and out of an environment.

    Attributes:
        observation: numbers of a flattened observation.
        actions: how many there are to choose from, where ``discrete``; otherwise numbers of an action.
        discrete: whether actions are chosen from finitely many.
        info: names of the numbers in a step's ``info`` that are kept.
        name: what messages call it.
    """

    observation: int
    actions: int
    discrete: bool
    info: tuple[str, ...] = ()
    name: str = ""

    @classmethod
    def of(cls, env: gymnasium.Env, name: str, info: Sequence[str] = ()) -> Interface:
        """Of this environment.

        Raises:
            DataError: there is no fixed number of observations, or they are pictures; actions are neither discrete nor
                bounded numbers.
        """
        space = env.observation_space
        if isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) > 1:
            raise DataError(
                f"{name} observes pictures, {space.shape} bytes, which the networks here do not see as such: wrap it "
                "in gymnasium.wrappers.TransformObservation, which encodes them as some numbers"
            )
        try:
            observation = spaces.flatten_space(env.observation_space).shape
        except NotImplementedError:
            observation = None
        if not observation:
            raise DataError(f"{name} observes {env.observation_space}, which is no fixed number of numbers: wrap it")
        action = env.action_space
        if isinstance(action, spaces.Discrete):
            return cls(observation[0], int(action.n), True, tuple(info), name)
        if isinstance(action, spaces.Box) and action.is_bounded():
            return cls(observation[0], int(np.prod(action.shape)), False, tuple(info), name)
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

    One that terminates waits: its observation stays, without reward, until all begin again. For gymnasium's
    AsyncVectorEnv a process's rows are one environment, whose observations have reward, end and info beside them.

    Args:
        factory: makes a sub-environment.
        interface: of these.
        horizon: steps of an episode.
        capacity: most rows of a process; any number where there is one process alone.
        part: which of the processes' shares is this one's.
        parent: the process that started this one, so that a child knows itself.
    """

    metadata = {"render_modes": []}

    def __init__(
        self,
        factory: Callable[[], gymnasium.Env],
        interface: Interface,
        horizon: int,
        capacity: int = 0,
        part: int = 0,
        parent: int | None = None,
    ) -> None:
        self.factory, self.interface, self.horizon, self.part = factory, interface, horizon, part
        self.envs: list[gymnasium.Env] = []
        self.ended: list[bool] = []
        shape = (capacity,) if interface.discrete else (capacity, interface.actions)
        self.action_space = spaces.Box(-np.inf, np.inf, shape, np.float64)
        width = interface.observation + 2 + len(interface.info)
        self.observation_space = spaces.Box(-np.inf, np.inf, (capacity, width), np.float64)
        self.observation = np.zeros((capacity, interface.observation))
        self.capacity = capacity
        self.tasks: Sequence[EnvTask] = ()
        self.steps = 0
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
        self.tasks, self.steps = tasks, 0
        for i, (env, task, seed) in enumerate(zip(self.envs, tasks, seeds, strict=False)):
            with self._named("reset", i):
                env.get_wrapper_attr("set_task")(task)
                observation, _ = env.reset(seed=seed)
                self.observation[i] = spaces.flatten(env.observation_space, observation)
                self._refuse_nonfinite(i, 0.0)
        return self.observation[: len(tasks)].copy()

    def act(self, actions: np.ndarray) -> Acted:
        """From actions (N,) or (N, actions) in [-1, 1].

        Raises:
            DataError: a sub-environment failed, was truncated, or gave what is no number.
        """
        rows, names = len(self.ended), self.interface.info
        rewards, told = np.zeros(rows), np.full((rows, len(names)), np.nan)
        chosen = self._chosen(actions[:rows]) if rows else actions
        self.steps += 1
        for i, env in enumerate(self.envs[:rows]):
            if not self.ended[i]:
                with self._named("step", i):
                    observation, rewards[i], terminated, truncated, info = env.step(chosen[i])
                    self.observation[i] = spaces.flatten(env.observation_space, observation)
                    told[i] = [float(info.get(name, np.nan)) for name in names]
                    self._refuse_nonfinite(i, rewards[i])
                if truncated and not terminated and self.steps < self.horizon:
                    raise DataError(
                        f"{self.interface.name} is truncated after {self.steps} of {self.horizon} steps, which is no "
                        f"end that its states know of: give --data.init_args.horizon {self.steps}, or have it terminate"
                    )
                self.ended[i] = bool(terminated)
        return Acted(self.observation[:rows].copy(), rewards, np.array(self.ended, float), told)

    def _refuse_nonfinite(self, i: int, reward: float) -> None:
        for what, value in (("reward", reward), ("observation", self.observation[i])):
            if not np.isfinite(value).all():
                raise ValueError(f"its {what} is {value}")

    @contextlib.contextmanager
    def _named(self, call: str, i: int) -> Iterator[None]:
        """Errors of a sub-environment say where they happened."""
        try:
            yield
        except Exception as error:
            said = " ".join(str(error).split()) or type(error).__name__
            where = f" {self.steps}" if call == "step" else ""
            raise DataError(
                f"{self.interface.name} failed in {call}{where} of task {self.tasks[i]} ({said}): mend the environment"
            ) from error

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
        begun = self.begin(*options["parts"][self.part])
        nothing = np.zeros(len(begun))
        return self._beside(Acted(begun, nothing, nothing, np.zeros((len(begun), len(self.interface.info))))), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict]:
        return self._beside(self.act(action)), 0.0, False, False, {}

    def _beside(self, acted: Acted) -> np.ndarray:
        """All of a step in one array, with room for as many rows as there may be."""
        columns = [acted.observation, acted.reward[:, None], acted.terminated[:, None], acted.info]
        own = np.concatenate(columns, 1)
        return np.pad(own, ((0, self.capacity - len(own)), (0, 0)))


@contextlib.contextmanager
def _errors_told_once() -> Iterator[None]:
    """Gymnasium warns of what other processes raised, several times, and then raises it here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*ERROR: ")
        yield


class Processes:
    """Rows that several processes share, through gymnasium's AsyncVectorEnv; methods as ``Rows``.

    Args:
        factory: makes a sub-environment.
        interface: of these.
        processes: their number.
        horizon: steps of an episode.
    """

    def __init__(
        self, factory: Callable[[], gymnasium.Env], interface: Interface, processes: int, horizon: int
    ) -> None:
        self.factory, self.interface, self.processes, self.horizon = factory, interface, processes, horizon
        self.vector: AsyncVectorEnv | None = None
        self.capacity = self.rows = 0

    def begin(self, tasks: Sequence[EnvTask], seeds: Sequence[int]) -> np.ndarray:
        self.rows, share = len(tasks), -(-len(tasks) // self.processes)
        if self.vector is None or share > self.capacity:
            self.close()
            self.capacity = share
            self.vector = AsyncVectorEnv(
                [
                    partial(Rows, self.factory, self.interface, self.horizon, self.capacity, part, os.getpid())
                    for part in range(self.processes)
                ]
            )
        self.share = share
        bounds = [slice(p * share, (p + 1) * share) for p in range(self.processes)]
        with _errors_told_once():
            observation, _ = self.vector.reset(options={"parts": [(tasks[b], seeds[b]) for b in bounds]})
        return self._acted(observation).observation

    def act(self, actions: np.ndarray) -> Acted:
        assert self.vector is not None
        shares = np.zeros(self.vector.action_space.shape)  # pyright: ignore[reportArgumentType]
        for part in range(self.processes):
            own = actions[part * self.share : (part + 1) * self.share]
            shares[part, : len(own)] = own
        with _errors_told_once():
            return self._acted(self.vector.step(shares)[0])

    def _acted(self, of_processes: np.ndarray) -> Acted:
        rows = of_processes[:, : self.share].reshape(-1, of_processes.shape[2])[: self.rows]
        size = self.interface.observation
        return Acted(rows[:, :size], rows[:, size], rows[:, size + 1], rows[:, size + 2 :])

    def render(self) -> Any:
        raise NotImplementedError("other processes show nothing")

    def close(self) -> None:
        if self.vector is not None:
            vector, self.vector = self.vector, None
            vector.close(timeout=10)
