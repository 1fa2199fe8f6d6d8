"""What neural processes share: a density of the function's values at any points, and how it is measured."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.core.episodes import Task
from datamodules.core.errors import at_least
from models.core.learner import MetaLearner
from models.core.metrics import DENSITIES, density_metrics
from models.core.predictions import Mixture


class ProcessLearner(MetaLearner):
    """Predicts a Mixture whose parts are functions: one Gaussian at each point, or one for each sample of a latent.

    Args:
        inputs: numbers that an input has.
        outputs: numbers that a target has.
        reconstruct: score the points of the support set along with the queries in meta-training, as Garnelo et al.
            (ICML 2018) and the released code of Nguyen and Grover (ICML 2022) do; otherwise the queries alone.
        **others: see MetaLearner.
    """

    tasks = frozenset({"regression"})
    own_metrics = DENSITIES
    selects_by = "marginal"

    def __init__(self, inputs: int = 1, outputs: int = 1, reconstruct: bool = True, **others: Any) -> None:
        super().__init__(**others)
        at_least(1, inputs=inputs, outputs=outputs)
        self.inputs, self.outputs, self.reconstruct = inputs, outputs, reconstruct

    def per_task(self, prediction: Any, target: Tensor) -> dict[str, Tensor]:
        with torch.autocast(target.device.type, enabled=False):
            return super().per_task(prediction, target) | density_metrics(prediction, target)

    def scored(self, task: Task) -> tuple[Tensor, Tensor]:
        """Points (N, inputs) and their targets (N, outputs) that meta-training scores, the queries last."""
        if not self.reconstruct:
            return task.query_x, task.query_y
        return torch.cat([task.support.x, task.query_x]), torch.cat([task.support.y, task.query_y])

    def objective(self, task: Task) -> tuple[Any, ...]:
        x, y = self.scored(task)
        prediction = self.predict(self.adapt(task.support), x)
        return -prediction.log_densities(y).mean(), of_last(prediction, len(task.query_y))


def of_last(prediction: Mixture, queries: int) -> Mixture:
    """The prediction for the last so many points."""
    return Mixture(*(part[..., -queries:, :] for part in prediction))


def gaussians(made: Tensor, least: float) -> Mixture:
    """What a network's outputs (M, Q, 2 outputs) say: means, and deviations of at least ``least`` by a softplus."""
    mean, raw = made.to(torch.promote_types(made.dtype, torch.float32)).chunk(2, -1)
    return Mixture(mean, least + (1 - least) * F.softplus(raw))
