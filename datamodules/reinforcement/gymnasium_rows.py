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
from multiprocessing import connection
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
        for what in ("observation_space", "action_space"):
            if not isinstance(getattr(env, what, None), spaces.Space):
                raise DataError(
                    f"{name} has no {what}: give it one of gymnasium.spaces, at the latest in its constructor"
                )
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
        actions = actions_of(env.action_space)
        if actions is None:
            raise DataError(
                f"{name} takes {env.action_space}, but actions must be discrete or numbers with bounds: wrap it"
            )
        return cls(observation[0], *actions, tuple(info), name)


def actions_of(space: spaces.Space) -> tuple[int, bool] | None:
    """How many there are to choose from, or numbers of an action, and whether they are discrete; None for neither."""
    if isinstance(space, spaces.Discrete):
        return int(space.n), True
    if isinstance(space, spaces.Box) and space.is_bounded():
        return int(np.prod(space.shape)), False
    return None


def flat(space: spaces.Space, observation: Any) -> np.ndarray:
    """An observation as numbers, (observation,).

    Raises:
        ValueError: it does not have the shape that the space declares; NumPy would repeat a number to fill it.
    """
    _refuse_misshapen(space, observation)
    return spaces.flatten(space, observation)  # pyright: ignore[reportReturnType]


def _refuse_misshapen(space: spaces.Space, observation: Any, part: str = "") -> None:
    """Compares shapes alone: that all values are within their bounds would take longer to see than many a step."""
    if (declared := space.shape) is not None:
        shape = observation.shape if isinstance(observation, np.ndarray) else np.shape(observation)
        if shape != declared:
            raise ValueError(f"its observation{part} has the shape {shape}, but observation_space declares {declared}")
    elif isinstance(space, spaces.Dict):
        for name, of in space.spaces.items():
            _refuse_misshapen(of, observation[name], f"{part} {name}")
    elif isinstance(space, spaces.Tuple):
        for i, (of, value) in enumerate(zip(space.spaces, observation, strict=True)):
            _refuse_misshapen(of, value, f"{part} {i}")


def truth(what: str, value: Any) -> bool:
    """Of a step's end.

    Raises:
        ValueError: it is an array of several.
    """
    try:
        return bool(value)
    except ValueError as error:
        raise ValueError(f"its {what} is {value}, where True or False is due") from error


def failure(name: str, where: str, error: BaseException, cure: str = "mend the environment") -> DataError:
    """What a user's environment raised, in one line that says where."""
    # Some say no more than a value; an exit would otherwise end the run without a word.
    bare = isinstance(error, (KeyError, SystemExit)) or not str(error)
    said = f"it raised {error!r}" if bare else str(error)
    return DataError(" ".join(f"{name} failed in {where} ({said}): {cure}".split()))


def make(name: str, arguments: dict[str, Any]) -> gymnasium.Env:
    """An environment from the path of its class or from its id.

    Raises:
        DataError: there is none of that name, something that it needs is not installed, it failed, or it has no tasks.
    """
    where, cure = "its import", "mend the environment"
    try:
        factory: Any = _class(name) if re.fullmatch(r"\w+(\.\w+)+", name) else _registered(name)
        where, cure = "its constructor", f"give what it needs by --data.init_args.arguments, or {cure}"
        env = factory(**arguments)
    except DataError:
        raise
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
    except (Exception, SystemExit) as error:
        raise failure(name, where, error, cure) from error
    if not isinstance(env, gymnasium.Env):
        raise DataError(f"env is {name!r}, which gives {env!r}: give the path of a subclass of gymnasium.Env")
    for hook in ("sample_task", "set_task"):
        if not env.has_wrapper_attr(hook) or not callable(env.get_wrapper_attr(hook)):
            close(name, env)
            raise DataError(f"{name} has no {hook}: see datamodules.GymnasiumTasks for what an environment needs")
    return env


def _class(path: str) -> Callable[..., Any]:
    module, leaf = path.rsplit(".", 1)
    found = getattr(importlib.import_module(module), leaf, None)
    if not callable(found):
        told = f" but {module} has no {leaf}" if found is None else f", which is {found!r}"
        raise DataError(f"env is {path!r}{told}: give the path of a class")
    return found


def _registered(name: str) -> Callable[..., Any]:
    return partial(gymnasium.make, name, disable_env_checker=True)


