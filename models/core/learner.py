"""The one base class of all algorithms."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_map

from datamodules.core.base import EpisodicDataModule, TaskKindName
from datamodules.core.episodes import Episodes, Support, Task
from datamodules.core.errors import ConfigError
from datamodules.core.metric import Metric
from models.core.base_learner import BaseLearner
from models.core.from_checkpoint import build
from models.core.metrics import EMBEDDING, FINGERPRINT, TaskMetrics, classification_metrics, regression_metrics
from models.core.predictions import Mixture, Prediction, cross_entropies
from models.core.task_kinds import KINDS
from models.core.task_map import map_tasks
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNorm, BatchNormMode, Statistics, recording, replace_batch_norm

OptimizerCallable = Callable[[Iterable], Optimizer]
SchedulerCallable = Callable[[Optimizer], LRScheduler]


@dataclass(frozen=True)
class Paper:
    """What an algorithm's file implements."""

    authors: str
    title: str
    venue: str
    year: int
    url: str


class MetaLearner(pl.LightningModule):
    """Learns from tasks. An algorithm overrides ``adapt`` and ``predict``, each for ONE task.

    Where the mean query loss after adaptation is not the paper's meta-objective it overrides ``objective``, and where
    the tasks are not support and query tensors, the steps. State is returned by ``adapt`` and never kept on ``self``:
    tasks are mapped over by ``vmap``.

    Args:
        optimizer: of the meta-update, from parameters.
        scheduler: of its learning rate, stepped once per meta-update; None keeps it constant.
        batch_norm: where the statistics that normalise a query come from.
        chunk: tasks that are mapped over together; None chooses by size and device.
    """

    paper: ClassVar[Paper]
    tasks: ClassVar[frozenset[TaskKindName]]
    own_metrics: ClassVar[Mapping[str, Metric]] = {}
    """What it measures of a task beside the metrics of its kind, by name."""
    selects_by: ClassVar[str | None] = None
    """The metric of meta-validation that its best checkpoint has unless told otherwise; None: its kind's headline."""
    reads_facts: bool = False
    """Whether its support sets hold what data know of a task (``Support.facts``)."""

    def __init__(
        self,
        optimizer: OptimizerCallable = lambda parameters: Adam(parameters, lr=1e-3),
        scheduler: SchedulerCallable | None = None,
        batch_norm: BatchNormMode = "transductive",
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk is {chunk} but must be at least 1")
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.batch_norm: BatchNormMode = batch_norm
        self.chunk = chunk
        stages = ("train", "val", "test")
        self.metrics = torch.nn.ModuleDict({f"{s}_tasks": TaskMetrics(self.declared_metrics()) for s in stages})

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, torch.nn.Module):
            # Torch's own batch norm heeds none of the modes, and is wrong where tasks are mapped over.
            for module in value.modules():
                if isinstance(module, Backbone):
                    replace_batch_norm(module)
        super().__setattr__(name, value)

    @classmethod
    def load_from_checkpoint(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, checkpoint_path: Any, map_location: Any = "cpu", **settings: Any
    ) -> MetaLearner:
        """The learner of a checkpoint with its weights, in evaluation mode; its own data and run need not be there.

        Args:
            checkpoint_path: ``runs/<name>/checkpoints/best.ckpt``, or any other checkpoint that train.py wrote.
            map_location: where its tensors go.
            settings: of the learner, over those that it was trained with: ``eval_inner_steps=10``.

        Raises:
            ConfigError: no such checkpoint, or one of another program or of a learner that is no subclass of this.
        """
        return build(cls, checkpoint_path, map_location, settings)

    @classmethod
    def declared_metrics(cls) -> dict[str, Metric]:
        """All that may be measured of a task, by name: of its kinds of task, and each class's own."""
        declared = {"loss": Metric("lower")}
        for kind in sorted(cls.tasks):
            declared |= KINDS[kind].metrics
        for base in reversed(cls.__mro__):
            declared |= vars(base).get("own_metrics", {})
        return declared

    # What an algorithm overrides ------------------------------------------------------------------------------------

    def adapt(self, support: Support) -> Any:
        """What is learnt of one task from its support set."""
        raise NotImplementedError

    def predict(self, state: Any, query_x: Tensor) -> Any:
        """Logits (Q, ways), values (Q, out) or their Mixture, for queries of the task that ``state`` was adapted to."""
        raise NotImplementedError

    def adaptation(self, support: Support) -> Iterable[Any]:
        """The states along the way, from before the first step; here only the last, for lack of steps."""
        yield self.adapt(support)

    def objective(self, task: Task) -> tuple[Any, ...]:
        """One task's part of the meta-objective, a scalar, and the predictions it was measured on.

        A third value, a dictionary of tensors, is what the task leaves to the learner beyond its gradient:
        ``update_from_tasks`` gets its mean over the meta-batch. Under "metrics" it may hold a dictionary of scalars to
        report of the task, which ``own_metrics`` declares.
        """
        prediction = self.predict(self.adapt(task.support), task.query_x)
        return self.loss(prediction, task.query_y), prediction

    def task_metrics(self, batch: Episodes) -> dict[str, Tensor]:
        """Metrics of each task, (T, …), that evaluation has beside those of its predictions; declared as any."""
        return {}

    def update_from_tasks(self, values: dict[str, Any]) -> None:
        """Take what the tasks of a meta-batch left, averaged over them and over all processes."""
        raise NotImplementedError

    @property
    def embedding_size(self) -> int:
        """d of ``embed_task``, which a test records of every task; 0 where a learner has no vector of a task."""
        return 0

    def embed_task(self, support: Support) -> Tensor:
        """What task this is, (embedding_size,), from its support set."""
        raise NotImplementedError

    @property
    def controls(self) -> tuple[str, ...]:
        """What it can be evaluated with in the place of a task's own embedding, by names that ``control`` takes."""
        return ()

    def control(self, name: str) -> None:
        """From here on evaluate with this control; see ``controls``."""
        raise NotImplementedError

    def embedding_distances(self, a: Tensor, b: Tensor) -> Tensor:
        """How far tasks are apart by their embeddings (A, d) and (B, d), (A, B): Euclidean unless it knows better."""
        return torch.cdist(a, b)

    def embeddings(self, x: Tensor) -> Tensor | None:
        """Of inputs (N, *input) each by itself, (N, features), to be looked at; None where it has none."""
        return None

    def generated_images(self, support: Support, count: int) -> Tensor | None:
        """So many images (count, C, H, W) that it makes for a task, as bright as they are; None where it makes none."""
        return None

    def check(self, data: EpisodicDataModule) -> str | None:
        """Why the learner cannot learn from these tasks, and the cure; None if it can."""
        return None

    def class_rows(self) -> dict[str, Tensor]:
        """Parameters with a row for each class, by name: of base learners' heads, and what an algorithm adds."""
        heads = {n: m for n, m in self.named_modules() if isinstance(m, BaseLearner)}
        return {f"{n}.{own}": p for n, head in heads.items() for own, p in head.head_parameters().items()}

    @property
    def statistics_source(self) -> Literal["batch", "running", "none"]:
        """What ``normalize_by`` takes for a batch in this mode, before a support set gives better."""
        if self.batch_norm == "none":
            return "none"
        return "running" if self.batch_norm == "running" and not self.training else "batch"

    @property
    def transductive(self) -> bool:
        """Whether a prediction depends on the other queries."""
        own = (m for m in self.modules() if isinstance(m, BatchNorm) and not m.fixed)
        return self.batch_norm == "transductive" and any(own)

    # What all share -------------------------------------------------------------------------------------------------

    def loss(self, prediction: Prediction, target: Tensor, shares: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of logits and labels, squared error of values, or negative log-density: a scalar.

        Examples of a classification count by ``shares`` (N,), if given.
        """
        if isinstance(prediction, Mixture):
            return -prediction.log_prob(target).mean()
        prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        if target.is_floating_point():
            return F.mse_loss(prediction, target)
        if shares is None:
            return F.cross_entropy(prediction, target)
        return cross_entropies(prediction, target, shares).mean()

    def support_loss(self, prediction: Tensor, support: Support, rows: Tensor | None = None) -> Tensor:
        """``loss`` of predictions (S, …) for a support set, each of whose classes counts alike: shots are no prior.

        With as many examples of each class it is the mean over examples. ``rows`` are those of a mini-batch; None: all.
        """
        target, shares = support.y, support.shares()
        if rows is not None:
            target, shares = target[rows], None if shares is None else shares[rows]
        return self.loss(prediction, target, shares)

    def map(self, function: Callable[..., Any], episodes: Episodes, *further: Tensor) -> Any:
        """``function`` of every task of a meta-batch; its tensors come back with a leading (T,).

        Beside the task it gets its row of each of ``further``, (T, …).
        """
        e = episodes
        unlabelled = () if e.unlabelled_x is None else (e.unlabelled_x,)
        told = e.facts if self.reads_facts else {}

        def one(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor, *rows: Tensor) -> Any:
            images = rows[0] if unlabelled else None
            rows = rows[len(unlabelled) :]
            facts = dict(zip(told, rows, strict=False)) if self.reads_facts else None
            task = Task(Support(support_x, support_y, e.ways, images, facts), query_x, query_y)
            return function(task, *rows[len(told) :])

        # In evaluation what a task draws must not depend on which tasks it is mapped with.
        randomness = "different" if self.training else "same"
        tensors = (e.support_x, e.support_y, e.query_x, e.query_y, *unlabelled, *told.values(), *further)
        return map_tasks(one, *tensors, chunk=self.chunk, randomness=randomness)

    def per_task(self, prediction: Any, target: Tensor) -> dict[str, Tensor]:
        """Metrics of each task from predictions (T, Q, …) and targets (T, Q, …)."""
        with torch.autocast(target.device.type, enabled=False):  # what is measured is not to be rounded, whatever was
            if isinstance(prediction, Mixture) or target.is_floating_point():
                return regression_metrics(prediction, target, width=not self.training)
            return classification_metrics(prediction, target)

    def training_step(self, batch: Episodes, batch_idx: int) -> Tensor:
        def recorded(task: Task) -> tuple[Tensor, Tensor, dict[str, Any], Statistics]:
            statistics: Statistics = {}
            with recording(statistics if self.batch_norm == "running" else None, differentiable=False):
                loss, prediction, *kept = self.objective(task)
            return loss, prediction, kept[0] if kept else {}, statistics

        loss, prediction, kept, statistics = self.map(recorded, batch)
        with torch.no_grad():
            for (layer, step), of_tasks in self._mean_over_tasks(statistics, batch.meta_batch).items():
                layer.update_running(*of_tasks, step=step)
            metrics = {"loss": loss, **self.per_task(prediction, self.targets(batch)), **kept.pop("metrics", {})}
            if kept:
                self.update_from_tasks(self._mean_over_tasks(kept, batch.meta_batch))
            self.stage_metrics("train").update(batch.index, metrics)
        # Processes may hold unequal shares; DDP averages over processes, the meta-objective is a mean over tasks.
        return loss.sum() * (self.trainer.world_size / batch.meta_batch)

    def targets(self, batch: Any) -> Tensor:
        """What the predictions of ``objective`` are held against, (T, Q, …)."""
        return batch.query_y

    def stage_metrics(self, stage: str) -> TaskMetrics:
        """The metrics of "train", "val" or "test" tasks collected so far."""
        return cast(TaskMetrics, self.metrics[f"{stage}_tasks"])

    def predictions(self, batch: Episodes) -> Any:
        """Predictions (T, Q, …) for the queries of every task, in evaluation."""
        return self.map(lambda task: self.predict(self.adapt(task.support), task.query_x), batch)

    def predictions_by_parts(self, batch: Episodes, size: int) -> Tensor:
        """Predictions (T, parts, size, …) for queries (T, parts · size, …), each part a batch of its own."""

        def by_parts(task: Task) -> Tensor:
            state = self.adapt(task.support)
            return torch.stack([self.predict(state, x) for x in task.query_x.split(size)])

        return self.map(by_parts, batch)

    def evaluation_step(self, batch: Episodes, stage: str) -> None:
        prediction = self.predictions(batch)
        metrics = self.per_task(prediction, batch.query_y) | self.task_metrics(batch)
        facts = kept = None
        if stage == "test":
            facts = batch.task | {FINGERPRINT: batch.fingerprint()}
            if self.embedding_size:
                kept = {EMBEDDING: self.map(lambda task: self.embed_task(task.support), batch)}
        self.stage_metrics(stage).update(batch.index, metrics, facts, kept)

    def validation_step(self, batch: Episodes, batch_idx: int) -> None:
        self.evaluation_step(batch, "val")

    def test_step(self, batch: Episodes, batch_idx: int) -> None:
        self.evaluation_step(batch, "test")

    @property
    def tasks_seen(self) -> int:
        """Training tasks consumed so far, over all processes and resumes."""
        return self.trainer.datamodule.tasks_seen

    @property
    def meta_updates(self) -> int:
        """Meta-updates made so far, over all resumes; 0 outside of a Trainer."""
        trainer = getattr(self, "_trainer", None)
        return 0 if trainer is None else trainer.global_step

    def all_metrics(self) -> dict[str, Metric]:
        """What is declared of all that it measures, the data's own metrics included once a Trainer has them."""
        return self.stage_metrics("test").declared

    def log_stage(self, stage: str) -> None:
        """Log what a stage's tasks came to, and forget them."""
        metrics = {f"{stage}/{name}": value for name, value in self.stage_metrics(stage).compute().items()}
        # Equal on every process already; sync_dist only tells Lightning so.
        self.log_dict({**metrics, "tasks_seen": float(self.tasks_seen)}, sync_dist=stage != "train")
        self.stage_metrics(stage).reset()

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.train()  # one that was loaded to predict is trained on as any other
        for metrics in self.metrics.values():
            cast(TaskMetrics, metrics).declared.update(self.trainer.datamodule.own_metrics)

    def on_train_batch_start(self, batch: Episodes, batch_idx: int) -> None:
        # What a step draws (dropout, latent samples) is a function of seeds, step and process: resume is exact.
        step = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        seeds = (self.trainer.datamodule.seed, int(os.environ.get("PL_GLOBAL_SEED", 0)))
        torch.manual_seed(hash((*seeds, step, self.global_rank)) & (2**63 - 1))

    def on_train_batch_end(self, outputs: Any, batch: Episodes, batch_idx: int) -> None:
        if (batch_idx + 1) % self.trainer.log_every_n_steps == 0:
            self.log_stage("train")

    def on_validation_epoch_end(self) -> None:
        self.log_stage("val")

    def on_test_epoch_start(self) -> None:
        self.stage_metrics("test").reset()

    def on_test_epoch_end(self) -> None:
        metrics = self.stage_metrics("test").compute()
        self.log_dict({f"test/{name}": value for name, value in metrics.items()}, sync_dist=True)

    def parameter_groups(self) -> list[Any]:
        """What the optimizer is made with: the parameters that are trained, or groups with rates of their own."""
        return [p for p in self.parameters() if p.requires_grad]

    def configure_optimizers(self) -> Any:
        trained = self.parameter_groups()
        if not trained:
            raise ConfigError("this learner has no parameters beside its frozen backbone: there is nothing to train")
        optimizer = self.optimizer(trained)
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}

    def _mean_over_tasks(self, values: Any, meta_batch: int) -> Any:
        """Mean over the tasks of all processes of tensors (T, …), held in dictionaries or tuples."""

        def mean(value: Tensor) -> Tensor:
            of_tasks = value.detach().sum(0) / meta_batch
            several = self.trainer.world_size > 1
            return self.trainer.strategy.reduce(of_tasks, reduce_op="sum") if several else of_tasks

        return tree_map(mean, values)
