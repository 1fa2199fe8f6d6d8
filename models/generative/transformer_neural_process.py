"""Transformer neural processes: a transformer whose sequence is the points, without positions."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from datamodules.core.episodes import Support
from datamodules.core.errors import at_least
from models.core.learner import Paper
from models.core.predictions import Mixture
from models.generative.process_learner import ProcessLearner
from models.generative.set_networks import attend, layers

KeysAndValues = tuple[Tensor, Tensor]


class Layer(nn.Module):
    """A layer of a transformer's encoder, normalised after each addition (Vaswani et al., NeurIPS 2017).

    Args:
        size: d, of a token.
        heads: of the attention.
        feedforward: units of the hidden layer that follows.
    """

    def __init__(self, size: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key_value, self.out = nn.Linear(size, size), nn.Linear(size, 2 * size), nn.Linear(size, size)
        self.feed = layers(size, feedforward, size)
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(2))
        for linear in (self.query, self.key_value, self.out):
            nn.init.zeros_(linear.bias)

    def keys_and_values(self, tokens: Tensor) -> KeysAndValues:
        key, value = self.key_value(tokens).chunk(2, -1)
        return key, value

    def forward(self, tokens: Tensor, attended: KeysAndValues) -> Tensor:
        """Tokens (N, d) after they have looked at the support set's keys and values."""
        x = self.norms[0](tokens + self.out(attend(self.query(tokens), *attended, self.heads)))
        return self.norms[1](x + self.feed(x))


class TNP(ProcessLearner):
    """TNP-D: tokens (x, y) of the support set and (x, 0) of queries, all of which attend to the support set alone.

    So queries are independent given the support set, as in a conditional neural process, and what the support set
    becomes does not depend on them: its keys and values of every layer are the state. There are no positions, hence no
    order.

    Args:
        inputs, outputs, reconstruct: see ProcessLearner.
        size: d, of a token.
        depth: layers of the transformer.
        heads: of each attention.
        feedforward: units of its hidden layers, and of the one that predicts.
        embedding_layers: from (x, y) to a token.
        **others: see MetaLearner.
    """

    paper = Paper(
        "Nguyen and Grover",
        "Transformer Neural Processes: Uncertainty-Aware Meta Learning Via Sequence Modeling",
        "ICML",
        2022,
        "https://arxiv.org/abs/2207.04179",
    )

    def __init__(
        self,
        inputs: int = 1,
        outputs: int = 1,
        size: int = 64,
        depth: int = 6,
        heads: int = 4,
        feedforward: int = 128,
        embedding_layers: int = 4,
        reconstruct: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(inputs, outputs, reconstruct, **others)
        at_least(1, size=size, depth=depth, heads=heads, feedforward=feedforward, embedding_layers=embedding_layers)
        if size % heads:
            raise ValueError(f"size is {size} but must be a multiple of heads, {heads}")
        self.embed = layers(inputs + outputs, *[size] * embedding_layers)
        self.layers = nn.ModuleList(Layer(size, heads, feedforward) for _ in range(depth))
        self.head = layers(size, feedforward, 2 * outputs)

    def adapt(self, support: Support) -> list[KeysAndValues]:
        tokens = self.embed(torch.cat([support.x, support.y], -1))
        stack = cast(list[Layer], list(self.layers))
        state = [stack[0].keys_and_values(tokens)]
        for before, layer in pairwise(stack):
            tokens = before(tokens, state[-1])
            state.append(layer.keys_and_values(tokens))
        return state

    def predict(self, state: list[KeysAndValues], query_x: Tensor) -> Mixture:
        unknown = query_x.new_zeros(*query_x.shape[:-1], self.outputs)
        tokens = self.embed(torch.cat([query_x, unknown], -1))
        for layer, attended in zip(self.layers, state, strict=True):
            tokens = layer(tokens, attended)
        made = self.head(tokens)[None]
        mean, raw = made.to(torch.promote_types(made.dtype, torch.float32)).chunk(2, -1)
        return Mixture(mean, raw.exp())
