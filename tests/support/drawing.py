"""What is on a figure."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from app.plots import style


def drawn(figure: Figure) -> bytes:
    """The figure as PNG; drawing it finds what building it does not."""
    content = style.png(figure, dpi=40)
    assert content.startswith(b"\x89PNG")
    return content


def labels(axes) -> list[str]:
    return axes.get_legend_handles_labels()[1]


def sketch(figure: Figure, path: Path) -> None:
    """In place of ``style.save``: lays the figure out and draws all that is on it, which finds what building it does
    not, but without the pixels, which take as long again; the file is there and holds nothing."""
    with matplotlib.rc_context(style.STYLE):
        figure.draw_without_rendering()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
