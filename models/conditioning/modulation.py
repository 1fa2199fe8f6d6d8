"""A task embedding modulates features."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from models.core.base_learner import Parameters
from models.core.conditioning import Conditioning
from models.networks.modulation import activated


class Modulation(Conditioning):
    """Scales, and shifts, the channels of every layer of the backbone by what a linear map of the embedding says.

    As MMAML has it (Vuorio et al., NeurIPS 2019, section 4.2), before each nonlinearity. The maps start from weights of
    deviation 0.01 and no bias, so that FiLM starts close to no change.

    Args:
        form: "film", scale 1 + γ and shift β (Perez et al., AAAI 2018); "sigmoid", gates between 0 and 1; "softmax",
            attention over a layer's channels, whose scales are in all 1.
    """

    def __init__(self, form: Literal["film", "sigmoid", "softmax"] = "film") -> None:
        super().__init__()
        self.form = form

    def attach(self, learner: nn.Module, embedding_size: int) -> None:
        points = activated(learner)
        self.names, self.sizes = list(points), list(points.values())
        self.generator = nn.Linear(embedding_size, sum(self.sizes) * (2 if self.form == "film" else 1))
        nn.init.normal_(self.generator.weight, std=0.01)
        nn.init.zeros_(self.generator.bias)

    def forward(self, embedding: Tensor, parameters: Parameters) -> Parameters:
        generated = self.generator(embedding)
        channels = sum(self.sizes)
        of_layers = generated[:channels].split(self.sizes)
        if self.form == "film":
            scales = [1 + gamma for gamma in of_layers]
        elif self.form == "sigmoid":
            scales = [torch.sigmoid(score) for score in of_layers]
        else:
            scales = [score.softmax(-1) for score in of_layers]
        values = {f"{name}.scale": scale for name, scale in zip(self.names, scales, strict=True)}
        if self.form == "film":
            shifts = generated[channels:].split(self.sizes)
            values |= {f"{name}.shift": shift for name, shift in zip(self.names, shifts, strict=True)}
        return values
