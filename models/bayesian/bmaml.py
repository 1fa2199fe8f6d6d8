"""Bayesian MAML: particles that move together, by Stein variational gradient descent, to a task's posterior."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from datamodules.core.episodes import Support, Task
from datamodules.core.errors import at_least
from models.bayesian.svgd import flat, split_into_particles, svgd_direction, unflat
from models.core.base_learner import BaseLearner, Parameters
from models.core.inner_loop import (
    Adapted,
    adapted,
    call,
    inner_gradient,
    last,
    query,
    split_parameters,
)
from models.core.learner import MetaLearner, Paper
from models.core.predictions import Mixture, Prediction, cross_entropies
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNormMode, Statistics, record, recording

Evidence = list[tuple[Tensor, Tensor, Tensor | None]]
"""Observations (x, y), normalised batch by batch, and by what each counts; None for all alike.

x are features where only the head adapts.
"""

PRECISIONS = ("log_lambda", "log_gamma")


def weights(parameters: Parameters) -> Parameters:
    """What belongs to the network: all but the precisions."""
    return {n: p for n, p in parameters.items() if n not in PRECISIONS}


def log_normal(deviation: Tensor, log_precision: Tensor) -> Tensor:
    """Log-density of deviations from a Gaussian's mean, summed, up to a constant."""
    return 0.5 * (log_precision - log_precision.exp() * deviation.square()).sum()


def log_gamma(log_precision: Tensor, shape: float, rate: float) -> Tensor:
    """Log-density of the logarithm of a precision that is Gamma distributed, up to a constant."""
    return shape * log_precision - rate * log_precision.exp()


