"""Functions drawn from Gaussian processes: the one-dimensional benchmark of neural processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Episodes, TaskDistribution
from datamodules.core.errors import at_least
from datamodules.core.streams import TaskStreams
from datamodules.regression.functions import Range, in_order, standard_deviation

Kernel = Literal["rbf", "matern52", "periodic"]
Facts = Mapping[str, Tensor]
Sizes = int | tuple[int, int]


def rbf(distance: Tensor, lengthscale: Tensor, period: Tensor) -> Tensor:
    """exp(-d² / 2ℓ²)."""
    return (-0.5 * (distance / lengthscale).square()).exp()


def matern52(distance: Tensor, lengthscale: Tensor, period: Tensor) -> Tensor:
    """(1 + √5 d/ℓ + 5 d²/3ℓ²) exp(-√5 d/ℓ)."""
    r = math.sqrt(5) * distance / lengthscale
    return (1 + r + r.square() / 3) * (-r).exp()


def periodic(distance: Tensor, lengthscale: Tensor, period: Tensor) -> Tensor:
    """exp(-2 sin²(π d/p) / ℓ²)."""
    return (-2 * ((math.pi * distance / period).sin() / lengthscale).square()).exp()


KERNELS: dict[Kernel, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "rbf": rbf,
    "matern52": matern52,
    "periodic": periodic,
}
"""Correlations at a distance, in the order of the numbers that ``Episodes.task["kernel"]`` has."""


def distances(x: Tensor, other: Tensor) -> Tensor:
    """Of points (…, N, 1) and (…, M, 1), (…, N, M)."""
    return (x - other.transpose(-1, -2)).abs()


def covariance(facts: Facts, x: Tensor, other: Tensor) -> Tensor:
    """Of the function of one task at points (N, 1) and (M, 1), (N, M), noise left out.

    Args:
        facts: of the task, see GaussianProcessTasks.
        x, other: the points, whose precision the result has.
    """
    lengthscale, scale, period = (facts[name].to(x.dtype) for name in ("lengthscale", "scale", "period"))
    each = torch.stack([of(distances(x, other), lengthscale, period) for of in KERNELS.values()])
    chosen = facts["kernel"] == torch.arange(len(KERNELS), device=x.device)
    return scale.square() * torch.where(chosen[:, None, None], each, 0.0).sum(0)


class GaussianProcessTasks(TaskDistribution):
    """Functions from Gaussian processes of one kernel, each with hyperparameters of its own, observed with noise.

    Every fact of a task that its exact predictive distribution takes is in ``Episodes.task``: "kernel", its number in
    KERNELS; "lengthscale" ℓ and "period" p, in units of x, p for all kernels; "scale", the standard deviation of
    function values; "noise", that of an observation.

    Args:
        kernel: of all functions.
        shots: points of the support set; or the least and the most, which every block of tasks draws its own from.
        queries: points of the query set; None: every block draws from ``least_queries`` to what ``points`` leaves.
        least_queries: where drawn.
        points: most points of a task, where queries are drawn.
        x_range, lengthscale, scale, period: ranges that each is uniform in.
        noise: standard deviation of an observation's noise.
        block: tasks of one size: episode i is of block i // ``block``.
        seed, split: of the episodes.
    """

    seed: int
    x_range: Range

    def __init__(
        self,
        kernel: Kernel,
        shots: Sizes,
        queries: int | None,
        *,
        least_queries: int,
        points: int,
        x_range: Range,
        lengthscale: Range,
        scale: Range,
        period: Range,
        noise: float,
        block: int,
        seed: int,
        split: str,
    ) -> None:
        self.kernel: Kernel = kernel
        self.shots, self.queries = shots, queries
        self.least_queries, self.points = least_queries, points
        self.x_range, self.noise, self.block = x_range, noise, block
        self.ranges = {"lengthscale": lengthscale, "scale": scale, "period": period}
        self.seed, self.split = seed, split

    def sizes(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Shots and queries of each episode, (T, 2)."""
        # Streams that are no episode's: blocks are numbered where episodes never get to.
        blocks = np.asarray(indices, np.uint64) // np.uint64(self.block)
        rng = TaskStreams(self.seed, self.split, np.uint64(2**63) + blocks)
        low, high = self.shots if isinstance(self.shots, tuple) else (self.shots, self.shots)
        shots = low + rng.integers(high - low + 1)
        if self.queries is not None:
            return np.stack([shots, np.full_like(shots, self.queries)], 1)
        most = self.points - shots
        return np.stack([shots, self.least_queries + rng.integers(most - self.least_queries + 1)], 1)

    def alike(self, indices: Sequence[int]) -> list[list[int]]:
        groups: dict[tuple[int, int], list[int]] = {}
        for index, (shots, queries) in zip(indices, self.sizes(indices).tolist(), strict=True):
            groups.setdefault((shots, queries), []).append(index)
        return list(groups.values())

    def sample(self, indices: Sequence[int]) -> Episodes:
        """The tasks of these numbers.

        Raises:
            ValueError: they differ in size, see ``alike``.
        """
        index = np.asarray(indices, np.int64)
        (shots, queries), *others = np.unique(self.sizes(index), axis=0).tolist()
        if others:
            raise ValueError("these tasks differ in size: sample those that are alike together")
        rng = TaskStreams(self.seed, self.split, index)
        drawn = {name: torch.from_numpy(rng.uniform(low, high)).float() for name, (low, high) in self.ranges.items()}
        x = torch.from_numpy(rng.uniform(*self.x_range, shots + queries, 1)).float()
        normal = torch.from_numpy(rng.normal(shots + queries, 1))
        # Of what single precision left of x and the hyperparameters: the covariance is exactly that of the facts.
        exact = {name: value.double()[:, None, None] for name, value in drawn.items()}
        correlation = KERNELS[self.kernel](distances(x.double(), x.double()), exact["lengthscale"], exact["period"])
        noise = torch.full_like(drawn["scale"], self.noise)
        observed = exact["scale"].square() * correlation
        observed.diagonal(dim1=-2, dim2=-1).add_(noise.double().square()[:, None])
        y = (torch.linalg.cholesky(observed) @ normal).float()
        return Episodes(
            support_x=x[:, :shots],
            support_y=y[:, :shots],
            query_x=x[:, shots:],
            query_y=y[:, shots:],
            index=torch.from_numpy(index),
            task={**drawn, "noise": noise, "kernel": torch.full((len(index),), list(KERNELS).index(self.kernel))},
        )


