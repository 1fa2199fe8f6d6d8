"""The Neural Statistician: a variational autoencoder of sets, whose context says which set it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.core.episodes import Support, Task
from datamodules.core.errors import at_least
from datamodules.core.metric import Metric
from models.core.embedding_learner import EmbeddingLearner
from models.core.inner_loop import class_means
from models.core.learner import Paper
from models.networks.backbones import Backbone
from models.networks.batch_norm import normalize_by, recording
from models.networks.gaussians import Gaussian, standard_normal
from models.task_embedding.statistician_networks import (
    BernoulliDecoder,
    ContextNetwork,
    GaussianDecoder,
    InferenceNetwork,
    LatentPrior,
    Normalized,
    initialize,
)


class NeuralStatistician(EmbeddingLearner):
    """Learns without labels of its own what tells one set from another: a latent c for each set, a z for each example.

    The model is p(c) Π p(z | c) p(x | c, z), p(c) standard normal; the statistic network q(c | D) sees the mean over
    the set's examples (section 3.3). A class is a set: in meta-training, all examples of each of a task's classes,
    support and queries together, so that 32 ways of 5 examples are the paper's batch of 32 sets of 5. It minimises
    -(w · reconstruction - KL / w) by set and example, w = 1 + α, where α starts at ``alpha`` and halves every ``epoch``
    (section 4, and the reference code).

    A query belongs to the class k of the least KL(q(c | D_k) ‖ q(c | x)) (section 4.3). Logits are minus these
    divergences, as published without a scale: they order classes and are no calibrated probabilities.

    Args:
        backbone: h(x), the encoder of each example that q(c | D) and q(z | c, x) share.
        context: dimensions of c; 512 for Omniglot.
        latents: dimensions of z; 16 for Omniglot.
        hidden: width of all dense layers.
        layers: dense layers of the residual block in q(z | c, x) and p(z | c).
        widths: filters of the decoder's blocks, the last one first; images alone.
        convs: convolutions of each of its blocks, the transposed one included; images alone.
        alpha: α at the start, 0 or more; 0 is the evidence lower bound itself.
        epoch: meta-updates after which α halves. The reference has 4 sets of 5 of each of some 1,200 characters, all
            of them once more turned, and 32 in an update: 300.
        stochastic: draw c and z in training; False takes their means.
        **others: see EmbeddingLearner.
    """

    paper = Paper(
        "Edwards and Storkey", "Towards a Neural Statistician", "ICLR", 2017, "https://arxiv.org/abs/1606.02185"
    )
    own_metrics = {
        "elbo": Metric("higher", "evidence lower bound (nats per example)"),
        "reconstruction": Metric("higher", "reconstruction (nats per example)"),
        "context_kl": Metric(label="KL of the context (nats per set)"),
        "latent_kl": Metric(label="KL of the latents (nats per example)"),
    }

    def __init__(
        self,
        backbone: Backbone,
        context: int = 512,
        latents: int = 16,
        hidden: int = 256,
        layers: int = 3,
        widths: Sequence[int] = (64, 128, 256),
        convs: int = 3,
        alpha: float = 1.0,
        epoch: int = 300,
        stochastic: bool = True,
        **others: Any,
    ) -> None:
        super().__init__(backbone, **others)
        at_least(1, context=context, latents=latents, hidden=hidden, layers=layers, epoch=epoch)
        at_least(0, alpha=alpha)
        features, shape = backbone.out_features, backbone.input_shape
        self.instance = Normalized(features, hidden)
        self.context = ContextNetwork(hidden, context)
        self.inference = InferenceNetwork(features, context, latents, hidden, layers)
        self.prior = LatentPrior(context, latents, hidden, layers)
        if len(shape) == 3:
            decoder = BernoulliDecoder(shape, context, latents, hidden, widths, convs)
            self.decoder = decoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        else:
            self.decoder = GaussianDecoder(shape[0], context, latents, hidden, layers)
        self.apply(initialize)
        self.alpha, self.epoch, self.stochastic = alpha, epoch, stochastic

    @property
    def weight(self) -> float:
        """w = 1 + α at the present meta-update."""
        return 1 + self.alpha * 0.5 ** (self.meta_updates // self.epoch)

    @property
    def embedding_size(self) -> int:
        return self.context.latents

    def embed(self, x: Tensor) -> Tensor:
        """What the statistic network pools, (N, hidden), of inputs (N, *input)."""
        return self.instance(self.backbone(x))

    def summarize(self, z: Tensor, support: Support) -> Gaussian:
        """q(c | D_k) of each class, (ways, context)."""
        return self.context(class_means(z, support))

    def compare(self, summary: Gaussian, z: Tensor) -> Tensor:
        return -summary.kl(self.context(z)[:, None])

    def embed_task(self, support: Support) -> Tensor:
        """The mean of q(c | D), (context,), D being all of the support set."""
        with normalize_by(self.statistics_source):
            z = self.embed(support.x)
            # With those of the classes, since batch norm by the batch's own statistics needs more than one set.
            sets = torch.cat([class_means(z, support), z.mean(0, keepdim=True)])
            return self.context(sets).mean[-1]

    def draw(self, q: Gaussian) -> Tensor:
        """A sample of each row."""
        return q.sample(standard_normal(q.mean)) if self.stochastic else q.mean

    def bound(self, h: Tensor, z: Tensor, sets: Support) -> tuple[Tensor, Tensor, Tensor]:
        """The parts of the evidence lower bound (eq. 7) of sets, with one sample of c and of each z.

        Args:
            h: features of the examples, (N, features).
            z: what the statistic network pools of them, (N, hidden).
            sets: the examples and which set each belongs to.

        Returns:
            log p(x | c, z) (N,), KL(q(c | D) ‖ p(c)) (sets,) and KL(q(z | c, x) ‖ p(z | c)) (N,), nats.
        """
        q_c = self.summarize(z, sets)
        c = self.draw(q_c)
        q_z = self.inference(h, c[sets.y])
        fit = self.decoder.log_likelihood(sets.x, self.draw(q_z), c[sets.y])
        return fit, q_c.kl(), q_z.kl(self.prior(c)[sets.y])

    def objective(self, task: Task) -> tuple[Any, ...]:
        support = task.support
        sets = Support(torch.cat([support.x, task.query_x]), torch.cat([support.y, task.query_y]), support.ways)
        with normalize_by(self.statistics_source):
            h = self.backbone(sets.x)
            z = self.instance(h)
            fit, context_kl, latent_kl = self.bound(h, z, sets)
            with torch.no_grad(), recording(None):
                prediction = self.compare(self.summarize(z[: len(support.y)], support), z[len(support.y) :])
        reconstruction, kl = fit.mean(), (context_kl.sum() + latent_kl.sum()) / len(sets.y)
        metrics = {
            "elbo": reconstruction - kl,
            "reconstruction": reconstruction,
            "context_kl": context_kl.mean(),
            "latent_kl": latent_kl.mean(),
        }
        loss = -(self.weight * reconstruction - kl / self.weight)
        return loss, prediction, {"metrics": {name: value.detach() for name, value in metrics.items()}}

    def generate(self, c: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """An example (n, *input) of each context (n, context): a mean of p(x | c, z) of images, a sample of vectors."""
        p_z = self.prior(c)
        return self.decoder.example(p_z.sample(standard_normal(p_z.mean, rng)), c, rng)

    def generated_images(self, support: Support, count: int) -> Tensor | None:
        """Of the classes in turn, whose contexts are the means of q(c | D_k)."""
        if len(support.x.shape) != 4:
            return None
        with normalize_by(self.statistics_source):
            c = self.summarize(self.embed(support.x), support).mean
            c = c[torch.arange(count, device=c.device) % support.ways]
            return self.generate(c, np.random.default_rng(0)).to(support.x.dtype)  # the same at every call
