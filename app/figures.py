"""Pictures of episodes, adaptation and results; each is a pure function of its data and returns a Figure.

The object-oriented API is used throughout: nothing here touches pyplot, a display or another figure. The draw_…
functions put one picture on given axes, for figures of several panels.
"""

from __future__ import annotations

import csv
import functools
import io
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter, PercentFormatter

from app.metrics import LOWER_IS_BETTER
from app.progress import SHARES, headline_text
from app.run import write_atomically

INK, MUTED, LINE = "#1f2933", "#66707c", "#d5dbe1"
MAIN, ACCENT = "#2463a6", "#c8441b"
SHADES = LinearSegmentedColormap.from_list("metabolt", ["#f4f7fa", "#8fb4d6", MAIN, "#12345c"])
CLASSES = ("#2463a6", "#e08214", "#2a9d72", "#c2376b", "#7a5cc0", "#5bb5d5", "#8c6239", "#b5b52d", "#6b7280", "#1f2933")
"""Ten colours that stay apart, in print and for most colour-blind readers."""

SHOTS, QUERIES, ROWS = 5, 15, 20  # of one class, of one class, and classes that an episode's picture shows at most
DPI = 120
STYLE: Any = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#edf0f3",
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "text.parse_math": False,  # class names may hold any character
}

P = ParamSpec("P")
Panel = tuple[str, Callable[[Axes], None]]
"""A title and what draws on the axes below it."""


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Makes its figure in this style, which it leaves no trace of."""

    @functools.wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return inside


def single(width: float = 5.6, height: float = 3.6) -> tuple[Figure, Axes]:
    """A figure of one picture; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def png(figure: Figure, dpi: int = DPI) -> bytes:
    """The figure as the content of a PNG file."""
    content = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context(STYLE):
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # shown as a box: a name in a rare script
        figure.savefig(content, format="png", dpi=dpi, facecolor="white")
    return content.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    write_atomically(path, png(figure))


def shorten(name: str, length: int = 24) -> str:
    """A name that fits; the end tells classes apart, so the middle goes."""
    return name if len(name) <= length else f"{name[: length // 3]}…{name[-(length - length // 3 - 1) :]}"


def pixels(images: Any) -> np.ndarray:
    """Images (N, C, H, W), uint8 or floats of any range, as (N, H, W, 3) floats in [0, 1]."""
    array = np.asarray(images)
    array = array / 255 if array.dtype == np.uint8 else (array - array.min()) / max(float(np.ptp(array)), 1e-9)
    array = array.transpose(0, 2, 3, 1).astype(np.float64)
    return np.repeat(array[..., :1], 3, -1) if array.shape[-1] < 3 else array[..., :3]


# Episodes -----------------------------------------------------------------------------------------------------------


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


# Adaptation ---------------------------------------------------------------------------------------------------------

FIT_STEPS = (0, 1, 5, 10)  # whose predictive intervals are drawn, and the last one's
FIGURE_NAMES = {
    "accuracy": "query accuracy",
    "mse": "query MSE",
    "nll": "query NLL (nats)",
    "ece": "expected calibration error",
    "nmi": "mutual information of clusters and families",
    "coverage": "coverage of the 95 % interval",
    "coverage_error": "error of the coverage",
    "width": "width of the 95 % interval",
    "inside_entropy": "entropy, classes of the task (nats)",
    "outside_entropy": "entropy, other classes (nats)",
    "outside_auroc": "AUROC of other classes",
    "return": "return over the trial",
    "first_episode": "return of the first episode",
    "last_episode": "return of the last episode",
    "regret": "regret over the trial",
    "normalised_return": "return as a share of the best policy's",
}


