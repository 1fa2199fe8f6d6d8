"""VariBAD: a policy that sees its belief about the task, which a variational autoencoder of trials infers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from datamodules.core.errors import ConfigError, at_least
from datamodules.core.metric import Metric
from datamodules.core.streams import TaskStreams
from datamodules.reinforcement.environments import Environment, Environments, Facts
from models.core.learner import Paper
from models.reinforcement.belief import Bound, Embedding, Experience, TrialAutoencoder, features
from models.reinforcement.learner import ReinforcementLearner
from models.reinforcement.normalization import RunningScale
from models.reinforcement.policies import (
    ActionHead,
    Actions,
    Gaussian,
    clipped_objective,
    draws_per_action,
    encode,
    generalized_advantages,
    mean_where,
    normalized_advantages,
    single,
)
from models.reinforcement.replay_buffer import RecentTrials
from models.reinforcement.trials import Seen, Trial, run_trial

Drawn = tuple[Experience, Tensor, Tensor | None, Tensor | None]
TRIALS, NOISE = 4, 5  # purposes of random numbers; those before are the trials'


class Kept(NamedTuple):
    """What is left of a step: what the policy saw, the belief, what the action was drawn from, and the value."""

    inputs: Tensor
    belief: Gaussian
    choice: Actions
    value: Tensor


class Rollout(NamedTuple):
    """Steps that the policy learns from, (M, …), of all trials in a row; see RL²."""

    inputs: Tensor
    action: Tensor
    old: Actions
    old_value: Tensor
    advantage: Tensor
    value_target: Tensor
    alive: Tensor


class ActorCritic(nn.Module):
    """Policy and value of an observation and a belief, each of which has a layer of its own that both share.

    Args:
        observations, belief: numbers of the two.
        actions, discrete: see Environment.
        embedding: units of the layers of observation and belief.
        hidden: units of the layers of policy and of value.
    """

    def __init__(
        self, observations: int, belief: int, actions: int, discrete: bool, embedding: int, hidden: Sequence[int]
    ) -> None:
        super().__init__()
        self.sizes = [observations, belief]
        self.observation, self.belief = (Embedding(n, embedding, torch.tanh) for n in self.sizes)
        sizes = [self.observation.size + self.belief.size, *hidden]
        self.actor, self.critic = (
            nn.Sequential(*(m for a, b in zip(sizes, hidden, strict=False) for m in (nn.Linear(a, b), nn.Tanh())))
            for _ in range(2)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear) and layer.weight.numel():
                nn.init.orthogonal_(layer.weight, nn.init.calculate_gain("tanh"))
                nn.init.zeros_(layer.bias)
        self.head, self.value = ActionHead(hidden[-1], actions, discrete), nn.Linear(hidden[-1], 1)

    def forward(self, inputs: Tensor) -> tuple[Actions, Tensor]:
        """The distribution over actions and the value (…,), from both side by side, (…, observations + belief)."""
        observation, belief = inputs.split(self.sizes, -1)
        x = torch.cat([self.observation(observation), self.belief(belief)], -1)
        return self.head(self.actor(x)), single(self.value(self.critic(x))).squeeze(-1)


class BeliefAgent:
    """Acts by a policy that sees a belief, which lasts through the trial."""

    def __init__(self, learner: VariBAD, greedy: bool = False) -> None:
        self.learner, self.greedy = learner, greedy
        assert learner.actions is not None
        self.draws = draws_per_action(learner.actions, learner.discrete)

    def begin(self, environment: Environment, task: Facts) -> tuple[Tensor, Tensor]:
        """The encoder's state, and whether the last action had an effect: there was none."""
        state = self.learner.vae.encoder.begin(len(next(iter(task.values()))))
        return state, state.new_zeros(len(state))

    def act(self, memory: tuple[Tensor, Tensor], seen: Seen, draws: Tensor) -> tuple[Any, Tensor, Kept]:
        learner, (state, counts) = self.learner, memory
        scale = learner.normalizer
        state = learner.vae.encoder.step(
            state.to(seen.observation), scale.observation(seen.reached), seen.action, scale.reward(seen.reward), counts
        )
        belief = learner.vae.encoder.belief(state)
        inputs = torch.cat([scale.observation(seen.observation), learner.beliefs.observation(features(belief))], -1)
        choice, value = learner.policy(inputs)
        action = choice.mode() if self.greedy else choice.sample(draws)
        return (state, seen.alive), action, Kept(inputs, belief, choice, value)


