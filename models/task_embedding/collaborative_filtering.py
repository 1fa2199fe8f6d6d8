"""Task embeddings by collaborative filtering: a task is known by how well a few learners do on it.

The matrix has a row for each learner and a column for each task; an entry is the accuracy on the task's queries, nan
where it was not measured. Two models complete it and say how sure they are: probabilistic matrix factorisation and a
Gaussian process latent variable model. Of either, what is believed of a new task is one Gaussian over the accuracies of
all learners (``Belief``), which measuring a few of them, the probes, narrows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from datamodules.core.errors import at_least

NODES = torch.special.ndtri((torch.arange(64, dtype=torch.float64) + 0.5) / 64)  # equally likely values of a N(0, 1)


@dataclass(frozen=True)
class Belief:
    """A Gaussian over the accuracies of N learners on one task.

    Attributes:
        mean: (N,), expected accuracies.
        covariance: (N, N).
    """

    mean: Tensor
    covariance: Tensor

    def given(self, rows: Sequence[int], values: Tensor, variances: Tensor | float = 0.0) -> Belief:
        """What is believed once some were measured.

        Args:
            rows: the learners.
            values: what was measured of each, (n,).
            variances: of the errors of measuring, (n,) or of all.
        """
        index = torch.as_tensor(rows, dtype=torch.long)
        across = self.covariance[:, index]
        own = across[index] + torch.diag(torch.as_tensor(variances, dtype=across.dtype).expand(len(index)))
        factor = torch.linalg.cholesky(own + 1e-12 * torch.eye(len(index), dtype=own.dtype))
        gain = torch.cholesky_solve(across.T, factor).T  # (N, n)
        return Belief(self.mean + gain @ (values - self.mean[index]), self.covariance - gain @ across.T)

    def deviation(self, measuring: Tensor | float = 0.0) -> Tensor:
        """Standard deviations (N,) of the accuracies; with a variance of ``measuring``, of what would be measured."""
        return (self.covariance.diagonal() + measuring).clamp(min=0).sqrt()

    def next_probe(self, left: Sequence[int], variance: float) -> int:
        """The learner whose measurement promises most: the knowledge gradient (Frazier, Powell and Dayanik, 2008).

        That is the expected accuracy of the learner that is expected to be the best after the measurement, which moves
        all means along one direction by a standard normal number.

        Args:
            left: learners to choose from.
            variance: of the error of measuring one.
        """
        index = torch.as_tensor(left, dtype=torch.long)
        moves = self.covariance[:, index] / (self.covariance.diagonal()[index] + variance).clamp(min=1e-12).sqrt()
        best = (self.mean[:, None, None] + moves[:, :, None] * NODES).amax(0).mean(-1)
        return int(index[best.argmax()])


class ColumnModel(ABC):
    """A model of the matrix whose columns, the tasks, are independent given what is known of the learners.

    Attributes:
        noise: σ², the variance of an entry about what the model says of it.
    """

    noise: float

    @abstractmethod
    def fit(self, matrix: Tensor) -> Self:
        """Learn from a matrix (N, T) with missing entries, nan."""

    @abstractmethod
    def smooth(self) -> tuple[Tensor, Tensor]:
        """Of a new task the mean (N,) and covariance (N, N) of what the model says of its entries."""

    def belief(self, measuring: float = 0.0) -> Belief:
        """What is believed of a new task's accuracies before any is measured.

        Args:
            measuring: how much of ``noise`` is the error of measuring an entry, by few queries; the rest is the
                learner's and the task's own.
        """
        mean, covariance = self.smooth()
        own = max(self.noise - measuring, 0.0)
        return Belief(mean, covariance + own * torch.eye(len(mean), dtype=mean.dtype))

    def complete(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Expected entries and their standard deviations, each (N, T), where missing; what was measured, where not."""
        prior, means, deviations = self.belief(), [], []
        for column in matrix.double().unbind(1):
            rows = (~column.isnan()).nonzero()[:, 0].tolist()
            of_task = prior.given(rows, column[rows]) if rows else prior
            means.append(torch.where(column.isnan(), of_task.mean, column))
            deviations.append(torch.where(column.isnan(), of_task.deviation(), 0.0))
        return torch.stack(means, 1), torch.stack(deviations, 1)


