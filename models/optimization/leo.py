"""Latent embedding optimization: gradient steps on the low-dimensional codes that classifiers are decoded from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from datamodules.core.episodes import Support, Task
from datamodules.core.errors import at_least
from datamodules.core.metric import Metric
from models.core.base_learner import Parameters
from models.core.inner_loop import Adapted, adapted, class_means, last, query, sgd_path, task_features
from models.core.learner import MetaLearner, Paper
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNormMode, normalize_by

PULL_BACK = 1e-4  # of the weights, the gradient in place of one that is not finite


class Classifier(NamedTuple):
    """A linear classifier, (ways, features), and what batch norm needs of the support set."""

    weights: Tensor
    backbone: Adapted


class LEO(MetaLearner):
    """Encodes the support set into a Gaussian over one latent code z for each class, decodes codes to softmax weights.

    The inner loop descends the support loss by the codes, decoding anew at each step (alg. 1), then, for a few small
    steps, by the weights themselves; both with meta-learned rates, one for each latent and each feature. In
    meta-training codes and weights are drawn, in evaluation they are the means. As published it works on the features
    of a frozen backbone (``UnitLength`` around ``Pretrained``); any other is trained along. Rates and penalties as
    published are for features of unit length: codes of longer ones diverge in the inner loop.

    The published ablations: ``inner_steps`` 0 and ``fine_tuning_steps`` 0, the conditional generator alone, or one of
    the two; ``conditional: false``, codes start from the prior; ``stochastic: false``.

    The weights of the penalties go with means over latents and classes, as in the reference code, whose values they
    are; the paper writes sums, and for λ₂ the norm instead of the mean square.

    Args:
        backbone: gives the features; batch norm and dropout of a frozen one are off.
        latents: dimensions of a class's code.
        inner_steps: gradient steps on the codes in meta-training.
        eval_inner_steps: those in evaluation; None takes as many as in training.
        fine_tuning_steps: gradient steps on the weights after that.
        inner_rate, fine_tuning_rate: what the learned rates start from. The loss they go with is the mean over examples
            times the number of ways: the reference code's sum, where there is one shot.
        dropout: of features, in the encoder and before the classifier.
        kl_weight: β, of KL(q(z|D) ‖ N(0, I)).
        encoder_penalty: γ, of ‖stopgrad(z') - z‖², the distance that the inner loop moved the codes.
        l2_penalty: λ₁, of the squared weights of encoder, relation network and decoder.
        orthogonality: λ₂, of the correlations between what the decoder makes of different latents.
        stochastic: draw codes and weights in meta-training.
        conditional: start from the encoder's codes; otherwise from those of N(0, I).
        clip_value, clip_norm: bounds of the meta-gradient's elements, then of each tensor's norm.
        batch_norm, **others: see MetaLearner.
    """

    paper = Paper(
        "Rusu, Rao, Sygnowski, Vinyals, Pascanu, Osindero and Hadsell",
        "Meta-Learning with Latent Embedding Optimization",
        "ICLR",
        2019,
        "https://arxiv.org/abs/1807.05960",
    )
    tasks = frozenset({"classification"})

    own_metrics = {"kl": Metric(), "encoder_penalty": Metric("lower")}

    def __init__(
        self,
        backbone: Backbone,
        latents: int = 64,
        inner_steps: int = 5,
        eval_inner_steps: int | None = None,
        fine_tuning_steps: int = 5,
        inner_rate: float = 1.0,
        fine_tuning_rate: float = 1e-3,
        dropout: float = 0.3,
        kl_weight: float = 1e-3,
        encoder_penalty: float = 1e-9,
        l2_penalty: float = 1e-8,
        orthogonality: float = 1e-3,
        stochastic: bool = True,
        conditional: bool = True,
        clip_value: float = 0.1,
        clip_norm: float = 0.1,
        batch_norm: BatchNormMode = "running",
        **others: Any,
    ) -> None:
        super().__init__(batch_norm=batch_norm, **others)
        at_least(1, latents=latents)
        at_least(0, inner_steps=inner_steps, eval_inner_steps=eval_inner_steps, fine_tuning_steps=fine_tuning_steps)
        self.backbone, features = backbone, backbone.out_features
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.Linear(features, latents, bias=False)
        pairs = [nn.Linear(2 * latents, 2 * latents, bias=False) for _ in range(3)]
        self.relation = nn.Sequential(pairs[0], nn.ReLU(), pairs[1], nn.ReLU(), pairs[2])
        self.decoder = nn.Linear(latents, 2 * features, bias=False)
        for layer in self.linear:
            nn.init.xavier_uniform_(layer.weight)
        self.inner_rate = nn.Parameter(torch.full((latents,), inner_rate), requires_grad=inner_steps > 0)
        tuned = fine_tuning_steps > 0
        self.fine_tuning_rate = nn.Parameter(torch.full((features,), fine_tuning_rate), requires_grad=tuned)
        self.inner_steps, self.fine_tuning_steps = inner_steps, fine_tuning_steps
        self.eval_inner_steps = inner_steps if eval_inner_steps is None else eval_inner_steps
        self.kl_weight, self.encoder_penalty = kl_weight, encoder_penalty
        self.l2_penalty, self.orthogonality = l2_penalty, orthogonality
        self.stochastic, self.conditional = stochastic, conditional
        self.clip_value, self.clip_norm = clip_value, clip_norm

    @property
    def linear(self) -> list[nn.Linear]:
        """The layers of encoder, relation network and decoder."""
        return [m for m in (self.encoder, *self.relation, self.decoder) if isinstance(m, nn.Linear)]

    def encode(self, x: Tensor, support: Support) -> Normal:
        """q(z|D) (ways, latents) by features (S, features): means over pairs of a class's example and any (eq. 2)."""
        if not self.conditional:
            prior = self.decoder.weight.new_zeros(support.ways, self.decoder.in_features)
            return Normal(prior, torch.ones_like(prior), validate_args=False)
        codes = self.encoder(self.dropout(x))
        shape = (len(codes), len(codes), -1)
        pairs = torch.cat([codes[:, None].expand(shape), codes[None].expand(shape)], -1)
        of_classes = class_means(self.relation(pairs).mean(1), support).to(self.decoder.weight.dtype)
        mean, log_deviation = of_classes.chunk(2, -1)
        # The paper says nothing on how to make σ positive. Its code has max(exp(·) - 1, 1e-10), without a gradient from
        # 0 downwards; this starts from the prior's 1.
        return Normal(mean, log_deviation.exp(), validate_args=False)

    def decode(self, z: Tensor) -> Normal:
        """p(w|z) (ways, features): around σ = √(2 / (features + ways)), as the reference code has it."""
        mean, log_ratio = self.decoder(z).to(z.dtype).chunk(2, -1)
        scale = math.sqrt(2 / (mean.shape[1] + mean.shape[0]))
        return Normal(mean, scale * log_ratio.exp(), validate_args=False)

    def draw(self, gaussian: Normal) -> Tensor:
        """In meta-training a draw, differentiable by the Gaussian's parameters; otherwise the mean."""
        if not (self.training and self.stochastic):
            return gaussian.mean
        return gaussian.mean + gaussian.stddev * torch.randn_like(gaussian.mean)

    def logits(self, x: Tensor, weights: Tensor) -> Tensor:
        return F.linear(self.dropout(x.to(weights.dtype)), weights)

    def codes(self, x: Tensor, z: Tensor, support: Support) -> Iterator[Tensor]:
        """The codes (ways, latents) before the first step in latent space and after each one."""

        def loss(parameters: Parameters, step: int) -> Tensor:
            weights = self.draw(self.decode(parameters["z"]))
            return support.ways * self.support_loss(self.logits(x, weights), support)

        steps = self.inner_steps if self.training else self.eval_inner_steps
        for parameters in sgd_path(loss, {"z": z}, lambda step: {"z": self.inner_rate}, steps):
            yield parameters["z"]

    def fine_tuned(self, x: Tensor, weights: Tensor, support: Support) -> Iterator[Tensor]:
        """The weights (ways, features) before the first step on them and after each one."""

        def loss(parameters: Parameters, step: int) -> Tensor:
            return support.ways * self.support_loss(self.logits(x, parameters["w"]), support)

        rate: Parameters = {"w": self.fine_tuning_rate}
        for parameters in sgd_path(loss, {"w": weights}, lambda step: rate, self.fine_tuning_steps):
            yield parameters["w"]

    def adaptation(self, support: Support) -> Iterator[Classifier]:
        with normalize_by(self.statistics_source):
            x = self.backbone(support.x)
        backbone = adapted(self.backbone, {}, support, self.batch_norm)
        weights = x
        for z in self.codes(x, self.draw(self.encode(x, support)), support):
            weights = self.draw(self.decode(z))
            yield Classifier(weights, backbone)
        for step, tuned in enumerate(self.fine_tuned(x, weights, support)):
            if step:
                yield Classifier(tuned, backbone)

    def adapt(self, support: Support) -> Classifier:
        return last(self.adaptation(support))

    def predict(self, state: Classifier, query_x: Tensor) -> Tensor:
        return self.logits(query(self.backbone, state.backbone, query_x, self.statistics_source), state.weights)

    def penalty(self) -> Tensor:
        """λ₁ Σ‖φ‖² + λ₂ mean((C - I)²), C the cosines between the decoder's weights of any two latents."""
        squares = torch.stack([layer.weight.square().sum() for layer in self.linear]).sum()
        directions = F.normalize(self.decoder.weight, dim=0)
        off = directions.T @ directions - torch.eye(self.decoder.in_features).to(directions)
        return self.l2_penalty * squares + self.orthogonality * off.square().mean()

    def objective(self, task: Task) -> tuple[Any, ...]:
        x, query_x = task_features(self.backbone, task, self.batch_norm, self.statistics_source)
        q = self.encode(x, task.support)
        z = self.draw(q)
        z_adapted = last(self.codes(x, z, task.support))
        weights = last(self.fine_tuned(x, self.draw(self.decode(z_adapted)), task.support))
        prediction = self.logits(query_x, weights)
        # In closed form; the reference code takes the drawn codes' own ratio.
        divergence = kl_divergence(q, Normal(0.0, 1.0)).mean() if self.stochastic else z.new_zeros(())
        moved = (z_adapted.detach() - z).square().mean()
        loss = self.loss(prediction, task.query_y) + self.kl_weight * divergence + self.encoder_penalty * moved
        metrics = {"kl": divergence.detach(), "encoder_penalty": moved.detach()}
        return loss + self.penalty(), prediction, {"metrics": metrics}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        trained = [p for p in self.parameters() if p.grad is not None]
        if not torch.stack([p.grad.isfinite().all() for p in trained if p.grad is not None]).all():
            rank_zero_warn(f"meta-update {self.meta_updates}: the gradient is not finite, weights decay instead")
            optimizer.zero_grad(set_to_none=True)
            for layer in self.linear:
                layer.weight.grad = PULL_BACK * layer.weight.detach()
        nn.utils.clip_grad_value_(trained, self.clip_value)
        for p in trained:
            nn.utils.clip_grad_norm_(p, self.clip_norm)
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
