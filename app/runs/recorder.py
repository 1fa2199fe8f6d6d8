"""Leaves the record of every test task, and measures what takes more than the test: nothing here is drawn."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from app.runs.directory import TASKS_CSV, TASKS_NPZ
from app.runs.evaluation_record import save_table, save_tasks
from app.runs.guard import Guard
from app.runs.open_set import OpenSet
from app.runs.probe import Probe
from models.core.learner import MetaLearner

log = logging.getLogger(__name__)


class Recorder(pl.Callback):
    """Writes ``test_tasks.csv`` and ``test_tasks.npz`` after a test, and measures queries of other classes.

    The first process alone does; what fails costs a line, not the run.

    Args:
        run_dir: of the run.
        open_set_tasks: test tasks that are also asked about the next one's queries; 0 asks none.

    Attributes:
        open_set: of the last test; None where it was not measured.
    """

    def __init__(self, run_dir: Path, open_set_tasks: int = 600) -> None:
        self.run_dir, self.open_set_tasks = run_dir, open_set_tasks
        self.open_set: OpenSet | None = None
        self._guarded = Guard(log)

    def on_test_end(self, trainer: Any, pl_module: MetaLearner) -> None:
        self.open_set = None
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        # First what was measured: of a slow learner, the rest takes minutes, in which a process may be killed.
        self._guarded("record of the tasks", lambda: self._save(trainer, pl_module))
        self.open_set = self._guarded("queries of other classes", lambda: self._measure_open_set(trainer, pl_module))
        if self.open_set is not None:
            pl_module.stage_metrics("test").subset.update(self.open_set.metrics())
            self._guarded("record of the tasks", lambda: self._save(trainer, pl_module))

    def _save(self, trainer: Any, learner: MetaLearner) -> None:
        metrics, data = learner.stage_metrics("test"), trainer.datamodule
        save_table(self.run_dir / TASKS_CSV, data.distribution("test"), metrics.all_tasks)
        save_tasks(self.run_dir / TASKS_NPZ, data, type(learner).__name__, metrics)

    def _measure_open_set(self, trainer: Any, learner: MetaLearner) -> OpenSet | None:
        probe = Probe(learner, trainer.datamodule, "test")
        tasks = min(self.open_set_tasks, probe.available)
        if not tasks or "open_set_auroc" not in probe.kind.metrics:
            return None
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            return OpenSet.of(probe, tasks)
