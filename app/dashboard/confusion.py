"""Who is taken for whom, over many tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.dashboard.view import Figures, View
from app.plots import confusion as plots
from app.runs.probe import Probe


@dataclass
class Confusions:
    """Who is taken for whom, over many tasks.

    Attributes:
        ids: of the K classes that occurred.
        wrong: (K, K), queries of row k that were labelled as class l.
        asked: (K, K), queries of row k that could have been: class l was in their task.
        image: of each id, as it is stored.
        tasks: that were looked at.
        meetings: of two classes in them, counted for each of the two.
    """

    ids: list[int]
    wrong: np.ndarray
    asked: np.ndarray
    image: dict[int, Tensor]
    tasks: int
    meetings: int

    @classmethod
    def of(cls, probe: Probe, tasks: int, known: Tensor | None = None) -> Confusions | None:
        """From the first tasks of a split; None where the data does not tell its classes.

        Args:
            probe: predicts.
            tasks: their number.
            known: labels that are predicted already, (T, Q).
        """
        labels, predicted, ids, image = [], [], [], {}
        for start in range(0, tasks, probe.data.eval_batch_size):
            stored, ready = probe.sample(range(start, min(start + probe.data.eval_batch_size, tasks)))
            if "classes" not in stored.task:
                return None
            predicted.append(probe.predict(ready).argmax(-1) if known is None else known[stored.index])
            labels.append(stored.query_y)
            ids.append(stored.task["classes"])
            for i, classes in enumerate(stored.task["classes"].tolist()):
                for x, y in zip(stored.support_x[i], stored.support_y[i].tolist(), strict=True):
                    image.setdefault(classes[y], x)
        occurred, place = torch.cat(ids).unique(return_inverse=True)  # place: (T, ways)
        true, taken = (place.gather(1, torch.cat(a).long()).numpy() for a in (labels, predicted))  # (T, Q)
        wrong, asked = np.zeros((len(occurred),) * 2), np.zeros((len(occurred),) * 2)
        np.add.at(wrong, (true, taken), 1)
        np.add.at(asked, (true[:, :, None], place.numpy()[:, None, :]), 1)
        np.fill_diagonal(wrong, 0)
        np.fill_diagonal(asked, 0)
        return cls(occurred.tolist(), wrong, asked, image, tasks, tasks * place.shape[1] * (place.shape[1] - 1))

    def by(self, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Summed over classes of one name: ``wrong``, ``asked`` and the names."""
        different = sorted(set(names))
        member = np.array([[n == d for n in names] for d in different], float)
        return member @ self.wrong @ member.T, member @ self.asked @ member.T, different

    def worst_pairs(self, count: int) -> list[tuple[int, int, int, int]]:
        """Pairs of places in ``ids`` with the mistaken and the asked queries in both directions, worst share first."""
        wrong, asked = np.triu(self.wrong + self.wrong.T), np.triu(self.asked + self.asked.T)
        share = np.divide(wrong, asked, out=np.zeros_like(wrong), where=asked > 0)
        order = np.lexsort((-wrong.ravel(), -share.ravel()))[:count]
        pairs = [(int(k) // len(self.ids), int(k) % len(self.ids)) for k in order]
        return [(a, b, int(wrong[a, b]), int(asked[a, b])) for a, b in pairs if wrong[a, b] > 0]


def confusion(view: View) -> Figures:
    """Classes that are taken for others, after the test."""
    if not view.final:
        return
    known = None if view.open_set is None else view.open_set.predicted
    tasks = min(view.confusion_tasks, view.probe.available) if known is None else len(known)
    confusions = view.guard("confusions", lambda: Confusions.of(view.probe, tasks, known))
    if confusions is not None:
        yield "confusion", partial(confusion_matrix, view.probe, confusions)
        if view.probe.pictures:
            yield "confused_pairs", partial(confused_pairs, view.probe, confusions)


def confusion_matrix(probe: Probe, confusions: Confusions) -> Any:
    """Between classes where they are few, else between their groups.

    None where a cell would be less than four meetings of classes, on average: that shows chance.
    """
    names = probe.class_names(confusions.ids)
    groups = probe.groups(confusions.ids)
    title = f"Share of a class's queries given to another class, {confusions.tasks} tasks"
    if len(names) <= 30:
        parts = (confusions.wrong, confusions.asked, names)
    elif groups is not None and len(set(groups)) > 1:
        parts, title = confusions.by(groups), f"{title}, by group"
    else:
        return None
    return plots.confusion(*parts, title) if confusions.meetings >= 4 * len(parts[-1]) ** 2 else None


def confused_pairs(probe: Probe, confusions: Confusions) -> Any:
    names = probe.class_names(confusions.ids)
    pairs = [
        (names[a], names[b], confusions.image[confusions.ids[a]], confusions.image[confusions.ids[b]], wrong, asked)
        for a, b, wrong, asked in confusions.worst_pairs(10)
    ]
    title = "Classes most often taken for one another, in either direction"
    return plots.confused_pairs(pairs, title) if pairs else None
