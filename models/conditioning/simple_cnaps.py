"""Simple CNAPs: classes as Gaussians of their own covariance, in features that may be conditioned on the task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from datamodules.core.episodes import Support
from models.conditioning.adaptive import AdaptiveLearner
from models.core.inner_loop import class_means
from models.core.learner import Paper
from models.networks.backbones import Backbone


def covariance(z: Tensor, shares: Tensor) -> Tensor:
    """Σ s (z - μ)(z - μ)ᵀ / (Σ s - 1), μ their weighted mean, of rows z (N, d); 0 where the shares s (N,) sum to 1."""
    total = shares.sum()
    centred = z - (shares @ z) / total
    return (shares[:, None] * centred).T @ centred / (total - 1).clamp(min=1)


class SimpleCNAPs(AdaptiveLearner):
    """Scores class k by -½ (z - μ_k)ᵀ Q_k⁻¹ (z - μ_k), Q_k = λ_k Σ_k + (1 - λ_k) Σ + β I, λ_k = n_k / (n_k + 1).

    Σ_k is the covariance of the class's n_k support embeddings, Σ that of all, both unbiased (eqs. 2 and 3). Beside the
    features nothing is learned: ``conditioned: false`` on a frozen backbone is a baseline without training, to be
    evaluated as it is.

    Args:
        regularization: β.
        backbone, conditioned, code, penalty, **others: see AdaptiveLearner.
    """

    paper = Paper(
        "Bateni, Goyal, Masrani, Wood and Sigal",
        "Improved Few-Shot Visual Classification",
        "CVPR",
        2020,
        "https://arxiv.org/abs/1912.03432",
    )

    def __init__(
        self,
        backbone: Backbone,
        conditioned: bool = True,
        code: int = 64,
        penalty: float = 0.001,
        regularization: float = 1.0,
        **others: Any,
    ) -> None:
        super().__init__(backbone, conditioned, code, penalty, **others)
        if not regularization > 0:
            raise ValueError(f"regularization is {regularization} but must be above 0")
        self.regularization = regularization

    def covariances(self, z: Tensor, support: Support) -> Tensor:
        """Q of every class, (ways, d, d)."""
        members = support.members().to(z.dtype)
        of_task = covariance(z, torch.ones_like(members[:, 0]))
        of_classes = torch.stack([covariance(z, one) for one in members.unbind(1)])
        counts = members.sum(0)
        own = (counts / (counts + 1))[:, None, None]
        return own * of_classes + (1 - own) * of_task + self.regularization * torch.eye(z.shape[1]).to(z)

    def summarize(self, z: Tensor, support: Support) -> tuple[Tensor, Tensor]:
        """Means (ways, d), and the Cholesky factors of their Q (ways, d, d)."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            return class_means(z, support), torch.linalg.cholesky(self.covariances(z, support))

    def compare(self, summary: tuple[Tensor, Tensor], z: Tensor) -> Tensor:
        means, factors = summary
        with torch.autocast(z.device.type, enabled=False):
            apart = (z.to(means.dtype) - means[:, None]).mT  # (ways, d, Q)
            return -torch.linalg.solve_triangular(factors, apart, upper=False).square().sum(1).T / 2
