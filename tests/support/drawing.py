"""What is on a figure."""

from __future__ import annotations

from matplotlib.figure import Figure

from app.plots import style


def drawn(figure: Figure) -> bytes:
    """The figure as PNG; drawing it finds what building it does not."""
    content = style.png(figure, dpi=40)
    assert content.startswith(b"\x89PNG")
    return content


def labels(axes) -> list[str]:
    return axes.get_legend_handles_labels()[1]
