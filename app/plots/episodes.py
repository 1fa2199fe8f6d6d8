"""Pictures of episodes: support images, queries and predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from app.plots.style import ACCENT, MUTED, shorten, single, styled

SHOTS, QUERIES, ROWS = 5, 15, 20  # of one class, of one class, and classes that an episode's picture shows at most


def pixels(images: Any) -> np.ndarray:
    """Images (N, C, H, W), uint8 or floats of any range, as (N, H, W, 3) floats in [0, 1]."""
    array = np.asarray(images)
    array = array / 255 if array.dtype == np.uint8 else (array - array.min()) / max(float(np.ptp(array)), 1e-9)
    array = array.transpose(0, 2, 3, 1).astype(np.float64)
    return np.repeat(array[..., :1], 3, -1) if array.shape[-1] < 3 else array[..., :3]


def draw_episode(
    axes: Axes,
    support_x: Any,
    support_y: Any,
    query_x: Any,
    query_y: Any,
    probabilities: Any,
    names: Sequence[str],
    scale: float = 1.0,
    most_rows: int = ROWS,
) -> None:
    """One row per class: its support images, then its queries with the confidence of the prediction under each.

    A mistaken query is framed, and the number of the class that it was taken for comes first.

    Args:
        axes: to draw on.
        support_x, query_x: (S, C, H, W) and (Q, C, H, W), uint8 or floats.
        support_y, query_y: labels, (S,) and (Q,).
        probabilities: (Q, ways), of the predictions.
        names: of the classes, by label; empty for none.
        scale: of the text.
        most_rows: the first so many classes are shown.
    """
    support_x, query_x = pixels(support_x), pixels(query_x)
    support_y, query_y, probabilities = (np.asarray(a) for a in (support_y, query_y, probabilities))
    predicted, confidence = probabilities.argmax(-1), probabilities.max(-1)
    ways = min(probabilities.shape[-1], most_rows)
    rows = [(np.flatnonzero(support_y == c)[:SHOTS], np.flatnonzero(query_y == c)[:QUERIES]) for c in range(ways)]
    shots, queries = max(len(s) for s, _ in rows), max(len(q) for _, q in rows)
    height, width = support_x.shape[1:3]
    step_x, step_y, gap = width * 1.12, height * 1.42, width * 0.7
    left = shots * step_x + gap
    canvas = np.ones((math.ceil(ways * step_y), math.ceil(left + queries * step_x), 3))
    small, tiny = 9 * scale, 7.5 * scale

    def place(image: np.ndarray, x: float, y: float) -> None:
        canvas[round(y) : round(y) + height, round(x) : round(x) + width] = image

    for row, (of_support, of_query) in enumerate(rows):
        y = row * step_y
        label = f"{shorten(names[row])}  {row}" if names else str(row)
        axes.text(-0.3 * width, y + height / 2, label, ha="right", va="center", fontsize=small)
        for k, i in enumerate(of_support):
            place(support_x[i], k * step_x, y)
        for k, i in enumerate(of_query):
            x = left + k * step_x
            place(query_x[i], x, y)
            wrong = predicted[i] != row
            text, colour = f"{confidence[i]:.0%}", ACCENT if wrong else MUTED
            if wrong:
                text = f"→{predicted[i]} {text}"
                corner = (round(x) - 0.5, round(y) - 0.5)
                axes.add_patch(Rectangle(corner, width, height, fill=False, ec=ACCENT, lw=2.2 * scale))
            axes.text(x + width / 2, y + height * 1.05, text, ha="center", va="top", fontsize=tiny, color=colour)
    axes.imshow(canvas, interpolation="nearest", extent=(-0.5, canvas.shape[1] - 0.5, canvas.shape[0] - 0.5, -0.5))
    axes.set_axis_off()
    if shots:
        axes.text(0, -0.2 * height, "support", fontsize=small, color=MUTED)
    axes.text(left, -0.2 * height, "queries, confidence below", fontsize=small, color=MUTED)


@styled
def episode(
    support_x: Any, support_y: Any, query_x: Any, query_y: Any, probabilities: Any, names: Sequence[str], title: str
) -> Figure:
    """An episode of images with predictions; arguments as ``draw_episode``."""
    offered = np.shape(probabilities)[-1]
    ways = min(offered, ROWS)
    queries = min(max(np.bincount(np.asarray(query_y))), QUERIES)
    shots = min(max(np.bincount(np.asarray(support_y))), SHOTS)
    margin = 0.4 + (0.075 * max(len(shorten(n)) for n in names[:ways]) if names else 0)
    figure, axes = single(margin + 0.58 * (shots + queries + 0.7), 0.75 + 0.72 * ways)
    draw_episode(axes, support_x, support_y, query_x, query_y, probabilities, names)
    right = int((np.asarray(probabilities).argmax(-1) == np.asarray(query_y)).sum())
    shown = "" if ways == offered else f" (the first {ways} of {offered} classes)"
    figure.suptitle(f"{title}: {right} of {len(query_y)} queries right{shown}", x=0.01, ha="left", fontsize=10.5)
    return figure


@styled
def generated(tasks: Sequence[tuple[Any, Any]], title: str) -> Figure:
    """A row for each task: images of its support set, then those that were generated for it.

    Args:
        tasks: support images (S, C, H, W) and generated ones (n, C, H, W), of each task.
        title: of the figure.
    """
    rows = [(pixels(support)[:QUERIES], pixels(made)[:QUERIES]) for support, made in tasks]
    shots, fakes = max(len(s) for s, _ in rows), max(len(f) for _, f in rows)
    height, width = rows[0][0].shape[1:3]
    gap, pad = width // 2, max(1, width // 14)
    canvas = np.ones((len(rows) * (height + pad), (shots + fakes) * (width + pad) + gap, 3))
    left = shots * (width + pad) + gap
    for row, (support, made) in enumerate(rows):
        y = row * (height + pad)
        for start, images in ((0, support), (left, made)):
            for k, image in enumerate(images):
                x = start + k * (width + pad)
                canvas[y : y + height, x : x + width] = image
    figure, axes = single(0.3 + 0.58 * (shots + fakes + 0.5), 0.8 + 0.58 * len(rows))
    axes.imshow(canvas, interpolation="nearest")
    axes.set_axis_off()
    axes.text(0, -0.2 * height, "support", fontsize=9, color=MUTED)
    axes.text(left, -0.2 * height, "generated", fontsize=9, color=MUTED)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    return figure
