"""Pictures of how far confidence can be trusted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from app.plots.style import ACCENT, LINE, MAIN, MUTED, single, styled


def _shares(axes: Axes, x: str, y: str) -> None:
    """Both axes from 0 to 100 %, with these labels."""
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.03)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(loc="upper left")


def wilson(correct: Any, count: Any) -> np.ndarray:
    """Bounds (2, …) of the 95 % interval of a share, of so many among so many (Wilson, JASA 1927)."""
    z, n = 1.96, np.asarray(count, np.float64)
    share = np.asarray(correct, np.float64) / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return np.stack([centre - half, centre + half])


def draw_reliability(axes: Axes, bins: Any) -> None:
    """Accuracy against confidence, with 95 % intervals; on the diagonal a learner is as often right as it says.

    Args:
        axes: to draw on.
        bins: (3, 15): the number of queries, the correct ones and the sum of confidences, by confidence.
    """
    count, correct, confidence = np.asarray(bins, np.float64)
    full = count > 0
    share = count / count.sum()
    observed, said = correct[full] / count[full], confidence[full] / count[full]
    error = float((share[full] * np.abs(observed - said)).sum())
    width = 1 / len(count)
    axes.bar((np.arange(len(count)) + 0.5) * width, share, width * 0.92, color=LINE, label="share of the queries")
    axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=(0, (4, 2)), label="as often right as said")
    bounds = np.abs(wilson(correct[full], count[full]) - observed)
    axes.errorbar(said, observed, yerr=bounds, color=MAIN, fmt="none", lw=1, alpha=0.6)
    axes.plot(said, observed, color=MAIN, marker="o", ms=4.5, label=f"measured, ECE {100 * error:.2f} %")
    _shares(axes, "confidence of the prediction", "accuracy")


@styled
def reliability(bins: Any, title: str = "Calibration") -> Figure:
    """The reliability diagram; arguments as ``draw_reliability``."""
    figure, axes = single(4.6, 4.2)
    draw_reliability(axes, bins)
    axes.set_title(title)
    return figure


def draw_coverage(axes: Axes, levels: Any) -> None:
    """Measured against nominal coverage of predictive intervals; on the diagonal they hold as many targets as they say.

    Args:
        axes: to draw on.
        levels: (20,), the number of targets in the central 5 % interval, how many more in the 10 % interval, and so on.
    """
    levels = np.asarray(levels, np.float64)
    share = levels / levels.sum()
    nominal = np.linspace(0, 1, len(levels) + 1)
    measured = np.concatenate([[0], share.cumsum()])
    error = float(np.abs(measured - nominal)[1:-1].mean())
    width = 1 / len(levels)
    axes.bar(nominal[1:] - width / 2, share, width * 0.92, color=LINE, label="share of the targets")
    axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=(0, (4, 2)), label="as many as said")
    axes.plot(nominal, measured, color=MAIN, marker="o", ms=3.5, label=f"measured, {100 * error:.2f} % off on average")
    _shares(axes, "probability of the predictive interval", "targets in it")


@styled
def coverage(levels: Any, title: str = "Calibration") -> Figure:
    """The reliability diagram of predictive intervals; arguments as ``draw_coverage``."""
    figure, axes = single(4.6, 4.2)
    draw_coverage(axes, levels)
    axes.set_title(title)
    return figure


def draw_open_set(axes: Axes, known: Any, unknown: Any, ways: int) -> None:
    """Which share of queries has a prediction of less entropy, of the task's classes and of others.

    Args:
        axes: to draw on.
        known, unknown: entropies, nats, of any shape.
        ways: classes of a task.
    """
    for values, colour, name in ((known, MAIN, "classes of the task"), (unknown, ACCENT, "other classes")):
        values = np.ravel(np.asarray(values, np.float64))
        axes.ecdf(values, color=colour, label=f"{name}: mean {values.mean():.3f}")
    axes.axvline(math.log(ways), color=MUTED, lw=1, ls=(0, (4, 2)), label=f"uniform over {ways} classes")
    axes.set_xlim(-0.02 * math.log(ways), 1.04 * math.log(ways))
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("entropy of the prediction (nats)")
    axes.set_ylabel("share of queries with less")
    axes.legend(loc="best")


def auroc_text(mean: float, half: float) -> str:
    """The title of entropies of known and unknown classes."""
    return f"Queries of other classes: AUROC {mean:.3f} ± {half:.3f}"


@styled
def open_set(known: Any, unknown: Any, ways: int, auroc: float, half: float, over: str) -> Figure:
    """Entropies of queries of known and unknown classes; arguments as ``draw_open_set``, and the AUROC of a task."""
    figure, axes = single(5.6, 3.8)
    draw_open_set(axes, known, unknown, ways)
    axes.set_title(f"{auroc_text(auroc, half)}, {over}")
    return figure
