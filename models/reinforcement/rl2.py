"""RL²: a recurrent policy whose state, through a trial, is what it learns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.core.errors import ConfigError, at_least
from datamodules.core.metric import Metric
from datamodules.reinforcement.environments import Environment, Environments, Facts
from models.core.learner import Paper
from models.networks.recurrent import GRUCell, Readout
from models.reinforcement.learner import ReinforcementLearner
from models.reinforcement.policies import (
    ActionHead,
    Actions,
    clipped_objective,
    draws_per_action,
    encode,
    generalized_advantages,
    mean_where,
    normalized_advantages,
    single,
)
from models.reinforcement.trials import Seen, Trial, run_trial


class Rollout(NamedTuple):
    """What a meta-update learns from, (steps, N, …).

    Inputs, actions, rewards, what actions were drawn from, and whether they had an effect.
    """

    inputs: Tensor
    action: Tensor
    reward: Tensor
    old: Actions
    advantage: Tensor
    value_target: Tensor
    alive: Tensor

    def of(self, rows: Tensor) -> Rollout:
        """Of some of the N trials, whole."""
        old = type(self.old)(*(part[:, rows] for part in self.old))
        parts = (self.inputs, self.action, self.reward, self.advantage, self.value_target, self.alive)
        inputs, action, reward, advantage, target, alive = (part[:, rows] for part in parts)
        return Rollout(inputs, action, reward, old, advantage, target, alive)


class RecurrentAgent:
    """Acts by a recurrent policy, whose state lasts through the trial."""

    def __init__(self, learner: RL2, greedy: bool = False) -> None:
        self.learner, self.greedy = learner, greedy
        assert learner.actions is not None
        self.draws = draws_per_action(learner.actions, learner.discrete)

    def begin(self, environment: Environment, task: Facts) -> Tensor:
        like = self.learner.policy.bias_hh
        return like.new_zeros(len(next(iter(task.values()))), like.shape[0] // 3)

    def act(self, memory: Tensor, seen: Seen, draws: Tensor) -> tuple[Tensor, Tensor, Any]:
        inputs = self.learner.inputs(seen)
        memory = self.learner.policy(inputs, memory.to(inputs))
        choice = self.learner.head(self.learner.readout(memory, inputs))
        return memory, choice.mode() if self.greedy else choice.sample(draws), choice


class RL2(ReinforcementLearner):
    """A policy sees its previous action, reward and whether the episode ended, and keeps its state between episodes.

    So what it does in later episodes of a trial can depend on what it met in the earlier ones: the state is reset with
    the task alone. Trained by proximal policy optimisation of the return of whole trials, with a value network that
    is recurrent likewise.

    Args:
        observations, actions, discrete: of the environments, see ReinforcementLearner; None is discrete.
        hidden: units of the gated recurrent networks, of policy and value.
        activation, weight_norm, memory, input_scale: of these, see GRUCell; the paper has relu, with weight
            normalisation.
        readout: units of a layer between each network and its output, see Readout; None in the paper.
        discount: γ, over the whole trial.
        decay: λ of the advantages; 1 on bandits, 0.3 on tabular MDPs.
        clip: of the ratio of probabilities.
        kl_limit: further epochs on the same trials end when the policy is further from the one that acted, nats.
        epochs, minibatches: passes over the trials of a meta-update, and parts that each is made in.
        entropy: weight of the policy's entropy in what is maximised.
        reward_prediction: weight of the squared error of rewards as the policy's network foresees them, for each action
            before one is taken; 0 in the paper. What has to be remembered of a task to foresee its rewards is learned
            sooner from them than from returns.
        max_grad_norm: of policy and value together; None leaves gradients as they are.
        greedy: the likeliest action in evaluation, not one drawn.
        **others: see ReinforcementLearner.
    """

    paper = Paper(
        "Duan, Schulman, Chen, Bartlett, Sutskever and Abbeel",
        "RL²: Fast Reinforcement Learning via Slow Reinforcement Learning",
        "arXiv",
        2016,
        "https://arxiv.org/abs/1611.02779",
    )

    own_metrics = {"entropy": Metric()}

    def __init__(
        self,
        observations: int | None = None,
        actions: int | None = None,
        discrete: bool | None = None,
        hidden: int = 128,
        activation: Literal["tanh", "relu"] = "tanh",
        weight_norm: bool = False,
        memory: int | None = None,
        input_scale: float | None = None,
        readout: int | None = None,
        discount: float = 0.99,
        decay: float = 1.0,
        clip: float = 0.2,
        kl_limit: float = 0.01,
        epochs: int = 5,
        minibatches: int = 4,
        entropy: float = 0.0,
        reward_prediction: float = 0.0,
        max_grad_norm: float | None = 1.0,
        greedy: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(observations, actions, True if discrete is None else discrete, **others)
        (observations, actions), discrete = self.required_sizes(), self.discrete
        at_least(1, hidden=hidden, epochs=epochs, minibatches=minibatches)
        at_least(0, reward_prediction=reward_prediction)
        self.automatic_optimization = False  # several updates on the same trials
        self.discount, self.decay, self.clip, self.kl_limit = discount, decay, clip, kl_limit
        self.epochs, self.minibatches, self.entropy = epochs, minibatches, entropy
        self.max_grad_norm, self.greedy = max_grad_norm, greedy
        inputs = observations + actions + 2
        self.policy, self.critic = (
            GRUCell(inputs, hidden, activation, weight_norm, memory, input_scale) for _ in range(2)
        )
        self.readout, self.critic_readout = (Readout(hidden, inputs, readout) for _ in range(2))
        self.head = ActionHead(self.readout.size, actions, discrete)
        self.value = nn.Linear(self.critic_readout.size, 1)
        self.reward_prediction = reward_prediction
        # Of each action and, where actions are continuous, of none.
        self.foreseen = nn.Linear(self.readout.size, actions + (not discrete)) if reward_prediction else None

    def inputs(self, seen: Seen) -> Tensor:
        """What the networks take, (…, observations + actions + 2)."""
        observation, reward = self.normalizer.observation(seen.observation), self.normalizer.reward(seen.reward)
        return torch.cat([observation, seen.action, reward[..., None], seen.done[..., None]], -1)

    def agent(self) -> RecurrentAgent:
        return RecurrentAgent(self, self.greedy and not self.training)

    def values(self, inputs: Tensor) -> Tensor:
        """Of the states along trials, (steps, N), in units of what a reward of 1 at each step comes to."""
        return single(self.value(self.critic_readout(self.critic.run(inputs), inputs)).squeeze(-1))

    def rollout(self, trial: Trial) -> Rollout:
        """What is learned from a trial, (steps, N, …); advantages are not yet normalised."""
        inputs = self.inputs(trial.seen)
        unit = sum(self.discount**t for t in range(len(trial.reward)))
        values = unit * self.values(inputs)
        reward = self.normalizer.reward(trial.reward)
        advantages = generalized_advantages(reward, values, self.discount, self.decay)
        target = (advantages + values) / unit
        return Rollout(inputs, trial.action, reward, trial.extras, advantages, target, trial.seen.alive)

    def on_fit_start(self) -> None:
        processes, trials = self.trainer.world_size, cast(Any, self.trainer).datamodule.meta_batch_size
        if trials // processes < self.minibatches:
            raise ConfigError(
                f"minibatches is {self.minibatches} but a process has {trials // processes} trials of a meta-update: "
                f"give --data.init_args.meta_batch_size {self.minibatches * processes} or more, or fewer minibatches"
            )

    def training_step(self, batch: Environments, batch_idx: int) -> None:
        optimizer = cast(torch.optim.Optimizer, self.optimizers(use_pl_optimizer=False))
        with torch.no_grad():
            if self.normalizer.waits:
                self.normalizer.update(run_trial(batch, self.agent()), self.total)
            trial = run_trial(batch, self.agent())
            rollout = self.rollout(trial)
            rollout = rollout._replace(advantage=normalized_advantages(rollout.advantage, rollout.alive, self.total))
        kl, updates = 0.0, 0
        for part, last in self._parts(rollout, len(batch)):
            share = part.action.shape[1] * self.minibatches / batch.meta_batch * self.trainer.world_size
            loss, kl_of_part = self.losses(part)
            optimizer.zero_grad()
            self.manual_backward(share * loss)
            if self.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.parameters(), self.max_grad_norm)
            kl, updates = kl + share * kl_of_part.detach(), updates + 1
            further = updates % self.minibatches == 0 and self._mean(kl) / self.minibatches > self.kl_limit
            if last or further:
                break
            optimizer.step()
            kl = 0.0 if updates % self.minibatches == 0 else kl
        self.last_step()
        with torch.no_grad():
            self.normalizer.update(trial, self.total)
            metrics = self.trial_metrics(batch, trial)
            metrics["entropy"] = mean_where(trial.extras.entropy(), trial.seen.alive, (0,))
            self.stage_metrics("train").update(batch.index, metrics)

    def losses(self, part: Rollout) -> tuple[Tensor, Tensor]:
        """What is minimised, and the divergence of the policy from the one that acted, nats: scalars."""
        features = self.readout(self.policy.run(part.inputs), part.inputs)
        now = self.head(features)
        log_ratio = now.log_prob(part.action) - part.old.log_prob(part.action)
        gain = mean_where(clipped_objective(log_ratio, part.advantage, self.clip), part.alive)
        gain = gain + self.entropy * mean_where(now.entropy(), part.alive)
        loss = F.mse_loss(self.values(part.inputs), part.value_target) - gain
        if self.foreseen is not None:
            missed = (self.rewards(features, part.action) - part.reward).square()
            loss = loss + self.reward_prediction * mean_where(missed, part.alive)
        return loss, mean_where(part.old.kl(now), part.alive)  # pyright: ignore[reportArgumentType]

    def rewards(self, features: Tensor, action: Tensor) -> Tensor:
        """As they are foreseen of actions, (steps, N): linear in what an action is encoded as."""
        assert self.foreseen is not None and self.actions is not None
        foreseen, taken = single(self.foreseen(features)), encode(action, self.actions, self.discrete)
        if not self.discrete:
            taken = F.pad(taken, (0, 1), value=1.0)
        return (foreseen * taken).sum(-1)

    def _parts(self, rollout: Rollout, trials: int) -> Iterator[tuple[Rollout, bool]]:
        """The trials of each update, and whether it is the last."""
        for epoch in range(self.epochs):
            order = torch.randperm(trials).to(rollout.inputs.device)
            for k, rows in enumerate(order.tensor_split(self.minibatches)):
                yield rollout.of(rows), epoch == self.epochs - 1 and k == self.minibatches - 1

    def _mean(self, value: Any) -> float:
        return float(self.total(torch.as_tensor(value))) / self.trainer.world_size
