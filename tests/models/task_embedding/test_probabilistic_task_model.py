"""Themes of tasks against scikit-learn's mixtures, SciPy's Dirichlet distribution and restatements in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats
from sklearn.mixture import GaussianMixture
from torch import Tensor

from datamodules.core.episodes import Support
from models import Conv4, ProbabilisticTaskModel
from models.networks.batch_norm import normalize_by
from models.networks.gaussians import Gaussian
from models.task_embedding.themes import Themes
from tests.support.gradients import assert_equals_finite_differences, episodes

DOUBLE = torch.float64
K, D, N = 3, 2, 40


def themes(concentration: float = 1.1, steps: int = 5) -> Themes:
    """Three themes with correlated covariances."""
    g = torch.Generator().manual_seed(0)
    made = Themes(K, D, concentration, steps).double()
    made.mean.copy_(torch.randn(K, D, generator=g, dtype=DOUBLE) * 2)
    root = torch.randn(K, D, D, generator=g, dtype=DOUBLE)
    made.covariance.copy_(root @ root.mT + 0.3 * torch.eye(D, dtype=DOUBLE))
    return made


def latents(variance: float | None = None, examples: int = N) -> Gaussian:
    """q(u) of examples: of variances between 0.05 and 1, or of one."""
    g = torch.Generator().manual_seed(1)
    mean = torch.randn(examples, D, generator=g, dtype=DOUBLE) * 2
    of = torch.rand(examples, D, generator=g, dtype=DOUBLE) * 0.95 + 0.05
    return Gaussian(mean, (of if variance is None else torch.full_like(of, variance)).log())


def mixture(made: Themes, shares: np.ndarray) -> GaussianMixture:
    """Of scikit-learn, with the themes as its parts."""
    of = GaussianMixture(K)
    of.weights_, of.means_, of.covariances_ = shares, made.mean.numpy(), made.covariance.numpy()
    of.precisions_cholesky_ = np.linalg.cholesky(np.linalg.inv(of.covariances_))
    return of


def small(**settings) -> ProbabilisticTaskModel:
    torch.manual_seed(0)
    settings = {"latents": 3, "themes": K, "widths": (3, 4), "stochastic": False} | settings
    return ProbabilisticTaskModel(Conv4(hidden=4, image_size=8), batch_norm="none", **settings).double()


def test_responsibilities_are_those_of_a_mixture():
    """Catches a covariance that is not inverted, a missing determinant, and a sum over examples for one over themes:
    with latents that are known exactly, and a posterior so narrow that proportions are, the E-step is
    scikit-learn's."""
    made, q = themes(), latents(1e-12)
    shares = np.array([0.5, 0.2, 0.3])
    log_r = made.log_responsibilities(made.scores(q), torch.from_numpy(shares) * 1e9)
    np.testing.assert_allclose(log_r.exp(), mixture(made, shares).predict_proba(q.mean.numpy()), rtol=1e-7, atol=1e-12)


def test_scores_are_expectations_over_the_latents():
    """Catches a trace of covariances in place of one with the precision: the expectation by numerical integration."""
    made, q = themes(), latents(examples=2)
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    for n in range(2):
        mean, sd = q.mean[n].numpy(), (q.log_variance[n] / 2).exp().numpy()
        for k in range(K):
            of = stats.multivariate_normal(made.mean[k].numpy(), made.covariance[k].numpy())
            expected = sum(
                a * b * of.logpdf(mean + sd * [x, y])
                for x, a in zip(nodes, weights, strict=True)
                for y, b in zip(nodes, weights, strict=True)
            ) / (2 * np.pi)
            assert made.scores(q)[n, k].item() == pytest.approx(expected, rel=1e-9)


