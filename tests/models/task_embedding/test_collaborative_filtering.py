"""Collaborative filtering: against scikit-learn, GPyTorch, formulas written out, and matrices whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.distributions import MultivariateNormal

from models.task_embedding.collaborative_filtering import (
    GPLVM,
    Belief,
    MatrixFactorization,
    choose,
    factorizations,
    latent_variable_models,
)

LEARNERS, RANK, NOISE = 16, 2, 0.03


def low_rank(tasks: int, seed: int = 0, learners: int = LEARNERS, noise: float = NOISE) -> Tensor:
    """Accuracies of rank 2 with biases and noise, (learners, tasks); the learners are the same for every seed."""
    fixed, rng = np.random.default_rng(99), np.random.default_rng(seed)
    factors, biases = fixed.normal(0, 0.08, (learners, RANK)), fixed.normal(0, 0.05, (learners, 1))
    clean = 0.6 + biases + factors @ rng.normal(0, 1, (RANK, tasks)) + rng.normal(0, 0.08, tasks)
    return torch.from_numpy(clean + rng.normal(0, noise, clean.shape))


def of_process(tasks: int, seed: int = 0) -> Tensor:
    """Accuracies that are smooth functions of two latents of a learner, drawn from a Gaussian process, with noise."""
    fixed, rng = np.random.default_rng(98), np.random.default_rng(seed)
    x, means = fixed.normal(0, 1, (LEARNERS, 2)), fixed.normal(0.6, 0.05, (LEARNERS, 1))
    kernel = 0.12**2 * np.exp(-0.5 * ((x[:, None] - x[None]) ** 2).sum(-1) / 1.5**2)
    drawn = np.linalg.cholesky(kernel + 1e-10 * np.eye(LEARNERS)) @ rng.normal(0, 1, (LEARNERS, tasks))
    return torch.from_numpy(means + drawn + rng.normal(0, NOISE, drawn.shape))


def with_gaps(matrix: Tensor, share: float, seed: int = 1) -> tuple[Tensor, Tensor]:
    """The matrix without a share of its entries, and which are missing."""
    missing = torch.rand(matrix.shape, generator=torch.Generator().manual_seed(seed)) < share
    return matrix.masked_fill(missing, torch.nan), missing


def test_missing_entries_are_told_to_the_level_of_the_noise():
    """Catches factors that do not converge, a lost bias, or a noise that swallows structure.

    A task's 3 numbers are fitted to n = 0.7 · 16 entries, so that least squares with known learners errs on others by
    σ √(1 + 3 / (n - 4)), 1.19 σ; the prior of the tasks takes from that, the estimated learners add to it.
    """
    matrix, missing = with_gaps(whole := low_rank(200), 0.3)
    model = MatrixFactorization(RANK, 0.1).fit(matrix)
    mean, deviation = model.complete(matrix)
    error = (mean - whole)[missing]
    assert 1.0 < error.square().mean().sqrt() / NOISE < 1.25
    assert math.sqrt(model.noise) == pytest.approx(NOISE, rel=0.06)
    assert 0.93 < (error.abs() < 1.96 * deviation[missing]).double().mean() < 0.97
    torch.testing.assert_close(mean[~missing], whole[~missing])
    latent = GPLVM(3, steps=150).fit(matrix).complete(matrix)[0]
    assert (latent - whole)[missing].square().mean().sqrt() < 1.5 * NOISE


def test_a_sweep_is_ridge_regression_of_either_side():
    """Catches biases without a penalty or that are counted twice, entries that are missing and yet fitted, or the
    learners' step with the tasks' old factors."""
    matrix, _ = with_gaps(low_rank(20), 0.3)
    model = MatrixFactorization(RANK, 0.7, sweeps=1)
    model.row_factors = torch.randn(LEARNERS, RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    model.row_biases = 0.1 * torch.arange(LEARNERS, dtype=torch.float64)
    start, biases = model.row_factors.clone(), model.row_biases.clone()
    model.sweep(matrix)
    ridge = Ridge(alpha=0.7, fit_intercept=False)
    for task in range(20):
        seen = ~matrix[:, task].isnan()
        ridge.fit(np.c_[start[seen], np.ones(seen.sum())], (matrix[:, task] - biases)[seen])
        np.testing.assert_allclose(model.column_factors[task], ridge.coef_[:-1], atol=1e-10)
        assert model.column_biases[task].item() == pytest.approx(ridge.coef_[-1], abs=1e-10)
    for row in range(LEARNERS):
        seen = ~matrix[row].isnan()
        features = np.c_[model.column_factors[seen], np.ones(seen.sum())]
        ridge.fit(features, (matrix[row] - model.column_biases)[seen])
        np.testing.assert_allclose(model.row_factors[row], ridge.coef_[:-1], atol=1e-10)
        assert model.row_biases[row].item() == pytest.approx(ridge.coef_[-1], abs=1e-10)


def test_the_factors_are_the_maximum_of_their_posterior():
    """Catches a sweep that stops before the optimum, or one that minimises anything else than eq. 4."""
    matrix, missing = with_gaps(low_rank(40), 0.2)
    model = MatrixFactorization(RANK, 0.3, sweeps=3000).fit(matrix)
    names = ("row_factors", "row_biases", "column_factors", "column_biases")
    u, b, v, c = parts = [getattr(model, name).clone().requires_grad_() for name in names]
    error = (matrix - model.mean - b[:, None] - c - u @ v.T).masked_select(~missing)
    loss = error.square().sum() + 0.3 * sum(part.square().sum() for part in parts)
    for gradient in torch.autograd.grad(loss, parts):
        assert gradient.abs().max() < 1e-4


def test_the_tasks_prior_and_the_noise_have_the_largest_evidence():
    """Catches an expectation without the posterior's own covariance, which shrinks the prior with every iteration."""
    matrix, _ = with_gaps(low_rank(60), 0.2)
    model = MatrixFactorization(RANK, 0.3).fit(matrix)
    features = torch.cat([model.row_factors, torch.ones(LEARNERS, 1, dtype=torch.float64)], 1)
    # What final prediction error made larger, as the likelihood has it.
    seen = (~matrix.isnan()).sum(1).double().mean()
    fitted = torch.tensor(model.noise) * (seen - 3) / (seen + 3)
    covariance = model.prior_covariance * 59 / 61
    parameters = [model.prior_mean.clone(), torch.linalg.cholesky(covariance), fitted.log()]

    def evidence(mean: Tensor, root: Tensor, log_noise: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for column in matrix.T:
            rows = ~column.isnan()
            x, center = features[rows], (model.mean + model.row_biases)[rows]
            covariance = x @ root @ root.T @ x.T + log_noise.exp() * torch.eye(len(x))
            total = total + MultivariateNormal(center + x @ mean, covariance).log_prob(column[rows])
        return total

    best = evidence(*parameters)
    for number, parameter in enumerate(parameters):
        for sign in (1, -1):
            away = list(parameters)
            away[number] = parameter + sign * 0.15 * (parameter.abs().mean() if number < 2 else 1)
            assert evidence(*away) < best
    gradient = torch.autograd.grad(evidence(*(p := [q.requires_grad_() for q in parameters])), p)
    assert gradient[0].abs().max() < 0.05
    # Nats to an e-fold of the prior's deviation, of 180 factors, and of the noise, of some 770 entries.
    assert (gradient[1] * p[1]).sum().abs() < 0.5
    assert gradient[2].abs() < 0.5


def test_a_new_tasks_factor_has_the_posterior_of_bayesian_linear_regression():
    """Catches a prior about zero, the precision of the noise for its variance, or probes of different errors that
    count alike: against the factor and the entries as one Gaussian, conditioned on the entries."""
    model = MatrixFactorization(RANK, 0.3).fit(low_rank(100))
    rows, values = [3, 11, 6], torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64)
    for variances in (None, torch.tensor([0.001, 0.01, 0.0003], dtype=torch.float64)):
        mean, covariance = model.embed(rows, values, variances)
        x = np.c_[model.row_factors[rows], np.ones(3)]
        prior, root = model.prior_mean.numpy(), model.prior_covariance.numpy()
        errors = np.eye(3) * model.noise if variances is None else np.diag(variances)
        gain = root @ x.T @ np.linalg.inv(x @ root @ x.T + errors)
        expected = (model.mean + model.row_biases)[rows].numpy() + x @ prior
        np.testing.assert_allclose(mean, prior + gain @ (values.numpy() - expected), atol=1e-9)
        np.testing.assert_allclose(covariance, root - gain @ x @ root, atol=1e-9)
    # What is believed of the learners that were not measured follows from the factor.
    mean, covariance = model.embed(rows, values)
    belief, features = model.belief().given(rows, values), np.c_[model.row_factors, np.ones(LEARNERS)]
    others = [n for n in range(LEARNERS) if n not in rows]
    told = (model.mean + model.row_biases).numpy() + features @ mean.numpy()
    np.testing.assert_allclose(belief.mean[others], told[others], atol=1e-9)
    spread = np.einsum("ni,ij,nj->n", features, covariance.numpy(), features) + model.noise
    np.testing.assert_allclose(belief.deviation()[others], np.sqrt(spread)[others], atol=1e-9)


