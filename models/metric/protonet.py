"""Prototypical networks."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.core.episodes import Support
from models.core.embedding_learner import EmbeddingLearner
from models.core.inner_loop import class_means
from models.core.learner import Paper
from models.networks.backbones import Backbone


class ProtoNet(EmbeddingLearner):
    """Classifies a query by the nearest prototype: the mean embedding of each class's support (eqs. 1 and 2).

    Training tasks have more ways than test tasks (60 on Omniglot), and batch norm uses running statistics in
    evaluation: a prediction depends on no other query.

    Args:
        backbone: the embedding.
        distance: "euclidean", squared, as published; or "cosine" similarity times ``scale``.
        scale: multiplies the similarities; None is 1 for Euclidean distance and a learned scale, from 10, for cosine.
        **others: see EmbeddingLearner.
    """

    paper = Paper(
        "Snell, Swersky and Zemel",
        "Prototypical Networks for Few-shot Learning",
        "NeurIPS",
        2017,
        "https://arxiv.org/abs/1703.05175",
    )

    def __init__(
        self,
        backbone: Backbone,
        distance: Literal["euclidean", "cosine"] = "euclidean",
        scale: float | None = None,
        **others: Any,
    ) -> None:
        super().__init__(backbone, **others)
        self.distance = distance
        learned = scale is None and distance == "cosine"
        self.scale = nn.Parameter(torch.tensor(10.0)) if learned else (1.0 if scale is None else scale)

    def embed(self, x: Tensor) -> Tensor:
        z = super().embed(x)
        return F.normalize(z, dim=-1) if self.distance == "cosine" else z

    def summarize(self, z: Tensor, support: Support) -> Tensor:
        """Prototypes (ways, features); shots may differ by class."""
        return class_means(z, support)

    def compare(self, summary: Tensor, z: Tensor) -> Tensor:
        if self.distance == "cosine":
            return self.scale * (z @ F.normalize(summary, dim=-1).T)
        return -self.scale * (z[:, None] - summary).square().sum(-1)
