"""Matching networks, with full context embeddings or without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.core.episodes import Support
from datamodules.core.errors import at_least
from models.core.deterministic_order import shuffled
from models.core.embedding_learner import EmbeddingLearner
from models.core.learner import Paper
from models.networks.backbones import Backbone
from models.networks.recurrent import LSTMCell


class Memory(NamedTuple):
    """Support embeddings g(xᵢ, S), (S, features), and which class (ways, S) each is a member of."""

    g: Tensor
    members: Tensor


class MatchingNet(EmbeddingLearner):
    """Labels a query by the support labels, weighted by attention: Σᵢ a(x̂, xᵢ) yᵢ (eq. 1).

    The attention is the softmax of cosine similarities of the embeddings f(x̂) and g(xᵢ). With full context, g reads
    the support set as a sequence in both directions (appendix A.2), and f is an LSTM that reads from it again and again
    before it answers (A.1). That sequence's order is as good as random, and a function of the support set alone: no
    prediction depends on the order that examples come in.

    Args:
        backbone: f' and g', which are one network.
        full_context: embed in the context of the support set; without, f and g are the backbone.
        reads: K, steps of f's LSTM, each with a read of the support set.
        scale: multiplies the similarities, an inverse temperature. 1 is published; but then no query can be predicted
            with more certainty than e² to 1 against each other image. None learns it, from 10.
        shots_count: each example has its share of the attention, so that a class with more of them is the likelier: the
            equation as it is printed. By default each class has, which is the same for as many examples of each.
        **others: see EmbeddingLearner.
    """

    paper = Paper(
        "Vinyals, Blundell, Lillicrap, Kavukcuoglu and Wierstra",
        "Matching Networks for One Shot Learning",
        "NeurIPS",
        2016,
        "https://arxiv.org/abs/1606.04080",
    )

    def __init__(
        self,
        backbone: Backbone,
        full_context: bool = True,
        reads: int = 5,
        scale: float | None = 1.0,
        shots_count: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(backbone, **others)
        at_least(1, reads=reads)
        self.shots_count = shots_count
        self.full_context, self.reads = full_context, reads
        self.scale = nn.Parameter(torch.tensor(10.0)) if scale is None else scale
        if full_context:
            size = backbone.out_features
            self.forth, self.back = LSTMCell(size, size), LSTMCell(size, size)
            self.reader = LSTMCell(size, size, recurrent=2 * size)

    def in_sequence(self, z: Tensor) -> Tensor:
        """g(xᵢ, S): the support embeddings (S, features) and what an LSTM says of each, from either side (A.2)."""
        return self.forth.run(z) + self.back.run(z.flip(0)).flip(0) + z

    def attended(self, z: Tensor, g: Tensor) -> Tensor:
        """f(x̂, S): query embeddings (Q, features) after K reads of the support's (S, features) (A.1, eqs. 3 to 6).

        From h₀ = 0: the first read is the mean.
        """
        projected, h, memory = self.reader.project(z), torch.zeros_like(z), torch.zeros_like(z)
        for _ in range(self.reads):
            read = (h @ g.T).softmax(-1) @ g
            output, memory = self.reader(projected, torch.cat([h, read], -1), memory)
            h = output + z
        return h

    def summarize(self, z: Tensor, support: Support) -> Memory:
        y = support.y
        if self.full_context:
            order = shuffled(support)
            z, y = self.in_sequence(z[order]), y[order]
        return Memory(z, replace(support, y=y).members().T)

    def compare(self, summary: Memory, z: Tensor) -> Tensor:
        f = self.attended(z, summary.g) if self.full_context else z
        similarity = self.scale * (F.normalize(f, dim=-1) @ F.normalize(summary.g, dim=-1).T)
        if not self.shots_count:
            similarity = similarity - summary.members.T.to(z.dtype) @ summary.members.sum(1).to(z.dtype).log()
        attention = similarity.log_softmax(-1)[:, None].masked_fill(~summary.members, -torch.inf)
        return attention.logsumexp(-1)  # the logarithm of a class's share