def restated_e_step(made: Themes, q: Gaussian, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """γ and r, example by example."""
    mean, variance = q.mean.numpy(), q.log_variance.exp().numpy()
    gamma = np.full(K, made.concentration + len(mean) / K)
    r = np.zeros((len(mean), K))
    for _ in range(steps):
        for n in range(len(mean)):
            for k in range(K):
                sigma = made.covariance[k].numpy()
                score = stats.multivariate_normal(made.mean[k].numpy(), sigma).logpdf(mean[n])
                score -= np.trace(np.linalg.inv(sigma) @ np.diag(variance[n])) / 2
                r[n, k] = np.exp(score + special.digamma(gamma[k]) - special.digamma(gamma.sum()))
            r[n] /= r[n].sum()
        gamma = made.concentration + r.sum(0)
    return gamma, r


def test_the_e_step_equals_its_restatement_and_the_m_step_scikit_learns():
    """Catches a γ that forgets α or starts elsewhere, one step too few, and means or covariances that are weighed by
    responsibilities that do not sum to 1 for each theme."""
    made, q = themes(), latents()
    gamma, _ = restated_e_step(made, q, 5)
    np.testing.assert_allclose(made.infer(made.scores(q)), gamma, rtol=1e-9)
    uneven = torch.tensor([1.0, -2.0, 4.0], dtype=DOUBLE).expand(7, K)  # of one step, from an even start
    first = special.softmax(np.array([1.0, -2.0, 4.0]))
    np.testing.assert_allclose(themes(steps=1).infer(uneven), 1.1 + 7 * first, rtol=1e-9)
    exact = latents(1e-12)
    log_r = made.log_responsibilities(made.scores(exact), torch.ones(K, dtype=DOUBLE) * 1e9)
    fitted = mixture(made, np.full(K, 1 / K))
    fitted.reg_covar, fitted.covariance_type = 0.0, "full"
    fitted._m_step(exact.mean.numpy(), log_r.numpy())
    mean, covariance = made.maximize(exact, log_r)
    np.testing.assert_allclose(mean, fitted.means_, rtol=1e-8)
    np.testing.assert_allclose(covariance, fitted.covariances_, rtol=1e-6, atol=1e-8)
    # The latents' own variances are on top: of latents that are known to a variance of 0.5, by the same shares.
    _, more = made.maximize(Gaussian(exact.mean, torch.full_like(exact.mean, 0.5).log()), log_r)
    np.testing.assert_allclose(more - covariance, np.broadcast_to(0.5 * np.eye(D), (K, D, D)), atol=1e-9)


def test_the_e_step_climbs_the_bound():
    """Catches an update that is not the maximum of the bound over its part, or a bound of another model: no other γ and
    no other r is better than those that the E-step ends with, and the bound is below the marginal likelihood, by
    integration over the proportions."""
    made, q = themes(steps=200), latents(1e-12, examples=4)
    scores = made.scores(q)
    gamma = made.infer(scores)
    log_r = made.log_responsibilities(scores, gamma)
    best = made.bound(scores, log_r, gamma)
    g = torch.Generator().manual_seed(2)
    for _ in range(20):
        other = gamma * (0.2 * torch.randn(K, generator=g, dtype=DOUBLE)).exp()
        worse = (log_r + 0.3 * torch.randn(log_r.shape, generator=g, dtype=DOUBLE)).log_softmax(-1)
        assert made.bound(scores, log_r, other) < best
        assert made.bound(scores, worse, gamma) < best
    density = scores.exp().numpy()

    def joint(b: float, a: float) -> float:
        shares = np.array([a, b, max(1 - a - b, 1e-300)])
        return float(np.prod(density @ shares) * stats.dirichlet.pdf(shares / shares.sum(), np.full(K, 1.1)))

    marginal = np.log(integrate.dblquad(joint, 0, 1, 0, lambda a: 1 - a, epsabs=1e-10, epsrel=1e-6)[0])
    assert marginal - 1.0 < best.item() < marginal


def test_entropy_and_divergence_of_a_task_equal_scipys_and_an_integral():
    """Catches the KL the other way around, one of other concentrations, and an entropy of the mean proportions."""
    learner = small()
    learner.usual.copy_(torch.tensor([0.5, 0.3, 0.2]))
    gamma = torch.tensor([1.5, 3.0, 2.2], dtype=DOUBLE)
    got = learner.theme_metrics(gamma)
    assert got["theme_entropy"].item() == pytest.approx(stats.dirichlet.entropy(gamma.numpy()), rel=1e-10)
    q, p = gamma.numpy(), 6.7 * np.array([0.5, 0.3, 0.2])
    samples = np.random.default_rng(0).dirichlet(q, 200_000).T
    estimates = stats.dirichlet.logpdf(samples, q) - stats.dirichlet.logpdf(samples, p)
    error = estimates.std() / len(estimates) ** 0.5
    assert got["theme_divergence"].item() == pytest.approx(estimates.mean(), abs=5 * error)
    learner.usual.copy_(gamma / gamma.sum())
    assert learner.theme_metrics(gamma)["theme_divergence"].item() == pytest.approx(0, abs=1e-12)


def encoded(learner: ProbabilisticTaskModel, x: Tensor) -> Gaussian:
    with torch.no_grad(), normalize_by("none"):
        return Gaussian(*learner.latent(learner.backbone(x)).chunk(2, -1))


def test_the_embedding_is_the_mean_of_the_posterior():
    """Catches a γ that is not normalised, or of too few images, and one that the order of images changes."""
    learner, s = small().eval(), episodes(tasks=1)[0].support
    learner.themes.mean.mul_(100)
    with torch.no_grad():
        got = learner.embed_task(s)
        again = learner.embed_task(Support(s.x.flip(0), s.y.flip(0), 3))
    gamma, _ = restated_e_step(learner.themes, encoded(learner, s.x), 5)
    assert learner.embedding_size == K
    np.testing.assert_allclose(got, gamma / gamma.sum(), rtol=1e-8)
    torch.testing.assert_close(got, again, rtol=1e-9, atol=1e-12)
    assert got.std() > 1e-3


def test_the_objective_is_restated():
    """Catches a divergence that is not per image and pixel, queries that are scored by the support set's
    responsibilities, a squared distance, and a likelihood that is not normalised over grey values."""
    learner, task = small(kl_weight=0.7, label_weight=0.3), episodes(tasks=1, shots=2, queries=3)[0]
    learner.themes.mean.mul_(100)
    loss, prediction, kept = learner.objective(task)
    known, asked = encoded(learner, task.support.x), encoded(learner, task.query_x)
    means = torch.stack([known.mean[task.support.y == k].mean(0) for k in range(3)])
    distance = (asked.mean[:, None] - means).square().sum(-1).sqrt()
    torch.testing.assert_close(prediction.detach(), -distance, rtol=1e-8, atol=1e-9)
    label_loss = -prediction.detach().log_softmax(-1)[torch.arange(9), task.query_y].mean()
    # λ^x (1 - λ)^(1 - x) 2 artanh(1 - 2 λ) / (1 - 2 λ), of Loaiza-Ganem and Cunningham (NeurIPS 2019).
    p = learner.decoder(asked.mean).detach()
    normaliser = 2 * torch.atanh(1 - 2 * p) / (1 - 2 * p)
    density = p**task.query_x * (1 - p) ** (1 - task.query_x) * normaliser
    gamma, _ = restated_e_step(learner.themes, known, 5)
    mean, variance = asked.mean.numpy(), asked.log_variance.exp().numpy()
    score = np.empty((9, K))
    for k in range(K):
        sigma = learner.themes.covariance[k].numpy()
        score[:, k] = stats.multivariate_normal(learner.themes.mean[k].numpy(), sigma).logpdf(mean)
        score[:, k] -= (variance @ np.diag(np.linalg.inv(sigma))) / 2
    score += special.digamma(gamma) - special.digamma(gamma.sum())
    r = special.softmax(score, 1)
    alpha = np.full(K, 1.1)
    divergence = special.gammaln(gamma.sum()) - special.gammaln(alpha.sum())
    divergence += (special.gammaln(alpha) - special.gammaln(gamma)).sum()
    divergence += ((gamma - alpha) * (special.digamma(gamma) - special.digamma(gamma.sum()))).sum()
    entropy = stats.norm(scale=np.sqrt(variance)).entropy().sum(1).mean()
    mixture_kl = -((r * (score - np.log(r))).sum() - divergence) / 9 - entropy
    got = {name: value.item() for name, value in kept["metrics"].items()}
    assert got["label_loss"] == pytest.approx(label_loss.item(), rel=1e-9)
    assert got["reconstruction"] == pytest.approx(-density.log().mean().item(), rel=1e-4)  # torch expands around 1/2
    assert got["mixture_kl"] == pytest.approx(mixture_kl, rel=1e-8)
    expected = got["reconstruction"] + 0.7 / 64 * mixture_kl + 0.3 * label_loss.item()
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(kept["usual"].detach(), gamma / gamma.sum(), rtol=1e-8)
    share = r / r.sum(0)
    np.testing.assert_allclose(kept["mean"], share.T @ mean, rtol=1e-7)


def test_themes_follow_at_their_rate():
    """Catches a step towards the last task alone, and a mean of what is usual that forgets its first tasks."""
    learner = small(theme_rate=0.25)
    before = {n: b.clone() for n, b in learner.named_buffers()}
    g = torch.Generator().manual_seed(5)
    seen = []
    for _ in range(3):
        seen.append(torch.rand(K, generator=g, dtype=DOUBLE).softmax(0))
        learner.update_from_tasks(
            {"mean": torch.ones(K, 3).double(), "covariance": torch.eye(3).double().repeat(K, 1, 1), "usual": seen[-1]}
        )
    left = 0.75**3
    torch.testing.assert_close(learner.themes.mean, 1 + left * (before["themes.mean"] - 1))
    torch.testing.assert_close(
        learner.themes.covariance, (1 + left) * torch.eye(3, dtype=DOUBLE).repeat(K, 1, 1), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(learner.usual, torch.stack(seen).mean(0), rtol=1e-12, atol=1e-12)


def test_meta_gradient_equals_finite_differences():
    """Catches an E-step through which no gradient passes, and latents that are cut off."""
    learner = small(kl_weight=5.0, chunk=1)
    learner.themes.mean.mul_(100)
    with torch.no_grad():
        for p in learner.parameters():  # off ReLU's kinks, where dead units with biases of 0 are
            p.add_(0.1 * torch.randn_like(p))
    assert_equals_finite_differences(learner, episodes(tasks=2))
