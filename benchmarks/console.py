"""What the benchmarks show their tables on."""

from __future__ import annotations

from rich.console import Console


def wide_console() -> Console:
    """As wide as the tables are where there is no terminal to heed."""
    console = Console()
    if not console.is_terminal:
        console.width = 130
    return console
