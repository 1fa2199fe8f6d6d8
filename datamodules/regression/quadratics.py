"""Random quadratics: the classical problems that optimizers are learned on, whose best steps are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Episodes, TaskDistribution
from datamodules.core.errors import at_least
from datamodules.core.streams import TaskStreams


class RandomQuadratics(TaskDistribution):
    """Least squares |Wθ - y|² with the entries of W (d, d) and y (d,) standard normal, each task its own.

    A support set is the rows of W with what y has for each, and the queries are the same: what a linear network without
    bias is trained on is what is measured. The mean squared error is |Wθ - y|² / d, of Hessian 2 WᵀW / d and minimum 0.

    Args:
        dimension: d.
        seed, split: of the episodes.
    """

    seed: int

    def __init__(self, dimension: int, seed: int, split: str) -> None:
        self.dimension, self.seed, self.split = dimension, seed, split

    def sample(self, indices: Sequence[int]) -> Episodes:
        index = np.asarray(indices, np.int64)
        rng, d = TaskStreams(self.seed, self.split, index), self.dimension
        w, y = (torch.from_numpy(rng.normal(d, columns)).float() for columns in (d, 1))
        return Episodes(w, y, w, y, torch.from_numpy(index))


class Quadratics(EpisodicDataModule):
    """Random least-squares problems, on which optimizers are learned and compared (Andrychowicz et al., NeurIPS 2016).

    The base learner is a linear one: ``models.MLP`` with ``in_features`` d and ``hidden`` [], a head without bias.

    Args:
        dimension: d, of the parameters and of the rows; 10 in the paper.
        meta_batch_size, val_tasks, test_tasks, eval_batch_size, workers, seed: see EpisodicDataModule.
    """

    kind = "regression"

    def __init__(
        self,
        dimension: int = 10,
        meta_batch_size: int = 128,
        val_tasks: int = 600,
        test_tasks: int = 10_000,
        eval_batch_size: int = 500,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(meta_batch_size, val_tasks, test_tasks, eval_batch_size, workers, seed)
        at_least(1, dimension=dimension)
        self.dimension = dimension

    def task_shape(self) -> dict[str, int]:
        return {"shots": self.dimension, "queries": self.dimension}

    def build(self, split: str) -> RandomQuadratics:
        return RandomQuadratics(self.dimension, self.seed, split)
