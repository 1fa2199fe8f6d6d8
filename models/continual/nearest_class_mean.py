"""Nearest class mean: the control that needs no gradient and cannot forget."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Support
from models.continual.learner import ContinualLearner
from models.core.chance import Chance
from models.core.learner import Paper
from models.networks.backbones import Backbone


class ClassSums(NamedTuple):
    """Of each class the sum of its features, (classes, features), and how many examples it has, (classes,)."""

    sums: Tensor
    counts: Tensor


class NearestClassMean(ContinualLearner):
    """Classifies by the nearest mean of the features of each class's examples so far (Mensink et al., PAMI 2013).

    Sums of features are the same in any order of the experiences: nothing is ever forgotten, and what is lost with more
    classes is lost to their likeness. Meta-trained over streams it is a prototypical network.

    Args:
        backbone: of the features.
        **others: see MetaLearner.
    """

    paper = Paper(
        "Mensink, Verbeek, Perronnin and Csurka",
        "Distance-Based Image Classification: Generalizing to New Classes at Near-Zero Cost",
        "PAMI",
        2013,
        "https://doi.org/10.1109/TPAMI.2013.83",
    )

    def __init__(self, backbone: Backbone, **others: Any) -> None:
        super().__init__(**others)
        self.backbone = backbone

    def check(self, data: EpisodicDataModule) -> str | None:
        if getattr(data, "remember", 0):
            return "NearestClassMean has no mean of a class that is not in the stream: set data.remember to 0"
        return None

    def encode(self, inputs: Tensor) -> Tensor:
        return self.backbone(inputs)

    def begin(self, classes: int, chance: Chance) -> ClassSums:
        like = next(self.backbone.parameters())
        return ClassSums(like.new_zeros(classes, self.backbone.out_features), like.new_zeros(classes))

    def update(self, state: ClassSums, experience: Support) -> ClassSums:
        members = experience.members().to(state.sums.dtype)
        return ClassSums(state.sums + members.T @ experience.x, state.counts + members.sum(0))

    def predict(self, state: ClassSums, query_x: Tensor) -> Tensor:
        means = state.sums / state.counts.clamp(min=1)[:, None]
        distance = (query_x.square().sum(1, keepdim=True) - 2 * query_x @ means.T) + means.square().sum(1)
        return (-distance).where(state.counts > 0, -torch.inf)
