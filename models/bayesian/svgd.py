"""Stein variational gradient descent: particles that come to represent a distribution (Liu and Wang, NeurIPS 2016)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.core.base_learner import Parameters
from models.networks.backbones import Backbone


def rbf_kernel(particles: Tensor) -> tuple[Tensor, Tensor]:
    """k(θ, θ') = exp(-‖θ - θ'‖² / h) between particles (M, D): the matrix (M, M), and h.

    h is the median of the squared distances over log M, taken as a constant: no gradient passes through it.
    """
    number = len(particles)
    centred = particles - particles.mean(0)
    inner = centred @ centred.T
    norms = inner.diagonal(dim1=0, dim2=1)
    squared = (norms[:, None] + norms - 2 * inner).clamp(min=0)
    if number == 1:
        return torch.exp(-squared), torch.ones_like(squared[0, 0])
    row, column = torch.triu_indices(number, number, 1, device=particles.device)
    bandwidth = squared[row, column].median().detach().clamp(min=1e-12) / math.log(number)
    return torch.exp(-squared / bandwidth), bandwidth


def svgd_direction(particles: Tensor, gradient: Tensor) -> Tensor:
    """Where to move each particle: φ(θ_m) = 1/M Σ_j [k(θ_j, θ_m) ∇log p(θ_j) + ∇_{θ_j} k(θ_j, θ_m)].

    Args:
        particles: (M, D).
        gradient: of the log-density at each of them, (M, D).

    Returns:
        (M, D), differentiable with respect to both.
    """
    kernel, bandwidth = rbf_kernel(particles)
    # Summed over j, the gradient of the kernel is 2/h (θ_m Σ_j k_jm - Σ_j k_jm θ_j); BMAML's code leaves out the 2.
    repulsion = (2 / bandwidth) * (kernel.sum(1, keepdim=True) * particles - kernel @ particles)
    return (kernel @ gradient + repulsion) / len(particles)


def flat(parameters: Parameters) -> Tensor:
    """Stacked parameters, (M, …) each, as rows (M, D)."""
    return torch.cat([p.reshape(len(p), -1) for p in parameters.values()], 1)


def unflat(rows: Tensor, like: Parameters) -> Parameters:
    """The inverse of ``flat`` for parameters of these names and shapes."""
    parts = rows.split([p[0].numel() for p in like.values()], 1)
    return {name: part.view(p.shape) for (name, p), part in zip(like.items(), parts, strict=True)}


def split_into_particles(module: nn.Module, particles: int) -> None:
    """Give every parameter and buffer of a module a leading (M,), in place; ``functional_call`` takes one particle's.

    Each particle starts from the elements of the initialisation in an order of its own: as good as a draw of its own
    where elements are drawn alike, whatever they are drawn from.
    """
    for layer in module.modules():
        for name, p in list(layer.named_parameters(recurse=False)):
            shuffled = [p.detach().flatten()[torch.randperm(p.numel())].view(p.shape) for _ in range(particles)]
            setattr(layer, name, nn.Parameter(torch.stack(shuffled), p.requires_grad))
        for name, b in list(layer.named_buffers(recurse=False)):
            setattr(layer, name, b.expand(particles, *b.shape).clone())
        if isinstance(layer, Backbone):
            layer.particles = particles
