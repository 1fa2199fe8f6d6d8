"""Neural processes against Bayesian linear regression, where everything is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm
from torch import nn

from datamodules.core.episodes import Support, Task
from models import ANP, NP
from models.generative.latent_process import Process, importance_bound
from models.generative.set_networks import BayesianLatent, PooledLatent

NOISE = 0.5


class Slope(nn.Module):
    """What (x, y) tells of the slope z of y = z x + noise: y / x, with precision x² / σ², before its softplus."""

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        x, y = points.unbind(-1)
        return torch.stack([y / x, torch.log(torch.expm1(x.square() / NOISE**2))], -1)


class Line(nn.Module):
    """z x with the deviation of the noise, for what ``gaussians`` makes of it."""

    def forward(self, codes: Any, x: torch.Tensor) -> torch.Tensor:
        (z,) = codes
        mean = z * x
        return torch.cat([mean, torch.full_like(mean, math.log(math.expm1(NOISE)))], -1)


def linear_gaussian(**settings) -> NP:
    """A neural process whose networks are those of y = z x + noise, z ~ N(0, 1)."""
    settings = {"latents": 1, "hidden": 4, "aggregation": "bayesian", "deterministic": False} | settings
    learner = NP(least_deviation=0.0, reconstruct=False, **settings).double()
    learner.latent.point, learner.decoder = Slope(), Line()
    return learner


def line(shots: int, queries: int = 5, seed: int = 0) -> Task:
    rng = np.random.default_rng(seed)
    x = rng.uniform(0.2, 2, (shots + queries, 1)) * rng.choice([-1, 1], (shots + queries, 1))
    y = rng.normal() * x + NOISE * rng.normal(size=x.shape)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    return Task(Support(x[:shots], y[:shots], 0), x[shots:], y[shots:])


def posterior(x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Mean and variance of the slope by Bayesian linear regression (Bishop, eqs. 3.53 and 3.54)."""
    a, b = x.numpy(), y.numpy()
    variance = float(np.linalg.inv(np.eye(1) + a.T @ a / NOISE**2)[0, 0])
    return variance * float((a.T @ b)[0, 0]) / NOISE**2, variance


def log_evidence(task: Task) -> float:
    """log p of the queries' targets given the support set, in closed form."""
    mean, variance = posterior(task.support.x, task.support.y)
    x = task.query_x.numpy()
    covariance = variance * x @ x.T + NOISE**2 * np.eye(len(x))
    return float(multivariate_normal.logpdf(task.query_y[:, 0], mean * x[:, 0], covariance))


@pytest.mark.parametrize("shots", [1, 3, 40])
def test_linear_gaussian_process_is_bayesian_linear_regression(shots):
    """Catches precisions that are averaged or of the wrong power, a prior that is left out or counted by point, and
    samples or densities of another distribution than the predictive one."""
    learner, task = linear_gaussian(eval_samples=40_000).eval(), line(shots)
    mean, variance = posterior(task.support.x, task.support.y)
    q = learner.latent(task.support.x, task.support.y)
    assert q.mean.item() == pytest.approx(mean, rel=1e-9)
    assert q.variance.item() == pytest.approx(variance, rel=1e-9)
    assert learner.embed_task(task.support).item() == pytest.approx(mean, rel=1e-9)
    prediction = learner.predict(learner.adapt(task.support), task.query_x)
    measured = learner.per_task(prediction, task.query_y)
    x, y = task.query_x[:, 0].numpy(), task.query_y[:, 0].numpy()
    marginal = norm.logpdf(y, mean * x, np.sqrt(variance * x**2 + NOISE**2)).mean()
    assert measured["marginal"].item() == pytest.approx(marginal, abs=0.01)
    assert measured["joint"].item() == pytest.approx(log_evidence(task) / len(y), abs=0.01)


