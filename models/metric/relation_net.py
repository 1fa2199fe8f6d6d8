"""Relation networks."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.core.episodes import Episodes, Support
from datamodules.core.errors import at_least
from models.core.embedding_learner import EmbeddingLearner
from models.core.learner import Paper
from models.core.predictions import Prediction
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNorm


class RelationModule(nn.Module):
    """g_φ: how much a query's feature maps belong to a class's, before the sigmoid.

    Two blocks of 3×3 convolution, batch norm, ReLU and 2×2 max pooling on the two stacked, then two linear layers.

    Args:
        maps: (channels, height, width) of what is compared.
        filters: of both blocks.
        hidden: units between the linear layers.
        padding: of the convolutions.
    """

    def __init__(self, maps: tuple[int, int, int], filters: int, hidden: int, padding: int) -> None:
        super().__init__()
        channels, side, _ = maps
        self.maps = maps
        for _ in range(2):
            side = (side + 2 * padding - 2) // 2
        if side < 1:
            raise ValueError(f"nothing is left of maps of {maps[1]}×{maps[2]} after two poolings: pad, or halve less")
        self.convs = nn.ModuleList(nn.Conv2d(c, filters, 3, padding=padding) for c in (2 * channels, filters))
        self.norms = nn.ModuleList(BatchNorm(filters) for _ in range(2))
        self.linear = nn.Sequential(nn.Linear(filters * side**2, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        for conv in self.convs:
            nn.init.xavier_uniform_(cast(Tensor, conv.weight))

    def forward(self, classes: Tensor, queries: Tensor) -> Tensor:
        """Scores (Q, K) of the maps of K classes and Q queries, flattened, each with each."""
        first, second = cast(list[nn.Conv2d], self.convs)
        # Where tasks are mapped over, autocast rounds products of matrices but passes convolutions by.
        of_classes, of_queries = (z.unflatten(-1, self.maps).to(first.weight.dtype) for z in (classes, queries))
        # A convolution of two stacked maps is the sum of one of each: no need to repeat it for every pair.
        for_classes, for_queries = first.weight.split(self.maps[0], 1)
        of_classes = F.conv2d(of_classes, for_classes, first.bias, padding=first.padding)
        of_queries = F.conv2d(of_queries, for_queries, padding=first.padding)
        x = (of_queries[:, None] + of_classes).flatten(0, 1)
        x = F.relu(F.max_pool2d(self.norms[0](x), 2))
        x = F.relu(F.max_pool2d(self.norms[1](second(x)), 2))
        return self.linear(x.flatten(1)).view(len(queries), len(classes))


class RelationNet(EmbeddingLearner):
    """Learns the metric too: a network scores how much a query and a class belong together (eq. 1).

    A class is the sum of its support's feature maps, as of so many shots as in meta-training. Scores are between 0 and
    1 and regress on whether the class is the query's own (eq. 2); over classes, they are taken for shares of the
    probability.

    Args:
        backbone: the embedding, whose features are maps: ``Conv4`` with "pool" and, as published, two ``halvings``
            and two blocks ``unpadded``.
        criterion: "mse" of scores, as published; or "cross_entropy" of what the sigmoid would take.
        filters: of the relation module's convolutions.
        hidden: units of its first linear layer.
        padding: of its convolutions: with 1 its features are 64 for Omniglot, with 0 they are 576 for 84×84 pixels, as
            published.
        **others: see EmbeddingLearner.
    """

    paper = Paper(
        "Sung, Yang, Zhang, Xiang, Torr and Hospedales",
        "Learning to Compare: Relation Network for Few-Shot Learning",
        "CVPR",
        2018,
        "https://arxiv.org/abs/1711.06025",
    )

    shots: Tensor
    batches: Tensor

    def __init__(
        self,
        backbone: Backbone,
        criterion: Literal["mse", "cross_entropy"] = "mse",
        filters: int = 64,
        hidden: int = 8,
        padding: int = 1,
        **others: Any,
    ) -> None:
        super().__init__(backbone, **others)
        at_least(1, filters=filters, hidden=hidden)
        at_least(0, padding=padding)
        if backbone.maps is None:
            raise ValueError("relations are between feature maps, which this backbone averages: downsample by pool")
        self.criterion = criterion
        self.relation = RelationModule(backbone.maps, filters, hidden, padding)
        # The mean of the shots in meta-training, and over how many meta-batches.
        self.register_buffer("shots", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def on_train_batch_start(self, batch: Episodes, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.batches += 1
        self.shots += (batch.support_y.shape[1] / batch.ways - self.shots) / self.batches

    def summarize(self, z: Tensor, support: Support) -> Tensor:
        """The sum of the maps of each class's support, (ways, features).

        Of another number of shots than in meta-training, or of another for each class, it is what as many as there
        would have: their mean times those. A sum of more is nothing that the relation module has ever seen.
        """
        members = support.members().to(z.dtype)
        if self.training:
            return members.T @ z
        return self.shots.clamp(min=1).to(z.dtype) * (members.T @ z) / members.sum(0)[:, None]

    def compare(self, summary: Tensor, z: Tensor) -> Tensor:
        scores = self.relation(summary, z)
        return F.logsigmoid(scores) if self.criterion == "mse" else scores

    def loss(self, prediction: Prediction, target: Tensor) -> Tensor:
        if self.criterion == "cross_entropy":
            return super().loss(prediction, target)
        relations = cast(Tensor, prediction).exp()
        relations = relations.to(torch.promote_types(relations.dtype, torch.float32))
        return F.mse_loss(relations, F.one_hot(target, relations.shape[-1]).to(relations.dtype))