def test_the_latent_variable_models_likelihood_is_gpytorchs():
    """Catches a lost constant, length scales that multiply, or tasks with gaps that have the identity's likelihood."""
    gpytorch = pytest.importorskip("gpytorch")
    matrix, _ = with_gaps(low_rank(12), 0.25)
    model = GPLVM(2, steps=20).fit(torch.cat([matrix, matrix[:, :4]], 1))  # four are there twice
    mine, total = model.log_likelihood().item(), 0.0

    class Exact(gpytorch.models.ExactGP):
        def __init__(self, x: Tensor, y: Tensor, likelihood) -> None:
            super().__init__(x, y, likelihood)
            self.mean = gpytorch.means.ZeroMean()
            self.kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(ard_num_dims=2))

        def forward(self, x: Tensor):
            return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))

    for column in torch.cat([matrix, matrix[:, :4]], 1).T:
        rows = ~column.isnan()
        y = (column - model.means)[rows]
        likelihood = gpytorch.likelihoods.GaussianLikelihood(
            noise_constraint=gpytorch.constraints.GreaterThan(1e-9)
        ).double()
        gp = Exact(model.x[rows], y, likelihood).double()
        likelihood.noise = model.log_noise.exp()
        gp.kernel.outputscale = model.log_variance.exp()
        gp.kernel.base_kernel.lengthscale = model.log_scales.exp()
        gp.train()
        criterion = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, gp)
        total += criterion(gp(model.x[rows]), y).item() * len(y)
    assert mine == pytest.approx(total, rel=1e-6)


