"""What panels are made of: one look at a learner, at a validation or after a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from app.plots.style import Panel
from app.runs.open_set import OpenSet
from app.runs.probe import Probe

Figures = Iterator[tuple[str, Callable[[], Any]]]
"""Names, and what makes each figure; a figure that is None after all is left out."""


@dataclass
class View:
    """What panels look at, and what they leave for the figure of the whole.

    Attributes:
        probe: looks at the learner.
        table: what is kept of each task, name to (T, …), as far as it is still there at validations.
        at: when it was measured, for titles.
        final: after the test.
        run_dir: of the run.
        guard: what fails costs its figure alone.
        open_set: measured after the test; None without.
        curve_tasks, confusion_tasks: behind the curve of adaptation, and the figures of confusions.
        embedding_tasks: behind the figures of task embeddings.
        panels: what belongs into one figure of several panels; whole once all figures were gone through.
    """

    probe: Probe
    table: dict[str, Tensor]
    at: str
    final: bool
    run_dir: Path
    guard: Callable[[str, Callable[[], Any]], Any]
    open_set: OpenSet | None = None
    curve_tasks: int = 64
    confusion_tasks: int = 600
    embedding_tasks: int = 200
    panels: list[Panel] = field(default_factory=list)

    @property
    def values(self) -> Tensor | None:
        """The headline metric of each task, (T,)."""
        return self.table.get(self.probe.metric_name)
