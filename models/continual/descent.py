"""Steps of gradient descent along a stream, and those on a linear head in closed form."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from models.core.base_learner import Parameters
from models.core.chance import Chance

StreamOptimizer = Literal["adam", "sgd"]
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # of Adam (Kingma and Ba, ICLR 2015)


class Descent(NamedTuple):
    """Parameters that learn from a stream.

    Attributes:
        parameters: by name.
        mean, square: Adam's averages of their gradients and of these squared; empty where steps are of plain SGD.
        steps: taken so far, () float64 (float32 on MPS).
    """

    parameters: Parameters
    mean: Parameters
    square: Parameters
    steps: Tensor

    @classmethod
    def of(cls, parameters: Parameters, optimizer: StreamOptimizer) -> Descent:
        """Before the first step."""
        zeros = {name: torch.zeros_like(p) for name, p in parameters.items()} if optimizer == "adam" else {}
        device = next(iter(parameters.values())).device
        precise = torch.float32 if device.type == "mps" else torch.float64
        return cls(parameters, zeros, zeros, torch.zeros((), dtype=precise, device=device))

    def stepped(self, gradient: Parameters, rate: float) -> Descent:
        """After a step: of Adam where there are averages, otherwise of SGD."""
        steps = self.steps + 1
        if not self.mean:
            moved = {name: p - rate * gradient[name] for name, p in self.parameters.items()}
            return Descent(moved, {}, {}, steps)
        # The corrections of both averages, moved into the denominator: an array less to go through.
        first, second = 1 - BETA1**steps, 1 - BETA2**steps
        scale, eps = first / (second.sqrt() * rate), EPS * first / rate
        parameters, mean, square = {}, {}, {}
        for name, p in self.parameters.items():
            g = gradient[name]
            mean[name] = m = (g * (1 - BETA1)).add_(self.mean[name], alpha=BETA1)
            square[name] = v = (g * g).mul_(1 - BETA2).add_(self.square[name], alpha=BETA2)
            parameters[name] = torch.addcdiv(p, m, v.sqrt().mul_(scale.to(v)).add_(eps.to(v)), value=-1)
        return Descent(parameters, mean, square, steps)


def drawn(chance: Chance, shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Chance]:
    """New weights (outputs, *inputs) of the dtype of ``like``, and the chance after them.

    They are normal of variance 2 / inputs (He et al., ICCV 2015).
    """
    uniform, chance = chance.uniform(2, *shape)
    radius = (-2 * torch.log1p(-uniform[0])).sqrt() * math.sqrt(2 / math.prod(shape[1:]))  # Box and Muller, 1958
    return (radius * torch.cos(2 * math.pi * uniform[1])).to(like), chance


# A linear head is one matrix (classes, features + 1), whose last column is the bias: features have a 1 at their end.


def with_one(features: Tensor) -> Tensor:
    """Features (N, F) with the 1 that the bias is a weight of, (N, F + 1)."""
    return torch.cat([features, torch.ones_like(features[:, :1])], 1)


def drawn_head(chance: Chance, classes: int, features: int, like: Tensor) -> tuple[Tensor, Chance]:
    """A new head (classes, features + 1) of the dtype of ``like``, its biases 0, and the chance after it."""
    weight, chance = drawn(chance, (classes, features), like)
    return torch.cat([weight, torch.zeros_like(weight[:, :1])], 1), chance


def slopes(logits: Tensor, y: Tensor) -> Tensor:
    """The gradient of each example's cross-entropy by its logits, (…, classes) and (…) to (…, classes).

    Times the features it is the gradient of a linear head: (softmax - onehot) φᵀ.
    """
    # By comparison: torch's one_hot looks at values, which transformations do not let it.
    return logits.softmax(-1) - (y[..., None] == torch.arange(logits.shape[-1], device=y.device)).to(logits)


def all_slopes(head: Tensor, x: Tensor, y: Tensor, rate: float | Tensor) -> Tensor:
    """The slopes (N, classes) that SGD takes its steps by, one example after another, each at the head of its moment.

    Example t meets W_t = W_0 - rate Σ_{s<t} d_s φ_sᵀ, of which its logits need only d_s and the products φ_s·φ_t: the
    head itself is read once for all steps.

    Args:
        head: before the first step, W_0, (classes, F + 1).
        x: features of the examples, with the 1, (N, F + 1), in their order.
        y: their labels, (N,).
        rate: of the steps.
    """
    start, products = x @ head.T, x @ x.T
    taken: list[Tensor] = []
    for t in range(len(x)):
        logits = start[t]
        if taken:
            logits = logits - rate * (products[t, :t] @ torch.stack(taken))
        taken.append(slopes(logits, y[t]))
    return torch.stack(taken)
