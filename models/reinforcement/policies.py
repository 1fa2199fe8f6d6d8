"""What policies share: distributions over actions, advantages, the clipped objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.reinforcement.environments import normal


class Categorical(NamedTuple):
    """Over discrete actions, by logits (…, actions)."""

    logits: Tensor

    def sample(self, draws: Tensor) -> Tensor:
        """Actions (…,) int64 from uniform numbers (…, 1) in [0, 1)."""
        cumulated = self.logits.double().softmax(-1).cumsum(-1)
        return (draws >= cumulated / cumulated[..., -1:]).sum(-1)

    def mode(self) -> Tensor:
        return self.logits.argmax(-1)

    def log_prob(self, action: Tensor) -> Tensor:
        return self.logits.log_softmax(-1).gather(-1, action[..., None]).squeeze(-1)

    def entropy(self) -> Tensor:
        log_p = self.logits.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    def kl(self, other: Categorical) -> Tensor:
        """KL(self ‖ other), (…,)."""
        log_p = self.logits.log_softmax(-1)
        return (log_p.exp() * (log_p - other.logits.log_softmax(-1))).sum(-1)


class Gaussian(NamedTuple):
    """Over continuous actions, independent in each number: mean and logarithm of the deviation, (…, actions)."""

    mean: Tensor
    log_deviation: Tensor

    def sample(self, draws: Tensor) -> Tensor:
        """Actions (…, actions) from uniform numbers (…, actions) in [0, 1)."""
        return self.mean + self.log_deviation.exp() * normal(draws).to(self.mean.dtype)

    def mode(self) -> Tensor:
        return self.mean

    def log_prob(self, action: Tensor) -> Tensor:
        z = (action - self.mean) * (-self.log_deviation).exp()
        return (-0.5 * z.square() - self.log_deviation - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        return (self.log_deviation + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def kl(self, other: Gaussian) -> Tensor:
        """KL(self ‖ other), (…,)."""
        ratio = (2 * (self.log_deviation - other.log_deviation)).exp()
        apart = ((self.mean - other.mean) * (-other.log_deviation).exp()).square()
        return (0.5 * (ratio + apart - 1) + other.log_deviation - self.log_deviation).sum(-1)


Actions = Categorical | Gaussian


def single(x: Tensor) -> Tensor:
    """At least in single precision, whatever autocast made of it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def draws_per_action(actions: int, discrete: bool) -> int:
    """Uniform numbers that ``sample`` takes."""
    return 1 if discrete else actions


class ActionHead(nn.Module):
    """The distribution over actions from features: linear, and for continuous ones one deviation for all states.

    Args:
        features: size of the input.
        actions, discrete: see Environment.
        deviation: of continuous actions, to start from.
    """

    def __init__(self, features: int, actions: int, discrete: bool, deviation: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(features, actions)
        with torch.no_grad():  # at first all actions alike
            self.linear.weight.mul_(0.01)
            self.linear.bias.zero_()
        self.log_deviation = None if discrete else nn.Parameter(torch.full((actions,), math.log(deviation)))

    def forward(self, features: Tensor) -> Actions:
        output = single(self.linear(features))
        if self.log_deviation is None:
            return Categorical(output)
        return Gaussian(output, self.log_deviation.to(output).expand_as(output))


def encode(action: Tensor, actions: int, discrete: bool) -> Tensor:
    """Actions as a network takes them, (…, actions): one-hot where they are discrete."""
    return F.one_hot(action, actions).float() if discrete else action


def mean_where(values: Tensor, counts: Tensor, dims: tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    """Mean over dimensions of those values that ``counts``, of the same shape, has 1 for and not 0; None for all."""
    dims = tuple(range(values.dim())) if dims is None else dims
    # Divided twice, so that where all count nothing is rounded.
    return (values * counts).mean(dims, keepdim=keepdim) / counts.mean(dims, keepdim=keepdim)


def generalized_advantages(rewards: Tensor, values: Tensor, discount: float, decay: float) -> Tensor:
    """Generalised advantage estimates (Schulman et al., ICLR 2016, eq. 16), (steps, N); nothing follows the last step.

    Args:
        rewards: (steps, N).
        values: of the states that they were got in, (steps, N).
        discount: γ.
        decay: λ; 1 gives the discounted return less the value.
    """
    advantages, following = torch.empty_like(values), torch.zeros_like(values[0])
    next_value = torch.zeros_like(values[0])
    for t in reversed(range(len(rewards))):
        following = rewards[t] + discount * next_value - values[t] + discount * decay * following
        advantages[t], next_value = following, values[t]
    return advantages


def normalized_advantages(advantages: Tensor, counts: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """With mean 0 over the trials of all processes at each step, and deviation 1 over all steps that count.

    What a value network that cannot tell the steps apart yet gets wrong is common to all trials of a step.

    Args:
        advantages: (steps, N).
        counts: likewise, 1 for those that do and 0 for others.
        total: sum over all processes.
    """
    count = total(counts.sum(1, keepdim=True))
    centred = advantages - total((advantages * counts).sum(1, keepdim=True)) / count.clamp(min=1)
    deviation = (total((centred.square() * counts).sum()) / count.sum()).sqrt()
    return centred / (deviation + 1e-8)


def clipped_objective(log_ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """What proximal policy optimisation maximises (Schulman et al., 2017, eq. 7), of each action: the shape given."""
    ratio = log_ratio.exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
