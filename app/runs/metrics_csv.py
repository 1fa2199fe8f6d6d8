"""metrics.csv: every logged metric of a run, one row per step, kept through resumes."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
from pytorch_lightning.utilities.rank_zero import rank_zero_only, rank_zero_warn

from datamodules.core.errors import ConfigError
from datamodules.core.files import write_atomically


class MetricsCSV(Logger):
    """Writes ``metrics.csv`` whole and atomically, some seconds apart.

    Lightning's own CSVLogger deletes the file of the run that is resumed.

    Args:
        folder: the run directory, with the file of an earlier part of the run or none.

    Raises:
        ConfigError: that file cannot be read; it is left as it is.
    """

    def __init__(self, folder: Path, every_n_rows: int = 20) -> None:
        super().__init__()
        self.path = folder / "metrics.csv"
        self.every_n_rows = every_n_rows
        self.rows = self._read()
        self._unwritten = 0
        self._floor = max(self.rows, default=0)  # a test or a validation alone belongs to the run's last step

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
        rows: dict[int, dict[str, Any]] = {}
        cure = f"correct it, or move {self.path} elsewhere"
        try:
            with open(self.path, newline="") as file:
                reader = csv.DictReader(file)
                if reader.fieldnames and "step" not in reader.fieldnames:
                    raise ConfigError(f"{self.path} cannot be read (its first line names no column step): {cure}")
                for row in reader:
                    if None in row or not str(row["step"]).isdecimal():
                        what = "has more values than columns" if None in row else f"has {row['step']!r} for its step"
                        raise ConfigError(f"{self.path} cannot be read (line {reader.line_num} {what}): {cure}")
                    rows[int(row["step"])] = {k: v for k, v in row.items() if v not in ("", None)}
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{self.path} cannot be read ({error}): {cure}") from error
        return rows

    @rank_zero_only
    def start_at(self, step: int) -> None:
        """Take over the rows of an earlier part of the run, but those of steps that will come again."""
        self.rows = {s: row for s, row in self.rows.items() if s <= step}
        self._floor = 0

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = max(step or 0, self._floor)
        self.rows.setdefault(step, {"step": step}).update(metrics)
        self._unwritten += 1
        if self._unwritten >= self.every_n_rows:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        if not self._unwritten:
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
