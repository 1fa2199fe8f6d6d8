"""Soft clusters of tasks: one level of a learned hierarchy."""

from __future__ import annotations

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

    def assignment(self, nodes: Tensor, active: Tensor | None = None) -> Tensor:
        """How far each node (N, size) belongs to each cluster, (N, K), in all 1; nothing to those not ``active``."""
        distance = (nodes[:, None] - self.centres).square().sum(-1)
        score = -distance / (2 * self.deviation**2)
        if active is not None:
            score = torch.where(torch.arange(len(self.centres), device=score.device) < active, score, -torch.inf)
        return score.softmax(-1)

    def forward(self, nodes: Tensor, active: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the clusters hold, (K, size), and the assignment (N, K)."""
        assignment = self.assignment(nodes, active)
        held = torch.tanh((self.weight @ nodes.T).permute(2, 0, 1) + self.bias)  # (N, K, size)
        return (assignment[..., None] * held).sum(0), assignment
