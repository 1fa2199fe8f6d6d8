"""Layers with a Gaussian over every weight, N(weight, exp(weight_rho)²), and what is computed from such Gaussians."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RHO = "_rho"
Module = TypeVar("Module", bound=nn.Module)
"""What the name of a mean is followed by in the name of its log standard deviation."""

TINY = 1e-20  # added to a variance, whose root has no slope at 0


class BayesianLinear(nn.Module):
    """A linear layer that in training draws its outputs, by local reparametrisation (Kingma et al., NeurIPS 2015).

    Every example gets weights of its own: its outputs are independent Gaussians, N(x·μ, x²·σ²). In evaluation
    ``weight`` and ``bias`` are used as they are: who evaluates puts there what was drawn.

    Args:
        layer: whose parameters become the means.
        deviation: σ that every weight and bias starts from.
    """

    def __init__(self, layer: nn.Linear, deviation: float) -> None:
        super().__init__()
        self.weight, self.weight_rho = layer.weight, _log_deviation(layer.weight, deviation)
        self.bias = layer.bias
        self.bias_rho = None if layer.bias is None else _log_deviation(layer.bias, deviation)

    def forward(self, x: Tensor) -> Tensor:
        mean = F.linear(x, self.weight, self.bias)
        if not self.training:
            return mean
        of_bias = None if self.bias_rho is None else (2 * self.bias_rho).exp()
        variance = F.linear(x.square(), (2 * self.weight_rho).exp(), of_bias)
        return mean + (variance + TINY).sqrt() * torch.randn_like(mean)


class BayesianConv2d(nn.Module):
    """A convolution that in training draws its weights, by Flipout (Wen et al., ICLR 2018).

    One perturbation of the weights is drawn for the whole batch; random signs of each example's input and output
    channels make it another one for each example, uncorrelated with the others'. Every example draws its own bias. In
    evaluation ``weight`` and ``bias`` are used as they are.

    Args:
        layer: whose parameters become the means.
        deviation: σ that every weight and bias starts from.
    """

    def __init__(self, layer: nn.Conv2d, deviation: float) -> None:
        super().__init__()
        if layer.padding_mode != "zeros":
            raise ValueError(f"convolutions pad with zeros here, not by padding_mode {layer.padding_mode!r}")
        self.weight, self.weight_rho = layer.weight, _log_deviation(layer.weight, deviation)
        self.bias = layer.bias
        self.bias_rho = None if layer.bias is None else _log_deviation(layer.bias, deviation)
        self.settings = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}

    def forward(self, x: Tensor) -> Tensor:
        mean = F.conv2d(x, self.weight, self.bias, **self.settings)
        if not self.training:
            return mean
        perturbation = self.weight_rho.exp() * torch.randn_like(self.weight)
        flipped = F.conv2d(x * _noise(x).sign(), perturbation, **self.settings)
        y = mean + flipped * _noise(mean).sign()
        return y if self.bias_rho is None else y + _noise(mean) * self.bias_rho.exp()[:, None, None]


def make_bayesian(module: Module, deviation: float) -> Module:
    """Swap every ``nn.Linear`` and ``nn.Conv2d`` inside for its Bayesian kind, in place; all else keeps its values."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, BayesianLinear(child, deviation))
        elif isinstance(child, nn.Conv2d):
            setattr(module, name, BayesianConv2d(child, deviation))
        else:
            make_bayesian(child, deviation)
    return module


def kl_divergence(q: dict[str, Tensor], p: dict[str, Tensor]) -> Tensor:
    """KL(q‖p) of two Gaussians over all weights, nats; parameters without a deviation do not count."""
    total = next(iter(q.values())).new_zeros(())
    for name, mean in q.items():
        if (rho := name + RHO) in q:
            wider, moved = q[rho] - p[rho], (mean - p[name]) * (-p[rho]).exp()
            total = total + ((2 * wider).exp().sum() + moved.square().sum() - mean.numel()) / 2 - wider.sum()
    return total


def log_hyperprior(prior: dict[str, Tensor], shape: float, rate: float) -> Tensor:
    """log p(θ) of means μ ~ N(0, 1) and precisions 1/σ² ~ Gamma(shape, rate) of all weights, nats."""
    total = next(iter(prior.values())).new_zeros(())
    of_gamma = shape * math.log(rate) - math.lgamma(shape)
    for name, mean in prior.items():
        if (rho := name + RHO) in prior:
            log_precision = -2 * prior[rho]
            total = total - (mean.square() + math.log(2 * math.pi)).sum() / 2
            total = total + ((shape - 1) * log_precision - rate * log_precision.exp() + of_gamma).sum()
    return total


def draw(q: dict[str, Tensor], generator: torch.Generator, head: Collection[str]) -> dict[str, Tensor]:
    """Weights from a Gaussian, under the names of their means; parameters without a deviation as they are.

    Args:
        q: means and log deviations.
        generator: of the noise.
        head: names of what has a row for each class, the matrix first.
    """
    # The noise of a class goes by its row, not by its number: names of classes must not matter.
    rank = q[next(iter(head))].detach().sum(1).argsort().argsort()
    drawn = {}
    for name, mean in q.items():
        if name.endswith(RHO):
            continue
        drawn[name] = mean
        if (rho := name + RHO) in q:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            drawn[name] = mean + q[rho].exp() * (noise[rank] if name in head else noise)
    return drawn


def _log_deviation(mean: Tensor, deviation: float) -> nn.Parameter:
    return nn.Parameter(torch.full_like(mean, math.log(deviation)))


def _noise(x: Tensor) -> Tensor:
    """A standard normal for every example and channel, (N, C, 1, 1)."""
    return torch.randn_like(x[..., :1, :1])
