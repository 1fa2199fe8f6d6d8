"""The Gaussian process that a task's function was drawn from: the most that can be known of it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Episodes, Support, Task
from datamodules.regression.gaussian_processes import Facts, GaussianProcesses, covariance
from models.core.learner import MetaLearner, Paper
from models.core.metrics import DENSITIES
from models.core.predictions import Mixture


class Posterior(NamedTuple):
    """A Gaussian process after the observations of one support set.

    Attributes:
        x: the observed points, (S, 1) float64.
        factor: Cholesky factor of their covariance, noise included, (S, S).
        weights: its inverse times the observations, (S, 1).
        facts: of the task.
    """

    x: Tensor
    factor: Tensor
    weights: Tensor
    facts: Facts


class GaussianProcess(MetaLearner):
    """Exact inference with the hyperparameters that the task was drawn with, which no other learner is told.

    It has nothing to train and is evaluated as it is, with ``--stage test``. What it reaches is a ceiling: on average
    over tasks nobody predicts these functions better (Rasmussen and Williams, eqs. 2.23 and 2.24).

    Args:
        **others: see MetaLearner.
    """

    paper = Paper(
        "Rasmussen and Williams",
        "Gaussian Processes for Machine Learning",
        "MIT Press",
        2006,
        "https://gaussianprocess.org/gpml/",
    )
    tasks = frozenset({"regression"})
    own_metrics = DENSITIES
    selects_by = "marginal"
    reads_facts = True

    def __init__(self, **others: Any) -> None:
        super().__init__(**others)

    def check(self, data: EpisodicDataModule) -> str | None:
        if not isinstance(data, GaussianProcesses):
            return (
                f"GaussianProcess knows how GaussianProcesses were drawn, not {type(data).__name__}: give --data "
                "datamodules.GaussianProcesses, or another learner"
            )
        return super().check(data)

    def adapt(self, support: Support) -> Posterior:
        assert support.facts is not None
        x, facts = support.x.double(), support.facts
        factor = torch.linalg.cholesky(covariance(facts, x, x) + self.noise(facts, x))
        return Posterior(x, factor, torch.cholesky_solve(support.y.double(), factor), facts)

    def noise(self, facts: Facts, x: Tensor) -> Tensor:
        """Covariance of the noise of observations at points (N, 1), (N, N)."""
        return facts["noise"].double().square() * torch.eye(len(x), dtype=x.dtype, device=x.device)

    def joint(self, state: Posterior, query_x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (Q, 1) and covariance (Q, Q) of what would be observed at queries (Q, 1)."""
        x = query_x.double()
        cross = covariance(state.facts, state.x, x)
        explained = torch.linalg.solve_triangular(state.factor, cross, upper=False)
        own = covariance(state.facts, x, x) + self.noise(state.facts, x)
        return cross.mT @ state.weights, own - explained.mT @ explained

    def predict(self, state: Posterior, query_x: Tensor) -> Mixture:
        mean, of_all = self.joint(state, query_x)
        return Mixture(mean[None], of_all.diagonal(dim1=-2, dim2=-1).sqrt()[None, :, None])

    def densities(self, task: Task) -> dict[str, Tensor]:
        """Log-densities of one task's targets, see ``density_metrics``; of all together by their covariance."""
        state, y = self.adapt(task.support), task.query_y.double()
        mean, of_all = self.joint(state, task.query_x)
        factor = torch.linalg.cholesky(of_all)
        apart = torch.linalg.solve_triangular(factor, y - mean, upper=False)
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum()
        joint = -0.5 * (apart.square().sum() + log_det + len(y) * math.log(2 * math.pi))
        marginal = self.predict(state, task.query_x).log_densities(y).mean()
        return {"marginal": marginal, "joint": joint / len(y)}

    def task_metrics(self, batch: Episodes) -> dict[str, Tensor]:
        return self.map(self.densities, batch)