class VariBAD(ReinforcementLearner):
    """A policy sees its observation and its belief about the task: mean and log-variance of a Gaussian over latents m.

    The belief is of a recurrent encoder, which takes the transitions of the trial one by one; it lasts through all
    episodes and is reset with the task alone. Encoder and decoder are a variational autoencoder: from the belief after
    every step t, the decoder is to foresee the rewards (and states) of the whole trial, past and future, and the belief
    is not to move further from the one before it than that pays for:

        ELBO_t = E_{m ~ q(m | τ_:t)} log p(τ | m) - KL(q(m | τ_:t) ‖ q(m | τ_:t-1)),   t = 0 … H,

    where q before the first step is N(0, I). The policy learns by proximal policy optimisation of the return of whole
    trials, with the beliefs a constant: no gradient of returns reaches the encoder. The autoencoder learns from trials
    of any age in a buffer of recent ones, with a rate of its own.

    Defaults are those of the released code for the point robot.

    Args:
        observations, actions, discrete: of the environments, see ReinforcementLearner; None is discrete.
        latents: size of m.
        encoder_hidden: units of the encoder's recurrent network.
        embeddings: units of the encoder's and the decoders' layers of observation, action and reward.
        decoder_hidden: units of the decoders' layers.
        reward_weight, state_weight: of the squared errors of rewards and of next observations; 0 has no such decoder.
        reached_only: the reward decoder sees the observation reached alone, not also the one before and the action.
        kl_weight: of the KL, nats, against squared errors summed over the trial.
        elbo_terms, decoded_steps: of each trial so many ELBO_t, and so many of its steps in each, drawn at random and
            summed; None takes all.
        vae_rate: of the optimizer for the autoencoder; the policy has the optimizer's own.
        vae_batch: trials of an update of the autoencoder.
        vae_updates: after each update of the policy.
        buffer: recent trials that they are drawn from, which are part of each checkpoint.
        embedding: units of the policy's layers of observation and belief.
        hidden: units of the layers of policy and value.
        normalize_belief: by its running mean and deviation, before the policy sees it.
        discount: γ, over the whole trial.
        decay: λ of the advantages.
        clip: of the ratio of probabilities, and of the change of values.
        epochs, minibatches: passes over the steps of a meta-update, and parts that each is made in.
        entropy: weight of the policy's entropy in what is maximised.
        value_weight: of the error of values.
        max_grad_norm: of policy and value; None leaves gradients as they are.
        greedy: the likeliest action in evaluation, not one drawn.
        **others: see ReinforcementLearner.
    """

    paper = Paper(
        "Zintgraf, Shiarlis, Igl, Schulze, Gal, Hofmann and Whiteson",
        "VariBAD: A Very Good Method for Bayes-Adaptive Deep RL via Meta-Learning",
        "ICLR",
        2020,
        "https://arxiv.org/abs/1910.08348",
    )

    own_metrics = {
        "entropy": Metric(),
        "reconstruction": Metric(label="squared errors of a trial, summed over the bound's terms"),
        "kl": Metric(label="KL of successive beliefs, summed over a trial (nats)"),
        "reward_error": Metric("lower", "squared error of the next reward by the belief"),
        "belief_deviation": Metric(label="deviation of the belief before the last step"),
        "beliefs": Metric(curve=True),
        "reward_errors": Metric("lower", curve=True),
    }

    def __init__(
        self,
        observations: int | None = None,
        actions: int | None = None,
        discrete: bool | None = None,
        latents: int = 5,
        encoder_hidden: int = 128,
        embeddings: tuple[int, int, int] = (32, 16, 16),
        decoder_hidden: list[int] = [64, 32],  # noqa: B006
        reward_weight: float = 1.0,
        state_weight: float = 0.0,
        reached_only: bool = False,
        kl_weight: float = 1.0,
        elbo_terms: int | None = None,
        decoded_steps: int | None = None,
        vae_rate: float = 1e-3,
        vae_batch: int = 15,
        vae_updates: int = 3,
        buffer: int = 10000,
        embedding: int = 64,
        hidden: list[int] = [128, 128, 128],  # noqa: B006
        normalize_belief: bool = True,
        discount: float = 0.99,
        decay: float = 0.9,
        clip: float = 0.1,
        epochs: int = 2,
        minibatches: int = 8,
        entropy: float = 0.001,
        value_weight: float = 0.5,
        max_grad_norm: float | None = 0.5,
        greedy: bool = True,
        **others: Any,
    ) -> None:
        super().__init__(observations, actions, True if discrete is None else discrete, **others)
        (observations, actions), discrete = self.required_sizes(), self.discrete
        at_least(1, latents=latents, encoder_hidden=encoder_hidden, elbo_terms=elbo_terms, decoded_steps=decoded_steps)
        at_least(1, vae_batch=vae_batch, vae_updates=vae_updates, buffer=buffer, embedding=embedding)
        at_least(1, epochs=epochs, minibatches=minibatches, layers_of_decoder=len(decoder_hidden), layers=len(hidden))
        at_least(1, **{f"decoder_hidden[{i}]": n for i, n in enumerate(decoder_hidden)})
        at_least(1, **{f"hidden[{i}]": n for i, n in enumerate(hidden)})
        at_least(0, reward_weight=reward_weight, state_weight=state_weight, kl_weight=kl_weight)
        if not reward_weight and not (state_weight and observations):
            raise ConfigError("reward_weight and state_weight are 0: there is nothing to learn a belief from")
        self.automatic_optimization = False  # several updates on the same trials
        self.reward_weight, self.state_weight, self.kl_weight = reward_weight, state_weight, kl_weight
        self.elbo_terms, self.decoded_steps, self.latents = elbo_terms, decoded_steps, latents
        self.vae_rate, self.vae_batch, self.vae_updates = vae_rate, vae_batch, vae_updates
        self.discount, self.decay, self.clip = discount, decay, clip
        self.epochs, self.minibatches, self.entropy, self.value_weight = epochs, minibatches, entropy, value_weight
        self.max_grad_norm, self.greedy = max_grad_norm, greedy
        self.vae = TrialAutoencoder(
            *(observations, actions, latents, encoder_hidden, embeddings, decoder_hidden),
            rewards=reward_weight > 0,
            states=state_weight > 0 and observations > 0,
            reached_only=reached_only,
        )
        self.policy = ActorCritic(observations, 2 * latents, actions, discrete, embedding, hidden)
        self.beliefs = RunningScale(2 * latents)
        self.beliefs.on = normalize_belief
        self.recent = RecentTrials(buffer)

    def agent(self) -> BeliefAgent:
        return BeliefAgent(self, self.greedy and not self.training)

    def parameter_groups(self) -> list[Any]:
        return [
            {"params": list(self.policy.parameters())},
            {"params": list(self.vae.parameters()), "lr": self.vae_rate},
        ]

    # The autoencoder ------------------------------------------------------------------------------------------------

    def experience(self, trial: Trial) -> Experience:
        """A trial as it was, in the units of the environment."""
        assert self.actions is not None
        action = encode(trial.action, self.actions, self.discrete).to(trial.reward)
        return Experience(trial.seen.observation, trial.reached, action, trial.reward, trial.seen.alive)

    def scaled(self, e: Experience) -> Experience:
        """In the units of the networks."""
        observation, reached = (self.normalizer.observation(x) for x in (e.observation, e.reached))
        return e._replace(observation=observation, reached=reached, reward=self.normalizer.reward(e.reward))

    def vae_loss(self, bound: Bound) -> Tensor:
        """What the autoencoder minimises, of each trial, (N,)."""
        return self.reward_weight * bound.reward + self.state_weight * bound.state + self.kl_weight * bound.kl

    def drawn(self, seed: int, update: int) -> tuple[Drawn, int]:
        """What the bound is made of, of recent trials, each once; and how many they are over all processes.

        Args:
            seed: of the tasks.
            update: of the autoencoder, counted through the run.
        """
        assert self.observations is not None and self.actions is not None
        count = min(self.vae_batch, len(self.recent))
        places = TaskStreams(seed, "train", [update], TRIALS).choice(len(self.recent), count)[0]
        own = np.arange(self.trainer.global_rank, count, self.trainer.world_size)
        rows = self.recent.at(torch.from_numpy(places[own])).to(self.device).transpose(0, 1)
        e, steps = self.scaled(Experience.of(rows, self.observations, self.actions)), len(rows)
        rng = TaskStreams(seed, "train", update * self.vae_batch + own, NOISE)
        noise = torch.from_numpy(rng.normal(steps + 1, self.latents)).to(self.device).transpose(0, 1)
        terms, decoded = (
            None if n is None or n >= of else torch.from_numpy(rng.choice(of, n)).to(self.device).T
            for n, of in ((self.elbo_terms, steps + 1), (self.decoded_steps, steps))
        )
        return (e, noise, terms, decoded), count

    def remember(self, batch: Environments, trial: Trial) -> None:
        """Add the trials of all processes to the recent ones, in the order of their numbers."""
        rows = self.experience(trial).rows().transpose(0, 1)
        everyone = rows.new_zeros(batch.meta_batch, *rows.shape[1:])
        everyone[batch.index % batch.meta_batch] = rows  # a meta-batch is of numbers that follow one another
        self.recent.append(self.total(everyone))

    # The policy -----------------------------------------------------------------------------------------------------

    def rollout(self, trial: Trial) -> Rollout:
        """What the policy learns from, (steps, N, …); advantages are not yet normalised."""
        kept: Kept = trial.extras
        unit = sum(self.discount**t for t in range(len(trial.reward)))  # of values: a reward of 1 at each step
        values = unit * kept.value
        advantages = generalized_advantages(self.normalizer.reward(trial.reward), values, self.discount, self.decay)
        target = (advantages + values) / unit
        return Rollout(kept.inputs, trial.action, kept.choice, kept.value, advantages, target, trial.seen.alive)

    def losses(self, part: Rollout) -> Tensor:
        """What the policy minimises, of each step, (M,)."""
        now, value = self.policy(part.inputs)
        log_ratio = now.log_prob(part.action) - part.old.log_prob(part.action)
        gain = clipped_objective(log_ratio, part.advantage, self.clip) + self.entropy * now.entropy()
        near = part.old_value + (value - part.old_value).clamp(-self.clip, self.clip)
        missed = torch.maximum(*(F.smooth_l1_loss(v, part.value_target, reduction="none") for v in (value, near)))
        return 0.5 * self.value_weight * missed - gain

    # A meta-update --------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        processes, data = self.trainer.world_size, cast(Any, self.trainer).datamodule
        steps = data.meta_batch_size // processes * data.episodes * data.environment.horizon
        if steps < self.minibatches:
            raise ConfigError(
                f"minibatches is {self.minibatches} but a process has {steps} steps of a meta-update: give "
                "--data.init_args.meta_batch_size more, or fewer minibatches"
            )

    def training_step(self, batch: Environments, batch_idx: int) -> None:
        optimizer = cast(torch.optim.Optimizer, self.optimizers(use_pl_optimizer=False))
        with torch.no_grad():
            if self.normalizer.waits or self.beliefs.waits:
                self.take_in(run_trial(batch, self.agent()))
            trial = run_trial(batch, self.agent())
            self.remember(batch, trial)
            rollout = self.rollout(trial)
            rollout = rollout._replace(advantage=normalized_advantages(rollout.advantage, rollout.alive, self.total))
            rollout = tree_map(lambda x: x.flatten(0, 1), rollout)
        # The optimizer passes over what has no gradient: each of the two has moments and steps of its own.
        parameters, each = list(self.policy.parameters()), self.minibatches / self.total(rollout.alive.sum())
        for part in self.parts(rollout):
            self.differentiate(each * (part.alive * self.losses(part)).sum(), parameters)
            if self.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
            optimizer.step()
        metrics = self.trial_metrics(batch, trial)
        for k in range(self.vae_updates):
            given, trials = self.drawn(batch.seed, self.meta_updates * self.vae_updates + k)
            bound = self.vae.bound(*given)
            self.differentiate(self.vae_loss(bound).sum() / trials, list(self.vae.parameters()))
            if k < self.vae_updates - 1:
                optimizer.step()
        self.last_step()
        with torch.no_grad():
            self.take_in(trial)
            mean = [self.total(part.detach().sum() / trials).expand(len(batch)) for part in bound]
            metrics |= {"reconstruction": mean[0] + mean[1], "kl": mean[2]}
            metrics["entropy"] = mean_where(trial.extras.choice.entropy(), trial.seen.alive, (0,))
            self.stage_metrics("train").update(batch.index, metrics)

    def take_in(self, trial: Trial) -> None:
        """Let the running scales know of a trial."""
        self.normalizer.update(trial, self.total)
        of_beliefs = trial.seen._replace(observation=features(trial.extras.belief))
        self.beliefs.update(trial._replace(seen=of_beliefs), self.total)

    def differentiate(self, loss: Tensor, parameters: list[nn.Parameter]) -> None:
        """Leave the gradient of a loss, summed over processes, with these parameters, and none with others."""
        gradients = torch.autograd.grad(loss, parameters)
        self.zero_grad()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = self.total(gradient)

    def parts(self, rollout: Rollout) -> Iterator[Rollout]:
        """The steps of each update."""
        for _ in range(self.epochs):
            order = torch.randperm(len(rollout.alive)).to(rollout.inputs.device)
            for rows in order.tensor_split(self.minibatches):
                yield tree_map(lambda x, rows=rows: x[rows], rollout)

    # What is measured -----------------------------------------------------------------------------------------------

    def foreseeing_errors(self, trial: Trial) -> Tensor:
        """Squared errors of rewards as the mean belief before each step foresees them, (steps, N), in their unit.

        Not a number where the episode had ended.
        """
        e = self.scaled(self.experience(trial))
        missed = (self.vae.rewards(trial.extras.belief.mean, e) - e.reward).square()
        unit = self.normalizer.reward(torch.ones_like(missed))
        return (missed / unit.square()).where(e.alive > 0, torch.nan)

    def with_curves(self, batch: Environments, trial: Trial) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is measured of each trial, and what along it."""
        deviation = trial.extras.belief.log_deviation.exp()
        metrics = super().trial_metrics(batch, trial) | {"belief_deviation": deviation[-1].mean(-1)}
        curves = {"beliefs": deviation.transpose(0, 1)}
        if self.vae.reward is not None:
            errors = self.foreseeing_errors(trial)
            metrics["reward_error"], curves["reward_errors"] = errors.nanmean(0), errors.T
        return metrics, curves

    def trial_metrics(self, batch: Environments, trial: Trial) -> dict[str, Tensor]:
        return self.with_curves(batch, trial)[0]

    def evaluation_metrics(self, batch: Environments) -> dict[str, Tensor]:
        metrics, curves = self.with_curves(batch, run_trial(batch, self.agent()))
        return metrics | curves

    # What a checkpoint has ------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["recent_trials"] = self.recent.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "recent_trials" in checkpoint:
            self.recent.load_state_dict(checkpoint["recent_trials"])
