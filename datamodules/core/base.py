"""The base of every task distribution that a run can use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader

from datamodules.core.episodes import (
    Episodes,
    EvaluationGroups,
    EvaluationTasks,
    TaskDistribution,
    TrainingTasks,
    episode_loader,
)
from datamodules.core.errors import DataError, at_least
from datamodules.core.metric import Metric
from datamodules.core.runtime import memory_of_the_machine

MANY = 10_000  # tasks of a meta-batch, from which on it is asked whether memory holds them
LISTED = 40  # bytes of a task's number in a list


TaskKindName = Literal["classification", "regression", "reinforcement", "stream"]

# Settings of networks that data knows.
NETWORK_SETTINGS = ("observations", "actions", "discrete", "in_channels", "image_size", "input_shape", "classes")


class EpisodicDataModule(LightningDataModule):
    """Hands out episodes by index. A task distribution overrides ``prepare_data``, ``build`` and, for images, more.

    Args:
        meta_batch_size: tasks of one meta-update, over all processes.
        val_tasks: number of meta-validation tasks; always the first ones of that split.
        test_tasks: number of meta-test tasks, likewise.
        eval_batch_size: tasks that are evaluated together, per process.
        workers: processes that sample ahead; 0 samples in the training process (episodes take microseconds).
        seed: seed of the class split and of every episode; the same seed gives every algorithm the same tasks.
    """

    kind: TaskKindName = "classification"

    def __init__(
        self, meta_batch_size: int, val_tasks: int, test_tasks: int, eval_batch_size: int, workers: int, seed: int
    ) -> None:
        super().__init__()
        at_least(
            1,
            meta_batch_size=meta_batch_size,
            val_tasks=val_tasks,
            test_tasks=test_tasks,
            eval_batch_size=eval_batch_size,
        )
        at_least(0, workers=workers)
        if workers > (most := 16 * (os.cpu_count() or 1)):
            raise ValueError(f"workers is {workers} but this machine has {os.cpu_count()} cores: {most} are too many")
        self.meta_batch_size = meta_batch_size
        self.val_tasks = val_tasks
        self.test_tasks = test_tasks
        self.eval_batch_size = eval_batch_size
        self.workers = workers
        self.seed = seed
        self._distributions: dict[str, TaskDistribution] = {}
        # What earlier parts of the run consumed, perhaps in meta-batches of another size.
        self._before = {"batches": 0, "seen": 0, "next": 0}

    def task_shape(self) -> dict[str, int]:
        """What a meta-test task has, by the names of settings: ways, shots, queries; episodes; experiences."""
        return {}

    def network_settings(self) -> dict[str, Any]:
        """What the tasks ask of a network, by the names of its settings: those that are None are taken from here."""
        return {}

    @property
    def identity(self) -> str:
        """What tells tasks of this class apart beyond shape, seed and facts: an environment with its arguments."""
        return ""

    @property
    def selects(self) -> bool:
        """Whether meta-validation may choose a checkpoint: not where its classes are trained on by intention."""
        return True

    @property
    def own_metrics(self) -> dict[str, Metric]:
        """What it measures of a task beside the metrics of its kind, by name."""
        return {}

    def build(self, split: str) -> TaskDistribution:
        """The distribution of one split ("train", "val" or "test"), from what ``prepare_data`` left on disk."""
        raise NotImplementedError

    def distribution(self, split: str) -> TaskDistribution:
        """``build(split)``, kept."""
        if split not in self._distributions:
            self._refuse_too_large()
            self._distributions[split] = self.build(split)
        return self._distributions[split]

    def on_device(self, episodes: Episodes) -> Episodes:
        """What happens to a meta-batch once it is on the device: nothing, unless it holds images."""
        return episodes

    @property
    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _meta_batches_done(self) -> int:
        # Lightning restores these counters before it asks for an iterator, which makes resume exact mid-epoch too.
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.ready if self.trainer else 0

    @property
    def tasks_seen(self) -> int:
        """Training tasks consumed so far, over all processes and resumes, whatever their meta-batches were."""
        return self._before["seen"] + (self._meta_batches_done() - self._before["batches"]) * self.meta_batch_size

    def next_task(self) -> int:
        """Number of the first training task that was not consumed yet."""
        return self._before["next"] + (self._meta_batches_done() - self._before["batches"]) * self.meta_batch_size

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._meta_batches_done(), "seen": self.tasks_seen, "next": self.next_task()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Meta-batches begin at multiples of their size, by which some data numbers them: none is met twice.
        following = -(-state_dict["next"] // self.meta_batch_size) * self.meta_batch_size
        self._before = {**state_dict, "next": following}

    def train_dataloader(self) -> DataLoader:
        self._refuse_too_many("train", self.meta_batch_size)
        sampler = TrainingTasks(self.meta_batch_size, *self._rank, self.next_task)
        return self._loader("train", sampler, self.meta_batch_size)

    def val_dataloader(self) -> DataLoader:
        return self._evaluation_loader("val", self.val_tasks)

    def test_dataloader(self) -> DataLoader:
        return self._evaluation_loader("test", self.test_tasks)

    def _evaluation_loader(self, split: str, tasks: int) -> DataLoader:
        self._refuse_too_many(split, min(self.eval_batch_size, tasks))
        groups = self.distribution(split).alike(range(tasks))
        if len(groups) == 1:
            sampler = EvaluationTasks(tasks, self.eval_batch_size, *self._rank)
        else:
            sampler = EvaluationGroups(groups, self.eval_batch_size, *self._rank)
        return self._loader(split, sampler, self.eval_batch_size)

    def _refuse_too_large(self) -> None:
        """Refuse a task that the machine cannot hold, before any is made.

        Raises:
            DataError: naming the setting.
        """
        shape = self.task_shape()
        name = max(("shots", "queries", "episodes"), key=lambda n: shape.get(n) or 0)
        examples = (shape.get("ways") or 1) * (shape.get(name) or 0)
        if 8 * examples > memory_of_the_machine() / 8:  # one number of each, several times
            raise DataError(f"{name} is {shape[name]}, more than memory holds: lower --data.init_args.{name}")

    def _refuse_too_many(self, split: str, tasks: int) -> None:
        """Refuse meta-batches that the machine cannot hold, which would end in a kill or after minutes.

        Raises:
            DataError: naming the setting.
        """
        if tasks < MANY:
            return
        sizes = [0]
        self.distribution(split).sample([0]).apply(lambda tensor: (sizes.append(tensor.nbytes), tensor)[1])
        need, most = tasks * (sum(sizes) + LISTED), memory_of_the_machine()
        if need > most / 2:
            name = "meta_batch_size" if split == "train" else "eval_batch_size"
            raise DataError(
                f"{name} is {tasks}, which takes {need / 2**30:.0f} GiB of memory and the machine has "
                f"{most / 2**30:.0f}: lower --data.init_args.{name}"
            )

    def _loader(self, split: str, sampler, meta_batch: int) -> DataLoader:
        return episode_loader(
            self.distribution(split), sampler, meta_batch, self.workers, pin_memory=torch.cuda.is_available()
        )

    def on_after_batch_transfer(self, batch: Episodes, dataloader_idx: int) -> Episodes:
        ready = self.on_device(batch)
        return ready if self.trainer is None else self.trainer.precision_plugin.convert_input(ready)  # 64-true, 16-true


def shape_text(shape: Mapping[str, int]) -> str:
    """A task's shape as people say it: "5-way 1-shot", "trials of 3 episodes", "streams of 40 experiences"."""
    words = [f"{shape['ways']}-way"] if shape.get("ways") else []
    words += [f"{shape['shots']}-shot"] if shape.get("shots") else []
    words += [f"trials of {shape['episodes']} episodes"] if shape.get("episodes") else []
    words += [f"streams of {shape['experiences']} experiences"] if shape.get("experiences") else []
    return " ".join(words)
