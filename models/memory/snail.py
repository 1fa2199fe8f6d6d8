"""SNAIL, the simple neural attentive meta-learner, supervised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.core.episodes import Support
from datamodules.core.errors import DataError, at_least
from models.core.deterministic_order import shuffled, shuffled_labels
from models.core.embedding_learner import EmbeddingLearner
from models.core.learner import Paper
from models.networks.backbones import Backbone

# Blocks take x (S + Q, channels): S steps, and Q alternatives for the one step that follows them, none of which any
# other row depends on. With Q = 1 that is a plain sequence. Each returns its input with new channels behind.


def earlier(x: Tensor, steps: int, by: int) -> Tensor:
    """The rows ``by`` steps before each row; zeros before the first."""
    past = F.pad(x[:steps], (0, 0, by, 0))
    return torch.cat([past[:steps], past[steps].expand(len(x) - steps, -1)])


class DenseBlock(nn.Module):
    """A causal convolution of kernel size 2, gated: tanh(x_f) σ(x_g)."""

    def __init__(self, channels: int, dilation: int, filters: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.conv = nn.Linear(2 * channels, 2 * filters)
        self.channels = channels + filters

    def forward(self, x: Tensor, steps: int) -> Tensor:
        of_tanh, of_gate = self.conv(torch.cat([earlier(x, steps, self.dilation), x], -1)).chunk(2, -1)
        return torch.cat([x, of_tanh.tanh() * of_gate.sigmoid()], -1)


class TCBlock(nn.Module):
    """Temporal convolutions: dense blocks of dilation 2, 4, … until they reach over a sequence of that length."""

    def __init__(self, channels: int, length: int, filters: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for i in range(1, math.ceil(math.log2(length)) + 1):
            self.blocks.append(block := DenseBlock(channels, 2**i, filters))
            channels = block.channels
        self.channels = channels

    def forward(self, x: Tensor, steps: int) -> Tensor:
        for block in self.blocks:
            x = block(x, steps)
        return x


class AttentionBlock(nn.Module):
    """Soft attention of each step to the steps up to it: softmax over keys of query·key / √(key size)."""

    def __init__(self, channels: int, keys: int, values: int) -> None:
        super().__init__()
        self.key, self.query = nn.Linear(channels, keys), nn.Linear(channels, keys)
        self.value = nn.Linear(channels, values)
        self.channels = channels + values

    def forward(self, x: Tensor, steps: int) -> Tensor:
        row = torch.arange(len(x), device=x.device)
        seen = (row <= row[:, None]) & (row < steps) | (row == row[:, None])
        scores = self.query(x) @ self.key(x).T / self.key.out_features**0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.cat([x, weights @ self.value(x)], -1)


class History(NamedTuple):
    """Labelled embeddings in their order, (S, features + labels), and the label that stands for each class (ways,)."""

    steps: Tensor
    labels: Tensor


class SNAIL(EmbeddingLearner):
    """Reads the support set as a sequence of embeddings with their labels, then a query without, whose label it tells.

    Causal attention and dilated causal convolutions take turns, each adding its channels to those before (section 3).
    Every query ends a sequence of its own, and only that step's output counts. Order, and which label stands for which
    class, are as good as random, and functions of the support set alone.

    Args:
        backbone: the embedding.
        labels: of the output, N as published. Tasks may have fewer classes, each with any of the labels, but not more.
        max_shots: the most shots per class that the convolutions are to reach over.
        attention: sizes of keys and values of the three attention blocks.
        filters: of every dense block of the two stacks between them.
        blocks: "both", as published; or, as its ablations, "attention" or "convolution" alone.
        **others: see EmbeddingLearner.
    """

    paper = Paper(
        "Mishra, Rohaninejad, Chen and Abbeel",
        "A Simple Neural Attentive Meta-Learner",
        "ICLR",
        2018,
        "https://arxiv.org/abs/1707.03141",
    )

    def __init__(
        self,
        backbone: Backbone,
        labels: int = 5,
        max_shots: int = 5,
        attention: Sequence[tuple[int, int]] = ((64, 32), (256, 128), (512, 256)),
        filters: int = 128,
        blocks: Literal["both", "attention", "convolution"] = "both",
        **others: Any,
    ) -> None:
        super().__init__(backbone, **others)
        at_least(2, labels=labels)
        at_least(1, max_shots=max_shots, filters=filters)
        self.labels = labels
        self.blocks = nn.ModuleList()
        channels, length = backbone.out_features + labels, labels * max_shots + 1
        for number, (keys, values) in enumerate(attention):
            if number and blocks != "attention":
                self.blocks.append(block := TCBlock(channels, length, filters))
                channels = block.channels
            if blocks != "convolution":
                self.blocks.append(block := AttentionBlock(channels, keys, values))
                channels = block.channels
        self.readout = nn.Linear(channels, labels)

    def summarize(self, z: Tensor, support: Support) -> History:
        if support.ways > self.labels:
            few = f"a task has {support.ways} ways but the model only {self.labels} labels"
            raise DataError(f"{few}: lower the ways, or train it with --model.init_args.labels {support.ways}")
        labels = shuffled_labels(support, self.labels)
        given = F.one_hot(labels[support.y], self.labels).to(z.dtype)
        return History(torch.cat([z, given], -1)[shuffled(support)], labels)

    def compare(self, summary: History, z: Tensor) -> Tensor:
        x, steps = torch.cat([summary.steps, F.pad(z, (0, self.labels))]), len(summary.steps)
        for block in self.blocks:
            x = block(x, steps)
        return self.readout(x[steps:])[:, summary.labels]
