"""metrics.csv: every logged metric of a run, one row per step, kept through resumes."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
from pytorch_lightning.utilities.rank_zero import rank_zero_only, rank_zero_warn

from datamodules.core.files import write_atomically


class MetricsCSV(Logger):
    """Writes ``metrics.csv`` whole and atomically, some seconds apart.

    Lightning's own CSVLogger deletes the file of the run that is resumed.

    Args:
        folder: the run directory.
    """

    def __init__(self, folder: Path, every_n_rows: int = 20) -> None:
        super().__init__()
        self.path = folder / "metrics.csv"
        self.every_n_rows = every_n_rows
        self.rows: dict[int, dict[str, Any]] | None = None
        self._unwritten = 0
        self._floor = 0

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> None:
        return None

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _read(self) -> dict[int, dict[str, Any]]:
        if not self.path.is_file():
            return {}
        with open(self.path, newline="") as file:
            rows = [{k: v for k, v in row.items() if v not in ("", None)} for row in csv.DictReader(file)]
        return {int(row["step"]): row for row in rows}

    @rank_zero_only
    def start_at(self, step: int) -> None:
        """Take over the rows of an earlier part of the run, but those of steps that will come again."""
        self.rows = {s: row for s, row in self._read().items() if s <= step}

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = step or 0
        if self.rows is None:  # no training: a test or a validation belongs to the run's last step
            self.rows = self._read()
            self._floor = max(self.rows, default=0)
        step = max(step, self._floor)
        self.rows.setdefault(step, {"step": step}).update(metrics)
        self._unwritten += 1
        if self._unwritten >= self.every_n_rows:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        if not self._unwritten or self.rows is None:
            return
        columns = ["step", *sorted({k for row in self.rows.values() for k in row} - {"step"})]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(self.rows[s] for s in sorted(self.rows))
        try:
            write_atomically(self.path, text.getvalue())
            self._unwritten = 0
        except OSError as error:
            rank_zero_warn(f"could not write {self.path} ({error.strerror}): training goes on")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()
