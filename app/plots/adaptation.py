"""Pictures of adaptation along the inner loop, of fitted functions, and of meta-training."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from app.plots.style import ACCENT, FIT_STEPS, INK, MAIN, SHADES, mean_and_half, single, styled
from datamodules.core.metric import Metric


def draw_adaptation(axes: Axes, values: Any, metric: Metric, label: str) -> None:
    """Mean over tasks against the inner step, with its 95 % interval.

    Args:
        axes: to draw on.
        values: (T, steps + 1), of each task before the first step and after each one.
        metric, label: what they are, and its name on the axis.
    """
    mean, half = mean_and_half(values)
    steps = np.arange(len(mean))
    axes.fill_between(steps, mean - half, mean + half, color=MAIN, alpha=0.18, lw=0, label="95 % interval over tasks")
    axes.plot(steps, mean, color=MAIN, marker="o", ms=4.5, label=f"mean of {len(values)} tasks")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("inner steps taken")
    axes.set_ylabel(label)
    if metric.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    rises = mean[-1] >= mean[0]
    for step, above in ((0, not rises), (len(mean) - 1, rises)):
        text = f"{100 * mean[step]:.1f} %" if metric.share else f"{mean[step]:.3g}"
        place = {"xytext": (0, 9 if above else -16), "textcoords": "offset points", "ha": "center"}
        axes.annotate(text, (step, mean[step]), fontsize=8.5, **place)
    axes.margins(x=0.08, y=0.2)
    axes.legend(loc="lower right" if rises else "upper right")


@styled
def adaptation(values: Any, metric: Metric, label: str, title: str = "Adaptation") -> Figure:
    """The adaptation curve; arguments as ``draw_adaptation``."""
    figure, axes = single()
    draw_adaptation(axes, values, metric, label)
    axes.set_title(title)
    return figure


def draw_fit(
    axes: Axes,
    grid: Any,
    truth: Any | None,
    support_x: Any,
    support_y: Any,
    predictions: Any,
    band: Any | None = None,
) -> None:
    """One function: the true one, the support points, and the prediction after each inner step.

    Args:
        axes: to draw on.
        grid: where functions are drawn, (N,).
        truth: the true function, (N,), or None.
        support_x, support_y: (S,).
        predictions: (steps + 1, N); of more than six states six are shown, the first and the last among them.
        band: the ends of the last state's predictive interval, (2, N), or None.
    """
    predictions = np.asarray(predictions)
    states = len(predictions)
    if band is not None:
        axes.fill_between(grid, *np.asarray(band), color=MAIN, alpha=0.18, lw=0, label="95 % predictive interval")
    if truth is not None:
        axes.plot(grid, truth, color=INK, lw=1.2, ls=(0, (4, 2)), label="true function")
    for k in sorted({int(k) for k in np.linspace(0, states - 1, min(states, 6)).round()}):
        place = 1.0 if states == 1 else k / (states - 1)
        label = "prediction" if states == 1 else _state_name(k)
        axes.plot(grid, predictions[k], color=SHADES(0.3 + 0.5 * place), lw=1.1 + 0.9 * place, label=label)
    axes.plot(support_x, support_y, "o", color=ACCENT, ms=5, mec="white", zorder=5, label="support")


def _state_name(step: int) -> str:
    return "before adaptation" if step == 0 else f"after step {step}"


@styled
def fits(
    grid: Any, truth: Any | None, support_x: Any, support_y: Any, predictions: Any, title: str = "Regression tasks"
) -> Figure:
    """Several tasks side by side; arguments as ``draw_fit``, but for grid with the tasks (T, …) as first dimension."""
    tasks = len(predictions)
    columns = min(tasks, 2)
    rows = math.ceil(tasks / columns)
    figure = Figure(figsize=(4.3 * columns, 0.6 + 2.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for i, axes in enumerate(panels.flat):
        if i >= tasks:
            axes.set_axis_off()
            continue
        draw_fit(axes, grid, None if truth is None else truth[i], support_x[i], support_y[i], predictions[i])
    _label_fits(figure, panels, title)
    return figure


@styled
def predictive_fits(
    grid: Any,
    truth: Any | None,
    support_x: Any,
    support_y: Any,
    predictions: Any,
    bands: Any,
    title: str = "Regression tasks",
) -> Figure:
    """The predictive intervals of several tasks, a row each, after some of the steps, a column each.

    Arguments as ``draw_fit``, but for grid with the tasks (T, …) as first dimension; bands are (T, steps + 1, 2, N).
    """
    tasks, states = np.shape(predictions)[:2]
    steps = [*(k for k in FIT_STEPS if k < states - 1), states - 1]
    figure = Figure(figsize=(1 + max(2.4 * len(steps), 4.8), 0.8 + 1.8 * tasks), layout="constrained")
    panels = figure.subplots(tasks, len(steps), sharex=True, sharey="row", squeeze=False)
    for i, row in enumerate(panels):
        for k, axes in zip(steps, row, strict=True):
            state = (np.asarray(predictions[i])[k : k + 1], np.asarray(bands[i])[k])
            draw_fit(axes, grid, None if truth is None else truth[i], support_x[i], support_y[i], *state)
            if i == 0 and states > 1:
                axes.set_title(_state_name(k))
        known = [a for a in (truth, support_y) if a is not None]
        _bound(row[0], np.concatenate([np.ravel(a[i]) for a in known]), np.asarray(bands[i])[-1])
    _label_fits(figure, panels, title)
    return figure


def _bound(axes: Axes, known: np.ndarray, band: np.ndarray) -> None:
    """Show what is known and the last interval whole; an interval that is much wider, before adaptation, is cut."""
    low, high = min(known.min(), band[0].min()), max(known.max(), band[1].max())
    reach = max(float(np.ptp(known)), 1e-9)
    low, high = max(low, known.min() - 2 * reach), min(high, known.max() + 2 * reach)
    axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))


def _label_fits(figure: Figure, panels: np.ndarray, title: str) -> None:
    for axes in panels[-1]:
        axes.set_xlabel("x")
    for axes in panels[:, 0]:
        axes.set_ylabel("y")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5))


def read_curve(path: Path, metric_name: str) -> np.ndarray:
    """Validations from metrics.csv: (N, 3) of tasks seen, the metric and the half-width of its 95 % interval.

    Raises:
        OSError: the file cannot be read.
    """
    name = f"val/{metric_name}"
    with open(path, newline="") as file:
        rows = [r for r in csv.DictReader(file) if r.get(name) and r.get("tasks_seen")]
    points = [[float(r["tasks_seen"]), float(r[name]), float(r.get(f"{name}_ci95") or "nan")] for r in rows]
    return np.array(points).reshape(-1, 3)


def draw_training(axes: Axes, points: Any, metric: Metric, label: str) -> None:
    """Meta-validation against tasks seen; ``points`` as ``read_curve`` gives them."""
    seen, mean, half = np.asarray(points, np.float64).T
    half = np.nan_to_num(half)
    axes.fill_between(seen, mean - half, mean + half, color=MAIN, alpha=0.18, lw=0, label="95 % interval over tasks")
    axes.plot(seen, mean, color=MAIN, marker="o" if len(seen) < 40 else "", ms=4, label="meta-validation")
    rises = metric.better != "lower"
    best = int(mean.argmax() if rises else mean.argmin())
    text = f"best {metric.short(float(mean[best]))}"
    axes.plot(seen[best], mean[best], "o", color=ACCENT, ms=6, mec="white", label=text, zorder=5)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("meta-training tasks seen")
    axes.set_ylabel(label)
    if metric.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    elif not rises:
        axes.set_ylim(bottom=0)
    axes.legend(loc="lower right" if rises else "upper right")


@styled
def training(points: Any, metric: Metric, label: str, title: str = "Meta-training") -> Figure:
    """The training curve; arguments as ``draw_training``."""
    figure, axes = single()
    draw_training(axes, points, metric, label)
    axes.set_title(title)
    return figure
