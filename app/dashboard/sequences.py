"""What is seen of learning along a sequence of tasks."""

from __future__ import annotations

from functools import partial

from app.dashboard.view import Figures, View
from app.plots import sequences as plots


def proficiency(view: View) -> Figures:
    """After the test, how many examples each task took until it was learned."""
    if "examples" in view.table and view.final:
        learners = [(type(view.probe.learner).__name__, view.table["examples"])]
        yield "proficiency", partial(plots.proficiency, learners, f"Examples to proficiency, {view.at}")
        view.panels.append(("Along the sequence", lambda axes: plots.draw_proficiency(axes, learners)))
