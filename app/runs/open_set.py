"""How sure a learner is of queries whose class is not in their episode, against those whose class is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from app.runs.probe import Probe
from datamodules.core.episodes import Task


def entropy(logits: Tensor) -> Tensor:
    """Of the predictive distribution, nats: (…, ways) to (…,)."""
    log_p = logits.double().log_softmax(-1)
    return -torch.xlogy(log_p.exp(), log_p.exp()).sum(-1)


@dataclass
class OpenSet:
    """Entropies of predictions for a task's own queries, and for those of the next task, which it has no classes for.

    The next task's queries are predicted as a batch of their own, of the same size: where a prediction depends on the
    other queries, it does so as for the task's own. Those whose class is in the episode are left out after that.

    Attributes:
        known: (T, Q), nats.
        unknown: (T, Q), nats.
        kept: (T, Q), which queries of the next task have a class that is not in the episode; at least one of each task.
        ways: classes of a task.
        predicted: (N, Q), labels that the first tasks' own queries were given, also of tasks that are left out here.
    """

    known: Tensor
    unknown: Tensor
    kept: Tensor
    ways: int
    predicted: Tensor

    @classmethod
    def of(cls, probe: Probe, tasks: int) -> OpenSet | None:
        """From the first tasks of a split; None where the data does not tell its classes, or has too few."""
        learner, batch = probe.learner, probe.data.eval_batch_size
        entropies, kept, predicted, ways = [], [], [], 0
        for start in range(0, tasks, batch):
            stored, ready = probe.sample(range(start, min(start + batch, tasks) + 1))
            if "classes" not in stored.task:
                return None
            ways, queries = stored.ways, stored.query_x.shape[1]
            classes = stored.task["classes"]
            of_next = classes[1:].gather(1, stored.query_y[1:].long())
            kept.append((of_next[:, :, None] != classes[:-1, None]).all(-1))

            def both(task: Task, queries: int = queries) -> Tensor:
                state = learner.adapt(task.support)
                return torch.stack([learner.predict(state, x) for x in task.query_x.split(queries)])

            own = ready.apply(lambda t: t[:-1])
            logits = learner.map(both, replace(own, query_x=torch.cat([own.query_x, ready.query_x[1:]], 1)))
            entropies.append(entropy(logits).cpu())
            predicted.append(logits[:, 0].argmax(-1).cpu())
        of_both, which = torch.cat(entropies), torch.cat(kept)
        some = which.any(1)
        if not some.any():
            return None
        return cls(of_both[some, 0], of_both[some, 1], which[some], ways, torch.cat(predicted))

    @property
    def auroc(self) -> Tensor:
        """Of telling the two apart by the entropy, within each task, (T,)."""
        share = (torch.cat([self.known, self.unknown], 1) / math.log(self.ways)).clamp(0, 1)
        foreign = torch.cat([torch.zeros_like(self.kept), self.kept], 1).long()
        considered = torch.cat([torch.ones_like(self.kept), self.kept], 1)
        rows = zip(share, foreign, considered, strict=True)
        return torch.stack([binary_auroc(score[use], label[use]) for score, label, use in rows])

    def metrics(self) -> dict[str, Tensor]:
        """Of each task, (T,)."""
        return {
            "known_entropy": self.known.mean(1),
            "unknown_entropy": (self.unknown * self.kept).sum(1) / self.kept.sum(1),
            "open_set_auroc": self.auroc,
        }