def ridge_regression(features: Tensor, targets: Tensor, penalty: float) -> Tensor:
    """argmin over w of |target - features w|² + penalty |w|², for each target by itself.

    Args:
        features: (M, k).
        targets: (M, L), nan where missing.
        penalty: of the squared norm.

    Returns:
        (L, k).
    """
    seen = (~targets.isnan()).to(features.dtype)
    gram = torch.einsum("mi,ml,mj->lij", features, seen, features)
    gram = gram + penalty * torch.eye(features.shape[1], dtype=features.dtype)
    return torch.linalg.solve(gram, targets.nan_to_num().T @ features)


def with_constant(factors: Tensor) -> Tensor:
    """Factors (M, k) beside a constant for the biases, (M, k + 1)."""
    return torch.cat([factors, torch.ones(len(factors), 1, dtype=factors.dtype)], 1)


def prediction_error(entries: float, parameters: int) -> float:
    """The variance of others over that of so many entries which so many numbers were fitted to (Akaike, 1969)."""
    return (entries + parameters) / (entries - parameters)


class MatrixFactorization(ColumnModel):
    """Probabilistic matrix factorisation (Salakhutdinov and Mnih, NIPS 2007): y_nt = m + b_n + c_t + u_n·v_t + noise.

    Learners' factors are the maximum a posteriori under Gaussian priors, by alternating ridge regressions. The prior
    of a task's factor [v, c] is then learned from all tasks (the paper's adaptive priors, section 3), its mean and full
    covariance, together with σ², by expectation maximisation with tasks' factors integrated out.

    Args:
        rank: of u and v; with 0 learners differ by their biases alone.
        penalty: λ = σ² / σ_u² = σ² / σ_v², of factors and biases alike (eq. 4).
        sweeps: at most so many over both sides.
    """

    def __init__(self, rank: int = 3, penalty: float = 0.3, sweeps: int = 100) -> None:
        at_least(0, rank=rank)
        at_least(1, sweeps=sweeps)
        if not penalty > 0:
            raise ValueError(f"penalty is {penalty} but must be above 0")
        self.rank, self.penalty, self.sweeps = rank, penalty, sweeps

    def fit(self, matrix: Tensor) -> Self:
        matrix = matrix.double()
        at_least(self.rank + 2, tasks=int((~matrix.isnan()).sum(1).min()))
        self.mean = matrix.nanmean()
        around = matrix - self.mean
        filled = (around - around.nanmean(1, True).nan_to_num()).nan_to_num()
        left, singular, _ = torch.linalg.svd(filled - filled.mean(0), full_matrices=False)
        self.row_factors = (left * singular.sqrt())[:, : self.rank]
        self.row_biases = around.nanmean(1).nan_to_num()
        for _ in range(self.sweeps):
            before = self.row_factors, self.row_biases
            self.sweep(around)
            moved = max(
                (b - a).abs().max().item() if a.numel() else 0.0 for a, b in zip(before, self._rows(), strict=True)
            )
            if moved < 1e-7:
                break
        self._learn_prior(around)
        return self

    def _rows(self) -> tuple[Tensor, Tensor]:
        return self.row_factors, self.row_biases

    def sweep(self, around: Tensor) -> None:
        """Solve for the tasks with learners fixed, then for the learners with tasks fixed.

        Args:
            around: the matrix less m.
        """
        found = ridge_regression(with_constant(self.row_factors), around - self.row_biases[:, None], self.penalty)
        self.column_factors, self.column_biases = found[:, :-1], found[:, -1]
        found = ridge_regression(with_constant(self.column_factors), (around - self.column_biases).T, self.penalty)
        self.row_factors, self.row_biases = found[:, :-1], found[:, -1]

    def _learn_prior(self, around: Tensor, iterations: int = 100) -> None:
        """Mean and covariance of the tasks' factors and σ², by expectation maximisation with the learners fixed."""
        target = around - self.row_biases[:, None]
        seen = (~target.isnan()).double()
        features, target = with_constant(self.row_factors), target.nan_to_num()
        gram = torch.einsum("ni,nt,nj->tij", features, seen, features)
        factors = torch.cat([self.column_factors, self.column_biases[:, None]], 1)
        width, tasks, count = factors.shape[1], len(factors), seen.sum()
        small = 1e-9 * torch.eye(width, dtype=factors.dtype)
        self.prior_mean = factors.mean(0)
        self.prior_covariance = (factors - self.prior_mean).T @ (factors - self.prior_mean) / tasks + small
        variance = (((target - features @ factors.T) * seen).square().sum() / count).clamp(min=1e-9)
        for _ in range(iterations):
            precision = torch.linalg.inv(self.prior_covariance)
            covariance = torch.linalg.inv(gram / variance + precision)
            moment = (target * seen).T @ features / variance + precision @ self.prior_mean
            factors = (covariance @ moment[..., None]).squeeze(-1)
            self.prior_mean = factors.mean(0)
            away = factors - self.prior_mean
            self.prior_covariance = (away.T @ away + covariance.sum(0)) / tasks + small
            errors = ((target - features @ factors.T) * seen).square().sum() + (gram * covariance).sum()
            variance = (errors / count).clamp(min=1e-9)
        self.factors, self.factor_covariances = factors, covariance
        # What other tasks will show varies more than what was fitted to these, by their number.
        self.prior_covariance = self.prior_covariance * prediction_error(tasks, 1)
        self.noise = variance.item() * prediction_error((count / len(features)).item(), width)

    def smooth(self) -> tuple[Tensor, Tensor]:
        features = with_constant(self.row_factors)
        mean = self.mean + self.row_biases + features @ self.prior_mean
        return mean, features @ self.prior_covariance @ features.T

    def embed(self, rows: Sequence[int], values: Tensor, variances: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The task embedding: mean (rank + 1,) and covariance of a new task's factor [v, c], given some of its entries.

        Args:
            rows: of which learners.
            values: the entries, (n,).
            variances: of each about what the model says, (n,); None for ``noise``.
        """
        features = with_constant(self.row_factors)[list(rows)]
        weight = 1 / (torch.full_like(values, self.noise, dtype=features.dtype) if variances is None else variances)
        precision = torch.linalg.inv(self.prior_covariance)
        covariance = torch.linalg.inv(features.T @ (weight[:, None] * features) + precision)
        around = values.double() - self.mean - self.row_biases[list(rows)]
        return covariance @ (features.T @ (weight * around) + precision @ self.prior_mean), covariance


class GPLVM(ColumnModel):
    """Gaussian process latent variable model (Lawrence, 2005) of the matrix, as PMF-AutoML has it (Fusi et al., 2018).

    Every learner has a latent x_n; every task is a function of it, drawn from a Gaussian process about the learners'
    means with the kernel s² exp(-½ |(x - x') / ℓ|²) + σ² [x is x'], of which the task's measured entries are known.
    Latents, under a standard normal prior, and the kernel's parameters maximise the marginal likelihood of all tasks.

    Args:
        latents: Q, at most the number of learners less one.
        steps: of Adam.
        rate: its learning rate.
    """

    def __init__(self, latents: int = 3, steps: int = 300, rate: float = 0.05) -> None:
        at_least(1, latents=latents, steps=steps)
        self.latents, self.steps, self.rate = latents, steps, rate

    def fit(self, matrix: Tensor) -> Self:
        matrix = matrix.double()
        at_least(self.latents + 2, tasks=int((~matrix.isnan()).sum(1).min()))
        self.means = matrix.nanmean(1)
        around = matrix - self.means[:, None]
        # Tasks whose entries are measured of the same learners share their covariance: the sum of their squares, and
        # their number, are all that the likelihood needs.
        seen, group = (~matrix.isnan()).T.unique(dim=0, return_inverse=True)
        self.seen, filled = seen.double(), around.nan_to_num()
        self.squares = torch.stack([filled[:, group == g] @ filled[:, group == g].T for g in range(len(seen))])
        self.counts = torch.bincount(group, minlength=len(seen)).double()
        left, singular, _ = torch.linalg.svd(filled, full_matrices=False)
        start = (left * singular)[:, : self.latents]
        self.x = (start / start[:, 0].std().clamp(min=1e-9)).requires_grad_()
        variance = around.nan_to_num().square().sum() / self.seen.sum(1).dot(self.counts)
        self.log_scales = torch.zeros(self.x.shape[1], dtype=torch.float64, requires_grad=True)
        self.log_variance = (0.5 * variance).clamp(min=1e-6).log().detach().requires_grad_()
        self.log_noise = (0.1 * variance).clamp(min=1e-6).log().detach().requires_grad_()
        parameters = [self.x, self.log_scales, self.log_variance, self.log_noise]
        optimizer = torch.optim.Adam(parameters, lr=self.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        with torch.enable_grad():
            for _ in range(self.steps):
                optimizer.zero_grad()
                loss = (0.5 * self.x.square().sum() - self.log_likelihood()) / self.counts.sum()
                loss.backward()
                optimizer.step()
                schedule.step()
        for parameter in parameters:
            parameter.requires_grad_(False)
        entries = self.seen.sum(1).dot(self.counts).item() / len(matrix)
        self.noise = self.log_noise.exp().item() * prediction_error(entries, self.x.shape[1] + 1)
        return self

    def kernel(self) -> Tensor:
        """Covariance (N, N) of what the model says of a task's entries, without the noise."""
        scaled = self.x / self.log_scales.exp()
        squared = (scaled[:, None] - scaled[None]).square().sum(-1)
        return self.log_variance.exp() * torch.exp(-0.5 * squared)

    def log_likelihood(self) -> Tensor:
        """Log marginal likelihood of all measured entries, nats."""
        eye = torch.eye(len(self.x), dtype=torch.float64)
        noisy = self.kernel() + self.log_noise.exp() * eye
        # Rows and columns that are not measured become those of the identity, which adds nothing.
        own = noisy * self.seen[:, :, None] * self.seen[:, None] + torch.diag_embed(1 - self.seen)
        factor = torch.linalg.cholesky(own)
        quadratic = torch.cholesky_solve(self.squares, factor).diagonal(dim1=1, dim2=2).sum(1)
        log_det = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
        constant = self.seen.sum(1) * math.log(2 * math.pi)
        return -0.5 * (quadratic + self.counts * (log_det + constant)).sum()

    def smooth(self) -> tuple[Tensor, Tensor]:
        return self.means, self.kernel()


def held_out_error(model: ColumnModel, matrix: Tensor, probes: int, folds: int = 5, seed: int = 0) -> float:
    """Root mean squared error of entries of tasks that the model was not fitted to, but for a few entries of each.

    Args:
        model: is fitted anew for every fold of tasks.
        matrix: (N, T).
        probes: entries of a held-out task that are known, at random; less where none would be left.
        folds: that the tasks are divided into.
        seed: of the folds and of the known entries.
    """
    matrix, generator = matrix.double(), torch.Generator().manual_seed(seed)
    fold = torch.randperm(matrix.shape[1], generator=generator) % min(folds, matrix.shape[1])
    errors = []
    for number in range(int(fold.max()) + 1):
        prior = model.fit(matrix[:, fold != number]).belief()
        for column in matrix[:, fold == number].unbind(1):
            seen = (~column.isnan()).nonzero()[:, 0]
            order = seen[torch.randperm(len(seen), generator=generator)]
            given = max(0, min(probes, len(order) - 1))
            known, rest = order[:given].tolist(), order[given:]
            mean = prior.given(known, column[known]).mean if known else prior.mean
            errors.append((mean - column)[rest].square())
    return torch.cat(errors).mean().sqrt().item()


def choose(
    candidates: Sequence[ColumnModel], matrix: Tensor, probes: int, seed: int = 0
) -> tuple[ColumnModel, list[float]]:
    """The first candidate whose ``held_out_error`` is the least or 2 % above, fitted to the whole matrix; and
    the errors of all. The simplest are to come first."""
    errors = [held_out_error(model, matrix, probes, seed=seed) for model in candidates]
    best = next(model for model, error in zip(candidates, errors, strict=True) if error <= 1.02 * min(errors))
    return best.fit(matrix), errors


def factorizations(learners: int, tasks: int) -> list[ColumnModel]:
    """What a matrix of this size is tried with."""
    most = min(learners - 1, tasks // 4 - 2)
    ranks = [rank for rank in (0, 1, 2, 3, 5, 8) if rank <= most]
    return [MatrixFactorization(rank, penalty) for rank in ranks for penalty in ((0.1, 1.0) if rank else (0.1,))]


def latent_variable_models(learners: int) -> list[ColumnModel]:
    """Likewise."""
    return [GPLVM(latents) for latents in (1, 2, 4) if latents <= max(learners - 1, 1)]
