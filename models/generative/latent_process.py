"""A latent of the whole function, sampled to predict: what neural processes with and without attention share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from datamodules.core.episodes import Support, Task
from datamodules.core.errors import at_least
from datamodules.core.metric import Metric
from models.core.predictions import Mixture
from models.generative.process_learner import ProcessLearner, gaussians, of_last
from models.generative.set_networks import Decoder

SEED = 0  # of the noise in evaluation
Bound = Literal["importance", "elbo"]


class Process(NamedTuple):
    """What is known of one task.

    Attributes:
        z: samples of the latent, (M, latents).
        kept: what the deterministic path keeps of the support set.
    """

    z: Tensor
    kept: Sequence[Tensor]


class LatentProcess(ProcessLearner):
    """p(y* | x*, C) = E p(y* | x*, z, r(x*, C)) over z from q(z|C), the latent of the function; r is deterministic.

    Meta-training samples z from the posterior that also saw the queries T, and maximises a bound on log p(y | C):
    "elbo", E log p(y|z) - KL(q(z|C ∪ T) ‖ q(z|C)) (Garnelo et al., eq. 9); or "importance", the log of the mean over
    samples of p(y|z) q(z|C) / q(z|C ∪ T), which is tighter, and is what the published results on Gaussian processes
    were trained by. A prediction is the mixture over samples from q(z|C), in evaluation by noise that is the same for
    every task. The mean of q(z|C) is the task's embedding.

    An algorithm makes ``latent``, from points to q, and overrides ``keep`` and ``codes``.

    Args:
        inputs, outputs: see ProcessLearner.
        codes: numbers of r; 0 without a deterministic path.
        hidden: units of the decoder's layers.
        latents: dimensions of z.
        decoder_layers: of the decoder.
        bound: what meta-training maximises.
        samples: of z in meta-training.
        eval_samples: in evaluation.
        stochastic: sample; otherwise take the mean of q.
        least_deviation: of the values: σ is this + (1 - this) · softplus.
        **others: see ProcessLearner.
    """

    latent: nn.Module
    own_metrics = {"kl": Metric(label="divergence of the latent with queries and without (nats)")}

    def __init__(
        self,
        inputs: int,
        outputs: int,
        codes: int,
        hidden: int,
        latents: int,
        decoder_layers: int,
        bound: Bound = "importance",
        samples: int = 4,
        eval_samples: int = 50,
        stochastic: bool = True,
        least_deviation: float = 0.1,
        **others: Any,
    ) -> None:
        super().__init__(inputs, outputs, **others)
        at_least(1, hidden=hidden, latents=latents, samples=samples, eval_samples=eval_samples)
        at_least(2, decoder_layers=decoder_layers)
        self.latents, self.samples, self.eval_samples = latents, samples, eval_samples
        self.stochastic, self.least_deviation = stochastic, least_deviation
        self.bound: Bound = bound
        self.decoder = Decoder(codes + latents, inputs, 2 * outputs, hidden, decoder_layers)

    def keep(self, support: Support) -> Sequence[Tensor]:
        """What the deterministic path keeps of a support set."""
        raise NotImplementedError

    def codes(self, kept: Sequence[Tensor], query_x: Tensor) -> Sequence[Tensor]:
        """What it says about queries (Q, inputs): codes that broadcast to (M, Q, n) each, side by side."""
        raise NotImplementedError

    @property
    def embedding_size(self) -> int:
        return self.latents

    def embed_task(self, support: Support) -> Tensor:
        return self.latent(support.x, support.y).mean

    def sample(self, q: Normal) -> Tensor:
        """Samples (M, latents)."""
        if not self.stochastic:
            return q.mean[None]
        if self.training:
            return q.mean + q.stddev * torch.randn_like(q.mean.expand(self.samples, -1))
        generator = torch.Generator(q.mean.device).manual_seed(SEED)
        shape = (self.eval_samples, self.latents)
        return q.mean + q.stddev * torch.randn(shape, generator=generator, device=q.mean.device, dtype=q.mean.dtype)

    def decode(self, z: Tensor, kept: Sequence[Tensor], query_x: Tensor) -> Mixture:
        """The values at queries (Q, inputs) by each sample (M, latents)."""
        return gaussians(self.decoder([*self.codes(kept, query_x), z[:, None]], query_x), self.least_deviation)

    def adapt(self, support: Support) -> Process:
        return Process(self.sample(self.latent(support.x, support.y)), self.keep(support))

    def predict(self, state: Process, query_x: Tensor) -> Mixture:
        return self.decode(state.z, state.kept, query_x)

    def objective(self, task: Task) -> tuple[Any, ...]:
        support = task.support
        prior = self.latent(support.x, support.y)
        posterior = self.latent(torch.cat([support.x, task.query_x]), torch.cat([support.y, task.query_y]))
        x, y = self.scored(task)
        z = self.sample(posterior)
        prediction = self.decode(z, self.keep(support), x)
        log_p = prediction.log_densities(y).sum(-1)
        divergence = kl_divergence(posterior, prior).sum()
        match self.bound:
            case "elbo":
                bound = log_p.mean() - divergence
            case "importance":
                bound = importance_bound(log_p, z, posterior, prior)
        return -bound / len(y), of_last(prediction, len(task.query_y)), {"metrics": {"kl": divergence.detach()}}


def importance_bound(log_p: Tensor, z: Tensor, posterior: Normal, prior: Normal) -> Tensor:
    """log of the mean of p(y|z) q(z|C) / q(z|C ∪ T) over samples of the posterior (Burda et al., ICLR 2016, eq. 8).

    Args:
        log_p: log p(y|z) of each sample, (M,).
        z: the samples, (M, latents).
        posterior, prior: q(z|C ∪ T) and q(z|C).
    """
    log_weight = log_p + (prior.log_prob(z) - posterior.log_prob(z)).sum(-1)
    return log_weight.logsumexp(0) - math.log(len(z))
