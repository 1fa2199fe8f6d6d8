"""MAML for policies: an initialisation from which policy gradients of a few episodes go far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from datamodules.core.errors import at_least
from datamodules.core.metric import Metric
from datamodules.reinforcement.environments import Environment, Environments, Facts
from models.core.base_learner import Parameters
from models.core.inner_loop import call, last, sgd_path
from models.core.learner import Paper
from models.core.task_map import map_tasks
from models.reinforcement.learner import ReinforcementLearner
from models.reinforcement.policies import (
    ActionHead,
    Actions,
    clipped_objective,
    draws_per_action,
    generalized_advantages,
    mean_where,
)
from models.reinforcement.trials import Seen, Trial, run_trial
from models.reinforcement.trust_region import trust_region_step


class Rollouts(NamedTuple):
    """K episodes of one policy in one task, side by side; those of T tasks have a leading (T,).

    Attributes:
        observation: (steps, K, seen_size).
        action: (steps, K), or (steps, K, actions) where continuous.
        old: the distributions that the actions were drawn from.
        advantage: (steps, K).
        alive: (steps, K), 0 where the episode has terminated.
    """

    observation: Tensor
    action: Tensor
    old: Actions
    advantage: Tensor
    alive: Tensor


class TaskAgent:
    """Acts without a memory, by a policy with parameters of each task's own.

    Args:
        learner: whose policy it is.
        parameters: each (T, …), of T tasks whose environments follow one another.
    """

    def __init__(self, learner: MAMLPolicy, parameters: Parameters) -> None:
        self.policy, self.normalizer, self.parameters = learner.policy, learner.normalizer, parameters
        assert learner.actions is not None
        self.draws = draws_per_action(learner.actions, learner.discrete)

    def begin(self, environment: Environment, task: Facts) -> None:
        return None

    def act(self, memory: None, seen: Seen, draws: Tensor) -> tuple[None, Tensor, Actions]:
        tasks = len(next(iter(self.parameters.values())))
        observation = self.normalizer.observation(seen.observation).unflatten(0, (tasks, -1))
        choice = vmap(lambda p, x: call(self.policy, p, x))(self.parameters, observation)
        choice = tree_map(lambda t: t.flatten(0, 1), choice)
        return None, choice.sample(draws), choice


def linear_baseline(observation: Tensor, returns: Tensor, counts: Tensor | None = None, ridge: float = 1e-5) -> Tensor:
    """Expected returns of states, (steps, T, K), by ridge regression within each of T tasks.

    On o, o², t, t², t³ and 1 (Duan et al., ICML 2016), t in hundreds of steps and o within ±10, as in rllab.

    Args:
        observation: (steps, T, K, seen_size).
        returns: that followed, (steps, T, K).
        counts: (steps, T, K), 0 where a step is not to be fitted to, otherwise 1; None fits to all.
        ridge: added to the diagonal of the normal equations.
    """
    o = observation.double().clamp(-10, 10)
    t = (torch.arange(len(o), device=o.device) / 100).to(o)[:, None, None, None].expand(*o.shape[:-1], 1)
    features = torch.cat([o, o**2, t, t**2, t**3, torch.ones_like(t)], -1)
    x = features.movedim(1, 0).flatten(1, 2)  # (T, steps K, features)
    y = returns.double().movedim(1, 0).flatten(1, 2)[..., None]
    if counts is not None:
        x = x * counts.double().movedim(1, 0).flatten(1, 2)[..., None]
    normal = x.mT @ x + ridge * torch.eye(x.shape[-1]).to(x)
    weights = torch.linalg.solve(normal, x.mT @ y)
    return (features @ weights[None]).squeeze(-1).to(returns)


def policy_surrogate(
    log_ratio: Tensor, advantages: Tensor, discount: float, decay: float, sampling_correction: bool
) -> Tensor:
    """What the inner step ascends, of each action: (steps, K).

    Its gradient is a policy gradient. The meta-gradient differentiates that once more: the second derivatives of
    ``log_ratio`` times advantage are not those of the expected return, for lack of the dependence of the sampling
    distribution on the parameters. Those of the corrected one are: with w the sum of the log-ratios up to an action,
    earlier ones less by the decay each step, and v the same without its own, it is Loaded DiCE (Farquhar, Whiteson and
    Foerster, NeurIPS 2019, Algorithm 1). With a decay of 1 any
    baseline leaves both derivatives as they are; a lower one trades variance for bias.

    Args:
        log_ratio: of the policy's probabilities of the actions to those they were drawn with, (steps, K).
        advantages: (steps, K), constants.
        discount: γ; a step at time t weighs γ^t.
        decay: λ of the advantages.
        sampling_correction: False for the surrogate as published (Finn et al., 2017, eq. 4).
    """
    time = torch.arange(len(advantages)).to(advantages)
    weights = (discount**time)[:, None] * advantages
    if not sampling_correction:
        return weights * log_ratio
    apart = time[:, None] - time
    along = torch.where(apart >= 0, decay ** apart.clamp(min=0), 0.0) @ log_ratio
    return weights * (along.exp() - (along - log_ratio).exp())


class MAMLPolicy(ReinforcementLearner):
    """Finds an initialisation of a policy from which a policy gradient step on K episodes of a task does well.

    The inner step is REINFORCE with a linear baseline fitted to the same episodes; its objective is the mean over their
    actions. The outer step is proximal or trust region policy optimisation of the adapted policies on K episodes of
    theirs, for which the inner steps are taken anew, on the episodes that they were taken on when acting.

    The published meta-gradient takes the distribution of the inner step's episodes as given. With
    ``sampling_correction`` its second derivatives are those of the expected return (in expectation over many
    episodes; Foerster et al., ICML 2018; Rothfuss et al., ICLR 2019, formulation II), at the price of more variance.

    In evaluation a trial of n episodes is n blocks of K: the returns of a block are averaged, and an inner step is
    taken between blocks.

    Args:
        observations, actions, discrete: of the environments, see ReinforcementLearner; None is discrete.
        hidden: units of the policy's layers; 100 and 100 in the paper.
        activation: after each of them; relu in the paper.
        deviation: of continuous actions, to start from.
        rollouts: K, episodes of a task for each inner step and for the meta-update; 20 in the paper's navigation.
        inner_rate: α, of the inner steps.
        later_rate: of steps in evaluation beyond those of meta-training; None for the same. The paper halves it.
        discounted_steps: the inner objective weighs step t by γ^t besides, as the gradient of the discounted return
            does, which the released code leaves out; ``sampling_correction`` needs it unless γ is 1.
        inner_steps: in meta-training.
        first_order: leave out second derivatives.
        sampling_correction: whether they take into account that the episodes depend on the policy.
        discount: γ.
        decay: λ of the advantages.
        normalize_advantages: of each task with mean 0 and deviation 1, as in the released code. α is in these units.
        outer: proximal policy optimisation by ``optimizer``, or trust region policy optimisation as published, which
            needs none.
        clip: of the ratio of probabilities; of "ppo".
        kl_limit: how far a meta-update takes the adapted policies from those that acted, nats; "ppo" ends its epochs
            beyond.
        epochs: gradient steps of a meta-update; of "ppo".
        max_grad_norm: of the meta-gradient; None leaves it as it is; of "ppo".
        damping: added to the diagonal of the divergence's Hessian; of "trpo".
        **others: see ReinforcementLearner.
    """

    paper = Paper(
        "Finn, Abbeel and Levine",
        "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
        "ICML",
        2017,
        "https://arxiv.org/abs/1703.03400",
    )

    selects_by = "last_episode"  # its first are by the initialisation
    own_metrics = {"entropy": Metric()}

    def __init__(
        self,
        observations: int | None = None,
        actions: int | None = None,
        discrete: bool | None = None,
        hidden: Sequence[int] = (100, 100),
        activation: Literal["relu", "tanh"] = "relu",
        deviation: float = 1.0,
        rollouts: int = 20,
        inner_rate: float = 0.1,
        later_rate: float | None = None,
        discounted_steps: bool = False,
        inner_steps: int = 1,
        first_order: bool = False,
        sampling_correction: bool = False,
        discount: float = 0.99,
        decay: float = 1.0,
        normalize_advantages: bool = True,
        outer: Literal["ppo", "trpo"] = "ppo",
        clip: float = 0.2,
        kl_limit: float = 0.01,
        epochs: int = 5,
        max_grad_norm: float | None = 1.0,
        damping: float = 1e-5,
        **others: Any,
    ) -> None:
        super().__init__(observations, actions, True if discrete is None else discrete, **others)
        (observations, actions), discrete = self.required_sizes(), self.discrete
        at_least(1, observations=observations, rollouts=rollouts, epochs=epochs)
        at_least(0, inner_steps=inner_steps)
        self.automatic_optimization = False  # several updates on the same episodes
        self.rollouts, self.inner_rate, self.inner_steps = rollouts, inner_rate, inner_steps
        self.later_rate = inner_rate if later_rate is None else later_rate
        self.discounted_steps = discounted_steps
        if sampling_correction and discount != 1 and not discounted_steps:
            raise ValueError("the sampling correction is of the discounted return: give discounted_steps true, too")
        self.first_order, self.sampling_correction = first_order, sampling_correction
        self.discount, self.decay, self.normalize_advantages = discount, decay, normalize_advantages
        self.outer, self.clip = outer, clip if outer == "ppo" else math.inf
        self.damping = damping
        self.kl_limit, self.epochs, self.max_grad_norm = kl_limit, epochs, max_grad_norm
        layers: list[nn.Module] = []
        for inputs, units in pairwise([observations, *hidden]):
            layers += [nn.Linear(inputs, units), nn.ReLU() if activation == "relu" else nn.Tanh()]
        features = [observations, *hidden][-1]
        self.policy = nn.Sequential(*layers, ActionHead(features, actions, discrete, deviation))

    def collect(self, batch: Environments, parameters: Parameters, purpose: int) -> tuple[Rollouts, Trial]:
        """K episodes of each task by policies of its own, parameters (T, …), as learned from and as they were."""
        agent = TaskAgent(self, parameters)
        trial = run_trial(batch.repeated(self.rollouts), agent, episodes=1, purpose=purpose)
        seen = self.normalizer.observation(trial.seen.observation)
        of_tasks = (seen, trial.action, trial.extras, self.normalizer.reward(trial.reward), trial.seen.alive)
        observation, action, old, reward, alive = tree_map(lambda t: t.unflatten(1, (len(batch), -1)), of_tasks)
        returns = generalized_advantages(reward, torch.zeros_like(reward), self.discount, 1.0)
        # Where an episode has ended there is nothing to expect.
        values = alive * linear_baseline(observation, returns, alive)
        advantage = generalized_advantages(reward, values, self.discount, self.decay)
        if self.normalize_advantages:
            centred = advantage - mean_where(advantage, alive, (0, 2), keepdim=True)
            advantage = centred / (mean_where(centred.square(), alive, (0, 2), keepdim=True).sqrt() + 1e-8)
        rollouts = tree_map(lambda t: t.movedim(1, 0), Rollouts(observation, action, old, advantage, alive))
        return rollouts, trial

    def blocks(self, batch: Environments, steps: int) -> Iterator[tuple[Rollouts, Trial]]:
        """What ``collect`` gives before each of so many inner steps, and after the last."""
        with torch.no_grad():
            parameters = {n: p.expand(len(batch), *p.shape) for n, p in self.policy.named_parameters()}
            for k in range(steps + 1):
                rollouts, trial = self.collect(batch, parameters, purpose=k)
                yield rollouts, trial
                if k < steps:
                    parameters = self.over_tasks(lambda p, r, k=k: self.inner_step(p, r, k), parameters, rollouts)

    def inner_step(self, parameters: Parameters, rollouts: Rollouts, step: int) -> Parameters:
        """The parameters of ONE task after the step with this number, counted from 0."""

        def loss(parameters: Parameters, _: int) -> Tensor:
            log_ratio = self.log_ratio(call(self.policy, parameters, rollouts.observation), rollouts)
            discount = self.discount if self.discounted_steps else 1.0
            of_actions = policy_surrogate(
                log_ratio * rollouts.alive, rollouts.advantage, discount, self.decay, self.sampling_correction
            )
            return -mean_where(of_actions, rollouts.alive)

        rate = self.inner_rate if step < max(1, self.inner_steps) else self.later_rate
        return last(sgd_path(loss, parameters, rate, 1, self.first_order))

    def losses(self, parameters: Parameters, *path: Rollouts) -> tuple[Tensor, Tensor]:
        """Of ONE task's rollouts before each inner step and after the last: what is minimised, and the divergence of
        the policy adapted from these parameters from the one that acted, nats; scalars."""
        for step, rollouts in enumerate(path[:-1]):
            parameters = self.inner_step(parameters, rollouts, step)
        after = path[-1]
        now = cast(Any, call(self.policy, parameters, after.observation))
        gain = clipped_objective(self.log_ratio(now, after), after.advantage, self.clip)
        return -mean_where(gain, after.alive), mean_where(after.old.kl(now), after.alive)

    def log_ratio(self, now: Any, rollouts: Rollouts) -> Tensor:
        """Of the probabilities of the actions to those that they were drawn with, (steps, K)."""
        return now.log_prob(rollouts.action) - rollouts.old.log_prob(rollouts.action)

    def over_tasks(self, function: Callable[..., Any], *trees: Any) -> Any:
        """``function`` of every task's part of structures of tensors (T, …)."""
        tensors, structure = tree_flatten(trees)

        def one(*parts: Tensor) -> Any:
            return function(*tree_unflatten(list(parts), structure))

        return map_tasks(one, *tensors, chunk=self.chunk)

    def training_step(self, batch: Environments, batch_idx: int) -> None:
        if self.normalizer.waits:
            for _, trial in self.blocks(batch, self.inner_steps):
                self.normalizer.update(trial, self.total)
        path, trials = zip(*self.blocks(batch, self.inner_steps), strict=True)
        if self.outer == "ppo":
            self.proximal_steps(batch, path)
        else:
            self.trust_region_step(batch, path)
        self.last_step()
        metrics = self.block_metrics(batch, trials)
        metrics["entropy"] = mean_where(path[0].old.entropy(), path[0].alive, (1, 2))
        for trial in trials:
            self.normalizer.update(trial, self.total)
        self.stage_metrics("train").update(batch.index, metrics)

    def all_losses(self, parameters: Parameters, path: tuple[Rollouts, ...]) -> tuple[Tensor, Tensor]:
        """``losses`` of all tasks from the same parameters, (T,) each."""
        return self.over_tasks(lambda *of_task: self.losses(parameters, *of_task), *path)

    def proximal_steps(self, batch: Environments, path: tuple[Rollouts, ...]) -> None:
        """Gradient steps on the same episodes, the last of which is left to take."""
        optimizer = cast(torch.optim.Optimizer, self.optimizers(use_pl_optimizer=False))
        for epoch in range(self.epochs):
            loss, kl = self.all_losses(dict(self.policy.named_parameters()), path)
            optimizer.zero_grad()
            # Processes may hold unequal shares; DDP averages over processes, the meta-objective is a mean over tasks.
            self.manual_backward(loss.sum() * (self.trainer.world_size / batch.meta_batch))
            if self.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.parameters(), self.max_grad_norm)
            if epoch == self.epochs - 1 or self._mean_over_tasks(kl, batch.meta_batch) > self.kl_limit:
                break
            optimizer.step()

    def trust_region_step(self, batch: Environments, path: tuple[Rollouts, ...]) -> None:
        """A step that needs no optimizer: with no gradient to take, its own does nothing but count."""

        def total(values: Any) -> Any:
            return tree_map(lambda v: self._mean_over_tasks(v[None], 1), values)

        start: Parameters = {name: p.detach() for name, p in self.policy.named_parameters()}
        moved = trust_region_step(
            lambda parameters: self.all_losses(parameters, path)[0].sum() / batch.meta_batch,
            lambda parameters: self.all_losses(parameters, path)[1].sum() / batch.meta_batch,
            start,
            self.kl_limit,
            total,
            damping=self.damping,
        )
        with torch.no_grad():
            for name, p in self.policy.named_parameters():
                p.copy_(moved[name])

    def evaluation_metrics(self, batch: Environments) -> dict[str, Tensor]:
        return self.block_metrics(batch, [trial for _, trial in self.blocks(batch, batch.episodes - 1)])

    def shown_trial(self, batch: Environments) -> Trial:
        """The first episode of each block."""
        trials = [trial._replace(extras=()) for _, trial in self.blocks(batch, batch.episodes - 1)]
        shown = [tree_map(lambda t: t[:, :: self.rollouts], trial) for trial in trials]
        return tree_map(lambda *parts: torch.cat(parts), *shown)

    def block_metrics(self, batch: Environments, trials: Sequence[Trial]) -> dict[str, Tensor]:
        """Metrics of each task by its blocks of K episodes, whose means count."""
        returns = torch.stack([self.of_rollouts(trial.returns(1)[:, 0]) for trial in trials], 1)
        info = {name: self.of_rollouts(value) for name, value in trials[-1].last_info(1).items()}
        return self.return_metrics(batch, returns) | info

    def of_rollouts(self, values: Tensor) -> Tensor:
        """The mean over the K episodes of each task, (T,), of values (T K,)."""
        return values.unflatten(0, (-1, self.rollouts)).mean(1)