class GaussianProcesses(EpisodicDataModule):
    """Functions from Gaussian processes: trained on those of one kernel, tested on those of the same or of another.

    The protocol of Nguyen and Grover (ICML 2022): shots are uniform in {3, …, 46}, queries in {3, …, 49 - shots}. In
    meta-training all tasks of a meta-batch have the same; in evaluation each task has its own, so that tasks are
    independent, as their intervals take them to be.

    Args:
        kernel: of meta-training and meta-validation.
        test_kernel: of meta-test; None: the same.
        shots: points of the support set, a number or the least and the most.
        queries: points of the query set; None draws them.
        least_queries: where queries are drawn.
        points: most points of a task, where queries are drawn.
        x_range: the points are uniform in it.
        lengthscale: range that ℓ is uniform in, in units of x; of the periodic kernel, without a unit.
        scale: range of the standard deviation of function values.
        period: range of the periodic kernel's p, in units of x.
        noise: standard deviation of an observation's noise.
        same_size: tasks in a row that share their size in evaluation; 16 in the published test.
        meta_batch_size, val_tasks, test_tasks, eval_batch_size, workers, seed: see EpisodicDataModule.
    """

    kind = "regression"

    def __init__(
        self,
        kernel: Kernel = "rbf",
        test_kernel: Kernel | None = None,
        shots: Sizes = (3, 46),
        queries: int | None = None,
        least_queries: int = 3,
        points: int = 49,
        x_range: Range = (-2.0, 2.0),
        lengthscale: Range = (0.1, 0.6),
        scale: Range = (0.1, 1.0),
        period: Range = (0.1, 0.5),
        noise: float = 0.02,
        same_size: int = 1,
        meta_batch_size: int = 16,
        val_tasks: int = 600,
        test_tasks: int = 10_000,
        eval_batch_size: int = 100,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(meta_batch_size, val_tasks, test_tasks, eval_batch_size, workers, seed)
        low, high = shots if isinstance(shots, tuple) else (shots, shots)
        in_order(x_range=x_range, lengthscale=lengthscale, scale=scale, period=period, shots=(low, high))
        at_least(1, shots=low, queries=queries, least_queries=least_queries, same_size=same_size)
        if queries is None and points < high + least_queries:
            raise ValueError(
                f"points is {points}, which leaves fewer than {least_queries} queries beside {high} shots: "
                f"give at least {high + least_queries}"
            )
        for name, (least, _) in {"lengthscale": lengthscale, "scale": scale, "period": period}.items():
            if not least > 0:
                raise ValueError(f"{name} is from {least} but must be above 0")
        if not standard_deviation(noise) > 0:
            raise ValueError("noise is 0, without which covariances have no Cholesky factor: give some")
        self.kernel: Kernel = kernel
        self.test_kernel: Kernel = test_kernel or kernel
        self.shots, self.queries, self.same_size = shots, queries, same_size
        self.settings = {"least_queries": least_queries, "points": points, "x_range": x_range, "noise": noise}
        self.settings |= {"lengthscale": lengthscale, "scale": scale, "period": period}

    def task_shape(self) -> dict[str, int]:
        """Of what does not differ between tasks."""
        shape = {} if isinstance(self.shots, tuple) else {"shots": self.shots}
        return shape if self.queries is None else {**shape, "queries": self.queries}

    @property
    def identity(self) -> str:
        return f"{self.test_kernel} kernel"

    def build(self, split: str) -> GaussianProcessTasks:
        return GaussianProcessTasks(
            self.test_kernel if split == "test" else self.kernel,
            self.shots,
            self.queries,
            **self.settings,
            block=self.meta_batch_size if split == "train" else self.same_size,
            seed=self.seed,
            split=split,
        )
