"""PEARL: off-policy meta-reinforcement learning, with a posterior over the task that exploration samples from."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.core.errors import at_least
from datamodules.core.metric import Metric
from datamodules.core.streams import TaskStreams
from datamodules.reinforcement.environments import Environment, Environments, EnvironmentTasks, normal
from models.core.learner import Paper
from models.reinforcement.context_encoder import ContextEncoder, Latents
from models.reinforcement.off_policy import OffPolicyLearner, Transitions
from models.reinforcement.policies import single
from models.reinforcement.posterior_sampling import PosteriorSampling
from models.reinforcement.soft_actor_critic import Critics, Policy, follow, network
from models.reinforcement.trials import run_trial

ROWS, NOISE, TASKS = 4, 5, 6  # purposes of random numbers; those before are the trials' of ``collect``


class Losses(NamedTuple):
    """Of each task, (T,)."""

    critic: Tensor
    value: Tensor
    policy: Tensor
    kl: Tensor


class PEARL(OffPolicyLearner):
    """An encoder infers a posterior over latents z from transitions of a task; a soft actor-critic knows z beside what
    it observes.

    Every so many gradient steps episodes of some training tasks are added to a replay buffer, first with z from the
    prior, then from the posterior. A gradient step takes, of each task of the meta-batch, transitions of any age for
    the actor-critic, and recent ones as the encoder's context. All losses are differentiated as one sum: each has
    a gradient by its own networks alone, and the encoder's is that of the critics and of the KL.

    Where the reward is sparse the encoder is given it and the actor-critic what it is shaped from, as in the paper.

    Args:
        observations, actions: of the environments, whose actions are continuous; see ReinforcementLearner.
        latents: size of z; 0 knows nothing of the task but what it observes: a baseline, or an oracle where the
            environments are ``revealed``.
        hidden: units of each of three layers, of policy, critics and value.
        encoder_hidden: likewise of the encoder.
        kl_weight: of the KL to the prior, nats summed over the meta-batch as in the released code; β of the paper.
        reward_scale: what rewards are multiplied with for the actor-critic, against the policy's entropy.
        discount: γ.
        target_rate: how far the target value moves at a gradient step.
        regularization: weight of the mean squares of the policy's means and log deviations.
        transitions: of each task in a gradient step.
        context: transitions of each task that the encoder is given in a gradient step.
        steps_per_iteration: gradient steps between collections.
        tasks_per_collection: drawn at random, which episodes of are added.
        initial_episodes: by the prior in every training task, before the first step.
        prior_episodes, posterior_episodes: of a task in a collection, in place of its former context.
        extra_episodes: of a task in a collection, by the posterior too, which are no context.
        exploration_episodes: of an evaluation's trial by the prior, the first ones.
        deterministic: the policy's mode in evaluation, not a sample.
        **others: see ReinforcementLearner.
    """

    paper = Paper(
        "Rakelly, Zhou, Quillen, Finn and Levine",
        "Efficient Off-Policy Meta-Reinforcement Learning via Probabilistic Context Variables",
        "ICML",
        2019,
        "https://arxiv.org/abs/1903.08254",
    )

    selects_by = "last_episode"  # its first episodes explore
    own_metrics = {"q_loss": Metric(), "v_loss": Metric(), "policy_loss": Metric(), "kl": Metric()}

    def __init__(
        self,
        observations: int | None = None,
        actions: int | None = None,
        latents: int = 5,
        hidden: int = 300,
        encoder_hidden: int = 200,
        kl_weight: float = 0.1,
        reward_scale: float = 5.0,
        discount: float = 0.99,
        target_rate: float = 0.005,
        regularization: float = 1e-3,
        transitions: int = 256,
        context: int = 64,
        steps_per_iteration: int = 2000,
        tasks_per_collection: int = 5,
        initial_episodes: int = 10,
        prior_episodes: int = 2,
        posterior_episodes: int = 0,
        extra_episodes: int = 2,
        exploration_episodes: int = 1,
        deterministic: bool = True,
        **others: Any,
    ) -> None:
        super().__init__(observations, actions, steps_per_iteration, discrete=False, **others)
        observations, actions = self.required_sizes()
        at_least(0, latents=latents, posterior_episodes=posterior_episodes, extra_episodes=extra_episodes)
        at_least(1, hidden=hidden, encoder_hidden=encoder_hidden, transitions=transitions, context=context)
        at_least(1, tasks_per_collection=tasks_per_collection, initial_episodes=initial_episodes)
        at_least(1, prior_episodes=prior_episodes, exploration_episodes=exploration_episodes)
        self.latents, self.kl_weight, self.reward_scale = latents, kl_weight, reward_scale
        self.discount, self.target_rate, self.regularization = discount, target_rate, regularization
        self.transitions, self.context = transitions, context
        self.tasks_per_collection, self.initial_episodes = tasks_per_collection, initial_episodes
        self.prior_episodes, self.posterior_episodes = prior_episodes, posterior_episodes
        self.extra_episodes, self.exploration_episodes = extra_episodes, exploration_episodes
        self.deterministic = deterministic
        self.encoder = ContextEncoder(observations + actions + 1, encoder_hidden, latents) if latents else None
        self.policy = Policy(observations + latents, hidden, actions)
        self.critics = Critics(observations + actions + latents, hidden)
        self.value = network(observations + latents, hidden, 1)
        self.target_value = copy.deepcopy(self.value).requires_grad_(False)

    def agent(self) -> PosteriorSampling:
        return PosteriorSampling(
            self, self.exploration_episodes, deterministic=self.deterministic and not self.training
        )

    @property
    def has_latents(self) -> bool:
        return True

    def task_latents(self, batch: Environments) -> Tensor | None:
        if self.encoder is None:
            return None
        trial = run_trial(batch, self.agent())
        context = Transitions(*(part.transpose(0, 1) for part in Transitions.of_trial(trial)))
        return self.infer(self.scaled(context), trial.seen.alive.T).mean

    def check_environment(self, environment: Environment) -> str | None:
        if environment.discrete:
            return "PEARL acts by continuous numbers but the environment's actions are discrete: choose models.RL2"
        return super().check_environment(environment)

    # Gradient steps -------------------------------------------------------------------------------------------------

    def scaled(self, t: Transitions) -> Transitions:
        """Transitions as the networks take them, from those of the environments."""
        observation, reached = (self.normalizer.observation(x) for x in (t.observation, t.reached))
        reward, shaped = self.normalizer.reward(t.reward), self.normalizer.shaped(t.shaped)
        return t._replace(observation=observation, reached=reached, reward=reward, shaped=shaped)

    def infer(self, context: Transitions, weight: Tensor | None = None) -> Latents:
        """The posterior of each task, (T, latents), by transitions (T, C), those of ``weight`` (T, C) 0 left out."""
        if self.encoder is None:
            nothing = context.observation[:, 0, :0]
            return Latents(nothing, nothing)
        rows = torch.cat([context.observation, context.action, context.reward[..., None]], -1)
        return self.encoder(rows, weight=weight)

    def losses(self, seen: Transitions, context: Transitions, of_latents: Tensor, of_actions: Tensor) -> Losses:
        """What is minimised, of each task.

        Args:
            seen: (T, B), what the actor-critic learns from, as ``scaled`` gives it.
            context: (T, C), likewise.
            of_latents: standard normal noise of z, (T, latents).
            of_actions: uniform numbers that actions are drawn by, (T, B, actions).
        """
        posterior = self.infer(context)
        z = posterior.sample(of_latents)[:, None].expand(-1, seen.observation.shape[1], -1)
        knows = torch.cat([seen.observation, z.detach()], -1)
        with torch.no_grad():
            next_value = single(self.target_value(torch.cat([seen.reached, z], -1))).squeeze(-1)
        # Where an episode ends by time alone, which is no part of the task, there is a next value.
        wanted = self.reward_scale * seen.shaped + self.discount * (1 - seen.terminated) * next_value
        critic = (self.critics(torch.cat([seen.observation, seen.action, z], -1)) - wanted).square().sum(0)
        choice = self.policy(knows)
        action, log_prob = choice.sample_with_log_prob(of_actions)
        worth = self.critics(torch.cat([seen.observation, action, z.detach()], -1), constant=True).amin(0)
        value = (single(self.value(knows)).squeeze(-1) - (worth - log_prob).detach()).square()
        spread = (choice.mean.square() + choice.log_deviation.square()).mean(-1)
        policy = log_prob - worth + self.regularization * spread
        return Losses(critic.mean(1), value.mean(1), policy.mean(1), posterior.kl())

    def training_step(self, batch: Environments, batch_idx: int) -> Tensor:
        losses = self.losses(*self.drawn(batch))
        with torch.no_grad():
            names = {"q_loss": losses.critic, "v_loss": losses.value, "policy_loss": losses.policy, "kl": losses.kl}
            self.stage_metrics("train").update(batch.index, names)
        # The released code averages over tasks all but the KL.
        total = losses.critic + losses.value + losses.policy + self.kl_weight * batch.meta_batch * losses.kl
        return total.sum() * (self.trainer.world_size / batch.meta_batch)

    def drawn(self, batch: Environments) -> tuple[Transitions, Transitions, Tensor, Tensor]:
        """What ``losses`` takes, a function of the tasks' numbers and of the replay buffer."""
        assert self.replay is not None and self.observations is not None and self.actions is not None
        assert batch.number is not None
        number, rows = batch.number.cpu(), batch.draws(self.transitions + self.context, purpose=ROWS).cpu()
        parts = (
            self.replay.rows(number, rows[:, : self.transitions]),
            self.replay.context(number, rows[:, self.transitions :]),
        )
        seen, context = (self.scaled(Transitions.of(p.to(self.device), self.observations, self.actions)) for p in parts)
        noise = batch.draws(self.latents + self.transitions * self.actions, purpose=NOISE)
        of_latents, of_actions = noise.split([self.latents, self.transitions * self.actions], 1)
        return seen, context, normal(of_latents), of_actions.unflatten(1, (self.transitions, self.actions))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        follow(self.target_value, self.value, self.target_rate)  # here, before any callback saves

    def collect(self, tasks: EnvironmentTasks, collection: int) -> None:
        assert tasks.tasks is not None
        if collection == 0:
            everyone = np.arange(tasks.tasks)
            self.add_episodes(
                tasks, everyone, everyone, PosteriorSampling(self, self.initial_episodes), self.initial_episodes
            )
        places = tasks.tasks + collection * self.tasks_per_collection + np.arange(self.tasks_per_collection)
        chosen = TaskStreams(tasks.seed, tasks.split, places, TASKS).integers(tasks.tasks)
        context = self.prior_episodes + self.posterior_episodes
        agent = PosteriorSampling(self, self.prior_episodes, context)
        self.add_episodes(tasks, places, chosen, agent, context, self.extra_episodes)
