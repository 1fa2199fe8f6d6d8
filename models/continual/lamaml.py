"""La-MAML: look-ahead meta-learning on a stream, with a learning rate of its own for each parameter."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad

from datamodules.core.errors import at_least
from models.continual.memory import Memory
from models.continual.online_sgd import Online, OnlineSGD
from models.core.base_learner import Parameters
from models.core.inner_loop import flat, inner, sgd_path
from models.core.learner import Paper
from models.networks.backbones import Backbone

Form = Literal["async", "sync", "cmaml"]
Replayed = Literal["earlier", "all"]


class LookAhead(NamedTuple):
    """What is kept on ONE stream.

    Attributes:
        rates: α, of each parameter its shape; C-MAML's are scalars.
        memory: the reservoir, which the stream is written to as it arrives.
        earlier: the reservoir as it was before this experience.
    """

    rates: Parameters
    memory: Memory
    earlier: Memory


def within(gradient: Parameters, most: float | None) -> Parameters:
    """A gradient shortened to a norm; None leaves it."""
    if most is None:
        return gradient
    factor = (most / flat(gradient).norm().clamp(min=1e-12)).clamp(max=1)
    return {n: g * factor for n, g in gradient.items()}


class LaMAML(OnlineSGD):
    """A batch is learned ahead, example by example; the step is that which makes this harm old examples least.

    From θ, one inner step on each example k of the batch in random order, θᵏ⁺¹ = θᵏ - relu(α) ∇ℓ(θᵏ); the
    meta-objective is the mean, over these steps, of the loss at θᵏ⁺¹ on the batch and examples that are replayed
    (Gupta et al. 2020, algorithm 1 and eq. 3). Its gradient by α is learned by first (eq. 5), that by θ after:

    "async", La-MAML: θ ← θ - relu(α) ∇_θ with the new α (eq. 6). "sync", Sync La-MAML: θ ← θ - rate · ∇_θ.
    "cmaml", C-MAML: likewise, with α one constant.

    Args:
        backbone: see OnlineSGD.
        form: which of the three.
        initial_rate: α at the beginning of a stream.
        rate_of_rates: of the steps that learn α; not for "cmaml".
        rate: of the steps of θ; not for "async".
        first_order: take inner gradients as constants, the default on MNIST.
        clip: what each number of an inner gradient, and the norm of the meta-gradient by θ and of that by α, are
            limited to; None for no limit.
        memory: examples of the reservoir.
        replay: of them, in each meta-objective.
        replayed: from the reservoir as it was before this experience, "earlier", or as it is, "all".
        **others: see OnlineSGD; ``glances`` are meta-updates on each batch.
    """

    paper = Paper(
        "Gupta, Yadav and Paull",
        "La-MAML: Look-ahead Meta Learning for Continual Learning",
        "NeurIPS",
        2020,
        "https://arxiv.org/abs/2007.13904",
    )

    def __init__(
        self,
        backbone: Backbone,
        form: Form = "async",
        initial_rate: float = 0.15,
        rate_of_rates: float = 0.3,
        rate: float = 0.1,
        first_order: bool = True,
        clip: float | None = 2.0,
        memory: int = 200,
        replay: int = 10,
        replayed: Replayed = "earlier",
        glances: int = 5,
        **others: Any,
    ) -> None:
        super().__init__(backbone, rate=rate, glances=glances, **others)
        at_least(0, initial_rate=initial_rate, rate_of_rates=rate_of_rates, clip=clip)
        at_least(1, memory=memory, replay=replay)
        self.form: Form = form
        self.replayed: Replayed = replayed
        self.initial_rate, self.rate_of_rates, self.first_order, self.clip = (
            initial_rate,
            rate_of_rates,
            first_order,
            clip,
        )
        self.memory, self.replay = memory, replay

    def keep(self, parameters: Parameters, classes: int) -> LookAhead:
        like = next(iter(parameters.values()))
        shapes = {n: () if self.form == "cmaml" else p.shape for n, p in parameters.items()}
        rates = {n: like.new_full(shape, self.initial_rate) for n, shape in shapes.items()}
        memory = Memory.empty(self.memory, self.features, classes, like)
        return LookAhead(rates, memory, memory)

    def open(self, state: Online) -> Online:
        return state._replace(kept=state.kept._replace(earlier=state.kept.memory))

    def wrote(self, state: Online, x: Tensor, y: Tensor) -> Online:
        memory, chance = state.kept.memory.written(x, y, "reservoir", state.chance)
        return state._replace(kept=state.kept._replace(memory=memory), chance=chance)

    def step(self, state: Online, x: Tensor, y: Tensor) -> Online:
        kept: LookAhead = state.kept
        order, chance = state.chance.uniform(len(y))
        x, y = x[order.argsort()], y[order.argsort()]
        from_memory = kept.earlier if self.replayed == "earlier" else kept.memory
        replayed, chance = from_memory.drawn(self.replay, chance)
        at, rates = state.parameters, kept.rates
        with inner(at):
            by_parameters, by_rates = grad(self.meta_objective, argnums=(0, 1))(at, rates, x, y, replayed)
        by_parameters = within(by_parameters, self.clip)
        if self.form != "cmaml":
            by_rates = within(by_rates, self.clip)
            rates = {n: a - self.rate_of_rates * by_rates[n] for n, a in rates.items()}
        of_step = {n: a.relu() for n, a in rates.items()} if self.form == "async" else dict.fromkeys(at, self.rate)
        parameters = {n: p - of_step[n] * by_parameters[n] for n, p in at.items()}
        return Online(parameters, kept._replace(rates=rates), chance)

    def meta_objective(
        self, parameters: Parameters, rates: Parameters, x: Tensor, y: Tensor, replayed: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """The mean loss on a batch and what is replayed, after each inner step on one example of the batch."""
        old_x, old_y, there = replayed
        both = torch.cat([x, old_x.view(-1, *x.shape[1:])]), torch.cat([y, old_y])
        there = torch.cat([torch.ones_like(y, dtype=torch.bool), there])
        ahead = {n: a.relu() for n, a in rates.items()}

        def loss(at: Parameters, k: int) -> Tensor:
            return self.mean_loss(at, x[k : k + 1], y[k : k + 1])

        path = sgd_path(loss, parameters, lambda _: ahead, len(y), self.first_order, self.clip)
        next(path)  # before the first step
        return torch.stack([self.mean_loss(at, *both, there) for at in path]).mean()
