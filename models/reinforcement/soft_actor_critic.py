"""The networks of soft actor-critic: a policy of squashed Gaussians, two critics, a value."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.reinforcement.environments import normal
from models.reinforcement.policies import single

LOG_DEVIATIONS = (-20.0, 2.0)
LAST = 3e-3  # weights of a last layer start within ± this, so that values and actions start near 0


class TanhGaussian(NamedTuple):
    """Over actions in (-1, 1): tanh of independent Gaussians, by their mean and log deviation, (…, actions)."""

    mean: Tensor
    log_deviation: Tensor

    def sample(self, draws: Tensor) -> Tensor:
        """Actions (…, actions) from uniform numbers (…, actions) in [0, 1)."""
        return self.sample_with_log_prob(draws)[0]

    def sample_with_log_prob(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """The same, differentiable, and the logarithm of their density, (…,)."""
        noise = normal(draws).to(self.mean)
        u = self.mean + self.log_deviation.exp() * noise
        gaussian = -0.5 * noise.square() - self.log_deviation - 0.5 * math.log(2 * math.pi)
        # log(1 - tanh² u), which loses all its digits where tanh is near 1.
        slope = 2 * (math.log(2) - u - F.softplus(-2 * u))
        return u.tanh(), (gaussian - slope).sum(-1)

    def mode(self) -> Tensor:
        """Of the Gaussian, (…, actions)."""
        return self.mean.tanh()


def network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Three hidden layers with ReLU."""
    last = nn.Linear(hidden, outputs)
    nn.init.uniform_(last.weight, -LAST, LAST)
    nn.init.zeros_(last.bias)
    layers = [m for size in (inputs, hidden, hidden) for m in (nn.Linear(size, hidden), nn.ReLU())]
    return nn.Sequential(*layers, last)


class Policy(nn.Module):
    """The distribution over actions from inputs (…, inputs)."""

    def __init__(self, inputs: int, hidden: int, actions: int) -> None:
        super().__init__()
        self.network = network(inputs, hidden, 2 * actions)

    def forward(self, inputs: Tensor) -> TanhGaussian:
        mean, log_deviation = single(self.network(inputs)).chunk(2, -1)
        return TanhGaussian(mean, log_deviation.clamp(*LOG_DEVIATIONS))


class Critics(nn.Module):
    """Two networks of the same shape, computed together: the value of an action, twice."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        both = [[m for m in network(inputs, hidden, 1) if isinstance(m, nn.Linear)] for _ in range(2)]
        layers = list(zip(*both, strict=True))
        self.weights = nn.ParameterList(torch.stack([m.weight.detach().T for m in layer]) for layer in layers)
        self.biases = nn.ParameterList(torch.stack([m.bias.detach()[None] for m in layer]) for layer in layers)

    def forward(self, inputs: Tensor, constant: bool = False) -> Tensor:
        """(2, …) from inputs (…, inputs); a ``constant`` has a gradient by its inputs alone."""
        x = inputs.flatten(0, -2).expand(2, -1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(*((bias.detach(), x, weight.detach()) if constant else (bias, x, weight)))
            x = F.relu(x) if i < len(self.weights) - 1 else x
        return single(x).view(2, *inputs.shape[:-1])


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, rate: float) -> None:
    """Move a target network's parameters towards another's by a fraction of the way (Polyak averaging)."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rate)
