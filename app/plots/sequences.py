"""Pictures of learning along a sequence of tasks: how soon each is learned, by those that came before it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from app.plots.style import CLASSES, shorten, single, styled

WINDOW = 7  # tasks that the line is a mean over

Named = Sequence[tuple[str, Any]]


def draw_proficiency(axes: Axes, learners: Named) -> None:
    """Examples until each task is learned well enough, against its place in the sequence.

    Dots are tasks, lines means over a few of them on either side. Who profits from earlier tasks falls.

    Args:
        axes: to draw on.
        learners: names, and the examples of each task, (T,).
    """
    for (name, examples), colour in zip(learners, cycle(CLASSES), strict=False):
        values = np.asarray(examples, np.float64)
        places = np.arange(1, len(values) + 1)
        axes.plot(places, values, "o", ms=3, color=colour, alpha=0.45)
        near = [values[max(0, k - WINDOW // 2) : k + WINDOW // 2 + 1].mean() for k in range(len(values))]
        axes.plot(places, near, color=colour, label=f"{shorten(name)}, mean {values.mean():.0f}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("task of the sequence")
    axes.set_ylabel("examples to proficiency")
    axes.legend(loc="best")


@styled
def proficiency(learners: Named, title: str) -> Figure:
    """See ``draw_proficiency``."""
    figure, axes = single(6.0, 3.8)
    draw_proficiency(axes, learners)
    axes.set_title(title)
    return figure