def mean_and_half(values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the first axis and the half-width of its 95 % interval, 1.96 standard errors."""
    values = np.asarray(values, np.float64)
    spread = values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])
    return values.mean(0), 1.96 * spread / len(values) ** 0.5


def draw_adaptation(axes: Axes, values: Any, figure_name: str) -> None:
    """Mean over tasks against the inner step, with its 95 % interval.

    Args:
        axes: to draw on.
        values: (T, steps + 1), of each task before the first step and after each one.
        figure_name: "accuracy" or "mse".
    """
    mean, half = mean_and_half(values)
    steps = np.arange(len(mean))
    axes.fill_between(steps, mean - half, mean + half, color=MAIN, alpha=0.18, lw=0, label="95 % interval over tasks")
    axes.plot(steps, mean, color=MAIN, marker="o", ms=4.5, label=f"mean of {len(values)} tasks")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("inner steps taken")
    axes.set_ylabel(FIGURE_NAMES.get(figure_name, figure_name))
    if figure_name == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    rises = mean[-1] >= mean[0]
    for step, above in ((0, not rises), (len(mean) - 1, rises)):
        text = f"{100 * mean[step]:.1f} %" if figure_name == "accuracy" else f"{mean[step]:.3g}"
        place = {"xytext": (0, 9 if above else -16), "textcoords": "offset points", "ha": "center"}
        axes.annotate(text, (step, mean[step]), fontsize=8.5, **place)
    axes.margins(x=0.08, y=0.2)
    axes.legend(loc="lower right" if rises else "upper right")


@styled
def adaptation(values: Any, figure_name: str, title: str = "Adaptation") -> Figure:
    """The adaptation curve; arguments as ``draw_adaptation``."""
    figure, axes = single()
    draw_adaptation(axes, values, figure_name)
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


# Classes ------------------------------------------------------------------------------------------------------------


def principal(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first two principal components of points (N, features), (N, 2), and what share of the variance each has."""
    away = points - points.mean(0)
    _, singular, directions = np.linalg.svd(away, full_matrices=False)
    share = singular**2 / max(float((singular**2).sum()), 1e-12)
    flat = away @ directions[:2].T
    lacking = 2 - flat.shape[1]  # one feature, or one point
    return np.pad(flat, [(0, 0), (0, lacking)]), np.pad(share, (0, lacking))[:2]


def component_names(share: np.ndarray) -> tuple[str, str]:
    """Labels of the axes of two principal components."""
    return f"1st component ({share[0]:.0%} of variance)", f"2nd component ({share[1]:.0%} of variance)"


@styled
def embedding(query_z: Any, query_y: Any, support_z: Any, support_y: Any, names: Sequence[str], title: str) -> Figure:
    """The first two principal components of one task's embeddings, with the prototype of each class.

    Args:
        query_z, support_z: embeddings, (Q, features) and (S, features).
        query_y, support_y: labels, (Q,) and (S,); of more than ten classes the first ten are shown.
        names: of the classes, by label.
        title: of the figure.
    """
    query_z, support_z = np.asarray(query_z, np.float64), np.asarray(support_z, np.float64)
    query_y, support_y = np.asarray(query_y), np.asarray(support_y)
    flat, share = principal(np.concatenate([query_z, support_z]))
    flat_query, flat_support = flat[: len(query_z)], flat[len(query_z) :]
    figure, axes = single(6.2, 4.2)
    for label in range(min(len(names), len(CLASSES))):
        queries, colour = flat_query[query_y == label], CLASSES[label]
        prototype = flat_support[support_y == label].mean(0)
        axes.scatter(*queries.T, s=26, color=colour, alpha=0.75, lw=0, label=shorten(names[label]))
        axes.scatter(*prototype, s=190, marker="*", color=colour, ec="white", lw=1.2, zorder=4)
    axes.scatter([], [], s=130, marker="*", color=MUTED, label="prototype")
    x, y = component_names(share)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.set_aspect("equal", adjustable="datalim")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    return figure


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


# Results ------------------------------------------------------------------------------------------------------------


def draw_histogram(axes: Axes, values: Any, figure_name: str) -> None:
    """Tasks by their figure, the worst tenth of them marked.

    Args:
        axes: to draw on.
        values: of each task, (T,).
        figure_name: "accuracy", "mse", "return".
    """
    values = np.sort(np.asarray(values, np.float64))
    values = values[np.isfinite(values)]
    low_is_worse = figure_name not in LOWER_IS_BETTER
    tenth = max(1, len(values) // 10)
    worst = values[:tenth] if low_is_worse else values[-tenth:]
    mean, half = mean_and_half(values)
    if low_is_worse:
        # Accuracies are multiples of 1 / queries, some returns whole: edges between, a whole number to a bar.
        gaps = np.diff(np.unique(values.round(6)))
        step = float(gaps.min()) if len(gaps) else 0.05
        step *= max(1, math.ceil((values[-1] - values[0]) / step / 40))
        edges: Any = values[-1] + step / 2 - step * np.arange(math.ceil((values[-1] - values[0]) / step) + 2)[::-1]
        if figure_name == "accuracy":
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    elif values[0] > 0 and values[-1] > 30 * np.median(values):
        edges = np.geomspace(values[0], values[-1] * 1.001, 41)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # matplotlib's own would need mathematics
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        edges = np.linspace(0, values[-1] * 1.001 or 1.0, 41)
    axes.hist(values, edges, color=MAIN, rwidth=0.92)
    marked = f"worst tenth: mean {_text(float(worst.mean()), figure_name)}"
    axes.hist(worst, edges, color=ACCENT, rwidth=0.92, label=marked)
    interval = f"mean {headline_text(figure_name, float(mean), float(half))}"
    axes.axvline(float(mean), color=INK, lw=1.2, ls=(0, (4, 2)), label=interval)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel(f"{FIGURE_NAMES.get(figure_name, figure_name)} of a task")
    axes.set_ylabel("tasks")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.legend(loc="upper left" if low_is_worse else "upper right")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.25)  # room for the legend


def _text(value: float, figure_name: str) -> str:
    return f"{100 * value:.2f} %" if figure_name == "accuracy" else f"{value:.3g}"


@styled
def histogram(values: Any, figure_name: str, title: str = "Meta-test tasks") -> Figure:
    """Tasks by their figure; arguments as ``draw_histogram``."""
    figure, axes = single()
    draw_histogram(axes, values, figure_name)
    axes.set_title(title)
    return figure


def _shares(axes: Axes, x: str, y: str) -> None:
    """Both axes from 0 to 100 %, with these labels."""
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.03)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(loc="upper left")