class BMAML(MetaLearner):
    """Meta-learns where M particles start, which a few SVGD steps take to the posterior of a task (section 3).

    A particle is a network, or a head on shared features, with its own precisions: λ of the prior N(0, 1/λ) over its
    weights and, for regression, γ of the noise. Steps go along the SVGD direction of the log-posterior, the sum over
    data as it stands, divided by the number of observations: so one particle without a prior takes MAML's step of the
    mean loss at the same rate, and the prior and the repulsion weigh against the data as the posterior has it. With M
    particles apart, each feels its own gradient at 1/M: rates are higher than MAML's.

    The meta-objective is the chaser loss: the squared distance of the particles adapted to the support set (follower)
    from where ``leader_steps`` more on support and query set take them (leader), which counts as a constant. A shared
    backbone learns by it through what the follower's steps make of its features. EMAML, the paper's ensemble of MAMLs,
    is ``svgd: false``, ``prior: false`` and ``meta_loss: separate``.

    Args:
        backbone: the base learner without its head.
        outputs: rows of the head: ways, or the dimension of y.
        particles: M.
        adapt: "head", particles are heads on shared features (the paper's classification); "all", networks.
        noise: standard deviation of y that γ starts from, for regression; None for classification. The reference code
            has 0.1.
        prior: over weights, with Gamma hyperpriors on λ (shape 2, rate 2) and γ (2, 0.2); otherwise likelihood alone.
        svgd: otherwise each particle follows its own gradient.
        meta_loss: "chaser"; "direct", minus the log-likelihood of each query under the average of the particles'
            predictions (the loss that the paper argues against, with the average taken for each query rather than for
            all queries of a task together); "separate", the particles' mean query loss.
        inner_rate: α, the learning rate of the inner loop.
        precision_rate: what the steps of log λ and log γ are multiplied by; 1 in the reference code. The gradient of
            log λ grows with the number of weights, so at the rates of a head alone it diverges unless this is small.
        follow_steps: SVGD steps on the support set in meta-training.
        leader_steps: further steps of the leader.
        leader_rate: of these; None takes ``inner_rate``.
        eval_inner_steps: steps in evaluation; None takes as many as in training.
        batch_norm, **others: see MetaLearner.
    """

    paper = Paper(
        "Yoon, Kim, Dia, Kim, Bengio and Ahn",
        "Bayesian Model-Agnostic Meta-Learning",
        "NeurIPS",
        2018,
        "https://arxiv.org/abs/1806.03836",
    )
    tasks = frozenset({"classification", "regression"})

    def __init__(
        self,
        backbone: Backbone,
        outputs: int = 5,
        particles: int = 5,
        adapt: Literal["head", "all"] = "head",
        noise: float | None = None,
        prior: bool = True,
        svgd: bool = True,
        meta_loss: Literal["chaser", "direct", "separate"] = "chaser",
        inner_rate: float = 0.1,
        precision_rate: float = 1.0,
        follow_steps: int = 1,
        leader_steps: int = 1,
        leader_rate: float | None = None,
        eval_inner_steps: int | None = None,
        batch_norm: BatchNormMode = "transductive",
        **others: Any,
    ) -> None:
        super().__init__(batch_norm=batch_norm, **others)
        at_least(1, outputs=outputs, particles=particles, leader_steps=leader_steps)
        at_least(0, follow_steps=follow_steps, eval_inner_steps=eval_inner_steps)
        if noise is not None and not 0 < noise < math.inf:
            raise ValueError(f"noise is {noise} but is a standard deviation: it must be finite and above 0")
        self.learner = BaseLearner(backbone, outputs)
        self.whole = adapt == "all"
        split_into_particles(self.learner if self.whole else self.learner.head, particles)
        self.outputs, self.particles = outputs, particles
        self.svgd, self.meta_loss = svgd, meta_loss
        self.inner_rate, self.precision_rate = inner_rate, precision_rate
        self.follow_steps, self.leader_steps = follow_steps, leader_steps
        self.leader_rate = inner_rate if leader_rate is None else leader_rate
        self.eval_inner_steps = follow_steps if eval_inner_steps is None else eval_inner_steps
        self.log_lambda = nn.Parameter(torch.zeros(particles)) if prior else None
        self.log_gamma = None if noise is None else nn.Parameter(torch.full((particles,), -2 * math.log(noise)))

    def start(self, ways: int) -> tuple[Parameters, Parameters]:
        """The particles, each tensor (M, …), and what of them stays as it is in the inner loop."""
        moving, fixed = split_parameters(self.learner, adapt_normalization=False)
        if self.whole:
            fixed = fixed | dict(self.learner.named_buffers())
        else:
            moving, fixed = {n: p for n, p in moving.items() if self.learner.in_head(n)}, {}
        particles = vmap(lambda p: self.learner.resize_head(p, ways))(moving)
        precisions = {n: p for n in PRECISIONS if (p := getattr(self, n)) is not None}
        return particles | precisions, fixed

    def log_posterior(self, particle: Parameters, fixed: Parameters, evidence: Evidence) -> Tensor:
        """log p(D | θ) p(θ) of one particle, a scalar, up to a constant."""
        moving = weights(particle)
        total = torch.zeros((), device=evidence[0][0].device)
        for x, y, shares in evidence:
            if self.whole:
                outputs = call(self.learner, moving | fixed, x, self.statistics_source)
            else:
                outputs = F.linear(x.to(moving["head.weight"].dtype), moving["head.weight"], moving["head.bias"])
            if self.log_gamma is None:
                total = total - cross_entropies(outputs, y, shares).sum()
            else:
                total = total + log_normal(outputs - y, particle["log_gamma"])
        if self.log_lambda is not None:
            total = total + sum(log_normal(w, particle["log_lambda"]) for w in moving.values())
            total = total + log_gamma(particle["log_lambda"], 2, 2)
            if self.log_gamma is not None:
                total = total + log_gamma(particle["log_gamma"], 2, 0.2)
        return total

    def path(
        self, particles: Parameters, fixed: Parameters, evidence: Evidence, rate: float, steps: int
    ) -> Iterator[Parameters]:
        """SVGD from these particles to the posterior: yields them before the first step and after each one."""
        observations = sum(len(y) for _, y, _ in evidence)

        def log_posterior(particle: Parameters, fixed: Parameters) -> Tensor:
            return self.log_posterior(particle, fixed, evidence)

        yield particles
        for _ in range(steps):
            gradient = vmap(lambda p, f: inner_gradient(log_posterior, p, f), randomness="different")(particles, fixed)
            with torch.autocast(evidence[0][0].device.type, enabled=False):
                rows, direction = flat(particles), flat(gradient)
                if self.svgd:
                    direction = svgd_direction(rows, direction)
                moves = unflat(rate / observations * direction, particles)
                slower = {n: self.precision_rate * moves[n] for n in PRECISIONS if n in moves}
                particles = {n: particles[n] + move for n, move in (moves | slower).items()}
            yield particles

    def seen(self, x: Tensor) -> Tensor:
        """What the particles see of a support set: features, which no step changes, where only heads adapt."""
        return x if self.whole else call(self.learner.backbone, {}, x, self.statistics_source)

    def state(self, particles: Parameters, fixed: Parameters, support: Support, step: int) -> Adapted:
        """Particles together with what batch norm in this mode needs of the support set."""
        if not self.whole:
            of_backbone = adapted(self.learner.backbone, {}, support, self.batch_norm)
            return of_backbone._replace(parameters=particles, step=step)

        def statistics(parameters: Parameters) -> Statistics | None:
            return adapted(self.learner, parameters, support, self.batch_norm).statistics

        of_each = vmap(statistics)(weights(particles | fixed)) if self.batch_norm == "support" else None
        support_x = support.x if self.batch_norm == "per_query" else None
        return Adapted(particles | fixed, of_each, support_x, step)

    def adaptation(self, support: Support) -> Iterator[Adapted]:
        particles, fixed = self.start(support.ways)
        steps = self.follow_steps if self.training else self.eval_inner_steps
        evidence: Evidence = [(self.seen(support.x), support.y, support.shares())]
        for step, moved in enumerate(self.path(particles, fixed, evidence, self.inner_rate, steps)):
            yield self.state(moved, fixed, support, step)

    def adapt(self, support: Support) -> Adapted:
        return last(self.adaptation(support))

    def query_features(self, state: Adapted, x: Tensor) -> Tensor:
        """What the particles see of queries, (Q, features), or the queries themselves."""
        if self.whole:
            return x
        return query(self.learner.backbone, state._replace(parameters={}), x, self.statistics_source)

    def particle_outputs(self, state: Adapted, x: Tensor) -> Tensor:
        """The outputs (M, Q, outputs) of every particle for what ``query_features`` gives."""
        if not self.whole:
            return vmap(F.linear, (None, 0, 0))(x, state.parameters["head.weight"], state.parameters["head.bias"])

        def one(parameters: Parameters, statistics: Statistics | None) -> tuple[Tensor, Statistics]:
            own: Statistics = {}
            with recording(own if self.batch_norm == "running" else None, differentiable=False):
                moved = Adapted(parameters, statistics, state.support_x, state.step)
                return query(self.learner, moved, x, self.statistics_source), own

        of_each = vmap(
            one, (0, None if state.statistics is None else 0), randomness="different" if self.training else "same"
        )
        outputs, statistics = of_each(weights(state.parameters), state.statistics)
        record(statistics)
        return outputs

    def prediction(self, outputs: Tensor, particles: Parameters) -> Prediction:
        """The equally weighted average of what particles predict, from their outputs (M, Q, outputs)."""
        if self.log_gamma is None:
            log_p = outputs.to(torch.promote_types(outputs.dtype, torch.float32)).log_softmax(-1)
            return log_p.logsumexp(0) - math.log(len(outputs))
        deviation = (-0.5 * particles["log_gamma"]).exp()[:, None, None]
        return Mixture(outputs.to(deviation.dtype), deviation.expand_as(outputs))

    def predict(self, state: Adapted, query_x: Tensor) -> Prediction:
        return self.prediction(self.particle_outputs(state, self.query_features(state, query_x)), state.parameters)

    def chaser_loss(self, follower: Parameters, leader: Parameters) -> Tensor:
        """Σ_m ‖Θ_m(follower) - Θ_m(leader)‖², the leader a constant."""
        # Without the precisions, as in the reference code.
        return (flat(weights(follower)) - flat(weights(leader)).detach()).square().sum()

    def objective(self, task: Task) -> tuple[Tensor, Prediction]:
        support, (particles, fixed) = task.support, self.start(task.support.ways)
        known = self.seen(support.x), support.y, support.shares()
        path = self.path(particles, fixed, [known], self.inner_rate, self.follow_steps)
        state = self.state(follower := last(path), fixed, support, self.follow_steps)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.meta_loss != "chaser"):
            features = self.query_features(state, task.query_x)
            outputs = self.particle_outputs(state, features)
            prediction = self.prediction(outputs, follower)
        if self.meta_loss == "direct":
            return self.loss(prediction, task.query_y), prediction
        if self.meta_loss == "separate":
            alone = [{n: p[m : m + 1] for n, p in follower.items()} for m in range(self.particles)]
            of_each = [self.prediction(o[None], p) for o, p in zip(outputs, alone, strict=True)]
            return torch.stack([self.loss(p, task.query_y) for p in of_each]).mean(), prediction
        with torch.no_grad():
            evidence: Evidence = [known, (features, task.query_y, None)]
            leader = last(self.path(follower, fixed, evidence, self.leader_rate, self.leader_steps))
        return self.chaser_loss(follower, leader), prediction
