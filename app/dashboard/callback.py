"""Which pictures a run shows, and when: in the run directory, and in Weights & Biases."""

from __future__ import annotations

import csv
import io
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from app.dashboard import few_shot, video
from app.dashboard.confusion import Confusions, confused_pairs, confusion_matrix
from app.dashboard.open_set import OpenSet
from app.dashboard.probe import Probe
from app.dashboard.reinforcement import TrialPictures
from app.dashboard.wandb import WandbRun, one_line
from app.plots import adaptation, calibration, confusion, embeddings, episodes, results, style
from app.runs.directory import TASKS_CSV, TASKS_NPZ
from app.runs.evaluation_record import save_tasks
from app.runs.progress import headline_text
from datamodules.core.files import write_atomically
from datamodules.regression.functions import FAMILIES
from models.core.learner import MetaLearner
from models.core.metrics import FINGERPRINT, HEADLINES, interval

log = logging.getLogger(__name__)
FIGURES = "figures"  # folder of a run
TABLE_ROWS = 10_000  # W&B cuts longer tables


class Dashboard(pl.Callback):
    """Draws what a learner does, at validations and after the test, for W&B and as PNG in the run directory.

    The first process alone draws, with no word to the others. A picture that fails costs a line, not the run.

    Args:
        run_dir: of the run; pictures are in its ``figures/``, with ``results.png`` and the metrics of every test task
            beside.
        share: of the training time that pictures at validations may take, on average; the first is always drawn.
        curve_tasks: tasks behind the adaptation curve.
        confusion_tasks: test tasks behind the pictures of confusions, and behind the metrics of other classes' queries.
        pictures: otherwise only metrics are kept.
    """

    def __init__(
        self,
        run_dir: Path,
        share: float = 0.005,
        curve_tasks: int = 64,
        confusion_tasks: int = 600,
        pictures: bool = True,
    ) -> None:
        self.run_dir, self.share, self.pictures = run_dir, share, pictures
        self.curve_tasks, self.confusion_tasks = curve_tasks, confusion_tasks
        self.seconds = 0.0
        self._started: float | None = None
        self._failed: set[str] = set()
        self._open_set: OpenSet | None = None

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
            # First what was measured: of a slow learner, the rest takes minutes, in which a process may be killed.
            self._guarded("table of the tasks", lambda: self._keep_tasks(trainer, pl_module))
            self._guarded("queries of other classes", lambda: self._measure_open_set(trainer, pl_module))
            self._guarded("table of the tasks", lambda: self._keep_tasks(trainer, pl_module))
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

    def _guarded(self, what: str, action: Callable[[], Any]) -> Any:
        """The action's result; if it fails, None and, the first time, a line."""
        try:
            return action()
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                log.warning("%s not made, the run goes on: %s: %s", what, type(error).__name__, one_line(error))
            return None

    def _measure_open_set(self, trainer: Any, learner: MetaLearner) -> None:
        data, self._open_set = trainer.datamodule, None
        if data.kind != "classification":
            return
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            self._open_set = OpenSet.of(Probe(learner, data, "test"), min(self.confusion_tasks, data.test_tasks))
        if self._open_set is not None:
            learner.stage_metrics("test").subset.update(self._open_set.metrics())

    def _draw(self, trainer: Any, learner: MetaLearner, split: str) -> None:
        if not self.pictures:
            return
        probe = Probe(learner, trainer.datamodule, split)
        drawn: dict[str, Path] = {}
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            for name, make in self._pictures(probe, trainer):
                if (figure := self._guarded(f"{split}/{name}", make)) is not None:
                    path = self.run_dir / (f"{name}.png" if name == "results" else f"{FIGURES}/{split}_{name}.png")
                    if self._guarded(f"{split}/{name}", lambda f=figure, p=path: style.save(f, p) or True):
                        drawn[f"{split}/{name}"] = path
        for logger in _runs(trainer):
            logger.write(_images(drawn), trainer.global_step)

    def _film(self, trainer: Any, learner: MetaLearner) -> None:
        """The evaluation on test task 0, where environments can be rendered."""
        if not self.pictures or trainer.datamodule.kind != "reinforcement":
            return
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            filmed = video.film(learner, Probe(learner, trainer.datamodule, "test").sample([0])[1])  # pyright: ignore
        if filmed is not None:
            path = self.run_dir / FIGURES / "test_video.gif"
            video.save(*filmed, path)
            for logger in _runs(trainer):
                import wandb

                logger.write({"test/video": wandb.Video(str(path), format="gif")}, trainer.global_step)

    def _pictures(self, probe: Probe, trainer: pl.Trainer) -> Iterator[tuple[str, Callable[[], Any]]]:
        final, acts = probe.split == "test", probe.data.kind == "reinforcement"
        metric = probe.learner.stage_metrics(probe.split)
        table: dict[str, Tensor] = metric.all_tasks if final or acts else {}
        values = table.get(probe.metric_name)
        panels: list[Any] = []
        at = "meta-test" if final else f"meta-validation after {probe.learner.tasks_seen:,} tasks"
        if values is not None and final:
            yield "histogram", partial(results.histogram, values, probe.metric_name)
            panels.append(("Meta-test tasks", lambda axes: results.draw_histogram(axes, values, probe.metric_name)))
        if "bins" in table:
            bins = table["bins"].double().sum(0)
            yield "reliability", partial(calibration.reliability, bins)
            panels.append(("Calibration", lambda axes: calibration.draw_reliability(axes, bins)))
        if "levels" in table:
            levels = table["levels"].double().sum(0)
            yield "reliability", partial(calibration.coverage, levels)
            panels.append(("Calibration", lambda axes: calibration.draw_coverage(axes, levels)))
        if "families" in table:
            of_families = table["families"].double().sum(0)
            yield "clusters", partial(confusion.clusters, of_families, FAMILIES)
            panels.append(("Clusters of tasks", lambda axes: confusion.draw_clusters(axes, of_families, FAMILIES)))
        available = probe.data.test_tasks if final else probe.data.val_tasks
        if acts:
            pictures = TrialPictures(probe, table, at, self._guarded)
            yield from pictures.all()
            panels += pictures.panels
        curve = (
            None if acts else self._guarded("adaptation", partial(probe.adaptation, min(self.curve_tasks, available)))
        )
        if curve is not None:
            yield "adaptation", partial(adaptation.adaptation, curve, probe.metric_name, f"Adaptation, {at}")
            panels.append(("Adaptation", lambda axes: adaptation.draw_adaptation(axes, curve, probe.metric_name)))
        points = self._guarded("training", partial(self._curve, trainer, probe.metric_name)) if final else None
        if points is not None:
            yield "training", partial(adaptation.training, points, probe.metric_name)
            panels.append(("Meta-training", lambda axes: adaptation.draw_training(axes, points, probe.metric_name)))
        open_set = self._open_set if final else None
        if open_set is not None:
            parts = (open_set.known, open_set.unknown[open_set.kept], open_set.ways)
            auroc = interval(open_set.auroc)
            yield "open_set", partial(calibration.open_set, *parts, *auroc, f"{len(open_set.known):,} tasks")
            title = calibration.auroc_text(*auroc)
            panels.append((title, lambda axes: calibration.draw_open_set(axes, *parts)))
        if probe.pictures:
            worst = None if values is None else int(table["index"][values.argmin()])
            yield "episode", lambda: episodes.episode(*few_shot.episode(probe, 0), title=f"Task 0, {at}")
            if worst is not None:
                yield (
                    "worst_episode",
                    lambda: episodes.episode(*few_shot.episode(probe, worst), title=f"Task {worst}, the worst"),
                )
        if probe.pictures and hasattr(probe.learner, "adversary"):
            yield (
                "generated",
                lambda: episodes.generated(few_shot.generated(probe, 6), f"Images generated for tasks, {at}"),
            )
        if probe.data.kind == "classification" and hasattr(probe.learner, "embed"):
            yield (
                "embedding",
                lambda: embeddings.embedding(*few_shot.embeddings(probe), title=f"Embedding of task 0, {at}"),
            )
        if probe.data.kind == "classification" and final:
            confusions = self._guarded("confusions", lambda: self._confusions(probe, available))
            if confusions is not None:
                yield "confusion", partial(confusion_matrix, probe, confusions)
                if probe.pictures:
                    yield "confused_pairs", partial(confused_pairs, probe, confusions)
        if probe.function:
            fits = self._guarded("fits", lambda: few_shot.fits(probe, 4))
            if fits is not None:
                distributions = len(fits) > 5
                several = adaptation.predictive_fits if distributions else adaptation.fits
                yield "fits", partial(several, *fits, title=f"Regression tasks, {at}")
                title = "Task 0: true function dashed, inner steps from light to dark"
                title += ", 95 % predictive interval" if distributions else ""
                panels.append((title, lambda axes: adaptation.draw_fit(axes, *few_shot.first(fits))))
        if final and panels:

            def one(axes: Any) -> None:
                episodes.draw_episode(axes, *few_shot.episode(probe, 0), most_rows=5)

            yield "results", lambda: results.results(panels, one if probe.pictures else None, _title(probe, table))

    def _confusions(self, probe: Probe, available: int) -> Confusions | None:
        known = None if self._open_set is None else self._open_set.predicted
        return Confusions.of(probe, min(self.confusion_tasks, available), known)

    def _curve(self, trainer: pl.Trainer, metric_name: str) -> np.ndarray | None:
        for logger in trainer.loggers:
            logger.save()
        path = self.run_dir / "metrics.csv"
        points = adaptation.read_curve(path, metric_name) if path.is_file() else np.zeros((0, 3))
        return points if len(points) > 1 else None

    def _keep_tasks(self, trainer: Any, learner: MetaLearner) -> None:
        """The table of the test tasks, as CSV and for comparisons."""
        metric, data = learner.stage_metrics("test"), trainer.datamodule
        columns, rows = _table(Probe(learner, data, "test"), metric.all_tasks)
        text = io.StringIO()
        csv.writer(text).writerows([columns, *rows])
        write_atomically(self.run_dir / TASKS_CSV, text.getvalue())
        save_tasks(self.run_dir / TASKS_NPZ, data, type(learner).__name__, metric)

    def _summarise(self, trainer: Any, learner: MetaLearner) -> None:
        """The table of the test tasks for W&B, and the run's summary."""
        metric, data = learner.stage_metrics("test"), trainer.datamodule
        columns, rows = _table(Probe(learner, data, "test"), metric.all_tasks)
        result, name = metric.everything(), HEADLINES[data.kind][0]
        for logger in _runs(trainer):
            import wandb

            logger.write({"test/per_task": wandb.Table(columns=columns, data=rows[:TABLE_ROWS])}, trainer.global_step)
            logger.experiment.summary.update(
                {f"test/{key}": value for key, value in result.items()}
                | {
                    "test/result": headline_text(name, result[name], result[f"{name}_ci95"]),
                    "test/transductive": learner.transductive,
                    "test/batch_norm": learner.batch_norm,
                    "algorithm": type(learner).__name__,
                    "data": type(data).__name__,
                }
            )


