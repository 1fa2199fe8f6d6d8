"""Soft clusters of tasks: one level of a learned hierarchy."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ClusterLevel(nn.Module):
    """One level of the hierarchy: from what its lower nodes hold to what its clusters hold (eqs. 4 and 5).

    Args:
        clusters: K, of this level.
        size: of what a node holds.
        deviation: σ of the soft assignment.
    """

    def __init__(self, clusters: int, size: int, deviation: float) -> None:
        super().__init__()
        self.centres = nn.Parameter(nn.init.xavier_uniform_(torch.empty(clusters, size)))
        self.weight = nn.Parameter(
            torch.stack([nn.init.xavier_uniform_(torch.empty(size, size)) for _ in range(clusters)])
        )
        self.bias = nn.Parameter(torch.zeros(clusters, size))
        self.deviation = deviation

    def scores(self, nodes: Tensor) -> Tensor:
        """Logits (N, K) of how far each node (N, size) belongs to each cluster."""
        return -(nodes[:, None] - self.centres).square().sum(-1) / (2 * self.deviation**2)

    def assignment(self, nodes: Tensor, active: Tensor | None = None) -> Tensor:
        """How far each node (N, size) belongs to each cluster, (N, K), in all 1; nothing to those not ``active``."""
        return _of_active(self.scores(nodes), active).softmax(-1)

    def forward(self, nodes: Tensor, assignment: Tensor) -> Tensor:
        """What the clusters hold, (K, size)."""
        held = torch.tanh((self.weight @ nodes.T).permute(2, 0, 1) + self.bias)  # (N, K, size)
        return (assignment[..., None] * held).sum(0)


class FunctionLevel(ClusterLevel):
    """A first level that reads a task's examples itself: its clusters are Gaussians over functions.

    Examples are y = φ(x)·g + noise, and the tasks of cluster k have codes g from N(c_k, R_k R_kᵀ). So clusters may
    have one centre and differ in the directions that they are wide in, as families of functions do: the mean line is
    the mean cubic. A task belongs to a cluster by its posterior probability, which knows how well so few examples tell
    the code.

    Args:
        clusters: K.
        size: of a code, and of φ(x).
        noise: initial standard deviation of an example's noise, in units of y.
    """

    FLOOR = 0.02  # of the noise: less leaves covariances that single precision cannot factor

    def __init__(self, clusters: int, size: int, noise: float = 0.3) -> None:
        super().__init__(clusters, size, deviation=1.0)
        self.root = nn.Parameter(torch.eye(size) + 0.3 * torch.randn(clusters, size, size))
        self.share = nn.Parameter(torch.zeros(clusters))
        self.log_noise = nn.Parameter(torch.tensor(math.log(noise)))

    def read(self, features: Tensor, y: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The task's mean code (size,), negative log evidence per example, nats, and assignment (1, K).

        Args:
            features: φ(x), (n, size).
            y: (n, 1).
            active: clusters in use.
        """
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(y.dtype)
            wide = features @ self.root  # (K, n, size)
            noise = self.log_noise.exp() + self.FLOOR
            covariance = wide @ wide.mT + noise.square() * torch.eye(len(y), dtype=y.dtype, device=y.device)
            factor, _ = torch.linalg.cholesky_ex(covariance)
            away = y.T - self.centres @ features.T  # (K, n)
            white = torch.linalg.solve_triangular(factor, away[..., None], upper=False)
            fit = white.square().sum((-1, -2)) / 2 + factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            score = _of_active(self.share, active).log_softmax(-1) - fit - len(y) * math.log(2 * math.pi) / 2
            assignment = score.softmax(-1)
            weighed = torch.linalg.solve_triangular(factor.mT, white, upper=True)
            codes = self.centres + (self.root @ (wide.mT @ weighed))[..., 0]
            return assignment @ codes, -score.logsumexp(-1) / len(y), assignment[None]


def _of_active(scores: Tensor, active: Tensor | None) -> Tensor:
    """Logits (…, K) that leave nothing to clusters not yet in use."""
    if active is None:
        return scores
    return torch.where(torch.arange(scores.shape[-1], device=scores.device) < active, scores, -torch.inf)
