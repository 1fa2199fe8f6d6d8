"""Distances between tasks of which the diagonal Fisher information of one network is known (Achille et al., 2019)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-8
Distance = Literal["cosine", "kl", "jsd", "entropy"]


def scaled(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Each as a share of both, element by element: what counts is not how much weights matter but to whom more."""
    both = a + b + EPSILON
    return a / both, b / both


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The paper's symmetric distance: one minus the cosine of a / (a + b) and b / (a + b).

    Embeddings (…, d) to (…,); as all of these.
    """
    return 1 - F.cosine_similarity(*scaled(a, b), dim=-1, eps=EPSILON)


def kl(a: Tensor, b: Tensor) -> Tensor:
    """Of Gaussians whose precisions they are: the larger of KL(a ‖ b) and KL(b ‖ a) in each dimension, summed."""
    ratio = (a + EPSILON) / (b + EPSILON)
    return torch.maximum(_kl_of_precisions(ratio), _kl_of_precisions(1 / ratio)).sum(-1)


def jsd(a: Tensor, b: Tensor) -> Tensor:
    """Of the same Gaussians, the mean KL to the Gaussian of their mean variance, averaged over dimensions."""
    precision_a, precision_b = a + EPSILON, b + EPSILON
    between = 2 / (1 / precision_a + 1 / precision_b)
    parts = _kl_of_precisions(between / precision_a) + _kl_of_precisions(between / precision_b)
    return (parts / 2).mean(-1)


def entropy(a: Tensor, b: Tensor) -> Tensor:
    """log 2 less the mean entropy, nats, of whom a weight is for: of a / (a + b)."""
    share, _ = scaled(a, b)
    return torch.tensor(2.0).log().to(share) - (torch.special.entr(share) + torch.special.entr(1 - share)).mean(-1)


def _kl_of_precisions(ratio: Tensor) -> Tensor:
    """KL of N(0, 1 / p) from N(0, 1 / q) where q / p is the ratio."""
    return (ratio - 1 - ratio.log()) / 2


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": cosine, "kl": kl, "jsd": jsd, "entropy": entropy}


def trivial(like: Tensor, precision: float) -> Tensor:
    """The embedding of the task that any network solves: no weight matters beyond a prior of this precision."""
    return torch.full_like(like, precision)


def asymmetric(
    a: Tensor,
    b: Tensor,
    nothing: Tensor,
    weight: float = 0.15,
    distance: Callable[[Tensor, Tensor], Tensor] = cosine,
) -> Tensor:
    """How little a model of task a is for task b: d(a, b) - weight · d(a, trivial task); a complex task a is for more.

    Args:
        a, b: embeddings (…, d).
        nothing: that of the trivial task, see ``trivial``.
        weight: α; 0.15 with the paper's probe.
        distance: d.
    """
    return distance(a, b) - weight * distance(a, nothing)


def pairwise(distance: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Distances (A, B) of embeddings (A, d) and (B, d); a row at a time, which memory holds."""
    return torch.stack([distance(one, b) for one in a])