def test_latents_and_kernel_are_trained_to_an_optimum_and_predict_as_a_gaussian_process():
    """Catches latents that stay where principal components put them, a prior that is left out, or predictions of a
    task without its learners' means: against scikit-learn's regression on the learned latents."""
    matrix = low_rank(60)
    model = GPLVM(2, steps=1000).fit(matrix)
    parameters = [p.requires_grad_() for p in (model.x, model.log_scales, model.log_variance, model.log_noise)]
    loss = (0.5 * model.x.square().sum() - model.log_likelihood()) / 60
    assert max(g.abs().max().item() for g in torch.autograd.grad(loss, parameters)) < 0.02
    for parameter in parameters:
        parameter.requires_grad_(False)
    kernel = ConstantKernel(model.log_variance.exp().item()) * RBF(model.log_scales.exp().numpy())
    rows, others = [0, 4, 9, 13], [1, 2, 3, 15]
    column = low_rank(1, seed=5)[:, 0]
    exact = GaussianProcessRegressor(kernel + WhiteKernel(model.noise), optimizer=None)
    exact.fit(model.x[rows].numpy(), (column - model.means)[rows].numpy())
    mean, deviation = exact.predict(model.x[others].numpy(), return_std=True)
    belief = model.belief().given(rows, column[rows])
    np.testing.assert_allclose(belief.mean[others], mean + model.means[others].numpy(), atol=1e-8)
    np.testing.assert_allclose(belief.deviation()[others], deviation, atol=1e-8)


