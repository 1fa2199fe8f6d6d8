"""Where a learner's embeddings put the tasks of a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.runs.probe import Probe
from datamodules.core.episodes import Episodes


@dataclass(frozen=True)
class TaskSpace:
    """Embeddings of tasks.

    Attributes:
        stored: the tasks as they are stored, on the CPU.
        embeddings: (T, d) float64.
        again: of other support sets of the same tasks, of as many examples, from their queries; None where those are
            too few.
    """

    stored: Episodes
    embeddings: Tensor
    again: Tensor | None = None

    @classmethod
    def of(cls, probe: Probe, indices: Sequence[int], twice: bool = False) -> TaskSpace:
        """Of the tasks of these numbers; ``twice`` from two support sets each."""
        size = probe.data.eval_batch_size
        parts = [indices[i : i + size] for i in range(0, len(indices), size)]
        found = [cls.of_batch(probe, part, twice) for part in parts]
        again = [space.again for space in found if space.again is not None]
        stored, _ = probe.sample(indices)
        embeddings = torch.cat([space.embeddings for space in found])
        return cls(stored, embeddings, torch.cat(again) if len(again) == len(found) else None)

    @classmethod
    def of_batch(cls, probe: Probe, indices: Sequence[int], twice: bool) -> TaskSpace:
        stored, ready = probe.sample(indices)
        other = other_supports(ready) if twice else None
        return cls(stored, embed(probe, ready), None if other is None else embed(probe, other))

    @property
    def signal(self) -> float | None:
        """Variance between tasks over that between support sets of one task, both summed over dimensions.

        Of one embedding for each task the variance is of both; what support sets have in it is taken off.
        """
        if self.again is None or len(self.embeddings) < 2:
            return None
        within = (self.embeddings - self.again).square().sum(1).mean() / 2
        both = (self.embeddings.var(0).sum() + self.again.var(0).sum()) / 2
        return float(((both - within).clamp(min=0)) / within)

    @property
    def groups(self) -> tuple[list[int], tuple[str, ...]] | None:
        """The group of each task, and the names of the groups."""
        if self.stored.groups is None or self.stored.task_groups is None:
            return None
        return self.stored.groups.tolist(), self.stored.task_groups[1]

    @property
    def fact(self) -> tuple[str, Tensor] | None:
        """The first number that the data know of a task, with its name, (T,)."""
        numbers = ((n, v) for n, v in self.stored.task.items() if v.dim() == 1 and v.is_floating_point())
        return next(((name, value) for name, value in numbers if value.unique().numel() > 1), None)


def embed(probe: Probe, ready: Episodes) -> Tensor:
    """Embeddings (T, d) float64 of tasks, on the CPU."""
    learner = probe.learner
    return learner.map(lambda task: learner.embed_task(task.support), ready).double().cpu()


def other_supports(ready: Episodes) -> Episodes | None:
    """The same tasks with as many of their queries for support sets; None where they are too few."""
    if not ready.ways:
        rows = torch.arange(ready.support_y.shape[1])
        enough = ready.query_y.shape[1] >= len(rows)
        return taken(ready, rows) if enough else None
    first_y, query_y = ready.support_y[0], ready.query_y[0]
    if not (ready.support_y == first_y).all() or not (ready.query_y == query_y).all():
        return None
    rows = [(query_y == k).nonzero()[:, 0][: int((first_y == k).sum())] for k in range(ready.ways)]
    chosen = torch.cat(rows)
    return taken(ready, chosen) if len(chosen) == len(first_y) else None


def taken(ready: Episodes, rows: Tensor) -> Episodes:
    """Tasks whose support sets are these of their queries."""
    return replace(ready, support_x=ready.query_x[:, rows], support_y=ready.query_y[:, rows], support_rows=None)
