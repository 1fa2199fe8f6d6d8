"""Feature-wise modulation: scales and shifts of channels that another network gives for each task."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FiLM(nn.Module):
    """γ x + β, a scale and a shift for each channel (Perez et al., AAAI 2018, eq. 2); nothing until ``activate``.

    γ and β are buffers named ``scale`` and ``shift``, (channels,) each, 1 and 0: a task's own take their places by
    ``functional_call``, like any parameter of the network. They are in no checkpoint.

    Args:
        channels: C of inputs (N, C) or (N, C, H, W).
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.active = channels, False

    def activate(self) -> None:
        """Give it the buffers, from which on it takes part."""
        self.active = True
        self.register_buffer("scale", torch.ones(self.channels), persistent=False)
        self.register_buffer("shift", torch.zeros(self.channels), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return x
        shape = (-1,) + (1,) * (x.dim() - 2)
        return torch.addcmul(self.shift.view(shape), x, self.scale.view(shape))


def activated(module: nn.Module) -> dict[str, int]:
    """The channels of all places where a network can be modulated, by name; from here on they take part.

    Raises:
        ValueError: there are none.
    """
    points = modulation_points(module)
    if not points:
        raise ValueError(
            f"{type(module).__name__} has no place where a task can modulate it: choose Conv4, ResNet or MLP"
        )
    for point in points.values():
        point.activate()
    return {name: point.channels for name, point in points.items()}


def modulation_points(module: nn.Module) -> dict[str, FiLM]:
    """The places in a network where its channels can be modulated, by name, from the input to the output."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, FiLM)}
