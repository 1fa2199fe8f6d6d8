"""Task themes: a mixture of Gaussians that tasks share, in proportions of a task's own, as topics of documents."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet, kl_divergence

from models.networks.gaussians import Gaussian


class Themes(nn.Module):
    """K Gaussians over latents u, and the Dirichlet distribution that a task's proportions π come from.

    Of a task's examples, z_n ~ π and u_n ~ N(μ_z, Σ_z). What is known of u_n is a Gaussian too, q(u_n) of an encoder;
    q(z_n) and q(π) = Dir(γ) are the variational posteriors. Nothing here is a parameter.

    Args:
        themes: K.
        latents: dimensions of u.
        concentration: α, of each theme.
        steps: of the E-step.
    """

    mean: Tensor
    covariance: Tensor

    def __init__(self, themes: int, latents: int, concentration: float, steps: int) -> None:
        super().__init__()
        self.concentration, self.steps = concentration, steps
        self.register_buffer("mean", 0.01 * torch.randn(themes, latents))
        self.register_buffer("covariance", 2 * torch.eye(latents).repeat(themes, 1, 1))

    def scores(self, q: Gaussian) -> Tensor:
        """The expectation of log N(u; μ_k, Σ_k) over each q(u_n), (N, K), nats."""
        factor, _ = torch.linalg.cholesky_ex(self.covariance)
        away = (q.mean - self.mean[:, None]).mT  # (K, d, N)
        white = torch.linalg.solve_triangular(factor, away, upper=False).square().sum(1)
        precisions = torch.cholesky_inverse(factor).diagonal(dim1=-2, dim2=-1)
        spread = q.log_variance.exp() @ precisions.T  # tr(Σ⁻¹ S)
        log_determinant = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (white.T + spread + log_determinant + q.mean.shape[-1] * math.log(2 * math.pi))

    def log_responsibilities(self, scores: Tensor, posterior: Tensor) -> Tensor:
        """log q(z_n = k), (N, K), of scores (N, K) and γ (K,)."""
        return (scores + posterior.digamma() - posterior.sum().digamma()).log_softmax(-1)

    def infer(self, scores: Tensor) -> Tensor:
        """The E-step: γ of a task, (K,), from the scores of its examples (N, K)."""
        posterior = torch.full_like(scores[0], self.concentration + scores.shape[0] / scores.shape[1])
        for _ in range(self.steps):
            posterior = self.concentration + self.log_responsibilities(scores, posterior).exp().sum(0)
        return posterior

    def bound(self, scores: Tensor, log_r: Tensor, posterior: Tensor) -> Tensor:
        """The evidence lower bound of a task's latents but for the entropy of q(u), nats."""
        log_share = posterior.digamma() - posterior.sum().digamma()
        prior = Dirichlet(torch.full_like(posterior, self.concentration), validate_args=False)
        of_examples = (log_r.exp() * (scores + log_share - log_r)).sum()
        return of_examples - kl_divergence(Dirichlet(posterior, validate_args=False), prior)

    def maximize(self, q: Gaussian, log_r: Tensor) -> tuple[Tensor, Tensor]:
        """The M-step on one task: the means (K, d) and covariances (K, d, d) of the themes by its examples alone."""
        share = (log_r - log_r.logsumexp(0)).exp().T  # (K, N)
        mean = share @ q.mean
        away = q.mean - mean[:, None]  # (K, N, d)
        between = (away * share[..., None]).mT @ away
        return mean, between + torch.diag_embed(share @ q.log_variance.exp())

    @torch.no_grad()
    def move(self, mean: Tensor, covariance: Tensor, rate: float) -> None:
        """Online: a step of that size towards new means and covariances."""
        self.mean.lerp_(mean.to(self.mean), rate)
        self.covariance.lerp_(covariance.to(self.covariance), rate)
