"""Probabilistic task modelling: a task as proportions of themes, which are Gaussians over latents of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import ContinuousBernoulli, Dirichlet, kl_divergence

from datamodules.core.episodes import Episodes, Support, Task
from datamodules.core.errors import at_least
from datamodules.core.metric import Metric
from models.core.embedding_learner import EmbeddingLearner
from models.core.inner_loop import class_means
from models.core.learner import Paper
from models.networks.backbones import Backbone
from models.networks.batch_norm import normalize_by
from models.networks.gaussians import Gaussian, standard_normal
from models.networks.generator import Generator
from models.task_embedding.themes import Themes


class ProbabilisticTaskModel(EmbeddingLearner):
    """A variational autoencoder of images whose prior is a mixture of themes, in a task's own proportions.

    A task's embedding is the mean of the Dirichlet posterior of its proportions, which a few variational steps find for
    each task (E-step). Encoder and decoder descend the negative evidence lower bound of the queries, given the
    support set's posterior, and the loss of a nearest-class-mean classifier of sampled latents. The themes follow by
    an online M-step. Queries are classified by the distance of mean latents from class means.

    The entropy of a task's posterior says how sure it is, and ``theme_divergence`` how far from the mean training task.

    Args:
        backbone: h(x), of images, before the linear layer to q(u | x).
        latents: dimensions of u.
        themes: K.
        concentration: α, of each theme's share a priori.
        steps: of the E-step.
        theme_rate: the step of the online M-step per meta-update.
        kl_weight: of the divergence from the mixture, which counts per image and, like reconstruction, per pixel.
        label_weight: of the classifier's loss; 0 learns without labels.
        widths: channels of the decoder before each transposed convolution, the last one first.
        stochastic: draw u in training; False takes its mean.
        **others: see EmbeddingLearner.
    """

    paper = Paper(
        "Nguyen, Do and Carneiro",
        "Probabilistic Task Modelling for Meta-Learning",
        "UAI",
        2021,
        "https://arxiv.org/abs/2106.04802",
    )
    own_metrics = {
        "reconstruction": Metric("lower", "reconstruction loss (nats per pixel)"),
        "mixture_kl": Metric(label="divergence from the mixture (nats per image)"),
        "label_loss": Metric("lower", "classifier's loss (nats)"),
        "theme_entropy": Metric(label="entropy of the theme posterior (nats)"),
        "theme_divergence": Metric(label="KL from the mean training task (nats)"),
    }
    usual: Tensor
    counted: Tensor

    def __init__(
        self,
        backbone: Backbone,
        latents: int = 64,
        themes: int = 8,
        concentration: float = 1.1,
        steps: int = 5,
        theme_rate: float = 1e-3,
        kl_weight: float = 0.1,
        label_weight: float = 1.0,
        widths: tuple[int, ...] = (8, 16, 32, 64),
        stochastic: bool = True,
        **others: Any,
    ) -> None:
        super().__init__(backbone, **others)
        at_least(1, latents=latents, themes=themes, steps=steps, **{f"widths[{i}]": w for i, w in enumerate(widths)})
        if not concentration > 0:
            raise ValueError(f"concentration is {concentration} but must be above 0")
        if not 0 <= theme_rate <= 1:
            raise ValueError(f"theme_rate is {theme_rate} but must be between 0 and 1")
        if len(backbone.input_shape) != 3:
            raise ValueError(f"images are reconstructed, but the backbone's input has the shape {backbone.input_shape}")
        self.latent = nn.Linear(backbone.out_features, 2 * latents)
        self.decoder = Generator(backbone.input_shape, list(widths), latents)
        self.themes = Themes(themes, latents, concentration, steps)
        self.theme_rate, self.kl_weight, self.label_weight = theme_rate, kl_weight, label_weight
        self.stochastic = stochastic
        # The mean of the normalised posteriors of training tasks, over so many meta-updates.
        self.register_buffer("usual", torch.full((themes,), 1 / themes))
        self.register_buffer("counted", torch.tensor(0))

    @property
    def embedding_size(self) -> int:
        return len(self.usual)

    def embed(self, x: Tensor) -> Tensor:
        """Means and log-variances of q(u | x), (N, 2 · latents)."""
        return self.latent(self.backbone(x))

    def embeddings(self, x: Tensor) -> Tensor:
        return self.embed(x).chunk(2, -1)[0]

    def summarize(self, z: Tensor, support: Support) -> Tensor:
        return class_means(z.chunk(2, -1)[0], support)

    def compare(self, summary: Tensor, z: Tensor) -> Tensor:
        return self.classify(summary, z.chunk(2, -1)[0])

    def classify(self, means: Tensor, u: Tensor) -> Tensor:
        """Logits (Q, ways): minus the distances, not squared, of latents from class means."""
        return -torch.cdist(u, means, compute_mode="donot_use_mm_for_euclid_dist")

    def posterior(self, support: Support) -> Tensor:
        """γ of the task's proportions of themes, (K,), from its support set."""
        with normalize_by(self.statistics_source):
            q = Gaussian.of(self.embed(support.x))
        return self.themes.infer(self.themes.scores(q))

    def embed_task(self, support: Support) -> Tensor:
        """The mean proportions of themes, (K,)."""
        posterior = self.posterior(support)
        return posterior / posterior.sum()

    def theme_metrics(self, posterior: Tensor) -> dict[str, Tensor]:
        """How sure a task's proportions are, and how unusual: the mean training task counts with as many examples."""
        q, usual = (Dirichlet(p, validate_args=False) for p in (posterior, posterior.sum() * self.usual))
        return {"theme_entropy": q.entropy(), "theme_divergence": kl_divergence(q, usual)}

    def task_metrics(self, batch: Episodes) -> dict[str, Tensor]:
        return self.map(lambda task: self.theme_metrics(self.posterior(task.support)), batch)

    def draw(self, q: Gaussian) -> Tensor:
        return q.sample(standard_normal(q.mean)) if self.stochastic else q.mean

    def objective(self, task: Task) -> tuple[Any, ...]:
        support, shots = task.support, len(task.support.y)
        with normalize_by(self.statistics_source):
            q = Gaussian.of(self.embed(torch.cat([support.x, task.query_x])))
        known, asked = q[:shots], q[shots:]
        u = self.draw(q)
        logits = self.decoder.logits(u[shots:].to(support.x.dtype))
        with torch.autocast(logits.device.type, enabled=False):
            fit = ContinuousBernoulli(logits=logits.to(u.dtype), validate_args=False)
            reconstruction = -fit.log_prob(task.query_x.to(u.dtype)).mean()
            prediction = self.classify(class_means(u[:shots], support), u[shots:])
            label_loss = self.loss(prediction, task.query_y)
            posterior = self.themes.infer(self.themes.scores(known))
            scores = self.themes.scores(asked)
            log_r = self.themes.log_responsibilities(scores, posterior)
            entropy = asked.entropy().mean()
            mixture_kl = -self.themes.bound(scores, log_r, posterior) / len(u[shots:]) - entropy
        loss = reconstruction + self.kl_weight / task.query_x[0].numel() * mixture_kl + self.label_weight * label_loss
        with torch.no_grad():
            mean, covariance = self.themes.maximize(asked, log_r)
            metrics = {"reconstruction": reconstruction, "mixture_kl": mixture_kl, "label_loss": label_loss}
            metrics |= self.theme_metrics(posterior)
        kept = {"mean": mean, "covariance": covariance, "usual": posterior / posterior.sum()}
        return loss, prediction, kept | {"metrics": {name: value.detach() for name, value in metrics.items()}}

    def update_from_tasks(self, values: dict[str, Any]) -> None:
        """Move the themes, and what is usual, by a meta-batch: the same on all processes, and all in the checkpoint."""
        self.themes.move(values["mean"], values["covariance"], self.theme_rate)
        self.counted += 1
        self.usual.lerp_(values["usual"].to(self.usual), 1.0 / int(self.counted))
