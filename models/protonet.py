"""Prototypical networks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.episodes import Episodes, Support, Task
from models.backbones import Backbone
from models.base import MetaLearner, Paper
from models.functional import EmbedOnce, class_means
from models.normalization import BatchNormMode, Statistics, normalize_by, statistics_of


class Prototypes(NamedTuple):
    """Class means (ways, features) and what batch norm needs: the support's statistics, or the support set itself."""

    mean: Tensor
    statistics: Statistics | None = None
    support: Support | None = None


class ProtoNet(MetaLearner):
    """Classifies a query by the nearest prototype: the mean embedding of each class's support (eqs. 1 and 2).

    Training tasks have more ways than test tasks (60 on Omniglot), and batch norm uses running statistics in
    evaluation: a prediction depends on no other query.

    Args:
        backbone: the embedding.
        distance: "euclidean", squared, as published; or "cosine" similarity times ``scale``.
        scale: multiplies the similarities; None is 1 for Euclidean distance and a learned scale, from 10, for cosine.
        chunk: tasks mapped over together; 1 keeps to the network's fused layers, which vmap does not use.
        batch_norm, **others: see MetaLearner.
    """

    paper = Paper(
        "Snell, Swersky and Zemel",
        "Prototypical Networks for Few-shot Learning",
        "NeurIPS",
        2017,
        "https://arxiv.org/abs/1703.05175",
    )
    tasks = frozenset({"classification"})

    def __init__(
        self,
        backbone: Backbone,
        distance: Literal["euclidean", "cosine"] = "euclidean",
        scale: float | None = None,
        batch_norm: BatchNormMode = "running",
        chunk: int | None = 1,
        **others: Any,
    ) -> None:
        super().__init__(batch_norm=batch_norm, chunk=chunk, **others)
        self.backbone = backbone.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # twice as fast on a CPU
        self.embedded = EmbedOnce(self.embed)
        self.distance = distance
        learned = scale is None and distance == "cosine"
        self.scale = nn.Parameter(torch.tensor(10.0)) if learned else (1.0 if scale is None else scale)

    def embed(self, x: Tensor, statistics: Statistics | None = None) -> Tensor:
        """Embeddings (N, out_features); unit length for cosine similarity."""
        with normalize_by(statistics or self.statistics_source):
            z = self.backbone(x)
        return F.normalize(z, dim=-1) if self.distance == "cosine" else z

    def similarity(self, z: Tensor, prototypes: Tensor) -> Tensor:
        """Logits (Q, ways) of embeddings (Q, features)."""
        if self.distance == "cosine":
            return self.scale * (z @ F.normalize(prototypes, dim=-1).T)
        return -self.scale * (z[:, None] - prototypes).square().sum(-1)

    def adapt(self, support: Support) -> Prototypes:
        statistics = statistics_of(lambda: self.backbone(support.x)) if self.batch_norm == "support" else None
        mean = class_means(self.embed(support.x, statistics), support)
        return Prototypes(mean, statistics, support if self.batch_norm == "per_query" else None)

    def predict(self, state: Prototypes, query_x: Tensor) -> Tensor:
        if state.support is None:
            return self.similarity(self.embed(query_x, state.statistics), state.mean)
        return torch.cat([self.together(state.support, x[None]) for x in query_x])

    def together(self, support: Support, query_x: Tensor) -> Tensor:
        """Logits (Q, ways) where support and queries share a pass, and so batch statistics."""
        z = self.embed(torch.cat([support.x, query_x]))
        shots = len(support.y)
        return self.similarity(z[shots:], class_means(z[:shots], support))

    def predictions(self, batch: Episodes) -> Any:
        if self.batch_norm not in ("running", "none") or batch.support_rows is None or batch.query_rows is None:
            return super().predictions(batch)
        # An embedding depends on its image alone, and tasks share images: 10,000 tasks embed each image once.
        support_x = self.embedded(batch.support_x, batch.support_rows)
        query_x = self.embedded(batch.query_x, batch.query_rows)
        embedded = replace(batch, support_x=support_x, query_x=query_x)
        return self.map(lambda t: self.similarity(t.query_x, class_means(t.support.x, t.support)), embedded)

    def on_validation_epoch_start(self) -> None:
        self.embedded = EmbedOnce(self.embed)

    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        self.embedded = EmbedOnce(self.embed)

    def objective(self, task: Task) -> tuple[Any, ...]:
        if self.batch_norm == "support":
            return super().objective(task)
        prediction = self.together(task.support, task.query_x)  # as the reference code
        return self.loss(prediction, task.query_y), prediction
