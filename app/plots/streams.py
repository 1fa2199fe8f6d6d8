"""Pictures of learning from streams: what is known of each experience after each one, and of all as they add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from app.plots.style import ACCENT, INK, MAIN, SHADES, mean_and_half, single, styled

WRITTEN = 12  # points up to which the matrix has its numbers written into it
LOGARITHMIC = 50  # experiences from which on a curve's axis is logarithmic


def draw_accuracies(axes: Axes, points: Sequence[int], unseen: Any, learned: Any, unit: str = "experiences") -> None:
    """Accuracy over all experiences so far against their number: on other examples of them, and on those learned.

    Where the two part it is generalisation that is lacking, and where both fall it is memory.

    Args:
        axes: to draw on.
        points: numbers of experiences, (P,).
        unseen, learned: of each stream, (T, P).
        unit: what an experience is called.
    """
    for values, label, colour in ((learned, "examples learned", ACCENT), (unseen, "other examples", MAIN)):
        mean, half = mean_and_half(np.asarray(values, np.float64))
        axes.fill_between(points, mean - half, mean + half, color=colour, alpha=0.18, lw=0)
        axes.plot(points, mean, color=colour, marker="o", ms=4, label=f"{label}, {100 * mean[-1]:.1f} % at the end")
    if max(points) >= LOGARITHMIC:
        axes.set_xscale("log")
        axes.set_xticks(points, [f"{p:,}" for p in points])
        axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(f"{unit} so far")
    axes.set_ylabel("accuracy over all of them")
    axes.legend(loc="lower left")


@styled
def accuracies(points: Sequence[int], unseen: Any, learned: Any, title: str) -> Figure:
    """See ``draw_accuracies``."""
    figure, axes = single(5.6, 3.8)
    draw_accuracies(axes, points, unseen, learned)
    axes.set_title(f"{title}\nmean of {len(unseen):,} streams, 95 % interval")
    return figure


def draw_matrix(axes: Axes, points: Sequence[int], matrix: Any) -> Any:
    """Accuracy on each experience (columns) after some of them (rows), mean over streams; the image.

    Args:
        axes: to draw on.
        points: after how many experiences, (P,).
        matrix: of each stream, (T, P, J), nan for experiences to come.
    """
    mean = np.asarray(matrix, np.float64).mean(0)
    image = axes.imshow(mean, cmap=SHADES, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(points)), [f"{p:,}" for p in points])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if mean.shape[1] <= WRITTEN:
        axes.set_xticks(range(mean.shape[1]), [str(1 + j) for j in range(mean.shape[1])])
        for row, column in zip(*np.nonzero(~np.isnan(mean)), strict=True):
            value = mean[row, column]
            colour = "white" if value > 0.55 else INK
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7.5, color=colour)
    else:
        places = [p - 1 for p in points]
        axes.set_xticks(places, [f"{p:,}" if p > mean.shape[1] / 15 or p == 1 else "" for p in points])
    axes.set_xlabel("accuracy on experience")
    axes.set_ylabel("after so many")
    return image


@styled
def matrix(points: Sequence[int], values: Any, title: str) -> Figure:
    """See ``draw_matrix``."""
    rows, columns = np.asarray(values).shape[1:]
    figure, axes = single(min(8.0, 3.0 + 0.28 * max(columns, 6)), min(7.0, 1.9 + 0.28 * max(rows, 5)))
    image = draw_matrix(axes, points, values)
    axes.set_title(f"{title}\nmean of {len(values):,} streams")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=25, format=PercentFormatter(1.0, decimals=0))
    bar.outline.set_visible(False)
    return figure
