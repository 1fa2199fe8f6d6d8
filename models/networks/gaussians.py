"""Gaussians with independent dimensions, as encoders give them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def standard_normal(like: Tensor, rng: np.random.Generator | None = None) -> Tensor:
    """Standard normal noise of a tensor's shape, new at every call, or a generator's."""
    if rng is None:
        return torch.randn_like(like)
    # By numpy, since what torch draws depends on the tasks that are mapped together, and on the device.
    return torch.from_numpy(rng.standard_normal(like.shape)).to(like.device, like.dtype)


class Gaussian(NamedTuple):
    """Means and log-variances, (…, d) each."""

    mean: Tensor
    log_variance: Tensor

    @classmethod
    def of(cls, made: Tensor) -> Gaussian:
        """Of a network's outputs (…, 2 d), in single precision at least."""
        return cls(*made.to(torch.promote_types(made.dtype, torch.float32)).chunk(2, -1))

    def __getitem__(self, rows) -> Gaussian:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Those of some rows."""
        return Gaussian(self.mean[rows], self.log_variance[rows])

    def sample(self, noise: Tensor) -> Tensor:
        """What standard normal noise (…, d) becomes."""
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def kl(self, other: Gaussian | None = None) -> Tensor:
        """KL(self ‖ other), nats, summed over d; None is the standard normal distribution."""
        if other is None:
            return 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance).sum(-1)
        ratio = self.log_variance - other.log_variance
        distance = (self.mean - other.mean).square() * (-other.log_variance).exp()
        return 0.5 * (ratio.exp() + distance - 1 - ratio).sum(-1)

    def entropy(self) -> Tensor:
        """In nats, over d."""
        return 0.5 * (1 + math.log(2 * math.pi) + self.log_variance).sum(-1)
