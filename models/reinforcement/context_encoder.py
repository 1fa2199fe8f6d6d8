"""What a task is, inferred from its transitions: a product of Gaussians."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.reinforcement.policies import single
from models.reinforcement.soft_actor_critic import network

LEAST_VARIANCE = 1e-7


class Latents(NamedTuple):
    """Independent Gaussians over the latents: mean and variance, (…, latents)."""

    mean: Tensor
    variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """z (…, latents), differentiable, from standard normal noise of that shape."""
        return self.mean + self.variance.sqrt() * noise.to(self.mean)

    def kl(self) -> Tensor:
        """KL to the prior N(0, I), nats, (…,)."""
        return 0.5 * (self.variance + self.mean.square() - 1 - self.variance.log()).sum(-1)


def product_of_gaussians(factors: Latents) -> Latents:
    """The normalised product of factors (…, C, latents) over C: precisions add up, means are weighed by them."""
    precision = factors.variance.reciprocal()
    variance = precision.sum(-2).reciprocal()
    return Latents(variance * (precision * factors.mean).sum(-2), variance)


class ContextEncoder(nn.Module):
    """The posterior over the latents, whatever the order of the context: a product of one Gaussian a transition.

    The prior is no factor of it, as in the released code.

    Args:
        inputs: numbers of a transition: observation, action and reward.
        hidden: units of each of three layers.
        latents: size of z.
    """

    def __init__(self, inputs: int, hidden: int, latents: int) -> None:
        super().__init__()
        self.network = network(inputs, hidden, 2 * latents)

    def factors(self, context: Tensor) -> Latents:
        """Of each transition, (…, inputs)."""
        mean, rho = single(self.network(context)).chunk(2, -1)
        return Latents(mean, F.softplus(rho).clamp(min=LEAST_VARIANCE))

    def forward(self, context: Tensor, before: Latents | None = None, weight: Tensor | None = None) -> Latents:
        """The posterior by a context (…, C, inputs), and by an earlier one if that led to ``before``.

        Transitions of ``weight`` (…, C) 0 are left out; the others have 1.
        """
        factors = self.factors(context)
        if weight is not None:
            factors = factors._replace(variance=factors.variance / weight[..., None])
        if before is not None:
            factors = Latents(*(torch.cat([b[..., None, :], f], -2) for b, f in zip(before, factors, strict=True)))
        return product_of_gaussians(factors)
