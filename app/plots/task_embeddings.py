"""Pictures of task embeddings: tasks on the plane, tasks and those nearest to them, distance against success."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from app.plots.embeddings import component_names, principal
from app.plots.episodes import pixels
from app.plots.style import ACCENT, CLASSES, INK, MAIN, MUTED, SHADES, shorten, single, styled
from datamodules.core.metric import Metric

MARKERS = ("o", "^", "s")
MOST = len(CLASSES) * len(MARKERS)
Groups = tuple[Sequence[int], Sequence[str]]
"""The number of each task's group, and the names of the groups."""


def neighbours_plane(points: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """t-SNE (van der Maaten and Hinton, 2008) of tasks by their distances (N, N), from the components on, (N, 2).

    Exact, not by Barnes and Hut, whose sums differ with threads: the same for the same tasks.
    """
    from sklearn.manifold import TSNE  # takes a second to import, and only figures need it

    start, _ = principal(points)
    start = 1e-4 * start / max(float(start[:, 0].std()), 1e-12)
    perplexity = min(30.0, (len(points) - 1) / 3)
    plane = TSNE(perplexity=perplexity, init=start, metric="precomputed", method="exact", random_state=0)
    symmetric = np.maximum((distances + distances.T) / 2, 0)
    np.fill_diagonal(symmetric, 0)
    return plane.fit_transform(symmetric)


def draw_tasks(axes: Axes, flat: np.ndarray, groups: Groups | None, values: Any, label: str) -> None:
    """Tasks as points, by the colour of their group or of a number.

    Args:
        axes: to draw on.
        flat: (N, 2).
        groups: see ``Groups``; None colours by ``values``.
        values: a number of each task, (N,); None is one colour for all.
        label: of the numbers.
    """
    if groups is not None:
        numbers, names = np.asarray(groups[0]), list(groups[1])
        for place, number in enumerate(np.unique(numbers)[:MOST]):
            own = flat[numbers == number]
            look: Any = {"color": CLASSES[place % len(CLASSES)], "marker": MARKERS[place // len(CLASSES)]}
            axes.scatter(*own.T, s=22, alpha=0.8, lw=0, label=shorten(names[int(number)], 22), **look)
        rest = flat[~np.isin(numbers, np.unique(numbers)[:MOST])]
        if len(rest):
            axes.scatter(*rest.T, s=12, alpha=0.5, lw=0, color=MUTED, label="others")
    elif values is not None:
        points = axes.scatter(*flat.T, c=np.asarray(values, np.float64), cmap=SHADES, s=22, ec=MUTED, lw=0.3)
        bar = axes.figure.colorbar(points, ax=axes, label=label)
        bar.outline.set_visible(False)  # pyright: ignore
    else:
        axes.scatter(*flat.T, s=22, alpha=0.8, lw=0, color=MAIN)


def draw_plane(axes: Axes, points: np.ndarray, groups: Groups | None, values: Any, label: str) -> None:
    """Tasks on their first two principal components; arguments as ``draw_tasks``."""
    flat, share = principal(points)
    draw_tasks(axes, flat, groups, values, label)
    x, y = component_names(share)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


@styled
def planes(
    points: Any, distances: Any, groups: Groups | None, values: Any, label: str, signal: float | None, title: str
) -> Figure:
    """Tasks on the plane twice: by principal components, and by t-SNE.

    Args:
        points: embeddings, (N, d).
        distances: of tasks, (N, N).
        groups, values, label: what colours the tasks, see ``draw_tasks``.
        signal: variance between tasks over that between support sets of one; None if it is not known.
        title: of the figure.
    """
    points = np.asarray(points, np.float64)
    figure = Figure(figsize=(11.4, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_plane(left, points, groups, None if groups else values, label)
    draw_tasks(right, neighbours_plane(points, np.asarray(distances, np.float64)), groups, values, label)
    right.set_xticks([])
    right.set_yticks([])
    left.set_title("Principal components")
    right.set_title("t-SNE")
    if groups is not None:
        handles, names = left.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right upper", ncols=1 + (len(names) > 20))
    told = "" if signal is None else f"; variance between tasks over within {signal:.2g}"
    figure.suptitle(f"{title}{told}", x=0.01, ha="left", fontsize=10.5)
    return figure


def mosaic(images: Any, most: int = 9) -> np.ndarray:
    """The first images (N, C, H, W) of a task side by side in a square, (H', W', 3)."""
    shown = pixels(images)[:most]
    side = math.ceil(len(shown) ** 0.5)
    height, width = shown.shape[1:3]
    pad = max(1, width // 14)
    canvas = np.ones((math.ceil(len(shown) / side) * (height + pad) - pad, side * (width + pad) - pad, 3))
    for place, image in enumerate(shown):
        y, x = place // side * (height + pad), place % side * (width + pad)
        canvas[y : y + height, x : x + width] = image
    return canvas


@styled
def nearest(
    rows: Sequence[Sequence[int]],
    draw: Callable[[Axes, int], None],
    distances: Any,
    groups: Groups | None,
    title: str,
) -> Figure:
    """A row for each of some tasks: its picture, then those of the tasks nearest to it; of another group framed.

    Args:
        rows: tasks by number, the task first and its neighbours from the nearest on.
        draw: a task's picture.
        distances: of tasks, (N, N).
        groups: see ``Groups``; None frames none.
        title: of the figure.
    """
    distances, columns = np.asarray(distances), max(map(len, rows))
    figure = Figure(figsize=(0.4 + 1.45 * columns, 0.6 + 1.6 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for of_row, tasks in zip(grid, rows, strict=True):
        for axes in of_row[len(tasks) :]:
            axes.set_axis_off()
        for place, (axes, task) in enumerate(zip(of_row, tasks, strict=False)):
            draw(axes, task)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(visible=False)
            other = groups is not None and groups[0][task] != groups[0][tasks[0]]
            for spine in axes.spines.values():
                spine.set_visible(other or place == 0)
                spine.set(color=ACCENT if other else INK, linewidth=2.0 if other else 1.0)
            name = f"task {task}" if groups is None else shorten(groups[1][groups[0][task]], 16)
            colour = ACCENT if other else INK if place == 0 else MUTED
            told = name if place == 0 else f"{name}\n{distances[tasks[0], task]:.3g}"
            axes.set_title(told, fontsize=7.5, color=colour, loc="center", pad=3)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    return figure


@styled
def distance(far: Any, values: Any, metric: Metric, label: str, title: str) -> Figure:
    """Each task's distance from where the tasks of meta-validation are on average, against how well it went.

    Args:
        far: distances, (N,).
        values: the metric of each task, (N,).
        metric, label: what it is, and its name on the axis.
        title: of the figure.
    """
    far, values = np.asarray(far, np.float64), np.asarray(values, np.float64)
    figure, axes = single(5.8, 3.8)
    axes.scatter(far, values, s=16, alpha=0.45, lw=0, color=MAIN)
    edges = np.quantile(far, np.linspace(0, 1, min(6, len(far))))
    middles, means = [], []
    for low, high in pairwise(edges):
        own = (far >= low) & (far <= high)
        middles.append(far[own].mean())
        means.append(values[own].mean())
    axes.plot(middles, means, color=ACCENT, marker="o", ms=4, label="mean of a fifth of the tasks")
    if metric.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    elif metric.better == "lower" and values.min() > 0 and values.max() > 30 * np.median(values):
        axes.set_yscale("log")
    axes.set_xlabel("distance to the mean embedding of meta-validation")
    axes.set_ylabel(f"{label} of a task")
    axes.legend()
    axes.set_title(f"{title}: rank correlation {rank_correlation(far, values):+.2f}")
    return figure


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, 0 where one of the two is constant."""
    from scipy.stats import spearmanr

    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(spearmanr(a, b).statistic)
