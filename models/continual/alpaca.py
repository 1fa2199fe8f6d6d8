"""ALPaCA: Bayesian linear regression over features, which a stream is learned by in closed form."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Support
from models.continual.descent import with_one
from models.continual.learner import ContinualLearner
from models.core.chance import Chance
from models.core.learner import Paper
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNormMode


class Posterior(NamedTuple):
    """Of the weights K, (features + 1, classes): their precision Λ, Q = Λ K̄ by classes, and each class's examples.

    (features + 1, features + 1), (features + 1, classes) and (classes,).
    """

    precision: Tensor
    products: Tensor
    counts: Tensor


class ALPaCA(ContinualLearner):
    """Regresses one-hot labels on features by exact Bayesian linear regression, whose prior is learned.

    A label's vector is y = Kᵀ φ(x) + ε, ε normal of variance σ²; each column of K is normal of mean K̄_0 and of
    covariance σ² Λ_0⁻¹. An example adds φ φᵀ to Λ and φ yᵀ to Λ K̄ (the paper's Algorithm 2, as sums): in any order to
    the same, so that nothing is forgotten. A query's vector is normal of mean K̄ᵀ φ and variance σ² (1 + φᵀ Λ⁻¹ φ), and
    a class's logit is its density at the class's own one-hot vector. K̄_0, Λ_0 = L Lᵀ, σ and the features are learned
    over meta-training streams. All classes have one prior, since labels are names.

    Args:
        backbone: of the features φ, which a 1 is added to.
        noise: σ before meta-training.
        **others: see MetaLearner.
    """

    paper = Paper(
        "Harrison, Sharma and Pavone",
        "Meta-Learning Priors for Efficient Online Bayesian Regression",
        "WAFR",
        2018,
        "https://arxiv.org/abs/1807.08912",
    )

    def __init__(
        self, backbone: Backbone, noise: float = 0.3, batch_norm: BatchNormMode = "running", **others: Any
    ) -> None:
        super().__init__(batch_norm=batch_norm, **others)
        if not noise > 0:
            raise ValueError(f"noise is {noise} but must be above 0")
        self.backbone = backbone
        size = backbone.out_features + 1
        self.mean = nn.Parameter(torch.zeros(size))  # K̄_0 of every class
        self.root = nn.Parameter(torch.eye(size))  # L, of which the lower triangle counts
        self.log_noise = nn.Parameter(torch.tensor(noise).log())

    def check(self, data: EpisodicDataModule) -> str | None:
        if getattr(data, "remember", 0):
            return "ALPaCA knows no class that is not in the stream: set data.remember to 0"
        return None

    def encode(self, inputs: Tensor) -> Tensor:
        return with_one(self.backbone(inputs))

    def begin(self, classes: int, chance: Chance) -> Posterior:
        precise = self.root.dtype if self.root.device.type == "mps" else torch.float64
        root = self.root.to(precise).tril()
        precision = root @ root.T
        products = (precision @ self.mean.to(precise))[:, None].expand(-1, classes)
        return Posterior(precision, products, self.mean.new_zeros(classes))

    def update(self, state: Posterior, experience: Support) -> Posterior:
        x, members = experience.x.to(state.precision), experience.members()
        return Posterior(
            state.precision + x.T @ x,
            state.products + x.T @ members.to(x),
            state.counts + members.sum(0),
        )

    def predict(self, state: Posterior, query_x: Tensor) -> Tensor:
        x = query_x.to(state.precision)
        solved = torch.cholesky_solve(x.T, torch.linalg.cholesky(state.precision))  # Λ⁻¹ φ of each query
        mean, spread = solved.T @ state.products, 1 + (x.T * solved).sum(0)
        # |y_c - mean|² / 2 of the one-hot y_c, without what all classes share.
        logits = mean / (self.log_noise.exp().square() * spread)[:, None]
        return logits.to(query_x).where(state.counts > 0, -torch.inf)
