"""What learners share that embed each input by itself and classify from the embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from datamodules.core.episodes import Episodes, Support, Task
from models.core.embedding_cache import EmbedOnce
from models.core.learner import MetaLearner
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNormMode, Statistics, normalize_by, statistics_of


class Embedded(NamedTuple):
    """A support set as queries are compared with it.

    Attributes:
        summary: what the learner makes of its embeddings; None where every query passes the network along with it.
        statistics: of batch norm, by the support set; None in the other modes.
        support: which every query passes the network along with; None in the other modes.
    """

    summary: Any
    statistics: Statistics | None = None
    support: Support | None = None


class EmbeddingLearner(MetaLearner):
    """Embeds each input by itself, sums the support set up and compares queries with the summary.

    An algorithm overrides ``summarize`` and ``compare``, each for ONE task. In training support and queries pass the
    network together and share batch statistics; in evaluation, with running statistics, no prediction depends on
    another query.

    Args:
        backbone: the embedding.
        chunk: tasks mapped over together; 1 keeps to the network's fused layers, which vmap does not use.
        batch_norm, **others: see MetaLearner.
    """

    tasks = frozenset({"classification"})

    def __init__(
        self, backbone: Backbone, batch_norm: BatchNormMode = "running", chunk: int | None = 1, **others: Any
    ) -> None:
        super().__init__(batch_norm=batch_norm, chunk=chunk, **others)
        self.backbone = backbone.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # twice as fast on a CPU
        self.embedded = EmbedOnce(self.embed)

    def embed(self, x: Tensor) -> Tensor:
        """Embeddings (N, features) of inputs (N, *input)."""
        return self.backbone(x)

    def embeddings(self, x: Tensor) -> Tensor:
        return self.embed(x)

    def summarize(self, z: Tensor, support: Support) -> Any:
        """What queries are compared with, from the support set and its embeddings (S, features)."""
        raise NotImplementedError

    def compare(self, summary: Any, z: Tensor) -> Tensor:
        """Logits (Q, ways) of queries, from their embeddings (Q, features)."""
        raise NotImplementedError

    def adapt(self, support: Support) -> Embedded:
        if self.batch_norm == "per_query":
            return Embedded(None, support=support)
        statistics = None
        if self.batch_norm == "support":
            statistics = statistics_of(lambda: self.together(support, support.x, 0))
        with normalize_by(statistics or self.statistics_source):
            return Embedded(self.summarize(self.embed(support.x), support), statistics)

    def predict(self, state: Embedded, query_x: Tensor) -> Tensor:
        if state.support is not None:
            joined = (torch.cat([state.support.x, x[None]]) for x in query_x)
            return torch.cat([self.together(state.support, x, 0)[-1:] for x in joined])
        with normalize_by(state.statistics or self.statistics_source):
            return self.compare(state.summary, self.embed(query_x))

    def together(self, support: Support, x: Tensor, first: int) -> Tensor:
        """Logits (N - first, ways) of the inputs (N, *input) from the first one on; those of the support set lead.

        They share a pass, and so batch statistics.
        """
        with normalize_by(self.statistics_source):
            z = self.embed(x)
            return self.compare(self.summarize(z[: len(support.y)], support), z[first:])

    def objective(self, task: Task) -> tuple[Any, ...]:
        if self.batch_norm == "support":
            return super().objective(task)
        support = task.support
        prediction = self.together(support, torch.cat([support.x, task.query_x]), len(support.y))
        return self.loss(prediction, task.query_y), prediction

    def predictions(self, batch: Episodes) -> Any:
        if self.batch_norm not in ("running", "none") or batch.support_rows is None or batch.query_rows is None:
            return super().predictions(batch)

        def compared(task: Task) -> Tensor:
            z = task.query_x
            return self.compare(self.summarize(z[:shots], task.support), z[shots:])

        # An embedding depends on its image alone, and tasks share images: 10,000 tasks embed each image once.
        with normalize_by(self.statistics_source):
            support_z = self.embedded(batch.support_x, batch.support_rows)
            query_z = self.embedded(batch.query_x, batch.query_rows)
            shots = support_z.shape[1]
            return self.map(compared, replace(batch, query_x=torch.cat([support_z, query_z], 1)))

    def on_validation_epoch_start(self) -> None:
        self.embedded = EmbedOnce(self.embed)

    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        self.embedded = EmbedOnce(self.embed)
