"""How sure a learner is of queries whose class is not in their task."""

from __future__ import annotations

from functools import partial

from app.dashboard.view import Figures, View
from app.plots import calibration
from models.core.metrics import interval


def open_set(view: View) -> Figures:
    """Entropies of queries of the task's classes and of others."""
    found = view.open_set
    if found is not None:
        parts = (found.known, found.unknown[found.kept], found.ways)
        auroc = interval(found.auroc)
        yield "open_set", partial(calibration.open_set, *parts, *auroc, f"{len(found.known):,} tasks")
        view.panels.append((calibration.auroc_text(*auroc), lambda axes: calibration.draw_open_set(axes, *parts)))