def _runs(trainer: pl.Trainer) -> list[WandbRun]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbRun)]


def _images(drawn: dict[str, Path]) -> dict[str, Any]:
    import wandb

    return {name: wandb.Image(str(path)) for name, path in drawn.items()}


def _title(probe: Probe, table: dict[str, Tensor]) -> str:
    data: Any = probe.data
    shape = f", {data.ways}-way {data.shots}-shot" if getattr(data, "ways", 0) else ""
    shape += f", trials of {data.episodes} episodes" if data.kind == "reinforcement" else ""
    result = headline_text(probe.metric_name, *interval(table[probe.metric_name]))
    unit = {"accuracy": "", "mse": " MSE"}.get(probe.metric_name, f" {probe.metric_name}")
    what = f"{type(probe.learner).__name__} on {type(data).__name__}{shape}"
    return f"{what}:{unit} {result} over {len(table['index']):,} meta-test tasks"


def _table(probe: Probe, tasks: dict[str, Tensor]) -> tuple[list[Any], list[list[Any]]]:
    """Columns and rows of the test table: metrics and facts of one number per task, and the names of its classes."""
    columns = {"task": tasks["index"].tolist()}
    columns |= {n: v.tolist() for n, v in tasks.items() if n not in ("index", FINGERPRINT) and v.dim() == 1}
    if "classes" in tasks:
        known, place = tasks["classes"].unique(return_inverse=True)
        names = probe.class_names(known.tolist())
        columns["classes"] = [", ".join(names[k] for k in row) for row in place.tolist()]
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]
