"""Conditional neural adaptive processes: a support set generates how a frozen network is modulated, and its head."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.core.episodes import Support
from models.conditioning.adaptive import AdaptiveLearner
from models.core.inner_loop import class_means
from models.core.learner import Paper
from models.networks.backbones import Backbone


class RowGenerator(nn.Module):
    """Three linear layers with ELU between them, beside an identity where sizes agree."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        layers = (
            nn.Linear(inputs, outputs),
            nn.ELU(),
            nn.Linear(outputs, outputs),
            nn.ELU(),
            nn.Linear(outputs, outputs),
        )
        self.layers, self.residual = nn.Sequential(*layers), inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x if self.residual else self.layers(x)


class CNAPs(AdaptiveLearner):
    """Generates the modulation of a frozen backbone from the support set, and each class's row of a linear head from
    the mean of its features (sections 2.2 and 2.3); nothing adapts by gradient steps.

    Args:
        backbone, conditioned, code, penalty, **others: see AdaptiveLearner.
    """

    paper = Paper(
        "Requeima, Gordon, Bronskill, Nowozin and Turner",
        "Fast and Flexible Multi-Task Classification Using Conditional Neural Adaptive Processes",
        "NeurIPS",
        2019,
        "https://arxiv.org/abs/1906.07697",
    )

    def __init__(
        self, backbone: Backbone, conditioned: bool = True, code: int = 64, penalty: float = 0.001, **others: Any
    ) -> None:
        super().__init__(backbone, conditioned, code, penalty, **others)
        self.weight_generator = RowGenerator(backbone.out_features, backbone.out_features)
        self.bias_generator = RowGenerator(backbone.out_features, 1)

    def summarize(self, z: Tensor, support: Support) -> tuple[Tensor, Tensor]:
        """Weights (ways, features) and biases (ways,), each class's from the mean of its features alone."""
        means = class_means(z, support)
        return self.weight_generator(means), self.bias_generator(means).squeeze(-1)

    def compare(self, summary: tuple[Tensor, Tensor], z: Tensor) -> Tensor:
        return F.linear(z, *summary)
