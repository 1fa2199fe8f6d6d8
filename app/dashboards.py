"""What is seen of a run: Weights & Biases, on line or off, and pictures in the run directory whatever is logged to."""

from __future__ import annotations

import csv
import io
import json
import logging
import netrc
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyExperiment, rank_zero_experiment
from pytorch_lightning.loggers.wandb import WandbLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.utils._pytree import tree_map

from app import figures, video
from app.dashboards_rl import TrialPictures
from app.metrics import FINGERPRINT, HEADLINES, INTERVAL, interval
from app.outside import Outside
from app.predictive import Mixture
from app.progress import headline_text
from app.run import TASKS_CSV, TASKS_NPZ, write_atomically
from app.tested import save_tasks
from datamodules.base import EpisodicDataModule
from datamodules.episodes import Episodes, Task
from datamodules.regression import FAMILIES
from models.base import MetaLearner

log = logging.getLogger(__name__)

Mode = Literal["auto", "online", "offline", "off"]
STATE, FIGURES = "wandb.json", "figures"
INIT_SECONDS, FINISH_SECONDS = 20.0, 120.0  # waited for the network before going on without it
TABLE_ROWS = 10_000  # W&B cuts longer tables


# Weights & Biases ---------------------------------------------------------------------------------------------------


class WandbRun(WandbLogger):
    """Lightning's logger, for a run that goes on: under the same id after a resume, off line where there is no network.

    Nothing is imported or written before Lightning asks for the run, by when all processes have joined. Whatever fails
    here is told in one line, and the training goes on with metrics.csv alone.

    Args:
        mode: "auto" is online with an API key and offline without one; "online", "offline".
        project, name: under which W&B shows the run.
        run_dir: holds ``wandb/`` and, in ``wandb.json``, the run's id.
        config: the complete configuration.
    """

    def __init__(self, mode: Mode, project: str, name: str, run_dir: Path, config: dict[str, Any]) -> None:
        super().__init__(name=name, project=project, save_dir=run_dir)
        self.mode: Mode = mode
        self.project, self.run_name, self.run_dir, self.config = project, name, run_dir, config
        self.url: str | None = None
        self.tasks_seen = 0.0
        self._first_step = 0
        self._broken = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None and not self._broken:
            try:
                self._start()
            except Exception as error:
                self._give_up(error)
        return DummyExperiment() if self._experiment is None else self._experiment

    def _start(self) -> None:
        import wandb

        mode = _mode(self.mode)
        if mode == "off":
            self._broken = True
            return
        state = self._read_state()
        self.tasks_seen, self._first_step = state.get("tasks_seen", 0.0), state.get("step", 0)
        name = state.get("id") or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        self._write_state(name)  # before the run, so that one that is killed at once is still found
        folder = self.run_dir / "wandb"
        before = set(folder.glob("*"))
        try:
            self._experiment = self._open(name, mode)
        except Exception as error:
            if mode == "offline":
                raise
            log.warning(
                "W&B cannot be reached, the run is kept offline in %s and can be synced later: %s", folder, _line(error)
            )
            wandb.teardown()  # lets go of the run's id
            for attempt in set(folder.glob("run-*")) - before:
                shutil.rmtree(attempt, ignore_errors=True)  # nothing was logged to it
            self._experiment = self._open(name, "offline")
        self._experiment.define_metric("*", step_metric="tasks_seen")
        self.url = None if self._experiment.settings.mode != "online" else self._experiment.url

    def _open(self, name: str, mode: Literal["online", "offline"]) -> Any:
        import wandb

        wanted = {
            "silent": True,
            "console": "off",  # the progress bar is not for a log file
            "init_timeout": INIT_SECONDS,
            "finish_timeout": FINISH_SECONDS,
            "finish_timeout_raises": True,
        }
        known = type(wandb.Settings()).model_fields
        chosen = {k: v for k, v in wanted.items() if k in known and f"WANDB_{k.upper()}" not in os.environ}
        wandb.setup(wandb.Settings(silent=True))
        return wandb.init(
            project=self.project,
            name=self.run_name,
            id=name,
            resume="allow",
            dir=str(self.run_dir),
            mode=mode,
            config=self.config,
            allow_val_change=True,  # a resumed run may be given more steps
            reinit="create_new",
            settings=wandb.Settings(**chosen),
        )

    def _read_state(self) -> dict[str, Any]:
        try:
            return json.loads((self.run_dir / STATE).read_text())
        except (OSError, ValueError):
            return {}

    def _write_state(self, name: str) -> None:
        state = {"id": name, "step": self._first_step, "tasks_seen": self.tasks_seen}
        write_atomically(self.run_dir / STATE, json.dumps(state) + "\n")

    def _give_up(self, error: Exception) -> None:
        self._broken, self._experiment = True, None
        log.warning("W&B does not work, going on without it: %s", _line(error))

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        pass  # the configuration is there from the start, and whole

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.write({k: v for k, v in metrics.items() if k != "epoch"}, step)  # the stream of tasks has no epochs

    @rank_zero_only
    def write(self, values: dict[str, Any], step: int | None = None) -> None:
        """Log values of any kind that W&B knows, beside the number of tasks seen.

        Steps never go back, also over resumes: W&B ignores what is logged to a step that it has passed.
        """
        run = self.experiment
        if self._experiment is None:
            return
        self.tasks_seen = float(values.get("tasks_seen", self.tasks_seen))
        try:
            run.log(
                values | {"tasks_seen": self.tasks_seen}, step=max(step or 0, run.step, self._first_step), commit=True
            )
        except Exception as error:
            self._give_up(error)

    @rank_zero_only
    def remember(self) -> None:
        """Keep how far the run is, for what is logged to it after a resume."""
        if self._experiment is not None:
            try:
                self._first_step = max(self._first_step, self._experiment.step)
                self._write_state(self._experiment.id)
            except OSError as error:
                log.warning("could not write %s: %s", self.run_dir / STATE, error.strerror)

    @rank_zero_only
    def close(self, exit_code: int = 0) -> None:
        """End the session; the run itself can be resumed."""
        if self._experiment is None:
            return
        self.remember()
        run, self._experiment = self._experiment, None
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            log.warning("W&B has not got everything, all of it is in %s: %s", self.run_dir / "wandb", _line(error))

    def hints(self) -> list[str]:
        """How to look at the run: one line per way."""
        if self._broken:
            return []
        if self.url:
            return [f"W&B: {self.url}"]
        folder = self.run_dir / "wandb"
        return [f"look: wandb leet {folder}", f"upload to W&B: wandb sync {folder}/offline-run-*"]


