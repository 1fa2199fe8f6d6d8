"""Amortized Bayesian meta-learning: a prior over weights from which a few steps of Bayes by Backprop do well."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from datamodules.core.episodes import Support, Task
from datamodules.core.errors import at_least
from models.core.base_learner import BaseLearner, Parameters
from models.core.inner_loop import (
    adapted,
    call,
    last,
    query,
    sgd_path,
    split_parameters,
)
from models.core.learner import MetaLearner, Paper
from models.core.predictions import Mixture, Prediction
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNormMode
from models.networks.bayesian_layers import RHO, draw, kl_divergence, log_hyperprior, make_bayesian

PREDICTION_SEED = 1 << 20  # beyond the inner steps' seeds, which are their numbers


class Posterior(NamedTuple):
    """A Gaussian over the weights of one task.

    Attributes:
        parameters: means, and under their names with ``_rho`` log standard deviations; and what does not adapt.
        support: of the task, for batch norm's statistics, which every draw of weights has its own of.
        step: gradient steps taken so far.
    """

    parameters: Parameters
    support: Support
    step: int


class ABML(MetaLearner):
    """Learns a Gaussian p(φ|θ) over all weights: the prior, and where each task's posterior q(φ|λ) starts from.

    The inner loop is gradient descent on means and log deviations by the negative evidence lower bound of the support
    set (Bayes by Backprop), and the meta-gradient passes through it. The meta-objective is the bound of support and
    query set together, with a hyperprior on θ: N(0, 1) on the means, Gamma on the precisions. Both bounds are in nats
    per example, so that rates are of MAML's size. Training draws by local reparametrisation and Flipout; evaluation
    draws weights from a fixed seed, with noise that all tasks and queries share. Scale and shift of batch norm are
    meta-learned as points and do not adapt.

    Args:
        backbone: the base learner without its head.
        outputs: rows of the head: ways, or the dimension of y.
        inner_rate: α, the learning rate of the means in the inner loop.
        inner_rho_rate: that of the log deviations; None takes the same.
        inner_steps: gradient steps in meta-training.
        eval_inner_steps: gradient steps in evaluation; None takes as many as in training.
        inner_samples, samples: draws of the weights for an inner step and for the meta-objective, in meta-training.
        eval_samples: draws for each of them in evaluation.
        deviation: σ of the prior's weights at the start of meta-training.
        inner_kl_weight: of KL(q‖p) in the inner loop; 1 is the bound itself, the paper takes less in classification.
        kl_weight: of KL(q‖p) in the meta-objective, 1 in the paper.
        hyperprior_shape, hyperprior_rate: a₀ and b₀ of the Gamma distribution.
        hyperprior_weight: of -log p(θ) in one task's bound: it counts once for all meta-training tasks, so one over
            their number (meta-updates times meta-batch, where tasks do not repeat).
        noise: standard deviation of an observation, units of y; for regression.
        learned_noise: meta-learn it, from ``noise`` on.
        batch_norm, **others: see MetaLearner.
    """

    paper = Paper(
        "Ravi and Beatson",
        "Amortized Bayesian Meta-Learning",
        "ICLR",
        2019,
        "https://openreview.net/forum?id=rkgpy3C5tX",
    )
    tasks = frozenset({"classification", "regression"})

    def __init__(
        self,
        backbone: Backbone,
        outputs: int = 5,
        inner_rate: float = 0.4,
        inner_rho_rate: float | None = None,
        inner_steps: int = 1,
        eval_inner_steps: int | None = None,
        inner_samples: int = 1,
        samples: int = 1,
        eval_samples: int = 10,
        deviation: float = 0.02,
        inner_kl_weight: float = 0.01,
        kl_weight: float = 1.0,
        hyperprior_shape: float = 1.0,
        hyperprior_rate: float = 0.01,
        hyperprior_weight: float = 1e-6,
        noise: float = 0.1,
        learned_noise: bool = False,
        batch_norm: BatchNormMode = "transductive",
        **others: Any,
    ) -> None:
        super().__init__(batch_norm=batch_norm, **others)
        at_least(1, outputs=outputs, inner_samples=inner_samples, samples=samples, eval_samples=eval_samples)
        at_least(0, inner_steps=inner_steps, eval_inner_steps=eval_inner_steps)
        for name, value in {"deviation": deviation, "noise": noise}.items():
            if not value > 0:
                raise ValueError(f"{name} is {value} but is a standard deviation: it must be above 0")
        self.learner = make_bayesian(BaseLearner(backbone, outputs), deviation)
        self.log_noise = nn.Parameter(torch.tensor(math.log(noise)), requires_grad=learned_noise)
        self.outputs = outputs
        self.inner_rate = inner_rate
        self.inner_rho_rate = inner_rate if inner_rho_rate is None else inner_rho_rate
        self.inner_steps = inner_steps
        self.eval_inner_steps = inner_steps if eval_inner_steps is None else eval_inner_steps
        self.inner_samples, self.samples, self.eval_samples = inner_samples, samples, eval_samples
        self.inner_kl_weight, self.kl_weight = inner_kl_weight, kl_weight
        self.hyperprior_shape, self.hyperprior_rate = hyperprior_shape, hyperprior_rate
        self.hyperprior_weight = hyperprior_weight

    def prior(self, ways: int) -> tuple[Parameters, Parameters]:
        """θ for so many classes, 0 for those that it is trained on, and what does not adapt."""
        theta, fixed = split_parameters(self.learner, adapt_normalization=False)
        return self.learner.resize_head(theta, ways), fixed

    def draws(self, q: Parameters, samples: int, seed: int) -> Iterator[Parameters]:
        """What to run the network with, once for each draw of its weights."""
        if self.training:  # the layers draw, for each example anew
            yield from [q] * samples
            return
        generator = torch.Generator(next(iter(q.values())).device).manual_seed(seed)
        for _ in range(self.eval_samples):
            yield draw(q, generator, [n for n in self.learner.head_parameters() if not n.endswith(RHO)])

    def surprise(self, outputs: list[Tensor], target: Tensor, shares: Tensor | None = None) -> Tensor:
        """-E_q[log p(y|x, φ)] over draws of the network's outputs (N, …), nats per example; see ``loss`` for shares."""
        if target.is_floating_point():
            log_p = [Normal(o, self.log_noise.exp(), validate_args=False).log_prob(target).sum(-1) for o in outputs]
            return -torch.stack(log_p).mean()
        return torch.stack([self.loss(o, target, shares) for o in outputs]).mean()

    def support_outputs(self, q: Parameters, x: Tensor, samples: int, seed: int) -> list[Tensor]:
        return [call(self.learner, w, x, self.statistics_source) for w in self.draws(q, samples, seed)]

    def query_outputs(self, state: Posterior, x: Tensor) -> list[Tensor]:
        def outputs(weights: Parameters) -> Tensor:
            learner = adapted(self.learner, weights, state.support, self.batch_norm, state.step)
            return query(self.learner, learner, x, self.statistics_source)

        return [outputs(weights) for weights in self.draws(state.parameters, self.samples, PREDICTION_SEED)]

    def adaptation(self, support: Support) -> Iterator[Posterior]:
        theta, fixed = self.prior(support.ways)

        def bound(q: Parameters, step: int) -> Tensor:
            outputs = self.support_outputs(q | fixed, support.x, self.inner_samples, step)
            surprise = self.surprise(outputs, support.y, support.shares())
            if step == 0:  # at the prior itself, where the divergence and its gradient vanish
                return surprise
            return surprise + self.inner_kl_weight / len(support.x) * kl_divergence(q, theta)

        rates = {n: torch.tensor(self.inner_rho_rate if n.endswith(RHO) else self.inner_rate) for n in theta}
        steps = self.inner_steps if self.training else self.eval_inner_steps
        for step, q in enumerate(sgd_path(bound, theta, lambda step: rates, steps)):
            yield Posterior(q | fixed, support, step)

    def adapt(self, support: Support) -> Posterior:
        return last(self.adaptation(support))

    def predict(self, state: Posterior, query_x: Tensor) -> Prediction:
        return self.predictive(self.query_outputs(state, query_x), state.support.ways)

    def predictive(self, outputs: list[Tensor], ways: int) -> Prediction:
        """The mean of the draws' distributions: log-probabilities (Q, ways), or a Mixture for 0 ways."""
        drawn = torch.stack(outputs).to(torch.promote_types(outputs[0].dtype, torch.float32))
        if not ways:
            return Mixture(drawn, self.log_noise.exp().expand_as(drawn))
        return drawn.log_softmax(-1).logsumexp(0) - math.log(len(drawn))

    def objective(self, task: Task) -> tuple[Any, ...]:
        state = self.adapt(task.support)
        theta, _ = self.prior(task.support.ways)
        support = self.support_outputs(state.parameters, task.support.x, self.samples, PREDICTION_SEED)
        queries = self.query_outputs(state, task.query_x)
        shots, asked = len(task.support.x), len(task.query_x)
        surprise = shots * self.surprise(support, task.support.y) + asked * self.surprise(queries, task.query_y)
        divergence = self.kl_weight * kl_divergence(state.parameters, theta)
        hyperprior = log_hyperprior(self.prior(0)[0], self.hyperprior_shape, self.hyperprior_rate)
        loss = (surprise + divergence - self.hyperprior_weight * hyperprior) / (shots + asked)
        return loss, self.predictive(queries, task.support.ways)