def close(name: str, env: gymnasium.Env) -> None:
    """Close an environment.

    Raises:
        DataError: it failed.
    """
    try:
        env.close()
    except (Exception, SystemExit) as error:
        raise failure(name, "close", error) from error


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
        self.spaces: list[Any] = []  # of the rows' actions
        self.centre = self.reach = np.zeros((0, interface.actions))
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
            with self._named("set_task", i):
                env.get_wrapper_attr("set_task")(task)
            with self._named("reset", i):
                observation, _ = env.reset(seed=seed)
                self._see(i, observation, 0.0)
        self._take_action_spaces()
        return self.observation[: len(tasks)].copy()

    def act(self, actions: np.ndarray) -> Acted:
        """From actions (N,) or (N, actions) in [-1, 1].

        Raises:
            DataError: a sub-environment failed, was truncated, or gave what is no number.
        """
        rows, names = len(self.ended), self.interface.info
        rewards, told = np.zeros(rows), np.full((rows, len(names)), np.nan)
        chosen = self._chosen(actions[:rows])
        self.steps += 1
        for i, env in enumerate(self.envs[:rows]):
            if not self.ended[i]:
                with self._named("step", i):
                    observation, rewards[i], terminated, truncated, info = env.step(chosen[i])
                    self._see(i, observation, rewards[i])
                    told[i] = [float(info.get(name, np.nan)) for name in names]
                    self.ended[i], truncated = truth("terminated", terminated), truth("truncated", truncated)
                if truncated and not self.ended[i] and self.steps < self.horizon:
                    raise DataError(
                        f"{self.interface.name} is truncated after {self.steps} of {self.horizon} steps, which is no "
                        f"end that its states know of: give --data.init_args.horizon {self.steps}, or have it terminate"
                    )
        return Acted(self.observation[:rows].copy(), rewards, np.array(self.ended, float), told)

    def _see(self, i: int, observation: Any, reward: float) -> None:
        space = self.envs[i].observation_space
        seen = flat(space, observation)
        if len(seen) != self.interface.observation:
            raise ValueError(
                f"its observation_space is {space}, {len(seen)} numbers, but {self.interface.observation} where it was "
                "made, and tasks must have equally many"
            )
        self.observation[i] = seen
        for what, value in (("reward", reward), ("observation", self.observation[i])):
            if not np.isfinite(value).all():
                raise ValueError(f"its {what} is {value}")

    @contextlib.contextmanager
    def _named(self, call: str, i: int) -> Iterator[None]:
        """Errors of a sub-environment say where they happened."""
        try:
            yield
        except (Exception, SystemExit) as error:
            where = f"{call} {self.steps}" if call == "step" else call
            raise failure(self.interface.name, f"{where} of task {self.tasks[i]}", error) from error

    def _take_action_spaces(self) -> None:
        """Of every row its own: a task may have other bounds, though not other numbers, of actions."""
        self.spaces = [env.action_space for env in self.envs[: len(self.tasks)]]
        for space, task in zip(self.spaces, self.tasks, strict=True):
            if actions_of(space) != (self.interface.actions, self.interface.discrete):
                kind = "choices" if self.interface.discrete else "numbers with bounds"
                line = (
                    f"{self.interface.name} takes {space} in task {task}, but {self.interface.actions} {kind} where it "
                    "was made: give all tasks equally many of one kind, they may have bounds of their own"
                )
                raise DataError(" ".join(line.split()))
        if not self.interface.discrete:
            size = (len(self.spaces), self.interface.actions)
            low, high = (
                np.array([getattr(s, end).ravel() for s in self.spaces], float).reshape(size) for end in ("low", "high")
            )
            self.centre, self.reach = (high + low) / 2, (high - low) / 2

    def _chosen(self, actions: np.ndarray) -> list[Any]:
        if self.interface.discrete:
            return [int(a) + int(space.start) for a, space in zip(actions, self.spaces, strict=True)]
        # In this order nothing is rounded where the bounds are -1 and 1.
        scaled = self.centre + self.reach * np.clip(actions, -1.0, 1.0)
        return [a.reshape(space.shape).astype(space.dtype) for a, space in zip(scaled, self.spaces, strict=True)]

    def render(self) -> Any:
        """A picture of the first row, (height, width, 3) uint8."""
        return self.envs[0].render()

    def close(self) -> None:
        for env in self.envs:
            close(self.interface.name, env)
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
        with self._alive("reset"):
            observation, _ = self.vector.reset(options={"parts": [(tasks[b], seeds[b]) for b in bounds]})
        return self._acted(observation).observation

    def act(self, actions: np.ndarray) -> Acted:
        assert self.vector is not None
        shares = np.zeros(self.vector.action_space.shape)  # pyright: ignore[reportArgumentType]
        for part in range(self.processes):
            own = actions[part * self.share : (part + 1) * self.share]
            shares[part, : len(own)] = own
        with self._alive("step"):
            return self._acted(self.vector.step(shares)[0])

    def _acted(self, of_processes: np.ndarray) -> Acted:
        rows = of_processes[:, : self.share].reshape(-1, of_processes.shape[2])[: self.rows]
        size = self.interface.observation
        return Acted(rows[:, :size], rows[:, size], rows[:, size + 1], rows[:, size + 2 :])

    @contextlib.contextmanager
    def _alive(self, call: str) -> Iterator[None]:
        """What other processes raise is told once; that one is gone, in place of an end of its pipe."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=r".*ERROR: ")  # gymnasium warns of it, too, several times
                yield
        except (EOFError, ConnectionError) as error:
            gone = self._abandon()
            raise DataError(
                f"{self.interface.name} failed in {call} (one of its processes {gone}): see whether memory ran out, or "
                "what it does by --data.init_args.processes 0"
            ) from error

    def _abandon(self) -> str:
        """End all processes, one of which is gone, and say how it went."""
        assert self.vector is not None
        vector, self.vector = self.vector, None
        ended = connection.wait([process.sentinel for process in vector.processes], timeout=5)
        gone = [process for process in vector.processes if process.sentinel in ended]
        for process in vector.processes:
            if process not in gone:
                process.terminate()
            process.join()
        vector.closed = True  # its own close() would wait for the answer of the one that is gone
        code = gone[0].exitcode or 0 if gone else 0
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def render(self) -> Any:
        raise NotImplementedError("other processes show nothing")

    def close(self) -> None:
        if self.vector is not None:
            try:
                with self._alive("close"):
                    self.vector.close(timeout=10)
            finally:
                self.vector = None
