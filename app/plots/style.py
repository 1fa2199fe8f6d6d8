"""What all pictures share: style, colours, files. Each picture is a pure function of its data and returns a Figure.

The object-oriented API is used throughout: nothing here touches pyplot, a display or another figure. The draw_…
functions put one picture on given axes, for figures of several panels.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from datamodules.core.files import write_atomically

INK, MUTED, LINE = "#1f2933", "#66707c", "#d5dbe1"
MAIN, ACCENT = "#2463a6", "#c8441b"
SHADES = LinearSegmentedColormap.from_list("metabolt", ["#f4f7fa", "#8fb4d6", MAIN, "#12345c"])
CLASSES = ("#2463a6", "#e08214", "#2a9d72", "#c2376b", "#7a5cc0", "#5bb5d5", "#8c6239", "#b5b52d", "#6b7280", "#1f2933")
"""Ten colours that stay apart, in print and for most colour-blind readers."""


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


FIT_STEPS = (0, 1, 5, 10)  # whose predictive intervals are drawn, and the last one's


def mean_and_half(values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the first axis and the half-width of its 95 % interval, 1.96 standard errors."""
    values = np.asarray(values, np.float64)
    spread = values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])
    return values.mean(0), 1.96 * spread / len(values) ** 0.5
