"""Conditional neural processes: a set becomes a code, and the code a Gaussian at every point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from datamodules.core.episodes import Support
from datamodules.core.errors import at_least
from models.core.learner import Paper
from models.core.predictions import Mixture
from models.generative.process_learner import ProcessLearner, gaussians
from models.generative.set_networks import Decoder, PooledCode


class CNP(ProcessLearner):
    """r = mean of h(x, y) over the support set, and N(μ, σ²) = g(x*, r) at every query (eqs. 1 to 3).

    Queries are independent given the support set, so that the joint density is the product of the marginals. The code
    is the task's embedding.

    Args:
        inputs, outputs, reconstruct: see ProcessLearner.
        hidden: units of every layer, and numbers of a code.
        encoder_layers: of a point, before the mean.
        code_layers: of the code, after it.
        decoder_layers: of the decoder.
        encoders: codes side by side, each of an encoder of its own: 1 in the paper; the code that the published results
            on Gaussian processes are of has 2, as many parameters as a neural process.
        least_deviation: σ is this + (1 - this) · softplus.
        **others: see MetaLearner.
    """

    paper = Paper(
        "Garnelo, Rosenbaum, Maddison, Ramalho, Saxton, Shanahan, Teh, Rezende and Eslami",
        "Conditional Neural Processes",
        "ICML",
        2018,
        "https://arxiv.org/abs/1807.01613",
    )

    def __init__(
        self,
        inputs: int = 1,
        outputs: int = 1,
        hidden: int = 128,
        encoder_layers: int = 4,
        code_layers: int = 2,
        decoder_layers: int = 3,
        encoders: int = 1,
        least_deviation: float = 0.1,
        reconstruct: bool = True,
        **others: Any,
    ) -> None:
        super().__init__(inputs, outputs, reconstruct, **others)
        at_least(1, hidden=hidden, encoder_layers=encoder_layers, code_layers=code_layers, encoders=encoders)
        at_least(2, decoder_layers=decoder_layers)
        self.least_deviation = least_deviation
        self.encoders = nn.ModuleList(
            PooledCode(hidden, inputs + outputs, hidden, encoder_layers, code_layers) for _ in range(encoders)
        )
        self.decoder = Decoder(encoders * hidden, inputs, 2 * outputs, hidden, decoder_layers)

    @property
    def embedding_size(self) -> int:
        return self.decoder.codes

    def embed_task(self, support: Support) -> Tensor:
        return torch.cat([encoder(support.x, support.y) for encoder in self.encoders])

    def adapt(self, support: Support) -> Tensor:
        return self.embed_task(support)

    def predict(self, state: Tensor, query_x: Tensor) -> Mixture:
        return gaussians(self.decoder([state], query_x)[None], self.least_deviation)
