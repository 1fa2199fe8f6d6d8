"""Pictures of results over tasks, and of several learners'."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter, PercentFormatter

from app.plots.style import ACCENT, CLASSES, INK, MAIN, Panel, mean_and_half, shorten, single, styled
from datamodules.core.metric import Metric


def draw_histogram(axes: Axes, values: Any, metric: Metric, label: str) -> None:
    """Tasks by their metric, the worst tenth of them marked.

    Args:
        axes: to draw on.
        values: of each task, (T,).
        metric, label: what they are, and its name on the axis.
    """
    values = np.sort(np.asarray(values, np.float64))
    values = values[np.isfinite(values)]
    low_is_worse = metric.better != "lower"
    tenth = max(1, len(values) // 10)
    worst = values[:tenth] if low_is_worse else values[-tenth:]
    mean, half = mean_and_half(values)
    if low_is_worse:
        # Accuracies are multiples of 1 / queries, some returns whole: edges between, a whole number to a bar.
        gaps = np.diff(np.unique(values.round(6)))
        step = float(gaps.min()) if len(gaps) else 0.05
        step *= max(1, math.ceil((values[-1] - values[0]) / step / 40))
        edges: Any = values[-1] + step / 2 - step * np.arange(math.ceil((values[-1] - values[0]) / step) + 2)[::-1]
        if metric.share:
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    elif values[0] > 0 and values[-1] > 30 * np.median(values):
        edges = np.geomspace(values[0], values[-1] * 1.001, 41)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # matplotlib's own would need mathematics
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        edges = np.linspace(0, values[-1] * 1.001 or 1.0, 41)
    axes.hist(values, edges, color=MAIN, rwidth=0.92)
    marked = f"worst tenth: mean {metric.short(float(worst.mean()))}"
    axes.hist(worst, edges, color=ACCENT, rwidth=0.92, label=marked)
    interval = f"mean {metric.text(float(mean), float(half))}"
    axes.axvline(float(mean), color=INK, lw=1.2, ls=(0, (4, 2)), label=interval)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel(f"{label} of a task")
    axes.set_ylabel("tasks")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.legend(loc="upper left" if low_is_worse else "upper right")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.25)  # room for the legend


@styled
def histogram(values: Any, metric: Metric, label: str, title: str = "Meta-test tasks") -> Figure:
    """Tasks by their metric; arguments as ``draw_histogram``."""
    figure, axes = single()
    draw_histogram(axes, values, metric, label)
    axes.set_title(title)
    return figure


@styled
def results(panels: Sequence[Panel], episode: Callable[[Axes], None] | None, title: str) -> Figure:
    """A run at a glance.

    Args:
        panels: one or more, in two columns.
        episode: draws one task across the figure's width, below them; None leaves it out.
        title: of the figure.
    """
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    heights = [3.2 * rows] + ([4.1] if episode else [])
    figure = Figure(figsize=(5.2 * columns, 0.45 + sum(heights)), layout="constrained")
    # Parts of their own, so that the episode's long names do not push the panels aside.
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    grid = parts[0].add_gridspec(rows, columns)
    for i, (name, draw) in enumerate(panels):
        # The last of an odd number takes its row for itself.
        alone = i == len(panels) - 1 and len(panels) % columns
        axes = parts[0].add_subplot(grid[i // columns, :] if alone else grid[i // columns, i % columns])
        draw(axes)
        axes.set_title(name)
    if episode is not None:
        episode(parts[1].add_subplot())
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure


@styled
def comparison(
    learners: Sequence[dict[str, Any]], differences: Sequence[dict[str, Any]], declared: Mapping[str, Metric], over: str
) -> Figure:
    """Metrics of several learners and paired differences, each with its 95 % interval; a row for each metric.

    Args:
        learners, differences: as comparison.json has them.
        declared: what the metrics are, by name.
        over: what they were tested on.
    """
    names = list(dict.fromkeys(name for learner in learners for name in learner["metrics"]))
    lines = max(len(learners), len(differences))
    height = 0.75 + 0.26 * lines
    figure = Figure(figsize=(10.4, 0.5 + height * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 2, squeeze=False)
    short = [shorten(learner["learner"]) for learner in learners]
    for row, name in zip(panels, names, strict=True):
        share, title = declared[name].share, declared[name].label or name
        _dots(row[0], [learner["metrics"].get(name) for learner in learners], short, share, CLASSES)
        pairs = [f"{shorten(d['learner'], 18)} \N{MINUS SIGN} {shorten(d['minus'], 18)}" for d in differences]
        row[1].axvline(0, color=INK, lw=1, ls=(0, (4, 2)))
        _dots(row[1], [d["metrics"].get(name) for d in differences], pairs, share, (INK,))
        row[0].set_title(title)
        row[1].set_title(f"paired difference{', percentage points' if share else ''}")
    figure.suptitle(f"{over}: mean and 95 % interval", x=0.01, ha="left", fontsize=12)
    return figure


@styled
def ranking(rows: Sequence[tuple[str, float, float]], label: str, title: str) -> Figure:
    """Shares with their 95 % intervals, the first at the top.

    Args:
        rows: name, share and half-width of its interval.
        label: of the axis.
        title: of the figure.
    """
    figure, axes = single(6.4, 0.9 + 0.26 * len(rows))
    numbers: list[Any] = [{"mean": mean, "ci95": half} for _, mean, half in rows]
    _dots(axes, numbers, [shorten(name, 34) for name, *_ in rows], True, (MAIN,))
    axes.set_xlabel(label)
    axes.set_title(title)
    return figure


def _dots(
    axes: Axes,
    told: Sequence[dict[str, float | None] | None],
    names: Sequence[str],
    share: bool,
    colours: Sequence[str],
) -> None:
    """A dot with its interval for each name, from the top down; nothing where there is no metric."""
    for place, numbers in enumerate(told):
        if numbers is None or numbers["mean"] is None:
            continue
        colour = colours[place % len(colours)]
        axes.errorbar(numbers["mean"], place, xerr=numbers["ci95"] or 0, fmt="o", ms=5, color=colour, capsize=3, lw=1.6)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    if share:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