def draw_reliability(axes: Axes, bins: Any) -> None:
    """Accuracy against confidence; on the diagonal a learner is as often right as it says.

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
    axes.plot(said, observed, color=MAIN, marker="o", ms=4.5, label=f"measured, ECE {100 * error:.2f} %")
    _shares(axes, "confidence of the prediction", "accuracy")


@styled
def reliability(bins: Any, title: str = "Calibration") -> Figure:
    """The reliability diagram; arguments as ``draw_reliability``."""
    figure, axes = single(4.6, 4.2)
    draw_reliability(axes, bins)
    axes.set_title(title)
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


def draw_outside(axes: Axes, inside: Any, outside: Any, ways: int) -> None:
    """How many queries have a prediction of at most so much entropy, of the task's classes and of others.

    Args:
        axes: to draw on.
        inside, outside: entropies, nats, of any shape.
        ways: classes of a task.
    """
    for values, colour, name in ((inside, MAIN, "classes of the task"), (outside, ACCENT, "other classes")):
        values = np.ravel(np.asarray(values, np.float64))
        axes.ecdf(values, color=colour, label=f"{name}: mean {values.mean():.3f}")
    axes.axvline(math.log(ways), color=MUTED, lw=1, ls=(0, (4, 2)), label=f"uniform over {ways} classes")
    axes.set_xlim(-0.02 * math.log(ways), 1.04 * math.log(ways))
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("entropy of the prediction (nats)")
    axes.set_ylabel("queries of at most so much")
    axes.legend(loc="best")


def auroc_text(mean: float, half: float) -> str:
    """The title of entropies inside and outside."""
    return f"Queries of other classes: AUROC {mean:.3f} ± {half:.3f}"


@styled
def outside(inside: Any, outside: Any, ways: int, auroc: float, half: float, over: str) -> Figure:
    """Entropies of queries inside and outside; arguments as ``draw_outside``, and the AUROC within a task."""
    figure, axes = single(5.6, 3.8)
    draw_outside(axes, inside, outside, ways)
    axes.set_title(f"{auroc_text(auroc, half)}, {over}")
    return figure


def read_curve(path: Path, figure_name: str) -> np.ndarray:
    """Validations from metrics.csv: (N, 3) of tasks seen, the figure and the half-width of its 95 % interval.

    Raises:
        OSError: the file cannot be read.
    """
    name = f"val/{figure_name}"
    with open(path, newline="") as file:
        rows = [r for r in csv.DictReader(file) if r.get(name) and r.get("tasks_seen")]
    points = [[float(r["tasks_seen"]), float(r[name]), float(r.get(f"{name}_ci95") or "nan")] for r in rows]
    return np.array(points).reshape(-1, 3)


def draw_training(axes: Axes, points: Any, figure_name: str) -> None:
    """Meta-validation against tasks seen; ``points`` as ``read_curve`` gives them."""
    seen, mean, half = np.asarray(points, np.float64).T
    half = np.nan_to_num(half)
    axes.fill_between(seen, mean - half, mean + half, color=MAIN, alpha=0.18, lw=0, label="95 % interval over tasks")
    axes.plot(seen, mean, color=MAIN, marker="o" if len(seen) < 40 else "", ms=4, label="meta-validation")
    rises = figure_name not in LOWER_IS_BETTER
    best = int(mean.argmax() if rises else mean.argmin())
    text = f"best {_text(float(mean[best]), figure_name)}"
    axes.plot(seen[best], mean[best], "o", color=ACCENT, ms=6, mec="white", label=text, zorder=5)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("meta-training tasks seen")
    axes.set_ylabel(FIGURE_NAMES.get(figure_name, figure_name))
    if figure_name == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    elif not rises:
        axes.set_ylim(bottom=0)
    axes.legend(loc="lower right" if rises else "upper right")


@styled
def training(points: Any, figure_name: str, title: str = "Meta-training") -> Figure:
    """The training curve; arguments as ``draw_training``."""
    figure, axes = single()
    draw_training(axes, points, figure_name)
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
def comparison(learners: Sequence[dict[str, Any]], differences: Sequence[dict[str, Any]], over: str) -> Figure:
    """Figures of several learners and paired differences, each with its 95 % interval; a row for each figure.

    Args:
        learners, differences: as comparison.json has them.
        over: what they were tested on.
    """
    names = list(dict.fromkeys(name for learner in learners for name in learner["figures"]))
    lines = max(len(learners), len(differences))
    height = 0.75 + 0.26 * lines
    figure = Figure(figsize=(10.4, 0.5 + height * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 2, squeeze=False)
    short = [shorten(learner["learner"]) for learner in learners]
    for row, name in zip(panels, names, strict=True):
        share = name in SHARES
        title = FIGURE_NAMES.get(name, name)
        _dots(row[0], [learner["figures"].get(name) for learner in learners], short, share, CLASSES)
        pairs = [f"{shorten(d['learner'], 18)} \N{MINUS SIGN} {shorten(d['minus'], 18)}" for d in differences]
        row[1].axvline(0, color=INK, lw=1, ls=(0, (4, 2)))
        _dots(row[1], [d["figures"].get(name) for d in differences], pairs, share, (INK,))
        row[0].set_title(title)
        row[1].set_title("paired difference")
    figure.suptitle(f"{over}: mean and 95 % interval", x=0.01, ha="left", fontsize=12)
    return figure


def _dots(
    axes: Axes,
    told: Sequence[dict[str, float | None] | None],
    names: Sequence[str],
    share: bool,
    colours: Sequence[str],
) -> None:
    """A dot with its interval for each name, from the top down; nothing where there is no figure."""
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
