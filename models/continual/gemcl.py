"""GeMCL: a Gaussian of each class, whose posterior is all that a stream changes."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Support
from models.continual.learner import ContinualLearner
from models.core.chance import Chance
from models.core.learner import Paper
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNormMode

SCORED_AT_ONCE = 4_000_000  # elements of queries x classes x features


class ClassMoments(NamedTuple):
    """Of each class how many examples it has, (classes,), their mean and their summed squared deviations from it.

    The latter two are (classes, features).
    """

    counts: Tensor
    means: Tensor
    deviations: Tensor


class GeMCL(ContinualLearner):
    """Each class's features are Gaussian, of a mean and a precision in each dimension that are inferred exactly.

    The prior of a class's precisions is Gamma(α, β), learned over meta-training streams together with the features,
    that of its means is flat: a Normal-Gamma of no observations. With n examples, of mean m and summed squared
    deviations S, α' = α + n / 2 and β' = β + S / 2, and a query's density is Student's t of 2 α' degrees of freedom
    around m, of squared scale β' / α' (1 + 1 / n). The moments n, m and S are the same in any order of the examples:
    nothing is forgotten.

    Args:
        backbone: of the features.
        alpha, beta: of the prior, before meta-training.
        predictive: "student", the posterior predictive density; "map", the Gaussian of the likeliest precision.
        **others: see MetaLearner.
    """

    paper = Paper(
        "Banayeeanzade, Mirzaiezadeh, Hasani and Soleymani Baghshah",
        "Generative vs. Discriminative: Rethinking The Meta-Continual Learning",
        "NeurIPS",
        2021,
        "https://proceedings.neurips.cc/paper/2021/hash/b4e267d84075f66ebd967d95331fcc03-Abstract.html",
    )

    def __init__(
        self,
        backbone: Backbone,
        alpha: float = 100.0,
        beta: float = 1000.0,
        predictive: Literal["student", "map"] = "student",
        batch_norm: BatchNormMode = "running",
        **others: Any,
    ) -> None:
        super().__init__(batch_norm=batch_norm, **others)
        if not (alpha > 0.5 and beta > 0):
            raise ValueError(f"alpha is {alpha} and beta {beta}, but they must be above 0.5 and above 0")
        self.backbone, self.predictive = backbone, predictive
        self.log_alpha = nn.Parameter(torch.tensor(math.log(alpha)))
        self.log_beta = nn.Parameter(torch.tensor(math.log(beta)))

    def check(self, data: EpisodicDataModule) -> str | None:
        if getattr(data, "remember", 0):
            return "GeMCL has no Gaussian of a class that is not in the stream: set data.remember to 0"
        return None

    def encode(self, inputs: Tensor) -> Tensor:
        return self.backbone(inputs)

    def begin(self, classes: int, chance: Chance) -> ClassMoments:
        like = next(self.backbone.parameters())
        none = like.new_zeros(classes, self.backbone.out_features)
        return ClassMoments(like.new_zeros(classes), none, none)

    def update(self, state: ClassMoments, experience: Support) -> ClassMoments:
        x, members = experience.x, experience.members().to(state.means)
        new = members.sum(0)
        own = (members.T @ x) / new.clamp(min=1)[:, None]
        spread = members.T @ (x - members @ own).square()
        # Moments of both together (Chan, Golub and LeVeque, 1983): sums of squares would round away what is small.
        counts = state.counts + new
        share = (new / counts.clamp(min=1))[:, None]
        away = own - state.means
        deviations = state.deviations + spread + away.square() * (state.counts[:, None] * share)
        return ClassMoments(counts, state.means + share * away, deviations)

    def predict(self, state: ClassMoments, query_x: Tensor) -> Tensor:
        counts = state.counts.clamp(min=1)[:, None]
        alpha, beta = self.log_alpha.exp() + counts / 2, self.log_beta.exp() + state.deviations / 2  # α', β'
        if self.predictive == "student":
            scale = beta / alpha * (1 + 1 / counts)
            constant = torch.lgamma(alpha + 0.5) - torch.lgamma(alpha) - (2 * math.pi * alpha * scale).log() / 2
            inverse = (2 * alpha * scale).reciprocal()
        else:
            inverse = (alpha - 0.5) / beta  # the likeliest precision, together with the mean
            constant = (inverse / (2 * math.pi)).log() / 2

        def densities(x: Tensor) -> Tensor:
            away = (x[:, None] - state.means).square() * inverse  # (Q, classes, features)
            if self.predictive == "map":
                return constant.sum(1) - away.sum(2) / 2
            return constant.sum(1) - (alpha[:, 0] + 0.5) * away.log1p().sum(2)

        size = max(1, SCORED_AT_ONCE // state.means.numel())
        scores = torch.cat([densities(x) for x in query_x.split(size)])
        return scores.where(state.counts > 0, -torch.inf)
