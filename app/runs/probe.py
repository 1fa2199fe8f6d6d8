"""A look at what a learner does on chosen tasks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Episodes, Task
from datamodules.core.metric import Metric
from models.core.learner import MetaLearner
from models.core.predictions import Mixture
from models.core.task_kinds import KINDS


def _on_cpu(prediction: Any) -> Any:
    return tree_map(lambda part: part.float().cpu(), prediction)


@dataclass
class Probe:
    """Looks at what a learner does on chosen tasks of a split. Uses no other process.

    Attributes:
        learner: in evaluation mode.
        data: gives the tasks, by number.
        split: "val" or "test".
    """

    learner: MetaLearner
    data: EpisodicDataModule
    split: str

    def __post_init__(self) -> None:
        self.tasks: Any = self.data.distribution(self.split)
        self.kind = KINDS[self.data.kind]
        self.metric_name = self.kind.headline

    def sample(self, indices: Sequence[int]) -> tuple[Episodes, Episodes]:
        """Tasks as they are stored, on the CPU, and as the learner gets them."""
        stored = self.tasks.sample(list(indices))
        ready = self.data.on_device(stored.to(self.learner.device))
        dtype: Any = self.learner.dtype
        return stored, ready.apply(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def predict(self, ready: Episodes) -> Any:
        """Logits (T, Q, ways), or values (T, Q, out) or their Mixture, on the CPU."""
        learner = self.learner
        return _on_cpu(learner.map(lambda task: learner.predict(learner.adapt(task.support), task.query_x), ready))

    def along(self, ready: Episodes, query_x: Tensor | None = None) -> Any:
        """Predictions before and after each inner step, (T, steps + 1, Q, …); for ``query_x`` (Q, …) where given.

        Of a Mixture both parts, (T, steps + 1, M, Q, …).
        """
        learner = self.learner

        def states(task: Task) -> Any:
            x = task.query_x if query_x is None else query_x
            predictions = [learner.predict(state, x) for state in learner.adaptation(task.support)]
            return tree_map(lambda *parts: torch.stack(parts), *predictions)

        return _on_cpu(learner.map(states, ready))

    def adaptation(self, tasks: int) -> np.ndarray | None:
        """The headline metric of the first tasks along the inner loop, (T, steps + 1); None where it has no steps."""
        curves = []
        for indices in self.tasks.alike(range(tasks)):
            _, ready = self.sample(indices)
            predictions = self.along(ready)
            states = (predictions.mean if isinstance(predictions, Mixture) else predictions).shape[1]
            if states < 2:
                return None
            target = ready.query_y.cpu()[:, None].expand(-1, states, *ready.query_y.shape[1:])
            curves.append(self.learner.per_task(predictions, target)[self.metric_name].numpy())
        return np.concatenate(curves)

    def names(self, stored: Episodes, i: int) -> list[str]:
        """Class names of task i by label; labels where the data has no names."""
        ids = stored.task.get("classes")
        return [str(k) for k in range(stored.ways)] if ids is None else self.class_names(ids[i].tolist())

    def class_names(self, ids: Sequence[int]) -> list[str]:
        known = self.tasks.class_names
        return [known[k] if known is not None else str(k) for k in ids]

    def groups(self, ids: Sequence[int]) -> list[str] | None:
        """The group of each class, where the data has groups."""
        known = self.tasks.group_names
        return [known[k] for k in ids] if known else None

    @property
    def metric(self) -> Metric:
        """What the headline metric is."""
        return self.kind.metrics[self.metric_name]

    @property
    def available(self) -> int:
        """Tasks of the split that evaluation looks at."""
        return self.data.test_tasks if self.split == "test" else self.data.val_tasks

    @property
    def pictures(self) -> bool:
        """Whether inputs are images."""
        return len(self._input_shape) == 3

    @property
    def function(self) -> bool:
        """Whether inputs and targets are numbers, so that a task can be drawn as a function."""
        return tuple(self._input_shape) == (1,)

    @functools.cached_property
    def _input_shape(self) -> torch.Size:
        return self.tasks.sample([0]).support_x.shape[2:]
