"""What is seen of learning from streams: which data its figures are made of."""

from __future__ import annotations

from functools import partial

from app.dashboard.view import Figures, View
from app.plots import streams as plots


def streams(view: View) -> Figures:
    """Accuracy as experiences add up, and after the test the matrix of accuracies after each on each."""
    table, points = view.table, view.probe.tasks.points
    if "accuracies" not in table:
        return
    unseen, learned = table["accuracies"], table["learned_accuracies"]
    yield "accuracies", partial(plots.accuracies, points, unseen, learned, f"Accuracy along streams, {view.at}")
    view.panels.append(("Along streams", lambda axes: plots.draw_accuracies(axes, points, unseen, learned)))
    if "matrix" in table:
        matrix = table["matrix"]
        yield "matrix", partial(plots.matrix, points, matrix, f"Accuracy by experience, {view.at}")
        view.panels.append(("By experience", lambda axes: plots.draw_matrix(axes, points, matrix) and None))
