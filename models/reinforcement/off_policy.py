"""What learners share that learn again from what they did long ago: a replay buffer that lives as long as the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from datamodules.core.errors import ConfigError, at_least
from datamodules.reinforcement.environments import Environments, EnvironmentTasks
from models.core.checkpoint_io import CHECKPOINTS
from models.reinforcement.learner import ReinforcementLearner
from models.reinforcement.replay_buffer import FILE, Replay
from models.reinforcement.trials import Agent, Trial, run_trial


class Transitions(NamedTuple):
    """What was observed, done, and came of it.

    Attributes:
        observation, reached: before and after, (…, observations).
        action: (…, actions).
        reward, shaped, terminated: (…,), see Step.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    shaped: Tensor
    reached: Tensor
    terminated: Tensor

    @classmethod
    def of(cls, rows: Tensor, observations: int, actions: int) -> Transitions:
        """From how they are kept, (…, 2 observations + actions + 3)."""
        observation, action, rewards, reached, ended = rows.split([observations, actions, 2, observations, 1], -1)
        return cls(observation, action, rewards[..., 0], rewards[..., 1], reached, ended[..., 0])

    @classmethod
    def of_trial(cls, trial: Trial) -> Transitions:
        """Each (steps, N, …)."""
        seen = trial.seen
        return cls(seen.observation, trial.action, trial.reward, trial.shaped, trial.reached, trial.terminated)

    def rows(self) -> Tensor:
        """How they are kept."""
        rewards = torch.stack([self.reward, self.shaped], -1)
        return torch.cat([self.observation, self.action, rewards, self.reached, self.terminated[..., None]], -1)


class OffPolicyLearner(ReinforcementLearner):
    """Adds episodes to a replay buffer every so many gradient steps. An algorithm overrides ``collect``.

    What it collects is a function of weights and numbers alone, so processes that train together collect the same, each
    for itself, and none has to send any. The first writes the buffer to the run's folder, beside the checkpoints; to
    evaluate it is not needed.

    Args:
        steps_per_iteration: gradient steps between collections.
        **others: see ReinforcementLearner.
    """

    def __init__(self, observations: int | None, actions: int | None, steps_per_iteration: int, **others: Any) -> None:
        super().__init__(observations, actions, **others)
        at_least(1, steps_per_iteration=steps_per_iteration)
        self.steps_per_iteration = steps_per_iteration
        self.replay: Replay | None = None
        self.collections = 0  # that the replay buffer has
        self._saved: dict[str, Any] | None = None

    def collect(self, tasks: EnvironmentTasks, collection: int) -> None:
        """Add episodes of some of the training tasks to the replay buffer: by weights, seed and number alone."""
        raise NotImplementedError

    def add_episodes(
        self,
        tasks: EnvironmentTasks,
        places: np.ndarray,
        chosen: np.ndarray,
        agent: Agent,
        context: int,
        extra: int = 0,
    ) -> None:
        """Let an agent act in training tasks.

        Args:
            tasks: all of them.
            places: (T,), numbers that no other trial has.
            chosen: (T,), numbers of the tasks.
            agent: acts.
            context, extra: episodes that are the task's context from now on, and further ones.
        """
        assert self.replay is not None
        environment, episodes = tasks.environment, context + extra
        batch = Environments(
            environment, torch.from_numpy(places), tasks.seed, tasks.split, episodes, task=tasks.facts(chosen)
        )
        batch = self.trainer.precision_plugin.convert_input(batch.to(self.device))
        trial = run_trial(batch, agent)
        self.normalizer.update(trial)  # every process meets the same
        shape = (episodes, environment.horizon)
        rows = Transitions.of_trial(trial).rows().transpose(0, 1).unflatten(1, shape)
        lengths = trial.seen.alive.T.unflatten(1, shape).sum(-1).long().cpu()
        for number, of_task, length in zip(chosen, rows, lengths, strict=True):
            self.replay.append(int(number), of_task, context, length)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self.collections <= self.meta_updates // self.steps_per_iteration:
            with torch.no_grad():
                self.collect(self.training_tasks, self.collections)
            self.collections += 1

    @property
    def training_tasks(self) -> EnvironmentTasks:
        return cast(EnvironmentTasks, self.trainer.datamodule.distribution("train"))

    def on_train_start(self) -> None:
        tasks, environment = self.training_tasks.tasks, self.training_tasks.environment
        if tasks is None:
            raise ConfigError(
                "there is a replay buffer for each training task, but no end of tasks: give "
                "--data.init_args.train_tasks, their number"
            )
        own = self.trainer.is_global_zero and not getattr(self.trainer, "fast_dev_run", False)
        file = Path(self.trainer.default_root_dir).absolute() / FILE if own else None
        dtype = next(self.parameters()).dtype
        width = 2 * environment.seen_size + environment.actions + 3
        self.replay = Replay(file, tasks, environment.horizon, width, torch.promote_types(dtype, torch.float32))
        self.collections = 0
        if self._saved is not None and self.trainer.ckpt_path is not None:
            folder = Path(self.trainer.ckpt_path).absolute().parent
            self.replay.load(self._saved["replay"], (folder.parent if folder.name == CHECKPOINTS else folder) / FILE)
            self.collections = self._saved["collections"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.replay is not None:
            self.replay.sync()
            checkpoint["collected"] = {"replay": self.replay.state_dict(), "collections": self.collections}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint.get("collected")

    def teardown(self, stage: str) -> None:
        if self.replay is not None:
            self.replay.close()
            self.replay = None
