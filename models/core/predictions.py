"""Predictive distributions of a real value."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal


class Mixture(NamedTuple):
    """Equally weighted Gaussians, as particles or samples of a posterior give them.

    Attributes:
        mean: of the M parts, (…, M, Q, out).
        deviation: standard deviations, of the same shape, above 0.
    """

    mean: Tensor
    deviation: Tensor

    def distribution(self) -> MixtureSameFamily:
        """Over (…, Q, out), each value by itself."""
        mean, deviation = (t.movedim(-3, -1) for t in self)
        parts = Normal(mean, deviation, validate_args=False)
        weights = Categorical(logits=torch.zeros_like(mean), validate_args=False)
        return MixtureSameFamily(weights, parts, validate_args=False)

    def log_densities(self, value: Tensor) -> Tensor:
        """Of each query by each part, all outputs together, (…, M, Q), from values (…, Q, out)."""
        return Normal(self.mean, self.deviation, validate_args=False).log_prob(value.unsqueeze(-3)).sum(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of values (…, Q, out), of the same shape."""
        return self.distribution().log_prob(value)

    def cdf(self, value: Tensor) -> Tensor:
        """The probability of no more than values (…, Q, out), of the same shape."""
        return self.distribution().cdf(value)

    def quantile(self, probability: float) -> Tensor:
        """The value that is exceeded with probability 1 - ``probability``, (…, Q, out), by bisection."""
        # A quantile of a mixture lies between the least and the greatest of those of its parts.
        of_parts = Normal(self.mean, self.deviation, validate_args=False).icdf(torch.full_like(self.mean, probability))
        low, high = of_parts.amin(-3), of_parts.amax(-3)
        distribution = self.distribution()
        for _ in range(30):  # to a billionth of that range
            middle = (low + high) / 2
            below = distribution.cdf(middle) < probability
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def central(self, probability: float) -> tuple[Tensor, Tensor]:
        """The ends of the interval that leaves as much on either side, each (…, Q, out)."""
        return self.quantile((1 - probability) / 2), self.quantile((1 + probability) / 2)


Prediction = Tensor | Mixture
"""Logits (…, Q, ways), values (…, Q, out), or the distribution of values."""


def cross_entropies(logits: Tensor, target: Tensor, shares: Tensor | None = None) -> Tensor:
    """Of each example (N,), from logits (N, ways) and labels (N,); times ``shares`` (N,), see ``Support.shares``."""
    of_each = F.cross_entropy(logits, target, reduction="none")
    return of_each if shares is None else of_each * shares.to(of_each)
