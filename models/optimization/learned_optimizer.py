"""A learned optimizer: a small network that reads of each parameter its gradient's history, and steps."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from datamodules.core.episodes import Support, Task
from datamodules.core.errors import at_least
from models.core.base_learner import BaseLearner, Parameters
from models.core.gradient_learner import GradientLearner
from models.core.inner_loop import Adapted, adapted, call, flat, inner_path, unflat, with_gradient
from models.core.learner import Paper
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNormMode, recording
from models.optimization.evolution import evolution_gradient

MOMENTA = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
TIMES = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
FEATURES = 2 + len(MOMENTA) + len(TIMES)


class Optimized(NamedTuple):
    """Where an optimization is: the parameters, and running means of their gradients, (N, momenta)."""

    parameters: Parameters
    momenta: Tensor


class LearnedOptimizer(GradientLearner):
    """Trains each task's network from a random start by an update rule that is meta-learned; the start is not.

    Of every parameter a network of two hidden layers sees 19 features: gradient, value and six running means of the
    gradient (decays 0.1 to 0.9999), each over its root mean square in its tensor, and eleven of the time,
    tanh(t / τ - 1) for τ from 1 to 100,000. It answers direction d and magnitude m for the step
    θ' = θ - scale · d · exp(m / 1000): MLPLOpt, or "LOLv2", of the library learned_optimization.

    What is meta-learned is the mean query loss after each step of a horizon, which is cut into windows: no gradient
    passes from one to those before it, unless evolution strategies persist.

    Args:
        backbone: the network that is trained, without its head.
        outputs: rows of the head: ways, or the dimension of y.
        head_bias: whether the head has one; without, and without hidden layers, the support loss is a quadratic.
        inner_steps: the horizon in meta-training.
        eval_inner_steps: the horizon in evaluation, longer, so that it is seen whether the optimizer goes on.
        window: steps that a gradient passes through; the horizon for all.
        estimator: of the meta-gradient: "gradient", by differentiating the windows; "es" or "pes", evolution strategies
            without and with the noise of earlier windows (``evolution_gradient``).
        deviation: σ of the evolution strategies' noise.
        pairs: of antithetic particles for each task.
        scale: of a step.
        hidden: width of both hidden layers.
        random_start: in meta-training each task starts from another draw of the initial weights: those of each tensor
            in random order. Evaluation starts from one, so that it is the same for all that is compared.
        first_order: take the support set's gradients as constants to the meta-gradient.
        batch_norm, **others: see MetaLearner.
    """

    paper = Paper(
        "Metz, Maheswaranathan, Nixon, Freeman and Sohl-Dickstein",
        "Understanding and correcting pathologies in the training of learned optimizers",
        "ICML",
        2019,
        "https://arxiv.org/abs/1810.10180",
    )
    tasks = frozenset({"classification", "regression"})

    def __init__(
        self,
        backbone: Backbone,
        outputs: int = 5,
        head_bias: bool = True,
        inner_steps: int = 100,
        eval_inner_steps: int | None = 200,
        window: int = 20,
        estimator: Literal["gradient", "es", "pes"] = "gradient",
        deviation: float = 0.01,
        pairs: int = 1,
        scale: float = 1e-3,
        hidden: int = 32,
        random_start: bool = True,
        first_order: bool = False,
        batch_norm: BatchNormMode = "transductive",
        **others: Any,
    ) -> None:
        super().__init__(outputs, inner_steps, eval_inner_steps, batch_norm, **others)
        at_least(1, inner_steps=inner_steps, window=window, pairs=pairs, hidden=hidden)
        if not (deviation > 0 and scale > 0):
            raise ValueError(f"deviation is {deviation} and scale {scale} but both must be above 0")
        self.learner = BaseLearner(backbone, outputs, head_bias).requires_grad_(False)
        self.window, self.scale = window, scale
        self.random_start, self.first_order = random_start, first_order
        self.estimator: Literal["gradient", "es", "pes"] = estimator
        self.deviation, self.pairs = deviation, pairs
        sizes = (FEATURES, hidden, hidden, 2)
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        for layer in layers:  # as haiku's, which the reference code is written with
            nn.init.trunc_normal_(layer.weight, 0.0, (d := layer.in_features**-0.5), -2 * d, 2 * d)
            nn.init.zeros_(layer.bias)
        self.network = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def weights(self) -> Parameters:
        """Of the optimizer: what is meta-learned."""
        return dict(self.network.named_parameters())

    def start(self, ways: int) -> Optimized:
        """The beginning of an optimization."""
        drawn: Parameters = self.learner.resize_head(dict(self.learner.named_parameters()), ways)
        if self.training and self.random_start:
            orders = {n: torch.rand(p.numel(), device=p.device).argsort() for n, p in drawn.items()}
            drawn = {n: p.flatten()[orders[n]].view(p.shape) for n, p in drawn.items()}
        return Optimized(drawn, torch.zeros_like(flat(drawn))[:, None].repeat(1, len(MOMENTA)))

    def path(
        self, network: Parameters, support: Support, begin: Optimized, first: int, steps: int
    ) -> Iterator[Optimized]:
        """So many steps by an optimizer of these weights, the first of them numbered ``first``."""

        def loss(parameters: Parameters, step: int) -> Tensor:
            outputs = call(self.learner, parameters, support.x, self.statistics_source, step)
            return self.support_loss(outputs, support)

        def update(
            step: int, at: Parameters, gradients: Parameters, _: Tensor, momenta: Tensor
        ) -> tuple[Parameters, Tensor]:
            theta, gradient = flat(at)[:, None], flat(gradients)[:, None]
            decays = gradient.new_tensor(MOMENTA)
            momenta = decays * momenta + (1 - decays) * gradient
            values = torch.cat([gradient, theta, momenta], 1)
            values = torch.cat([normalized(part) for part in values.split([p.numel() for p in at.values()])])
            time = torch.tanh(step / gradient.new_tensor(TIMES) - 1).expand(len(theta), len(TIMES))
            direction, magnitude = functional_call(self.network, network, (torch.cat([values, time], 1),)).unbind(1)
            return unflat(theta[:, 0] - self.scale * direction * torch.exp(magnitude / 1000), at), momenta

        path = inner_path(loss, begin.parameters, update, steps, begin.momenta, self.first_order, first)
        for reached in path:
            yield Optimized(*reached)

    def adaptation(self, support: Support) -> Iterator[Adapted]:
        for step, at in enumerate(self.path(self.weights(), support, self.start(support.ways), 0, self.steps)):
            yield adapted(self.learner, at.parameters, support, self.batch_norm, step)

    def after(self, parameters: Parameters, step: int, task: Task) -> tuple[Tensor, Tensor]:
        """Loss and prediction of the queries by parameters that so many steps reached."""
        state = adapted(self.learner, parameters, task.support, self.batch_norm, step)
        prediction = self.predict(state, task.query_x)
        return self.loss(prediction, task.query_y), prediction

    def objective(self, task: Task) -> tuple[Any, ...]:
        windows = range(0, self.inner_steps, self.window)
        state, network = self.start(task.support.ways), self.weights()

        def unroll(network: Parameters, state: Optimized, first: int) -> tuple[Optimized, Tensor]:
            """A window, and what its query losses add to their mean over the horizon."""
            losses, steps = [], min(self.window, self.inner_steps - first)
            for step, at in enumerate(self.path(network, task.support, state, first, steps), first):
                if step > first:
                    losses.append(self.after(at.parameters, step, task)[0])
                state = at
            return state, torch.stack(losses).sum() / self.inner_steps

        if self.estimator == "gradient":
            loss = task.query_x.new_zeros(())
            for first in windows:
                state, part = unroll(network, tree_map(torch.detach, state), first)
                loss = loss + part
        else:
            with recording(None):
                value, gradient, states = evolution_gradient(
                    unroll, network, state, windows, self.deviation, self.pairs, self.estimator == "pes"
                )
            loss = with_gradient(value, torch.stack([(p * gradient[n]).sum() for n, p in network.items()]).sum())
            state = tree_map(lambda t: t[0], states)
        with torch.no_grad():
            return loss, self.after(state.parameters, self.inner_steps, task)[1]


def normalized(values: Tensor) -> Tensor:
    """Columns of (n, features) over their root mean squares; what is all but zero stays small."""
    return values * torch.rsqrt(values.square().mean(0) + 1e-5)