def test_the_latent_becomes_certain_as_points_are_added():
    """Catches an aggregation by the mean of precisions: the variance must fall as 1 / N, the mean find the truth."""
    x = torch.linspace(-2, 2, 4001, dtype=torch.float64)[:-1, None] + 5e-4
    found = []
    for every in (100, 10, 1):
        q = linear_gaussian().latent(x[::every], 1.7 * x[::every])
        found.append(q.variance.item() * len(x[::every]))
        assert abs(q.mean.item() - 1.7) < 2 * q.stddev.item() ** 2 * 1.7
    assert found[2] == pytest.approx(found[1], rel=0.01) and found[1] == pytest.approx(found[0], rel=0.1)


def test_the_published_latent_does_not():
    """Catches an aggregation that knows how many points there are, where the published one does not: twice the same
    points give the same distribution, and no number of them a deviation below 0.1. With a network of each kind."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 1, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    for heads in (0, 2):
        latent = PooledLatent(4, 2, 8, 4, 2, heads).double()
        once, often = latent(x, y), latent(x.repeat(500, 1), y.repeat(500, 1))
        torch.testing.assert_close(once.mean, often.mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(once.stddev, often.stddev, rtol=1e-9, atol=1e-12)
        assert (often.stddev > 0.1).all() and (often.stddev < 1).all()
    bayesian = BayesianLatent(4, 2, 8, 2).double()
    once, often = bayesian(x, y), bayesian(x.repeat(500, 1), y.repeat(500, 1))
    assert (often.variance < once.variance / 5).all()


def test_the_importance_bound_of_the_exact_posterior_is_the_evidence():
    """Catches weights upside down, a bound of the mean for the mean of the bound, and a divergence counted twice: with
    exact q(z|C) and q(z|C ∪ T) every weight is p(y_T | C), so that any samples give it to rounding."""
    for seed in range(4):
        torch.manual_seed(seed)
        task = line(3, seed=seed)
        learner = linear_gaussian(samples=2, bound="importance").train()
        loss, *_ = learner.objective(task)
        assert loss.item() * len(task.query_y) == pytest.approx(-log_evidence(task), abs=1e-9)


def expected_bound(learner: NP, task: Task, times: int) -> tuple[float, float]:
    """The mean of the bound over so many draws, and its standard error."""
    torch.manual_seed(0)
    values = [-learner.objective(task)[0].item() * len(task.query_y) for _ in range(times)]
    return float(np.mean(values)), float(np.std(values) / math.sqrt(times))


def test_the_elbo_of_the_exact_posterior_is_the_evidence():
    """Catches a divergence of the wrong direction or sign, or one that is divided by samples."""
    task = line(3)
    mean, error = expected_bound(linear_gaussian(samples=20_000, bound="elbo").train(), task, 20)
    assert error < 0.01 and mean == pytest.approx(log_evidence(task), abs=5 * error)


def test_bounds_are_below_the_evidence_by_what_the_posterior_is_off():
    """Catches an "ELBO" that is none. Of a posterior that is too wide, the ELBO is below the evidence by
    KL(q ‖ p(z | C ∪ T)), in closed form; the importance bound lies between, and nearer with more samples."""
    task = line(2)
    x, y = (torch.cat(parts) for parts in ((task.support.x, task.query_x), (task.support.y, task.query_y)))
    _, variance = posterior(x, y)
    exact = linear_gaussian().latent

    class Wide(nn.Module):
        """The exact distribution of the support set; of all points one that is off."""

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.distributions.Normal:
            q, off = exact(x, y), len(x) > len(task.support.x)
            return torch.distributions.Normal(q.mean + 0.1 * off, q.stddev * (1 + 0.6 * off))

    found = []
    for bound, samples, times in (("elbo", 20_000, 20), ("importance", 4, 300), ("importance", 64, 300)):
        learner = linear_gaussian(samples=samples, bound=bound).train()
        learner.latent = Wide()
        found.append(expected_bound(learner, task, times)[0])
    elbo, few, many = found
    off = math.sqrt(variance) * 1.6
    divergence = math.log(math.sqrt(variance) / off) + (off**2 + 0.1**2) / (2 * variance) - 0.5
    evidence = log_evidence(task)
    assert divergence > 0.3 and elbo == pytest.approx(evidence - divergence, abs=0.02)
    assert elbo < few < many < evidence + 0.005


def test_importance_bound_by_hand():
    """Catches a sum for a mean over samples, and the densities of one sample for another's."""
    rng = np.random.default_rng(0)
    log_p, z = rng.normal(size=3), rng.normal(size=(3, 2))
    (a, b), (c, d) = np.abs(rng.normal(size=(2, 2, 2)))
    weights = [math.exp(log_p[k] + norm.logpdf(z[k], c, d).sum() - norm.logpdf(z[k], a, b).sum()) for k in range(3)]
    normal = [torch.distributions.Normal(*map(torch.from_numpy, parts)) for parts in ((a, b), (c, d))]
    got = importance_bound(torch.from_numpy(log_p), torch.from_numpy(z), *normal)
    assert got.item() == pytest.approx(math.log(sum(weights) / 3), rel=1e-12)


