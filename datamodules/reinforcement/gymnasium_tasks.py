"""Environments of gymnasium whose task can be set: physics engines, games, what users write."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.core.errors import DataError, at_least
from datamodules.core.metric import Metric
from datamodules.core.streams import TaskStreams
from datamodules.reinforcement.environments import (
    SUCCESS,
    Environment,
    EnvironmentDataModule,
    Environments,
    Facts,
    Step,
)

TEXT = 64  # bytes of a fact that is text, at most
WHOLE = (bool, int, np.integer, np.bool_)
FACTS = "give numbers, whole ones below 2^24, arrays of numbers or text, under the same names for every task"


class Newest(NamedTuple):
    """A handle of what goes on in the sub-environments, which have no copies.

    Attributes:
        number: counts what happened to them; only the newest handle can be stepped.
        observation: (N, observation_size).
    """

    number: int
    observation: Tensor


class GymnasiumEnvironment(Environment):
    """N environments of one class act in step, each on its own task. A sub-environment is made once and used again.

    ``start`` sets the tasks and resets with seeds that are made from its draws, so that what follows is a function of
    tasks, draws and actions, as far as the class takes its chance from ``self.np_random``. It begins new episodes in
    all: a state from before can no longer be stepped. One that terminates before the horizon stays as it is, without
    reward, until the horizon ends; one that is truncated before is refused, since its states do not tell how long it
    lasts. Discrete observations are one-hot, others flattened; actions in [-1, 1] are stretched to the bounds of the
    action space, which may be a task's own, beyond that they are clipped.

    Args:
        env: the path of a class, or an id that gymnasium knows.
        horizon: steps of an episode.
        processes: that share the sub-environments among them; 0 steps them one after another in this one.
        arguments: for the constructor.
        info: names of numbers in what a step tells that are kept.
        most: sub-environments that may be open at a time.

    Raises:
        DataError: gymnasium or what the class needs is not installed, or the class does not fit; names the cure.
    """

    start_draws = 1
    unscaled = True

    def __init__(
        self,
        env: str,
        horizon: int,
        processes: int = 0,
        arguments: dict[str, Any] | None = None,
        info: Sequence[str] = (),
        most: int = 1000,
    ) -> None:
        at_least(1, horizon=horizon, most_open=most)
        at_least(0, processes=processes)
        self.env, self.horizon, self.processes, self.arguments = env, horizon, processes, dict(arguments or {})
        self.info, self.most = tuple(info), most
        self._forget()
        try:
            from datamodules.reinforcement import gymnasium_rows
        except ImportError as error:
            raise DataError(f'{env} needs gymnasium: pip install "gymnasium[mujoco]"') from error
        self.interface = gymnasium_rows.Interface.of(self.first, env, self.info)
        self.observation_size, self.actions, self.discrete = self.interface[:3]
        limit = getattr(self.first.spec, "max_episode_steps", None)
        if limit is not None and limit < horizon:
            raise DataError(
                f"{env} is truncated after {limit} steps, but horizon is {horizon}: "
                f"give --data.init_args.horizon {limit}"
            )
        example = self._sample(TaskStreams(0, "train", [0]))[0]
        self.kinds = {name: type(value) for name, value in example.items()}
        self.shapes = {name: self._as_number(name, value).shape for name, value in example.items()}
        self.facts = sum(math.prod(shape) for shape in self.shapes.values())
        if not self.facts:
            raise DataError(f"{env}'s sample_task gives nothing that tells tasks apart: give it at least one number")
        self.renders = "rgb_array" in (self.first.metadata.get("render_modes") or ())
        self.fps = float(self.first.metadata.get("render_fps") or 30)

    @property
    def first(self) -> Any:
        """A sub-environment that draws tasks and is never stepped."""
        if self._first is None:
            from datamodules.reinforcement import gymnasium_rows

            self._first = gymnasium_rows.make(self.env, self.arguments)
        return self._first

    @property
    def identity(self) -> str:
        return f"{self.env} {json.dumps(self.arguments, sort_keys=True, default=str)}"

    @property
    def title(self) -> str:
        return self.env.rsplit(".", 1)[-1]

    def parameters(self, rng: TaskStreams) -> dict[str, np.ndarray]:
        drawn = self._sample(rng)
        for task in drawn:
            if task.keys() != self.kinds.keys():
                names, others = (", ".join(map(str, given)) or "nothing" for given in (self.kinds, task))
                raise DataError(f"{self.env}'s sample_task gives {names}, for another task {others}: {FACTS}")
        return {name: np.stack([self._fact(name, task[name]) for task in drawn]) for name in self.kinds}

    def _sample(self, rng: TaskStreams) -> list[Mapping[str, Any]]:
        """Tasks as ``sample_task`` gives them, one for each stream.

        Raises:
            DataError: it failed, or gave no dictionary.
        """
        sample = self.first.get_wrapper_attr("sample_task")
        try:
            split = {"split": rng.split} if "split" in inspect.signature(sample).parameters else {}
            drawn = [sample(np.random.default_rng(int(word)), **split) for word in rng.bits()]
        except (Exception, SystemExit) as error:
            from datamodules.reinforcement import gymnasium_rows

            raise gymnasium_rows.failure(self.env, "sample_task", error) from error
        for task in drawn:
            if not isinstance(task, Mapping):
                raise DataError(f"{self.env}'s sample_task gives {task!r}, which is no dictionary: {FACTS}")
        return drawn

    def _fact(self, name: str, value: Any) -> np.ndarray:
        """``_as_number`` of a fact that is like the other tasks'.

        Raises:
            DataError: it has another shape or kind, and would not come back as it is.
        """
        number, shape, kind = self._as_number(name, value), self.shapes[name], self.kinds[name]
        text = isinstance(value, str) != issubclass(kind, str)
        if text or (issubclass(kind, WHOLE) and number.ndim == 0 and kind(number) != number):
            raise DataError(
                f"{self.env}'s sample_task gives {name} {value!r}, for another task one of type {kind.__name__}: "
                "give the same type for every task"
            )
        if number.shape != shape:
            raise DataError(
                f"{self.env}'s sample_task gives {name} of shape {number.shape}, for another task {shape}: "
                "give every task the same one, such as by zeros at the end"
            )
        return number

    def _as_number(self, name: str, value: Any) -> np.ndarray:
        """A fact as numbers that single precision keeps; text as its bytes."""
        if isinstance(value, str):
            code = np.frombuffer(value.encode(), np.uint8)
            if len(code) > TEXT or 0 in code:
                raise DataError(f"{self.env}'s sample_task gives {name} {value!r}: a text has at most {TEXT} bytes")
            return np.pad(code, (0, TEXT - len(code))).astype(np.float64)
        try:
            number = np.asarray(value, np.float64)
        except (TypeError, ValueError):
            number = np.array(np.nan)
        whole = np.issubdtype(np.asarray(value).dtype, np.integer) and (number.astype(np.float32) != number).any()
        if not np.isfinite(number).all() or whole:
            raise DataError(f"{self.env}'s sample_task gives {name} {value!r}: {FACTS}")
        return number

    def _told(self, name: str, value: np.ndarray) -> Any:
        """A fact of one task as ``sample_task`` gave it."""
        kind = self.kinds[name]
        if issubclass(kind, str):
            return bytes(value.astype(np.uint8)).rstrip(b"\0").decode()
        return (
            kind(value) if value.ndim == 0 and issubclass(kind, WHOLE) else (float(value) if value.ndim == 0 else value)
        )

    def start(self, task: Facts, draws: Tensor) -> Newest:
        told = {name: value.cpu().numpy() for name, value in task.items()}
        tasks = [{name: self._told(name, value[i]) for name, value in told.items()} for i in range(len(draws))]
        if len(tasks) > self.most:
            raise DataError(
                f"{len(tasks)} environments would be open at a time, which is more than {self.most}: lower "
                "--data.init_args.meta_batch_size and eval_batch_size, or give --data.init_args.most_open"
            )
        seeds = (draws[:, 0].cpu().double() * 2**31).long().tolist()  # many environments keep them in 32 bits, signed
        return self._newest(task, self._rows().begin(tasks, seeds))

    def observe(self, task: Facts, state: Newest) -> Tensor:
        return state.observation

    def step(self, task: Facts, state: Newest, action: Tensor, draws: Tensor) -> Step:
        if state.number != self._number or self._open is None:
            raise RuntimeError(
                f"only the newest state of {self.env} can be stepped, its sub-environments have no copies: "
                "begin new episodes with start()"
            )
        acted = self._rows().act(action.detach().cpu().numpy())
        reward, terminated, info = (torch.from_numpy(part).to(state.observation) for part in acted[1:])
        told = dict(zip(self.info, info.unbind(1), strict=True))
        return Step(self._newest(task, acted.observation), reward, reward, terminated, told)

    def render(self) -> np.ndarray:
        """A picture of the first sub-environment as it is now, (height, width, 3) uint8."""
        return np.asarray(self._rows().render())

    def rendering(self) -> GymnasiumEnvironment | None:
        """The same with sub-environments of its own that can be rendered, in this process; None where they cannot."""
        if not self.renders:
            return None
        other = copy.copy(self)
        other._first = None
        other.processes, other.arguments = 0, self.arguments | {"render_mode": "rgb_array"}
        return other

    def close(self) -> None:
        """Close all sub-environments; ``start`` makes new ones."""
        if self._open is not None and self._owner == os.getpid():
            self._open.close()
        if self._first is not None:
            from datamodules.reinforcement import gymnasium_rows

            gymnasium_rows.close(self.env, self._first)
        self._forget()

    def _forget(self) -> None:
        self._first = self._open = self._owner = None
        self._number = 0

    def _rows(self) -> Any:
        if self._open is None or self._owner != os.getpid():  # after a fork they are the other process's
            from datamodules.reinforcement import gymnasium_rows

            factory = partial(gymnasium_rows.make, self.env, self.arguments)
            self._owner = os.getpid()
            if self.processes:
                self._open = gymnasium_rows.Processes(factory, self.interface, self.processes, self.horizon)
            else:
                self._open = gymnasium_rows.Rows(factory, self.interface, self.horizon)
        return self._open

    def _newest(self, task: Facts, observation: np.ndarray) -> Newest:
        self._number += 1
        return Newest(self._number, torch.from_numpy(observation).to(next(iter(task.values()))))

    def __getstate__(self) -> dict[str, Any]:
        """Without sub-environments: a copy makes its own."""
        return self.__dict__ | {"_first": None, "_open": None, "_owner": None, "_number": 0}


class GymnasiumTasks(EnvironmentDataModule):
    """Tasks of a user's own: any class of gymnasium with two methods more.

    ``sample_task(rng)`` draws a task with a NumPy generator: a dictionary of numbers, text, or arrays of fixed shape,
    which are kept in single precision; ``sample_task(rng, split)`` is told "train", "val" or "test" as well.
    ``set_task(task)`` is called with it before each reset, and may give ``action_space`` other bounds. For instance, in
    my_envs.py::

        class Corridor(gymnasium.Env):
            observation_space = gymnasium.spaces.Box(-10.0, 10.0, (1,))
            action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))

            def sample_task(self, rng):
                return {"goal": rng.uniform(-5.0, 5.0)}

            def set_task(self, task):
                self.goal = task["goal"]

            def reset(self, *, seed=None, options=None):
                super().reset(seed=seed)
                self.x = self.np_random.uniform(-1.0, 1.0, 1)
                return self.x, {}

            def step(self, action):
                self.x = self.x + action
                return self.x, -abs(float(self.x[0]) - self.goal), False, False, {}

    is trained on with ``--config configs/reinforcement/rl2/gymnasium.yaml --data.env my_envs.Corridor
    --data.horizon 20``. See GymnasiumEnvironment for what becomes of observations, actions and early ends.

    Args:
        env: the path of the class, or the id of a registered environment that has both methods.
        horizon: steps of an episode.
        episodes: of a trial.
        processes: that share the environments of a meta-batch, per training process; 0 has none beside it.
        arguments: for the class's constructor.
        info_metrics: names of numbers in what a step tells that become metrics, of the last episode: "success" whether
            it ever was one, others by their mean over its steps.
        most_open: environments that may be open at a time. As many as tasks of a meta-batch are; MAMLPolicy has as many
            of each as it has ``rollouts``.
        unscaled: whether learners normalise observations and rewards, unless told otherwise.
        meta_batch_size, eval_batch_size, val_tasks, test_tasks: see EpisodicDataModule.
        **common: see EnvironmentDataModule.

    Raises:
        DataError: see GymnasiumEnvironment.
    """

    def __init__(
        self,
        env: str,
        horizon: int,
        episodes: int = 2,
        processes: int = 0,
        arguments: dict[str, Any] | None = None,
        info_metrics: Sequence[str] = (),
        most_open: int = 1000,
        unscaled: bool = True,
        meta_batch_size: int = 20,
        val_tasks: int = 20,
        test_tasks: int = 100,
        eval_batch_size: int = 20,
        **common: Any,
    ) -> None:
        environment = GymnasiumEnvironment(env, horizon, processes, arguments, info_metrics, most_open)
        environment.unscaled = unscaled
        sizes: dict[str, Any] = {"val_tasks": val_tasks, "test_tasks": test_tasks, "eval_batch_size": eval_batch_size}
        super().__init__(environment, episodes, meta_batch_size=meta_batch_size, **sizes, **common)

    @property
    def own_metrics(self) -> dict[str, Metric]:
        """Of ``info_metrics``."""
        success = Metric("higher", "tasks that succeeded in the last episode", share=True)
        return {name: success if name == SUCCESS else Metric() for name in self.environment.info}  # pyright: ignore

    def on_device(self, episodes: Any) -> Any:
        # A batch that was sampled in another process comes with a copy, which would make sub-environments of its own.
        batch: Environments = episodes
        return dataclasses.replace(batch, environment=self.environment)

    def teardown(self, stage: str) -> None:
        self.environment.close()  # pyright: ignore
