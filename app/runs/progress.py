"""One bar for the whole meta-training: steps, tasks per second, time left, the latest metrics."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from datamodules.core.metric import Metric


class TaskProgress(ProgressBar):
    """A live bar on a terminal; elsewhere a line at the start, and every ``quiet_seconds``.

    Args:
        name, metric: of what is shown: "accuracy", "mse" or "return".
        quiet_seconds: seconds between lines where the output is not a terminal.
    """

    def __init__(self, name: str, metric: Metric, quiet_seconds: float = 30.0) -> None:
        super().__init__()
        self.name, self.metric, self.quiet_seconds = name, metric, quiet_seconds
        self.console = Console(file=sys.stderr)
        self.bar: Progress | None = None
        self._enabled = True
        self._task: TaskID | None = None
        self._clock = self._drawn_at = 0.0
        self._line_at = math.inf  # no line before something starts
        self._tasks = self._done = self._first = 0
        self._what, self._total = "", None
        self._note = self._before = ""  # beside the bar; what it was before a validation

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def _start(self, what: str, total: int | None, about: str, done: int = 0) -> None:
        self._clock, self._tasks, self._line_at, self._what = time.monotonic(), 0, time.monotonic(), what
        self._total, self._done, self._first = total, done, done
        if self._enabled and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            self._task = self.bar.add_task(what, total=total, completed=done, rate="", note=self._note)
            self.bar.start()
        elif self._enabled:
            self.console.print(f"{what}: {about}", soft_wrap=True, highlight=False, markup=False)

    def _advance(self, done: int, tasks: int) -> None:
        if not self._enabled:
            return
        self._done, self._tasks = done, self._tasks + tasks
        self._show(done == self._total)

    def _show(self, at_once: bool = False) -> None:
        """What is known by now, but not more often than can be read."""
        now = time.monotonic()
        if self.bar is not None and self._task is not None:
            if now - self._drawn_at > 0.1 or at_once:
                self._drawn_at = now
                self.bar.update(self._task, completed=self._done, rate=f"{self._rate():,.0f} tasks/s", note=self._note)
        elif now - self._line_at > self.quiet_seconds:
            self._line_at = now
            self._line()

    def _rate(self) -> float:
        return self._tasks / max(time.monotonic() - self._clock, 1e-9)

    def _line(self) -> None:
        left = ""
        if self._total and self._done > self._first:
            seconds = (time.monotonic() - self._clock) / (self._done - self._first) * (self._total - self._done)
            left = f", {int(seconds) // 60}:{int(seconds) % 60:02d} left"
        total = f"/{self._total}" if self._total else ""
        self.console.print(f"{self._what} {self._done}{total}, {self._rate():,.0f} tasks/s{left} {self._note}")

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        limit = trainer.max_steps * trainer.accumulate_grad_batches if trainer.max_steps > 0 else None
        steps = f"{trainer.max_steps:,} meta-updates" if trainer.max_steps > 0 else "meta-updates without end"
        done = f", {trainer.global_step:,} of them done" if trainer.global_step else ""
        about = f"{steps}{done}, on {trainer.strategy.root_device}, in {trainer.default_root_dir}"
        self._start("meta-train", limit, about, trainer.fit_loop.epoch_loop.batch_progress.total.ready)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._advance(trainer.fit_loop.epoch_loop.batch_progress.total.ready, len(batch) * trainer.world_size)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._before, total = self._note, int(sum(trainer.num_val_batches))
        if trainer.state.fn == "fit":
            self._validating(0, total)
        else:
            self._start("meta-val", total, _batches(trainer, total))

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn == "fit":
            self._validating(batch_idx + 1, int(sum(trainer.num_val_batches)))
        else:
            self._advance(batch_idx + 1, len(batch) * trainer.world_size)

    def _validating(self, done: int, total: int) -> None:
        """Meta-training stands still meanwhile."""
        if self._enabled:
            self._note = f"meta-val {done}/{total}"
            self._show(done == 0)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._note = self._before
        if trainer.state.fn != "fit":
            return self._stop()
        if (value := trainer.callback_metrics.get(f"val/{self.name}")) is not None:
            half = float(trainer.callback_metrics[f"val/{self.name}_ci95"])
            self._note = f"val {'' if self.metric.share else self.name + ' '}{self.metric.text(float(value), half)}"
        self._show(True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._enabled and self.bar is None:
            self._line()
        self._stop()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._note = ""
        total = int(sum(trainer.num_test_batches))
        self._start("meta-test", total, _batches(trainer, total))

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._advance(batch_idx + 1, len(batch) * trainer.world_size)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def print(self, *args: Any, **kwargs: Any) -> None:
        (self.bar.console if self.bar is not None else self.console).print(*args)


def _batches(trainer: pl.Trainer, total: int) -> str:
    """How much is to be done, where, and whose it is."""
    number = f"{total:,} {'batch' if total == 1 else 'batches'}"
    return f"{number} on {trainer.strategy.root_device}, in {trainer.default_root_dir}"
