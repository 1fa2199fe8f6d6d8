"""CAML: context-aware meta-learning, classification in context by a transformer over frozen features."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Support
from datamodules.core.errors import DataError, at_least
from models.core.deterministic_order import shuffled_labels
from models.core.embedding_learner import EmbeddingLearner
from models.core.learner import Paper
from models.networks.backbones import Backbone


def simplex_codes(labels: int, size: int) -> Tensor:
    """Equal-length and maximally equiangular vectors (ELMES), (labels, size): unit length, cosines -1 / (labels - 1).

    The corners of a regular simplex, turned into ``size`` dimensions by an orthogonal map that is always the same.
    """
    corners = torch.eye(labels, dtype=torch.float64) - 1 / labels
    turn = torch.randn(size, labels, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (labels / (labels - 1)) ** 0.5 * corners @ torch.linalg.qr(turn).Q.T


class Block(nn.Module):
    """A layer of a transformer, normalised before attention and before the dense layers, without positions.

    Args:
        size: of a token.
        heads: of the attention.
        dense: size of the hidden dense layer.
    """

    def __init__(self, size: int, heads: int, dense: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_dense = nn.LayerNorm(size, 1e-6), nn.LayerNorm(size, 1e-6)
        self.keys, self.mixed = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.dense = nn.Sequential(nn.Linear(size, dense), nn.GELU(), nn.Linear(dense, size))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def attention(self, x: Tensor) -> Tensor:
        """Every token of a sequence (N, tokens, size) attends to all of them."""
        query, key, value = self.keys(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        weights = (query @ key.mT / key.shape[-1] ** 0.5).softmax(-1)
        return self.mixed((weights @ value).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x))
        return x + self.dense(self.before_dense(x))


class Context(NamedTuple):
    """Support embeddings with the codes of their labels, (S, features + code), and each class's label (ways,)."""

    tokens: Tensor
    labels: Tensor


class CAML(EmbeddingLearner):
    """Reads a query and the support set as one sequence of features with codes of labels, and tells the query's label.

    Codes are the corners of a regular simplex, fixed but for a learned length; the query has a learned code for
    "unknown". The transformer knows no positions, so the support set is a set, and every query has a sequence of its
    own (section 4). As published the features are frozen (``Pretrained``); any other backbone is trained along. Which
    label stands for which class is as good as random, and a function of the support set alone.

    Args:
        backbone: of the features.
        max_ways: labels that there are codes and outputs for. Tasks may have fewer classes, but not more.
        code_size: of a label's code, which is put behind the features.
        layers, heads, dense: of the transformer: layers, heads of each, size of its hidden dense layers.
        **others: see EmbeddingLearner.
    """

    paper = Paper(
        "Fifty, Duan, Junkins, Amid, Leskovec, Ré and Thrun",
        "Context-Aware Meta-Learning",
        "ICLR",
        2024,
        "https://arxiv.org/abs/2310.10971",
    )

    codes: Tensor

    def __init__(
        self,
        backbone: Backbone,
        max_ways: int = 5,
        code_size: int = 256,
        layers: int = 4,
        heads: int = 8,
        dense: int = 1024,
        **others: Any,
    ) -> None:
        super().__init__(backbone, **others)
        at_least(2, max_ways=max_ways)
        at_least(1, layers=layers, heads=heads, dense=dense)
        at_least(max_ways, code_size=code_size)
        size = backbone.out_features + code_size
        if size % heads:
            raise ValueError(
                f"heads is {heads}, which does not divide the size of a token, {backbone.out_features} features + "
                f"{code_size} of code: give another code_size"
            )
        self.max_ways = max_ways
        self.register_buffer("codes", simplex_codes(max_ways, code_size).float())
        self.length = nn.Parameter(torch.ones(()))
        self.unknown = nn.Parameter(torch.zeros(code_size))
        self.blocks = nn.Sequential(*(Block(size, heads, dense) for _ in range(layers)))
        self.norm = nn.LayerNorm(size, 1e-6)
        self.readout = nn.Linear(size, max_ways, bias=False)

    def check(self, data: EpisodicDataModule) -> str | None:
        ways = max(data.task_shape().get("ways", 0), getattr(data, "train_ways", 0))
        return self.too_many(ways) if ways > self.max_ways else super().check(data)

    def too_many(self, ways: int) -> str:
        few = f"a task has {ways} ways but the model only {self.max_ways} codes of labels"
        return f"{few}: lower the ways, or train it with --model.init_args.max_ways {ways}"

    def summarize(self, z: Tensor, support: Support) -> Context:
        if support.ways > self.max_ways:
            raise DataError(self.too_many(support.ways))
        labels = shuffled_labels(support, self.max_ways)
        codes = self.length * self.codes[labels[support.y]]
        return Context(torch.cat([z, codes.to(z.dtype)], -1), labels)

    def compare(self, summary: Context, z: Tensor) -> Tensor:
        queries = torch.cat([z, self.unknown.to(z.dtype).expand(len(z), -1)], -1)
        sequences = torch.cat([queries[:, None], summary.tokens.expand(len(z), -1, -1)], 1)
        return self.readout(self.norm(self.blocks(sequences)[:, 0]))[:, summary.labels]