def wandb_logger(mode: Mode, project: str, name: str, run_dir: Path, config: dict[str, Any]) -> WandbRun | None:
    """The logger of a run, or None where W&B is off or not installed; arguments as ``WandbRun``."""
    if mode == "off":
        return None
    try:
        return WandbRun(mode, project, name, run_dir, config)
    except ModuleNotFoundError:
        if rank_zero_only.rank == 0:
            log.warning("wandb is not installed, going on with metrics.csv (--wandb off says so)")
        return None


def _mode(asked: Mode) -> Literal["online", "offline", "off"]:
    """What ``asked`` means here: by WANDB_MODE where it is set, else by whether there is an API key."""
    if asked == "offline":
        return "offline"
    environment = os.environ.get("WANDB_MODE", "")
    if asked == "auto" and environment in ("disabled", "offline", "dryrun"):
        return "off" if environment == "disabled" else "offline"
    if has_key():
        return "online"
    if asked == "online":
        log.warning("there is no W&B API key (wandb login, or WANDB_API_KEY): the run is kept offline")
    return "offline"


def has_key() -> bool:
    """Whether an API key for W&B is in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    hosts = {"api.wandb.ai", urlsplit(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url).hostname}
    for path in [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]:
        try:
            known = netrc.netrc(os.path.expanduser(path)).hosts if path else {}
        except (OSError, netrc.NetrcParseError):
            continue
        if hosts & set(known):
            return True
    return False


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:160] + " …"


def _on_cpu(prediction: Any) -> Any:
    return tree_map(lambda part: part.float().cpu(), prediction)


# What the pictures show ---------------------------------------------------------------------------------------------


@dataclass
class Probe:
    """Looks at what a learner does on chosen tasks of a split. Uses no other process.

    Attributes:
        learner: in evaluation mode.
        data: gives the tasks, by number.
        split: "val" or "test".
    """

    learner: MetaLearner
    data: EpisodicDataModule
    split: str

    def __post_init__(self) -> None:
        self.tasks: Any = self.data.distribution(self.split)
        self.figure_name = HEADLINES[self.data.kind][0]

    def sample(self, indices: Sequence[int]) -> tuple[Episodes, Episodes]:
        """Tasks as they are stored, on the CPU, and as the learner gets them."""
        stored = self.tasks.sample(list(indices))
        ready = self.data.on_device(stored.to(self.learner.device))
        dtype: Any = self.learner.dtype
        return stored, ready.apply(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def predict(self, ready: Episodes) -> Any:
        """Logits (T, Q, ways), or values (T, Q, out) or their Mixture, on the CPU."""
        learner = self.learner
        return _on_cpu(learner.map(lambda task: learner.predict(learner.adapt(task.support), task.query_x), ready))

    def along(self, ready: Episodes, query_x: Tensor | None = None) -> Any:
        """Predictions before and after each inner step, (T, steps + 1, Q, …); for ``query_x`` (Q, …) where given.

        Of a Mixture both parts, (T, steps + 1, M, Q, …).
        """
        learner = self.learner

        def states(task: Task) -> Any:
            x = task.query_x if query_x is None else query_x
            predictions = [learner.predict(state, x) for state in learner.adaptation(task.support)]
            return tree_map(lambda *parts: torch.stack(parts), *predictions)

        return _on_cpu(learner.map(states, ready))

    def adaptation(self, tasks: int) -> np.ndarray | None:
        """The headline figure of the first tasks along the inner loop, (T, steps + 1); None where it has no steps."""
        _, ready = self.sample(range(tasks))
        predictions = self.along(ready)
        states = (predictions.mean if isinstance(predictions, Mixture) else predictions).shape[1]
        if states < 2:
            return None
        target = ready.query_y.cpu()[:, None].expand(-1, states, *ready.query_y.shape[1:])
        return self.learner.per_task(predictions, target)[self.figure_name].numpy()

    def names(self, stored: Episodes, i: int) -> list[str]:
        """Class names of task i by label; labels where the data has no names."""
        ids = stored.task.get("classes")
        return [str(k) for k in range(stored.ways)] if ids is None else self.class_names(ids[i].tolist())

    def class_names(self, ids: Sequence[int]) -> list[str]:
        known = getattr(self.tasks, "class_names", None)
        return [known[k] if known is not None else str(k) for k in ids]

    def groups(self, ids: Sequence[int]) -> list[str] | None:
        """The group of each class, where the data has groups."""
        known = getattr(self.tasks, "group_names", None)
        return [known[k] for k in ids] if known else None

    @property
    def pictures(self) -> bool:
        """Whether inputs are images."""
        return self.data.kind == "classification" and len(self._input_shape) == 3

    @property
    def function(self) -> bool:
        """Whether inputs and targets are numbers, so that a task can be drawn as a function."""
        return self.data.kind == "regression" and tuple(self._input_shape) == (1,)

    @property
    def _input_shape(self) -> torch.Size:
        if not hasattr(self, "_shape"):
            self._shape = self.tasks.sample([0]).support_x.shape[2:]
        return self._shape


@dataclass
class Confusions:
    """Who is taken for whom, over many tasks.

    Attributes:
        ids: of the K classes that occurred.
        wrong: (K, K), queries of row k that were labelled as class l.
        asked: (K, K), queries of row k that could have been: class l was in their task.
        image: of each id, as it is stored.
        tasks: that were looked at.
        meetings: of two classes in them, counted for each of the two.
    """

    ids: list[int]
    wrong: np.ndarray
    asked: np.ndarray
    image: dict[int, Tensor]
    tasks: int
    meetings: int

    @classmethod
    def of(cls, probe: Probe, tasks: int, known: Tensor | None = None) -> Confusions | None:
        """From the first tasks of a split; None where the data does not tell its classes.

        Args:
            probe: predicts.
            tasks: their number.
            known: labels that are predicted already, (T, Q).
        """
        labels, predicted, ids, image = [], [], [], {}
        for start in range(0, tasks, probe.data.eval_batch_size):
            stored, ready = probe.sample(range(start, min(start + probe.data.eval_batch_size, tasks)))
            if "classes" not in stored.task:
                return None
            predicted.append(probe.predict(ready).argmax(-1) if known is None else known[stored.index])
            labels.append(stored.query_y)
            ids.append(stored.task["classes"])
            for i, classes in enumerate(stored.task["classes"].tolist()):
                for x, y in zip(stored.support_x[i], stored.support_y[i].tolist(), strict=True):
                    image.setdefault(classes[y], x)
        occurred, place = torch.cat(ids).unique(return_inverse=True)  # place: (T, ways)
        true, taken = (place.gather(1, torch.cat(a).long()).numpy() for a in (labels, predicted))  # (T, Q)
        wrong, asked = np.zeros((len(occurred),) * 2), np.zeros((len(occurred),) * 2)
        np.add.at(wrong, (true, taken), 1)
        np.add.at(asked, (true[:, :, None], place.numpy()[:, None, :]), 1)
        np.fill_diagonal(wrong, 0)
        np.fill_diagonal(asked, 0)
        return cls(occurred.tolist(), wrong, asked, image, tasks, tasks * place.shape[1] * (place.shape[1] - 1))

    def by(self, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Summed over classes of one name: ``wrong``, ``asked`` and the names."""
        different = sorted(set(names))
        member = np.array([[n == d for n in names] for d in different], float)
        return member @ self.wrong @ member.T, member @ self.asked @ member.T, different

    def worst_pairs(self, count: int) -> list[tuple[int, int, int, int]]:
        """Pairs of places in ``ids`` with the mistaken and the asked queries in both directions, worst share first."""
        wrong, asked = np.triu(self.wrong + self.wrong.T), np.triu(self.asked + self.asked.T)
        share = np.divide(wrong, asked, out=np.zeros_like(wrong), where=asked > 0)
        order = np.lexsort((-wrong.ravel(), -share.ravel()))[:count]
        pairs = [(int(k) // len(self.ids), int(k) % len(self.ids)) for k in order]
        return [(a, b, int(wrong[a, b]), int(asked[a, b])) for a, b in pairs if wrong[a, b] > 0]


# The callback -------------------------------------------------------------------------------------------------------


class Dashboard(pl.Callback):
    """Draws what a learner does, at validations and after the test, for W&B and as PNG in the run directory.

    The first process alone draws, with no word to the others. A picture that fails costs a line, not the run.

    Args:
        run_dir: of the run; pictures are in its ``figures/``, with ``results.png`` and the figures of every test task
            beside.
        share: of the training time that pictures at validations may take, on average; the first is always drawn.
        curve_tasks: tasks behind the adaptation curve.
        confusion_tasks: test tasks behind the pictures of confusions, and behind the figures of queries from outside.
        pictures: otherwise only figures are kept.
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
        self._outside: Outside | None = None

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
            self._guarded("queries from outside", lambda: self._measure_outside(trainer, pl_module))
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
                log.warning("%s not made, the run goes on: %s: %s", what, type(error).__name__, _line(error))
            return None

    def _measure_outside(self, trainer: Any, learner: MetaLearner) -> None:
        data, self._outside = trainer.datamodule, None
        if data.kind != "classification":
            return
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            self._outside = Outside.of(Probe(learner, data, "test"), min(self.confusion_tasks, data.test_tasks))
        if self._outside is not None:
            learner.task_figures("test").beside.update(self._outside.figures())

    def _draw(self, trainer: Any, learner: MetaLearner, split: str) -> None:
        if not self.pictures:
            return
        probe = Probe(learner, trainer.datamodule, split)
        drawn: dict[str, Path] = {}
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            for name, make in self._pictures(probe, trainer):
                if (figure := self._guarded(f"{split}/{name}", make)) is not None:
                    path = self.run_dir / (f"{name}.png" if name == "results" else f"{FIGURES}/{split}_{name}.png")
                    if self._guarded(f"{split}/{name}", lambda f=figure, p=path: figures.save(f, p) or True):
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
        metric = probe.learner.task_figures(probe.split)
        table: dict[str, Tensor] = metric.all_tasks if final or acts else {}
        values = table.get(probe.figure_name)
        panels: list[Any] = []
        at = "meta-test" if final else f"meta-validation after {probe.learner.tasks_seen:,} tasks"
        if values is not None and final:
            yield "histogram", partial(figures.histogram, values, probe.figure_name)
            panels.append(("Meta-test tasks", lambda axes: figures.draw_histogram(axes, values, probe.figure_name)))
        if "bins" in table:
            bins = table["bins"].double().sum(0)
            yield "reliability", partial(figures.reliability, bins)
            panels.append(("Calibration", lambda axes: figures.draw_reliability(axes, bins)))
        if "levels" in table:
            levels = table["levels"].double().sum(0)
            yield "reliability", partial(figures.coverage, levels)
            panels.append(("Calibration", lambda axes: figures.draw_coverage(axes, levels)))
        if "families" in table:
            of_families = table["families"].double().sum(0)
            yield "clusters", partial(figures.clusters, of_families, FAMILIES)
            panels.append(("Clusters of tasks", lambda axes: figures.draw_clusters(axes, of_families, FAMILIES)))
        available = probe.data.test_tasks if final else probe.data.val_tasks
        if acts:
            pictures = TrialPictures(probe, table, at, self._guarded)
            yield from pictures.all()
            panels += pictures.panels
        curve = (
            None if acts else self._guarded("adaptation", partial(probe.adaptation, min(self.curve_tasks, available)))
        )
        if curve is not None:
            yield "adaptation", partial(figures.adaptation, curve, probe.figure_name, f"Adaptation, {at}")
            panels.append(("Adaptation", lambda axes: figures.draw_adaptation(axes, curve, probe.figure_name)))
        points = self._guarded("training", partial(self._curve, trainer, probe.figure_name)) if final else None
        if points is not None:
            yield "training", partial(figures.training, points, probe.figure_name)
            panels.append(("Meta-training", lambda axes: figures.draw_training(axes, points, probe.figure_name)))
        outside = self._outside if final else None
        if outside is not None:
            parts = (outside.inside, outside.outside[outside.kept], outside.ways)
            auroc = interval(outside.auroc)
            yield "outside", partial(figures.outside, *parts, *auroc, f"{len(outside.inside):,} tasks")
            title = figures.auroc_text(*auroc)
            panels.append((title, lambda axes: figures.draw_outside(axes, *parts)))
        if probe.pictures:
            worst = None if values is None else int(table["index"][values.argmin()])
            yield "episode", lambda: figures.episode(*_episode(probe, 0), title=f"Task 0, {at}")
            if worst is not None:
                yield (
                    "worst_episode",
                    lambda: figures.episode(*_episode(probe, worst), title=f"Task {worst}, the worst"),
                )
        if probe.pictures and hasattr(probe.learner, "adversary"):
            yield "generated", lambda: figures.generated(_generated(probe, 6), f"Images generated for tasks, {at}")
        if probe.data.kind == "classification" and hasattr(probe.learner, "embed"):
            yield "embedding", lambda: figures.embedding(*_embeddings(probe), title=f"Embedding of task 0, {at}")
        if probe.data.kind == "classification" and final:
            confusions = self._guarded("confusions", lambda: self._confusions(probe, available))
            if confusions is not None:
                yield "confusion", partial(_confusion, probe, confusions)
                if probe.pictures:
                    yield "confused_pairs", partial(_confused_pairs, probe, confusions)
        if probe.function:
            fits = self._guarded("fits", lambda: _fits(probe, 4))
            if fits is not None:
                distributions = len(fits) > 5
                several = figures.predictive_fits if distributions else figures.fits
                yield "fits", partial(several, *fits, title=f"Regression tasks, {at}")
                title = "Task 0: true function dashed, inner steps from light to dark"
                title += ", 95 % predictive interval" if distributions else ""
                panels.append((title, lambda axes: figures.draw_fit(axes, *_first(fits))))
        if final and panels:

            def one(axes: Any) -> None:
                figures.draw_episode(axes, *_episode(probe, 0), most_rows=5)

            yield "results", lambda: figures.results(panels, one if probe.pictures else None, _title(probe, table))

    def _confusions(self, probe: Probe, available: int) -> Confusions | None:
        known = None if self._outside is None else self._outside.predicted
        return Confusions.of(probe, min(self.confusion_tasks, available), known)

    def _curve(self, trainer: pl.Trainer, figure_name: str) -> np.ndarray | None:
        for logger in trainer.loggers:
            logger.save()
        path = self.run_dir / "metrics.csv"
        points = figures.read_curve(path, figure_name) if path.is_file() else np.zeros((0, 3))
        return points if len(points) > 1 else None

    def _keep_tasks(self, trainer: Any, learner: MetaLearner) -> None:
        """The table of the test tasks, as CSV and for comparisons."""
        metric, data = learner.task_figures("test"), trainer.datamodule
        columns, rows = _table(Probe(learner, data, "test"), metric.all_tasks)
        text = io.StringIO()
        csv.writer(text).writerows([columns, *rows])
        write_atomically(self.run_dir / TASKS_CSV, text.getvalue())
        save_tasks(self.run_dir / TASKS_NPZ, data, type(learner).__name__, metric)

    def _summarise(self, trainer: Any, learner: MetaLearner) -> None:
        """The table of the test tasks for W&B, and the run's summary."""
        metric, data = learner.task_figures("test"), trainer.datamodule
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
    result = headline_text(probe.figure_name, *interval(table[probe.figure_name]))
    unit = {"accuracy": "", "mse": " MSE"}.get(probe.figure_name, f" {probe.figure_name}")
    what = f"{type(probe.learner).__name__} on {type(data).__name__}{shape}"
    return f"{what}:{unit} {result} over {len(table['index']):,} meta-test tasks"


def _table(probe: Probe, tasks: dict[str, Tensor]) -> tuple[list[Any], list[list[Any]]]:
    """Columns and rows of the test table: figures and facts of one number per task, and the names of its classes."""
    columns = {"task": tasks["index"].tolist()}
    columns |= {n: v.tolist() for n, v in tasks.items() if n not in ("index", FINGERPRINT) and v.dim() == 1}
    if "classes" in tasks:
        known, place = tasks["classes"].unique(return_inverse=True)
        names = probe.class_names(known.tolist())
        columns["classes"] = [", ".join(names[k] for k in row) for row in place.tolist()]
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _episode(probe: Probe, index: int) -> Any:
    stored, ready = probe.sample([index])
    probabilities = probe.predict(ready)[0].softmax(-1)
    parts = (stored.support_x[0], stored.support_y[0], stored.query_x[0], stored.query_y[0])
    return *parts, probabilities, probe.names(stored, 0)


def _generated(probe: Probe, tasks: int) -> Any:
    stored, ready = probe.sample(range(tasks))
    adversary: Any = probe.learner.adversary
    fakes = [adversary(ready[i].support, stored.support_x.shape[1])[0] for i in range(tasks)]
    made = [(255 * x.float().cpu()).byte() for x in fakes]  # as bright as they are
    return list(zip(stored.support_x, made, strict=True))


def _embeddings(probe: Probe) -> Any:
    stored, ready = probe.sample([0])
    embed: Any = probe.learner.embed
    query, support = (embed(x[0]).float().cpu() for x in (ready.query_x, ready.support_x))
    return query, stored.query_y[0], support, stored.support_y[0], probe.names(stored, 0)


def _fits(probe: Probe, tasks: int) -> Any:
    """Arguments of ``figures.fits``, or of ``figures.predictive_fits`` where predictions are distributions."""
    stored, ready = probe.sample(range(tasks))
    low, high = getattr(probe.data, "x_range", (float(stored.query_x.min()), float(stored.query_x.max())))
    grid = torch.linspace(low, high, 200)[:, None]
    truth = probe.tasks.function(stored.task, grid)[..., 0] if hasattr(probe.tasks, "function") else None
    predictions, bands = probe.along(ready, grid.to(probe.learner.device)), ()
    if isinstance(predictions, Mixture):
        bands = (torch.stack([end[..., 0] for end in predictions.central(INTERVAL)], -2),)
        predictions = predictions.mean.mean(-3)
    return grid[:, 0], truth, stored.support_x[..., 0], stored.support_y[..., 0], predictions[..., 0], *bands


def _first(fits: Any) -> Any:
    """The first task's, with the predictive interval of its last state where there are intervals."""
    grid, *parts = fits
    of_first = [None if part is None else part[0] for part in parts]
    return grid, *of_first[:4], *(bands[0, -1] for bands in parts[4:])


def _confusion(probe: Probe, confusions: Confusions) -> Any:
    """Between classes where they are few, else between their groups.

    None where a cell would be less than four meetings of classes, on average: that shows chance.
    """
    names = probe.class_names(confusions.ids)
    groups = probe.groups(confusions.ids)
    title = f"Queries given to another class, {confusions.tasks} tasks"
    if len(names) <= 30:
        parts = (confusions.wrong, confusions.asked, names)
    elif groups is not None and len(set(groups)) > 1:
        parts, title = confusions.by(groups), f"{title}, by group"
    else:
        return None
    return figures.confusion(*parts, title) if confusions.meetings >= 4 * len(parts[-1]) ** 2 else None


def _confused_pairs(probe: Probe, confusions: Confusions) -> Any:
    names = probe.class_names(confusions.ids)
    pairs = [
        (names[a], names[b], confusions.image[confusions.ids[a]], confusions.image[confusions.ids[b]], wrong, asked)
        for a, b, wrong, asked in confusions.worst_pairs(10)
    ]
    title = "Classes most often taken for one another, in either direction"
    return figures.confused_pairs(pairs, title) if pairs else None
