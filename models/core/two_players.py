"""Two players, one step: losses that train one player and take the other for a constant."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad_and_value

from models.core.inner_loop import with_gradient
from models.networks.batch_norm import recording


def of_inputs_alone(loss: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """A loss of tensors that one player made, whose gradient reaches these alone, not what the loss is made of."""
    with torch.no_grad(), recording(None):
        gradients, value = grad_and_value(loss, tuple(range(len(inputs))))(*inputs)
    return with_gradient(value, torch.stack([(g * x).sum() for g, x in zip(gradients, inputs, strict=True)]).sum())
