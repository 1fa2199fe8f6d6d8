"""Attentive neural processes: every query looks up what the support set has near it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from datamodules.core.episodes import Support
from datamodules.core.errors import at_least
from models.core.learner import Paper
from models.generative.latent_process import LatentProcess
from models.generative.set_networks import Attention, PooledLatent, layers, point_layers


class ANP(LatentProcess):
    """A neural process whose deterministic code is of each query: it attends by x to the points of the support set.

    Both paths let the points of a set attend to each other (figure 2); the latent is that of a neural process.

    Args:
        inputs, outputs, latents, decoder_layers: see LatentProcess.
        hidden: units of every layer, and numbers of the deterministic code.
        encoder_layers: of a point, of both paths; self-attention takes the place of the last two.
        code_layers: of the latent's code, after the mean.
        position_layers: of x, to queries and keys of the cross-attention.
        heads: of each attention.
        **others: see LatentProcess.
    """

    paper = Paper(
        "Kim, Mnih, Schwarz, Garnelo, Eslami, Rosenbaum, Vinyals and Teh",
        "Attentive Neural Processes",
        "ICLR",
        2019,
        "https://arxiv.org/abs/1901.05761",
    )

    def __init__(
        self,
        inputs: int = 1,
        outputs: int = 1,
        hidden: int = 128,
        latents: int = 128,
        encoder_layers: int = 4,
        code_layers: int = 2,
        decoder_layers: int = 3,
        position_layers: int = 2,
        heads: int = 8,
        **others: Any,
    ) -> None:
        at_least(1, code_layers=code_layers, position_layers=position_layers, heads=heads)
        at_least(3, encoder_layers=encoder_layers)
        if hidden % heads:
            raise ValueError(f"hidden is {hidden} but must be a multiple of heads, which is {heads}")
        super().__init__(inputs, outputs, hidden, hidden, latents, decoder_layers, **others)
        point = inputs + outputs
        self.latent = PooledLatent(latents, point, hidden, encoder_layers, code_layers, heads)
        self.points = point_layers(point, hidden, encoder_layers, heads)
        self.positions = layers(inputs, *[hidden] * position_layers)
        self.attention = Attention(hidden, heads)

    def keep(self, support: Support) -> Sequence[Tensor]:
        """Keys and values of the cross-attention, (S, hidden) each."""
        values = self.points(torch.cat([support.x, support.y], -1))
        return self.attention.key(self.positions(support.x)), self.attention.value(values)

    def codes(self, kept: Sequence[Tensor], query_x: Tensor) -> Sequence[Tensor]:
        return (self.attention.look_up(self.positions(query_x), *kept),)
