"""Pictures of which classes, or kinds of tasks, are taken for which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from app.plots.episodes import pixels
from app.plots.style import ACCENT, INK, LINE, SHADES, shorten, single, styled


@styled
def confusion(wrong: Any, asked: Any, names: Sequence[str], title: str) -> Figure:
    """Which classes, or groups of classes, are taken for which.

    A task's labels mean other classes in every episode, and two classes rarely meet: so a cell is the share of the
    queries of its row that were given to a class of its column, of all that were offered one.

    Args:
        wrong: (K, K), queries of row k that were labelled as another class, of column l.
        asked: (K, K), for each query of row k and each other class of column l in its task, one.
        names: of the K classes or groups.
        title: of the figure.
    """
    wrong, asked = np.asarray(wrong, np.float64), np.asarray(asked, np.float64)
    rate = np.where(asked > 0, wrong / np.maximum(asked, 1), np.nan)
    size, known = len(names), rate[asked > 0]
    cell, letters = (0.3, 8.0) if size <= 24 else (0.16, 6.5)
    figure, axes = single(2.8 + cell * max(size, 8), 1.7 + cell * max(size, 8))
    axes.set_facecolor(LINE)
    top = max(float(known.max()) if len(known) else 0.0, 1e-3)
    image = axes.imshow(rate, cmap=SHADES, vmin=0, vmax=top)
    labels = [shorten(n, 20) for n in names]
    axes.set_xticks(range(size), labels, rotation=90, fontsize=letters)
    axes.set_yticks(range(size), labels, fontsize=letters)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if size <= 12:
        for row, column in zip(*np.nonzero(asked), strict=True):
            value = rate[row, column]
            colour = "white" if value > 0.55 * top else INK
            axes.text(column, row, f"{100 * value:.1f}", ha="center", va="center", fontsize=7.5, color=colour)
    axes.set_xlabel("taken for (grey: they never met)" if (asked == 0).any() else "taken for")
    axes.set_ylabel("true")
    axes.set_title(title)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=25, format=PercentFormatter(1.0, decimals=None))
    bar.outline.set_visible(False)
    return figure


@styled
def confused_pairs(pairs: Sequence[tuple[str, str, Any, Any, int, int]], title: str) -> Figure:
    """The pairs of classes that are taken for one another most, with an image of each.

    Args:
        pairs: for each pair both names, an image of each (C, H, W), and of how many queries how many were mistaken:
            (name, name, image, image, mistaken, queries), worst first.
        title: of the figure.
    """
    columns = 2 if len(pairs) > 4 else 1
    rows = math.ceil(len(pairs) / columns)
    figure = Figure(figsize=(0.4 + 4.0 * columns, 0.55 + 0.78 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).T.ravel()  # down the first column, then the second
    for axes in panels:
        axes.set_axis_off()
    for axes, (one, other, image, other_image, mistaken, queries) in zip(panels, pairs, strict=False):
        both = pixels(np.stack([np.asarray(image), np.asarray(other_image)]))
        height, width = both.shape[1:3]
        gap = np.ones((height, max(1, width // 8), 3))
        axes.imshow(np.concatenate([both[0], gap, both[1]], 1), interpolation="nearest")
        axes.set_anchor("W")
        axes.set_xlim(-0.5, width * 6.5)
        x = width * 2.4
        axes.text(x, height * 0.22, shorten(one, 28), va="center", fontsize=8.5)
        axes.text(x, height * 0.52, shorten(other, 28), va="center", fontsize=8.5)
        axes.text(x, height * 0.84, f"{mistaken} of {queries} mistaken", va="center", fontsize=8.5, color=ACCENT)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    return figure


def draw_clusters(axes: Axes, table: Any, names: Sequence[str]) -> None:
    """Which cluster the tasks of each family belong to; clusters that know families have one full cell in a row.

    Args:
        axes: to draw on.
        table: (families, clusters): tasks of the family whose most probable cluster is that one.
        names: of the families.
    """
    counts = np.asarray(table, np.float64)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap=SHADES, vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(share):
        colour = "white" if value > 0.55 else INK
        axes.text(column, row, f"{100 * value:.0f} %", ha="center", va="center", fontsize=8.5, color=colour)
    axes.set_xticks(range(counts.shape[1]), [str(1 + c) for c in range(counts.shape[1])])
    axes.set_yticks(range(len(names)), [f"{n}, {int(c):,}" for n, c in zip(names, counts.sum(1), strict=True)])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("most probable cluster")


@styled
def clusters(table: Any, names: Sequence[str], title: str = "Clusters of tasks") -> Figure:
    """The families of tasks by cluster; arguments as ``draw_clusters``."""
    figure, axes = single()
    draw_clusters(axes, table, names)
    axes.set_title(title)
    return figure