@pytest.mark.parametrize("learner", [NP, ANP])
def test_the_divergence_is_in_closed_form(learner):
    """Catches KL(q(z|C) ‖ q(z|C ∪ T)), the other way round, and a mean for the sum over dimensions."""
    torch.manual_seed(0)
    model, task = learner(hidden=8, latents=3, encoder_layers=3).double().train(), line(3)
    *_, kept = model.objective(task)
    prior = model.latent(task.support.x, task.support.y)
    q = model.latent(torch.cat([task.support.x, task.query_x]), torch.cat([task.support.y, task.query_y]))
    (m1, s1), (m0, s0) = ((d.mean.detach().numpy(), d.stddev.detach().numpy()) for d in (q, prior))
    by_hand = (np.log(s0 / s1) + (s1**2 + (m1 - m0) ** 2) / (2 * s0**2) - 0.5).sum()
    assert kept["metrics"]["kl"].item() == pytest.approx(by_hand, rel=1e-9)
    assert by_hand > 0


def test_reconstruction_scores_the_support_set_too():
    """Catches a bound over points that are not those it is divided by."""
    torch.manual_seed(0)
    task = line(3)
    losses = {}
    for reconstruct in (False, True):
        torch.manual_seed(0)
        model = NP(hidden=8, latents=3, stochastic=False, reconstruct=reconstruct).double().train()
        loss, prediction, _ = model.objective(task)
        z = model.latent(torch.cat([task.support.x, task.query_x]), torch.cat([task.support.y, task.query_y]))
        prior = model.latent(task.support.x, task.support.y)
        x = torch.cat([task.support.x, task.query_x]) if reconstruct else task.query_x
        y = torch.cat([task.support.y, task.query_y]) if reconstruct else task.query_y
        at = model.predict(Process(z.mean[None], model.keep(task.support)), x)
        log_p = norm.logpdf(y, at.mean[0].detach(), at.deviation[0].detach()).sum()
        weight = (prior.log_prob(z.mean) - z.log_prob(z.mean)).sum().item()
        losses[reconstruct] = loss.item()
        assert loss.item() == pytest.approx(-(log_p + weight) / len(y), rel=1e-9)
        assert prediction.mean.shape == (1, 5, 1)
    assert losses[True] != losses[False]


def test_evaluation_samples_as_many_and_the_same_for_every_task():
    """Catches training's few samples in evaluation, and noise that depends on what was drawn before."""
    torch.manual_seed(0)
    model = NP(hidden=8, latents=3, samples=4, eval_samples=9).double()
    task = line(3)
    assert model.train().adapt(task.support).z.shape == (4, 3)
    first, again = (model.eval().adapt(task.support).z for _ in range(2))
    assert first.shape == (9, 3) and torch.equal(first, again)
    q, other = (model.latent(t.support.x, t.support.y) for t in (task, line(4, seed=5)))
    noise = (first - q.mean) / q.stddev
    torch.testing.assert_close(noise, (model.adapt(line(4, seed=5).support).z - other.mean) / other.stddev)
    assert model.embed_task(task.support).equal(q.mean)
