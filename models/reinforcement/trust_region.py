"""Trust region policy optimisation of parameters held in dictionaries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value

from models.core.base_learner import Parameters
from models.core.inner_loop import inner
from models.core.second_order import conjugate_gradient, hessian_product, inner_product


def trust_region_step(
    loss: Callable[[Parameters], Tensor],
    divergence: Callable[[Parameters], Tensor],
    start: Parameters,
    limit: float,
    total: Callable[[Any], Any] = lambda values: values,
    products: int = 10,
    damping: float = 1e-5,
    backtracks: int = 15,
    shrink: float = 0.8,
) -> Parameters:
    """The parameters after a step (Schulman et al., ICML 2015, appendix C), with rllab's settings.

    Along the natural gradient, as far as a divergence of that curvature allows, then back until the loss has fallen and
    the divergence is within the limit: no step at all where that does not happen.

    Args:
        loss: what is minimised, a scalar: this process's part of a sum over processes.
        divergence: likewise; 0 and stationary at the start.
        start: to go from.
        limit: of the divergence.
        total: sums tensors, in a dictionary or tuple, over all processes.
        products: conjugate gradient steps, each with a product with the divergence's Hessian.
        damping: added to that Hessian's diagonal.
        backtracks, shrink: lengths that are tried, and each one's share of the one before.
    """

    def curvature(vector: Parameters) -> Parameters:
        image = total(product(vector))
        return {name: image[name] + damping * v for name, v in vector.items()}

    with torch.no_grad():
        with inner(start):
            gradient, before = total(grad_and_value(loss)(start))
        product = hessian_product(divergence, start)
        direction = conjugate_gradient(curvature, gradient, products)
        length = (2 * limit / (inner_product(direction, curvature(direction)) + 1e-8)).sqrt()
        for k in range(backtracks):
            moved = {name: p - shrink**k * length * direction[name] for name, p in start.items()}
            with inner(start):
                after, apart = total((loss(moved), divergence(moved)))
            if after < before and apart <= limit:
                return moved
    return start
