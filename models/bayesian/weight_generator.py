"""A generator of classifiers: noise in, the weights of a task's classifier out."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from datamodules.core.episodes import Support, Task
from datamodules.core.errors import at_least
from datamodules.core.metric import Metric
from models.core.inner_loop import Adapted, adapted, class_means, query, task_features
from models.core.learner import MetaLearner, Paper
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNormMode, normalize_by

SEED = 0  # of the noise in evaluation


class Classifiers(NamedTuple):
    """Draws of one task's classifier.

    Attributes:
        weights: (samples, ways, features + 1), the biases last.
        log_weight: (samples,), of each draw in the predictive distribution; their exponentials sum to 1.
        backbone: what batch norm needs of the support set.
    """

    weights: Tensor
    log_weight: Tensor
    backbone: Adapted


class WeightGenerator(MetaLearner):
    """Generates classifiers: p(y|x, D) = E p(y | φ(x), g(z)) over noise z; features φ and generator g learn jointly.

    The output of g is the classifier: each class has noise z of its own and gets its weights and bias by g(z). A task
    is learned by inference of z, without gradients: an encoder, which the order of support set and classes does not
    matter to, gives q(z|D); several draws are averaged in probability, equally or by how well each explains the support
    set. Meta-training minimises the queries' negative log-likelihood under that average, and KL(q(z|D) ‖ N(0, I)).

    This has no single paper. Nearest is VERSA, whose amortised posterior is over the weights themselves (here
    over the generator's noise), with no divergence (``kl_weight`` 0); networks that make weights of noise are those of
    Krueger et al. (Bayesian Hypernetworks, arXiv 2017).

    Args:
        backbone: φ.
        latents: dimensions of a class's noise.
        hidden: units of each hidden layer, of encoder and generator.
        samples: draws of the noise in meta-training.
        eval_samples: draws in evaluation, the same noise for every task.
        weighting: what a draw weighs. "uniform": all alike, Monte Carlo over q. "likelihood": p(D|z) of the support
            set. "importance": p(D|z) p(z) / q(z|D), of the exact posterior under the prior N(0, I).
        kl_weight: of KL(q ‖ N(0, I)), nats, all classes together, against a task's queries together; 1 makes the bound.
        conditional: draw from q; otherwise from N(0, I), where only ``weighting`` adapts: importance sampling.
        stochastic: draw; otherwise take the mean of q, or of the prior.
        batch_norm, **others: see MetaLearner.
    """

    paper = Paper(
        "Gordon, Bronskill, Bauer, Nowozin and Turner",
        "Meta-Learning Probabilistic Inference for Prediction",
        "ICLR",
        2019,
        "https://openreview.net/forum?id=HkxStoC5F7",
    )
    tasks = frozenset({"classification"})

    own_metrics = {"kl": Metric()}

    def __init__(
        self,
        backbone: Backbone,
        latents: int = 64,
        hidden: int = 128,
        samples: int = 10,
        eval_samples: int = 20,
        weighting: Literal["uniform", "likelihood", "importance"] = "uniform",
        kl_weight: float = 0.01,
        conditional: bool = True,
        stochastic: bool = True,
        batch_norm: BatchNormMode = "running",
        **others: Any,
    ) -> None:
        super().__init__(batch_norm=batch_norm, **others)
        at_least(1, latents=latents, hidden=hidden, samples=samples, eval_samples=eval_samples)
        self.backbone, features = backbone, backbone.out_features
        self.latents, self.samples, self.eval_samples = latents, samples, eval_samples
        self.weighting: Literal["uniform", "likelihood", "importance"] = weighting
        self.kl_weight, self.stochastic = kl_weight, stochastic
        self.examples = self.posterior = None
        if conditional:
            self.examples = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
            self.posterior = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latents))
        self.generator = nn.Sequential(
            *(nn.Linear(latents, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()),
            nn.Linear(hidden, features + 1),
        )

    def encode(self, x: Tensor, support: Support) -> Normal:
        """q(z|D) (ways, latents) by features (S, features): of a class's mean code, and the mean of all classes'."""
        if self.examples is None or self.posterior is None:
            prior = x.new_zeros(support.ways, self.latents, dtype=torch.promote_types(x.dtype, torch.float32))
            return Normal(prior, torch.ones_like(prior), validate_args=False)
        codes = class_means(self.examples(x), support)
        task = codes.mean(0, keepdim=True).expand_as(codes)
        made = self.posterior(torch.cat([codes, task], -1))
        mean, log_deviation = made.to(torch.promote_types(made.dtype, torch.float32)).chunk(2, -1)
        return Normal(mean, log_deviation.exp(), validate_args=False)

    def noise(self, x: Tensor, support: Support, like: Tensor) -> Tensor:
        """Standard normal noise (samples, ways, latents); in evaluation a function of the support set alone."""
        if not self.stochastic:
            return torch.zeros_like(like)[None]
        if self.training:
            return torch.randn_like(like.expand(self.samples, *like.shape))
        generator = torch.Generator(like.device).manual_seed(SEED)
        shape = (self.eval_samples, *like.shape)
        drawn = torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)
        # The noise of a class goes by the rank of its features, not by its number: names of classes must not matter.
        return drawn[:, class_means(x, support).sum(1).argsort().argsort()]

    def log_p(self, x: Tensor, weights: Tensor) -> Tensor:
        """Log-probabilities (samples, N, ways) of features (N, features) under every classifier."""
        x = x.to(weights.dtype)
        logits = torch.einsum("nf,swf->snw", x, weights[..., :-1]) + weights[:, None, :, -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def generate(self, x: Tensor, support: Support, q: Normal) -> tuple[Tensor, Tensor]:
        """Classifiers (samples, ways, features + 1), and the log-weight (samples,) of each."""
        z = q.mean + q.stddev * self.noise(x, support, q.mean)
        weights = self.generator(z.to(next(self.generator.parameters()).dtype)).to(z.dtype)
        score = z.new_zeros(len(z))
        if self.weighting != "uniform":
            score = self.log_p(x, weights)[:, torch.arange(len(x)), support.y].sum(1)
        if self.weighting == "importance":
            score = score + (Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)).sum((1, 2))
        return weights, score.log_softmax(0)

    def predictive(self, x: Tensor, weights: Tensor, log_weight: Tensor) -> Tensor:
        """Log-probabilities (N, ways) of features (N, features): the mean of the draws' probabilities."""
        return (self.log_p(x, weights) + log_weight[:, None, None]).logsumexp(0)

    def adapt(self, support: Support) -> Classifiers:
        with normalize_by(self.statistics_source):
            x = self.backbone(support.x)
        drawn = self.generate(x, support, self.encode(x, support))
        return Classifiers(*drawn, adapted(self.backbone, {}, support, self.batch_norm))

    def predict(self, state: Classifiers, query_x: Tensor) -> Tensor:
        x = query(self.backbone, state.backbone, query_x, self.statistics_source)
        return self.predictive(x, state.weights, state.log_weight)

    def objective(self, task: Task) -> tuple[Any, ...]:
        x, query_x = task_features(self.backbone, task, self.batch_norm, self.statistics_source)
        q = self.encode(x, task.support)
        prediction = self.predictive(query_x, *self.generate(x, task.support, q))
        divergence = kl_divergence(q, Normal(0.0, 1.0)).sum() if self.stochastic else q.mean.new_zeros(())
        loss = self.loss(prediction, task.query_y) + self.kl_weight * divergence / len(task.query_y)
        return loss, prediction, {"metrics": {"kl": divergence.detach()}}