@pytest.mark.parametrize("probes", [0, 3])
def test_intervals_hold_what_new_tasks_turn_out_to_have(probes: int):
    """Catches intervals of the mean for those of an entry, or learners' factors that are taken for exact where 80 tasks
    told them: of each model's own kind of matrix, 95 % of the entries of new tasks are to be in."""
    inside: dict[str, list[Tensor]] = {"low_rank": [], "of_process": []}
    for seed in range(3):
        for draw, model in ((low_rank, MatrixFactorization(RANK, 0.1)), (of_process, GPLVM(2))):
            prior, rows = model.fit(draw(80, seed)).belief(), list(range(0, 5 * probes, 5))
            rest = [n for n in range(LEARNERS) if n not in rows]
            for column in draw(150, 50 + seed).T:
                belief = prior.given(rows, column[rows]) if rows else prior
                inside[draw.__name__].append(((column - belief.mean).abs() < 1.96 * belief.deviation())[rest])
    for held in inside.values():
        assert 0.93 < torch.cat(held).double().mean() < 0.975


def test_the_error_of_measuring_is_the_probes_and_the_rest_the_tasks_own():
    """Catches noise that is counted twice, or a measured learner that is believed less than its measurement."""
    model = MatrixFactorization(RANK, 0.3).fit(low_rank(100))
    for measuring in (0.0, 0.5 * model.noise):
        belief = model.belief(measuring)
        smooth = model.smooth()[1].diagonal()
        torch.testing.assert_close(belief.covariance.diagonal() + measuring, smooth + model.noise)
    exact = model.belief().given([2], torch.tensor([0.9], dtype=torch.float64))
    assert exact.mean[2].item() == pytest.approx(0.9)
    assert exact.deviation()[2] < 1e-5


def test_the_next_probe_is_the_one_that_promises_most():
    """Catches the most uncertain learner, or the one expected to be the best, in the place of what a measurement is
    worth: against measurements drawn at random and the belief after each."""
    rng, n = np.random.default_rng(48), 6
    root = rng.normal(0, 0.1, (n, n))
    belief = Belief(torch.from_numpy(rng.normal(0.6, 0.08, n)), torch.from_numpy(root @ root.T))
    worth, mean, covariance = [], belief.mean.numpy(), belief.covariance.numpy()
    for row in range(n):
        error = covariance[row, row] + 0.002
        values = rng.normal(mean[row], math.sqrt(error), 200_000)
        worth.append((mean[:, None] + covariance[:, row, None] / error * (values - mean[row])).max(0).mean())
    order = np.argsort(worth)[::-1]
    assert worth[order[0]] > worth[order[1]] + 0.001 > worth[order[2]] + 0.002  # far enough apart to tell
    assert belief.next_probe(range(n), 0.002) == order[0]
    assert belief.next_probe([k for k in range(n) if k != order[0]], 0.002) == order[1]


def test_rank_is_chosen_by_held_out_entries():
    """Catches a choice by the entries that were fitted, which takes the largest rank, or folds that are seen."""
    matrix = low_rank(120)
    candidates = factorizations(LEARNERS, 120)
    model, errors = choose(candidates, matrix, probes=5)
    assert isinstance(model, MatrixFactorization)
    assert model.rank == RANK
    assert len(errors) == len(candidates)
    best = dict(zip([m.rank for m in candidates if isinstance(m, MatrixFactorization)], errors, strict=True))
    assert best[1] > 1.2 * best[2]
    assert [m.latents for m in latent_variable_models(3) if isinstance(m, GPLVM)] == [1, 2]


def test_what_cannot_be_fitted_is_refused():
    """Catches a rank that no number of tasks identifies, told by a failure of linear algebra."""
    with pytest.raises(ValueError, match="tasks is 4 but must be at least 5"):
        MatrixFactorization(3).fit(low_rank(4))
    with pytest.raises(ValueError, match="penalty is 0 but must be above 0"):
        MatrixFactorization(3, 0)
