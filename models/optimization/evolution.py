"""Evolution strategies: gradients of what an unrolled loop comes to, without differentiating it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from models.core.base_learner import Parameters

Unroll = Callable[[Parameters, Any, Any], tuple[Any, Tensor]]
"""One window of a loop: from parameters, the state at its beginning and the window, its last state and its loss."""


def evolution_gradient(
    unroll: Unroll,
    parameters: Parameters,
    state: Any,
    windows: Iterable[Any],
    deviation: float,
    pairs: int = 1,
    persistent: bool = True,
) -> tuple[Tensor, Parameters, Any]:
    """The gradient of the sum of the windows' losses, smoothed by noise, by antithetic pairs: an estimate.

    Each window draws noise anew, ε ~ N(0, σ²) for a particle and -ε for its twin, which go on from states of their own.
    Their difference of losses weighs the noise of this window alone (truncated evolution strategies, which do not see
    what parameters did in earlier windows), or the sum of the noise so far: persistent evolution strategies, without
    that bias (Vicol, Metz and Sohl-Dickstein, ICML 2021, eq. 12 and algorithm 2).

    Args:
        unroll: runs a window.
        parameters: that the gradient is of.
        state: before the first window, tensors of any structure.
        windows: in their order.
        deviation: σ.
        pairs: of particles.
        persistent: whether the noise of earlier windows counts.

    Returns:
        The sum of the windows' mean losses over all particles, the gradient, and the particles' last states
        (2 · pairs, …).
    """
    with torch.no_grad():
        parameters = {name: p.detach() for name, p in parameters.items()}
        states = tree_map(lambda t: t.expand(2 * pairs, *t.shape), state)
        noise = {name: p.new_zeros(pairs, *p.shape) for name, p in parameters.items()}
        gradient, value = {name: torch.zeros_like(p) for name, p in parameters.items()}, 0.0
        for window in windows:
            drawn = {name: deviation * torch.randn_like(e) for name, e in noise.items()}
            noise = {name: noise[name] + e for name, e in drawn.items()} if persistent else drawn
            around = {name: p + torch.cat([drawn[name], -drawn[name]]) for name, p in parameters.items()}
            states, losses = vmap(lambda p, s, w=window: unroll(p, s, w), randomness="same")(around, states)
            weight = (losses[:pairs] - losses[pairs:]) / (2 * deviation**2 * pairs)
            gradient = {name: g + torch.tensordot(weight, noise[name], 1) for name, g in gradient.items()}
            value = value + losses.mean()
    return torch.as_tensor(value), gradient, states
