"""Which figures a run shows, and when: in the run directory, and in Weights & Biases."""

from __future__ import annotations

import itertools
import logging
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from app.dashboard import few_shot, video
from app.dashboard.panels import PANELS
from app.dashboard.view import Figures, View
from app.dashboard.wandb import WandbRun
from app.plots import results, style
from app.runs.evaluation_record import columns
from app.runs.guard import Guard
from app.runs.probe import Probe
from app.runs.recorder import Recorder
from datamodules.core.base import shape_text
from models.core.learner import MetaLearner
from models.core.metrics import interval

log = logging.getLogger(__name__)
FIGURES = "figures"  # folder of a run
TABLE_ROWS = 10_000  # W&B cuts longer tables


class Dashboard(pl.Callback):
    """Draws what a learner does, at validations and after the test, for W&B and as PNG in the run directory.

    The first process alone draws, with no word to the others. A figure that fails costs a line, not the run.

    Args:
        run_dir: of the run; figures are in its ``figures/``, with ``results.png`` beside.
        recorder: has what was measured after the test, for figures; None without.
        share: of the training time that figures at validations may take, on average; the first is always drawn.
        curve_tasks, confusion_tasks: see View.
        pictures: whether anything is drawn; otherwise only W&B is told.
    """

    def __init__(
        self,
        run_dir: Path,
        recorder: Recorder | None = None,
        share: float = 0.005,
        curve_tasks: int = 64,
        confusion_tasks: int = 600,
        pictures: bool = True,
    ) -> None:
        self.run_dir, self.recorder, self.share, self.pictures = run_dir, recorder, share, pictures
        self.curve_tasks, self.confusion_tasks = curve_tasks, confusion_tasks
        self.seconds = 0.0
        self._started: float | None = None
        self._guarded = Guard(log)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: MetaLearner) -> None:
        if not trainer.is_global_zero or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self._started is None or self.seconds <= self.share * (time.monotonic() - self._started):
            began = time.monotonic()
            self._guarded("pictures", lambda: self._draw(trainer, pl_module, "val"))
            self.seconds += time.monotonic() - began
        for logger in _runs(trainer):
            logger.remember()

    def on_test_end(self, trainer: Any, pl_module: MetaLearner) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:
            self._guarded("pictures", lambda: self._draw(trainer, pl_module, "test"))
            self._guarded("video", lambda: self._film(trainer, pl_module))
            self._guarded("summary", lambda: self._summarise(trainer, pl_module))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":  # a test follows training, in the same run
            for logger in _runs(trainer):
                logger.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        for logger in _runs(trainer):
            logger.close(exit_code=1)

    def _draw(self, trainer: Any, learner: MetaLearner, split: str) -> None:
        if not self.pictures:
            return
        view = self._view(trainer, learner, split)
        drawn: dict[str, Path] = {}
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            for name, make in self._figures(view):
                if (figure := self._guarded(f"{split}/{name}", make)) is not None:
                    path = self.run_dir / (f"{name}.png" if name == "results" else f"{FIGURES}/{split}_{name}.png")
                    if self._guarded(f"{split}/{name}", lambda f=figure, p=path: style.save(f, p) or True):
                        drawn[f"{split}/{name}"] = path
        for logger in _runs(trainer):
            logger.write(_images(drawn), trainer.global_step)

    def _view(self, trainer: Any, learner: MetaLearner, split: str) -> View:
        final = split == "test"
        for logger in trainer.loggers if final else []:
            logger.save()  # the curve of the training is read from its file
        return View(
            Probe(learner, trainer.datamodule, split),
            learner.stage_metrics(split).all_tasks,
            "meta-test" if final else f"meta-validation after {learner.tasks_seen:,} tasks",
            final,
            self.run_dir,
            self._guarded,
            self.recorder.open_set if final and self.recorder is not None else None,
            self.curve_tasks,
            self.confusion_tasks,
        )

    def _figures(self, view: View) -> Figures:
        for name in view.probe.kind.panels:
            yield from PANELS[name](view)
        if view.final and view.panels:
            yield "results", lambda: results.results(view.panels, few_shot.episode_panel(view), _title(view))

    def _film(self, trainer: Any, learner: MetaLearner) -> None:
        """The evaluation on test task 0, where environments can be rendered."""
        probe = Probe(learner, trainer.datamodule, "test")
        if not self.pictures or "trials" not in probe.kind.panels:
            return
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            filmed = video.film(learner, probe.sample([0])[1])  # pyright: ignore
        if filmed is not None:
            path = self.run_dir / FIGURES / "test_video.gif"
            video.save(*filmed, path)
            for logger in _runs(trainer):
                import wandb

                logger.write({"test/video": wandb.Video(str(path), format="gif")}, trainer.global_step)

    def _summarise(self, trainer: Any, learner: MetaLearner) -> None:
        """The table of the test tasks for W&B, and the run's summary."""
        metrics, probe = learner.stage_metrics("test"), Probe(learner, trainer.datamodule, "test")
        result, name = metrics.everything(), probe.metric_name
        for logger in _runs(trainer):
            import wandb

            table = columns(probe.tasks, metrics.all_tasks)
            rows = [list(row) for row in itertools.islice(zip(*table.values(), strict=True), TABLE_ROWS)]
            logger.write({"test/per_task": wandb.Table(columns=list(table), data=rows)}, trainer.global_step)
            logger.experiment.summary.update(
                {f"test/{key}": value for key, value in result.items()}
                | {
                    "test/result": probe.metric.text(result[name], result[f"{name}_ci95"]),
                    "test/transductive": learner.transductive,
                    "test/batch_norm": learner.batch_norm,
                    "algorithm": type(learner).__name__,
                    "data": type(probe.data).__name__,
                }
            )


def _runs(trainer: pl.Trainer) -> list[WandbRun]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbRun)]


def _images(drawn: dict[str, Path]) -> dict[str, Any]:
    import wandb

    return {name: wandb.Image(str(path)) for name, path in drawn.items()}


def _title(view: View) -> str:
    probe = view.probe
    shape = shape_text(probe.data.task_shape())
    what = f"{type(probe.learner).__name__} on {type(probe.data).__name__}{', ' if shape else ''}{shape}"
    result = probe.metric.text(*interval(view.table[probe.metric_name]))
    name = "" if probe.metric.share else f" {probe.metric_name}"
    return f"{what}:{name} {result} over {len(view.table['index']):,} meta-test tasks"
