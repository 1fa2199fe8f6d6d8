"""The base of learners of reinforcement learning."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from datamodules.core.base import EpisodicDataModule
from datamodules.core.errors import at_least
from datamodules.reinforcement.environments import Environment, Environments
from models.core.learner import MetaLearner
from models.core.metrics import FINGERPRINT
from models.reinforcement.normalization import RunningScale
from models.reinforcement.trials import Agent, Trial, run_trial


class ReinforcementLearner(MetaLearner):
    """Learns to act in environments. An algorithm overrides ``agent`` and its meta-training step.

    Args:
        observations, actions, discrete: of the environments, see Environment. A run takes them from its data where they
            are None; a learner that has no network takes any.
        normalize: observations and rewards by their running mean and deviation over meta-training, see RunningScale;
            None where the environment says that they are in units of any size.
        **others: see MetaLearner.
    """

    tasks = frozenset({"reinforcement"})

    def __init__(
        self,
        observations: int | None = None,
        actions: int | None = None,
        discrete: bool = True,
        normalize: bool | None = None,
        **others: Any,
    ) -> None:
        super().__init__(batch_norm="none", **others)
        self.observations, self.actions, self.discrete = observations, actions, discrete
        self.normalize = normalize
        self.normalizer = RunningScale(observations or 0)

    def required_sizes(self) -> tuple[int, int]:
        """Numbers of an observation, and of actions.

        Raises:
            ValueError: they are not given.
        """
        if self.observations is None or self.actions is None:
            raise ValueError("observations and actions are None: give the environment's, data.network_settings()")
        at_least(0, observations=self.observations)
        at_least(1, actions=self.actions)
        return self.observations, self.actions

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":  # otherwise a checkpoint knows
            unscaled = self.trainer.datamodule.environment.unscaled
            self.normalizer.on = unscaled if self.normalize is None else self.normalize

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        several = self.trainer.world_size > 1
        return cast(Tensor, self.trainer.strategy.reduce(value, reduce_op="sum")) if several else value

    def agent(self) -> Agent:
        """That acts as the learner has it now."""
        raise NotImplementedError

    def shown_trial(self, batch: Environments) -> Trial:
        """A trial of each task as it is tested, to be looked at."""
        return run_trial(batch, self.agent())

    @property
    def has_latents(self) -> bool:
        """Whether it infers a latent of each task from a set of transitions."""
        return False

    def task_latents(self, batch: Environments) -> Tensor | None:
        """What the learner has of each task for a latent, after a trial, (T, L), to be looked at; None without."""
        return None

    def check(self, data: EpisodicDataModule) -> str | None:
        return self.check_environment(data.environment)

    def check_environment(self, environment: Environment) -> str | None:
        """Why the learner cannot act in this environment, and the cure; None if it can."""
        wanted = {
            "observations": environment.seen_size,
            "actions": environment.actions,
            "discrete": environment.discrete,
        }
        for name, value in wanted.items():
            if getattr(self, name) not in (None, value):
                return (
                    f"the model's {name} is {getattr(self, name)} but the environment has {value}: "
                    f"give --model.init_args.{name} {str(value).lower()}"
                )
        return None

    def trial_metrics(self, batch: Environments, trial: Trial) -> dict[str, Tensor]:
        """Metrics of each task: its returns, and how they compare with the best policy's where that is known."""
        episodes = len(trial.reward) // batch.environment.horizon
        return self.return_metrics(batch, trial.returns(episodes)) | trial.last_info(episodes)

    def return_metrics(self, batch: Environments, returns: Tensor) -> dict[str, Tensor]:
        """Metrics of each task, from the returns of its episodes in order, (T, episodes)."""
        episodes, total = returns.shape[1], returns.sum(1)
        metrics = {"return": total, "first_episode": returns[:, 0], "last_episode": returns[:, -1], "returns": returns}
        optimum = batch.environment.optimum(batch.task)
        if optimum is not None:
            metrics["regret"] = episodes * optimum - total
            metrics["of_optimum"] = torch.stack([total, episodes * optimum], 1)
        return metrics

    def evaluation_metrics(self, batch: Environments) -> dict[str, Tensor]:
        """Metrics of each task, (T, …), of a trial in it."""
        return self.trial_metrics(batch, run_trial(batch, self.agent()))

    def last_step(self) -> None:
        """The last of several steps of the optimizer that a learner takes by itself in a meta-update.

        It alone goes through Lightning, so that ``max_steps``, checkpoints and schedules count meta-updates.
        """
        self.optimizers().step()  # pyright: ignore
        if (scheduler := self.lr_schedulers()) is not None:
            scheduler.step()  # pyright: ignore

    def evaluation_step(self, batch: Environments, stage: str) -> None:
        facts = {FINGERPRINT: batch.fingerprint()} if stage == "test" else None
        self.stage_metrics(stage).update(batch.index, self.evaluation_metrics(batch), facts)
