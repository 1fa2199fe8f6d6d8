"""The networks of the Neural Statistician: what its conditional distributions are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.batch_norm import BatchNorm
from models.networks.convolutional import ConvDecoder
from models.networks.gaussians import Gaussian, standard_normal


class Normalized(nn.Module):
    """A dense layer with batch norm, and ELU unless told otherwise."""

    def __init__(self, inputs: int, outputs: int, elu: bool = True) -> None:
        super().__init__()
        self.linear, self.norm, self.elu = nn.Linear(inputs, outputs), BatchNorm(outputs), elu

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.linear(x))
        return F.elu(x) if self.elu else x


class Residual(nn.Module):
    """So many dense layers with batch norm, ELU between them, and ELU of their sum with the input."""

    def __init__(self, size: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Normalized(size, size, elu=k < layers - 1) for k in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(self.layers(x) + x)


class GaussianLayer(nn.Module):
    """A dense layer to means and log-variances, all of which one batch norm normalises together: of one channel."""

    def __init__(self, inputs: int, latents: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, 2 * latents)
        self.norm = BatchNorm(1, momentum=1e-2, eps=1e-3)

    def forward(self, x: Tensor) -> Gaussian:
        return Gaussian.of(self.norm(self.linear(x)[:, None]).squeeze(1))


class ContextNetwork(nn.Module):
    """q(c | D), (sets, context), of the means of what is pooled, (sets, hidden)."""

    def __init__(self, hidden: int, latents: int) -> None:
        super().__init__()
        self.latents = latents
        self.layers = nn.Sequential(Normalized(hidden, hidden), Normalized(hidden, hidden))
        self.gaussian = GaussianLayer(hidden, latents)

    def forward(self, pooled: Tensor) -> Gaussian:
        return self.gaussian(self.layers(pooled))


class InferenceNetwork(nn.Module):
    """q(z | c, x), (N, latents), of features h(x) and contexts, (N, …) each."""

    def __init__(self, features: int, context: int, latents: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.of_h, self.of_c = nn.Linear(features, hidden), nn.Linear(context, hidden)
        self.residual, self.gaussian = Residual(hidden, layers), GaussianLayer(hidden, latents)

    def forward(self, h: Tensor, c: Tensor) -> Gaussian:
        return self.gaussian(self.residual(F.elu(self.of_h(h) + self.of_c(c))))


class LatentPrior(nn.Module):
    """p(z | c), (sets, latents), of contexts (sets, context)."""

    def __init__(self, context: int, latents: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.of_c = nn.Linear(context, hidden)
        self.residual, self.gaussian = Residual(hidden, layers), GaussianLayer(hidden, latents)

    def forward(self, c: Tensor) -> Gaussian:
        return self.gaussian(self.residual(F.elu(self.of_c(c))))


class BernoulliDecoder(nn.Module):
    """p(x | c, z) of images: a Bernoulli distribution for each pixel, whose grey value counts as its probability."""

    def __init__(
        self, shape: tuple[int, ...], context: int, latents: int, hidden: int, widths: Sequence[int], convs: int
    ) -> None:
        super().__init__()
        self.of_z, self.of_c = nn.Linear(latents, hidden), nn.Linear(context, hidden)
        self.images = ConvDecoder(hidden, shape, widths, convs)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """Logits (N, C, H, W)."""
        return self.images(F.elu(self.of_z(z) + self.of_c(c)))

    def example(self, z: Tensor, c: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """The mean of p(x | c, z), (N, C, H, W)."""
        return self(z, c).sigmoid()

    def log_likelihood(self, x: Tensor, z: Tensor, c: Tensor) -> Tensor:
        """log p(x | c, z), (N,), nats."""
        logits = self(z, c)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return -F.binary_cross_entropy_with_logits(logits, x.to(logits.dtype), reduction="none").flatten(1).sum(1)


class GaussianDecoder(nn.Module):
    """p(x | c, z) of vectors: a Gaussian with independent dimensions, log-variances between -4 and 3."""

    def __init__(self, outputs: int, context: int, latents: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.of_z, self.of_c = nn.Linear(latents, hidden), nn.Linear(context, hidden)
        self.residual, self.last = Residual(hidden, layers), nn.Linear(hidden, 2 * outputs)

    def forward(self, z: Tensor, c: Tensor) -> Gaussian:
        """Of (N, outputs)."""
        mean, log_variance = Gaussian.of(self.last(self.residual(F.elu(self.of_z(z) + self.of_c(c)))))
        return Gaussian(mean, log_variance.clamp(-4, 3))

    def example(self, z: Tensor, c: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """A sample of p(x | c, z), (N, outputs)."""
        p = self(z, c)
        return p.sample(standard_normal(p.mean, rng))

    def log_likelihood(self, x: Tensor, z: Tensor, c: Tensor) -> Tensor:
        """log p(x | c, z), (N,), nats."""
        mean, log_variance = self(z, c)
        away = (x.flatten(1) - mean).square() * (-log_variance).exp()
        return -0.5 * (math.log(2 * math.pi) + log_variance + away).sum(1)


def initialize(module: nn.Module) -> None:
    """Glorot and Bengio's normal distribution with ReLU's gain, as the reference code has it."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_normal_(module.weight, nn.init.calculate_gain("relu"))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
