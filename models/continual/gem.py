"""Gradient episodic memory: no step may make the loss on a memory of an earlier experience larger."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from datamodules.core.base import EpisodicDataModule
from datamodules.core.errors import at_least
from models.continual.memory import Memory
from models.continual.online_sgd import Online, OnlineSGD
from models.core.base_learner import Parameters
from models.core.inner_loop import flat, unflat
from models.core.learner import Paper
from models.networks.backbones import Backbone

ITERATIONS = 30  # of the interior-point method, each of which makes what is left some ten times smaller
CENTRING, TO_THE_EDGE = 0.1, 0.99


class Episodic(NamedTuple):
    """What is kept on ONE stream.

    Attributes:
        memory: with as many places for each experience.
        current: the number of the experience, () int64; -1 before the first.
    """

    memory: Memory
    current: Tensor


def nonnegative_quadratic(p: Tensor, q: Tensor) -> Tensor:
    """The u ≥ 0 that minimises ½ uᵀ P u + qᵀ u, (n,), for a positive semidefinite P (n, n) and q (n,).

    By a primal-dual interior-point method with a fixed number of steps, so that it can be mapped over.
    """
    precise = torch.float32 if p.device.type == "mps" else torch.float64
    scale = p.diagonal().abs().amax().clamp(min=torch.finfo(p.dtype).tiny)
    p, q = (p / scale).to(precise), (q / scale).to(precise)
    size = q.abs().amax().clamp(min=1e-12)  # u is in units of it
    q = q / size
    eye = torch.eye(len(q), dtype=precise, device=q.device)
    u = z = torch.ones_like(q)
    for _ in range(ITERATIONS):
        target = CENTRING * (u * z).mean()
        # P u + q = z and u z = target, to first order.
        step = torch.linalg.solve(p + (z / u) * eye, target / u - p @ u - q)
        of_z = target / u - z - (z / u) * step
        room = torch.cat([torch.where(d < 0, -v / d, torch.inf) for v, d in ((u, step), (z, of_z))]).amin()
        length = (TO_THE_EDGE * room).clamp(max=1)
        u, z = u + length * step, z + length * of_z
    return u * size


def projected(gradient: Tensor, others: Tensor, there: Tensor, margin: float = 0.0) -> Tensor:
    """The nearest to a gradient (n,) that goes against none of others (K, n): GEM's eqs. 10 to 12.

    Args:
        gradient: g.
        others: G.
        there: which of them there are, (K,) bool.
        margin: what the multipliers v of the dual problem are at least.

    Returns:
        g + Gᵀ v, or g itself where nothing goes against.
    """
    others = torch.where(there[:, None], others, 0.0)
    against = others @ gradient
    gram = others @ others.T
    v = nonnegative_quadratic(gram, against + margin * gram.sum(1)) + margin
    moved = gradient + others.T @ v.to(gradient.dtype)
    return torch.where((against < 0).any(), moved, gradient)


class AGEM(OnlineSGD):
    """The gradient may not go against that of a batch from the memory of all earlier experiences (eqs. 10 and 11).

    The last examples of each experience are kept, as many of each.

    Args:
        backbone: see OnlineSGD.
        experiences: that there is a memory for; a stream may not have more.
        memory: examples that are kept of each experience.
        replay: examples of the batch from the memory.
        **others: see OnlineSGD.
    """

    paper = Paper(
        "Chaudhry, Ranzato, Rohrbach and Elhoseiny",
        "Efficient Lifelong Learning with A-GEM",
        "ICLR",
        2019,
        "https://arxiv.org/abs/1812.00420",
    )

    def __init__(
        self, backbone: Backbone, experiences: int = 20, memory: int = 10, replay: int = 200, **others: Any
    ) -> None:
        super().__init__(backbone, **others)
        at_least(1, experiences=experiences, memory=memory, replay=replay)
        self.experiences, self.memory, self.replay = experiences, memory, replay

    def check(self, data: EpisodicDataModule) -> str | None:
        longest = data.task_shape().get("experiences", 0)
        if longest > self.experiences:
            return (
                f"{type(self).__name__} has a memory for {self.experiences} experiences but streams have {longest}: "
                f"give --model.init_args.experiences {longest}"
            )
        return super().check(data)

    def keep(self, parameters: Parameters, classes: int) -> Episodic:
        like = next(iter(parameters.values()))
        memory = Memory.empty(self.experiences * self.memory, self.features, self.experiences, like)
        return Episodic(memory, memory.met.new_full((), -1))

    def open(self, state: Online) -> Online:
        return state._replace(kept=state.kept._replace(current=state.kept.current + 1))

    def wrote(self, state: Online, x: Tensor, y: Tensor) -> Online:
        memory, current = state.kept
        memory, chance = memory.written(x, y, "balanced", state.chance, current.expand(len(y)))
        return state._replace(kept=Episodic(memory, current), chance=chance)

    def step(self, state: Online, x: Tensor, y: Tensor) -> Online:
        memory, current = state.kept
        earlier = torch.arange(self.experiences * self.memory, device=y.device) // self.memory < current
        (old_x, old_y, there), chance = memory.drawn(self.replay, state.chance, earlier)
        at = state.parameters
        gradient = self.gradient(at, x, y)
        g, other = flat(gradient), flat(self.gradient(at, old_x.view(-1, *x.shape[1:]), old_y, there))
        against = (g @ other).clamp(max=0) / other.square().sum().clamp(min=torch.finfo(g.dtype).tiny)
        return self.descended(state._replace(chance=chance), unflat(g - against * other, gradient))


class GEM(AGEM):
    """The gradient may go against that of no earlier experience's memory (Lopez-Paz and Ranzato 2017, eqs. 6 to 12).

    Args:
        backbone: see OnlineSGD.
        margin: what multipliers are at least where a gradient is changed: the paper's memory strength γ, which favours
            what helps earlier experiences.
        **others: see AGEM, but for ``replay``: all that is kept is looked at.
    """

    paper = Paper(
        "Lopez-Paz and Ranzato",
        "Gradient Episodic Memory for Continual Learning",
        "NeurIPS",
        2017,
        "https://arxiv.org/abs/1706.08840",
    )

    def __init__(
        self, backbone: Backbone, experiences: int = 20, memory: int = 10, margin: float = 0.5, **others: Any
    ) -> None:
        super().__init__(backbone, experiences, memory, **others)
        at_least(0, margin=margin)
        self.margin = margin

    def step(self, state: Online, x: Tensor, y: Tensor) -> Online:
        memory, current = state.kept
        at = state.parameters

        def of_one(old_x: Tensor, old_y: Tensor, held: Tensor) -> Tensor:
            return flat(self.gradient(at, old_x.view(-1, *x.shape[1:]), old_y, held))

        parts = (m.unflatten(0, (self.experiences, self.memory)) for m in (memory.x, memory.y, memory.held))
        earlier = torch.arange(self.experiences, device=y.device) < current
        gradient = self.gradient(at, x, y)
        moved = projected(flat(gradient), vmap(of_one)(*parts), earlier, self.margin)
        return self.descended(state, unflat(moved, gradient))
