"""Episodes: the meta-batch that every algorithm receives, and how a run walks through them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice, pairwise
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler


def checksum(numbers: Tensor) -> Tensor:
    """(…, n) int64 to (…,), numbers to know them and their order again by."""
    # Powers of a multiplier of linear congruential generators, modulo 2^64 as int64 has it.
    weights = torch.full((numbers.shape[-1],), 6364136223846793005).cumprod(0)
    return (numbers * weights.to(numbers.device)).sum(-1)


@dataclass(frozen=True)
class Support:
    """The support set of ONE task.

    Attributes:
        x: inputs, (S, *input).
        y: labels in [0, ways), (S,), int64; or targets, (S, out), for regression.
        ways: number of classes, static; 0 for regression.
        unlabelled: further inputs of the same classes without labels, (U, *input), for learners that use them.
        facts: what data know of this task, see ``Episodes.facts``; given to learners that declare ``reads_facts``: an
            oracle, and one with a loss over all meta-training classes. No prediction but an oracle's may look at them.
    """

    x: Tensor
    y: Tensor
    ways: int
    unlabelled: Tensor | None = None
    facts: Mapping[str, Tensor] | None = None

    def members(self) -> Tensor:
        """Which examples are of which class, (S, ways) bool."""
        # By comparison: torch's one_hot looks at values, which nested transformations do not let it.
        return self.y[:, None] == torch.arange(self.ways, device=self.y.device)

    def shares(self) -> Tensor | None:
        """Weights (S,) of mean 1 by which all classes count alike: shots are no prior; None for regression.

        Of double precision where the device has it, so that whoever computes in it loses nothing.
        """
        if not self.ways:
            return None
        precise = torch.float32 if self.y.device.type == "mps" else torch.float64
        return len(self.y) / self.ways / self.members().sum(0).to(precise)[self.y]


@dataclass(frozen=True)
class Task:
    """One task: its support set, its queries (Q, *input) and their targets (Q,) or (Q, out)."""

    support: Support
    query_x: Tensor
    query_y: Tensor


class MetaBatch:
    """A meta-batch of T tasks, whatever a task is.

    Attributes:
        index: (T,) int64, each task's number within its split.
        meta_batch: number of tasks of the whole meta-batch, over all processes.
        task: what the sampler knows of each task, name to (T, ...).
    """

    index: Tensor
    meta_batch: int
    task: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.index)

    def apply(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A copy with ``function`` applied to every tensor."""
        fields: Any = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]  # each kind is a dataclass
        changed: dict[str, Any] = {
            f.name: function(value) for f in fields if isinstance(value := getattr(self, f.name), Tensor)
        }
        copied: Any = dataclasses.replace(self, task={k: function(v) for k, v in self.task.items()}, **changed)  # pyright: ignore
        return copied

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return self.apply(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self.apply(lambda t: t.pin_memory())

    def fingerprint(self) -> Tensor:
        """A number by which to know each task again, (T,)."""
        raise NotImplementedError


@dataclass
class Episodes(MetaBatch):
    """A meta-batch of T tasks of one shape.

    Attributes:
        support_x: (T, S, *input); images are uint8 until they are on the device, then float32.
        support_y: (T, S) int64, or (T, S, out) float32.
        query_x: (T, Q, *input).
        query_y: (T, Q) or (T, Q, out).
        index: (T,) int64, each task's number within its split.
        ways: number of classes of every task; 0 for regression.
        meta_batch: number of tasks of the whole meta-batch, over all processes.
        task: what the sampler knows of each task, name to (T, ...): class ids, amplitude and phase.
        support_rows, query_rows: (T, S) and (T, Q), which image of the split each input is; None where inputs are drawn
            anew for every task.
        unlabelled_x: (T, U, *input), of each task's classes, other images than support and queries; None without.
        task_groups: see TaskDistribution.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    index: Tensor
    ways: int = 0
    meta_batch: int = 0
    task: dict[str, Tensor] = field(default_factory=dict)
    support_rows: Tensor | None = None
    query_rows: Tensor | None = None
    unlabelled_x: Tensor | None = None
    task_groups: tuple[str, tuple[str, ...]] | None = None

    def fingerprint(self) -> Tensor:
        """A number by which to know each task again, (T,).

        Of which images it shows, in their order, exact; where inputs are drawn anew, the sum of all squares, which
        machines round differently.
        """
        if self.support_rows is not None and self.query_rows is not None:
            return checksum(torch.cat([self.support_rows, self.query_rows], 1) + 1)
        parts = (self.support_x, self.support_y, self.query_x, self.query_y)
        return torch.stack([part.float().flatten(1).square().sum(1) for part in parts]).sum(0)

    def __getitem__(self, i: int) -> Task:
        unlabelled = None if self.unlabelled_x is None else self.unlabelled_x[i]
        facts = {name: values[i] for name, values in self.facts.items()}
        support = Support(self.support_x[i], self.support_y[i], self.ways, unlabelled, facts)
        return Task(support, self.query_x[i], self.query_y[i])

    @property
    def groups(self) -> Tensor | None:
        """The number of each task's group, (T,) int64; None where there are none."""
        return None if self.task_groups is None else self.task[self.task_groups[0]]

    @property
    def facts(self) -> dict[str, Tensor]:
        """``task``, and as "group" the number of each task's group where there are groups."""
        return self.task if self.groups is None else {**self.task, "group": self.groups}


class TaskDistribution:
    """A distribution over tasks: episode i of a split is a pure function of (seed, split, i).

    What is not known of its tasks is None.

    Attributes:
        seed: of the episodes.
        class_names, group_names: by the class ids of ``Episodes.task["classes"]``, names and groups of the classes.
        task_groups: what kinds of tasks there are: the fact that has each task's number, and their names by it.
        x_range: that inputs of one number lie in.
    """

    seed: int | None = None
    task_groups: tuple[str, tuple[str, ...]] | None = None
    x_range: tuple[float, float] | None = None

    @property
    def class_names(self) -> list[str] | None:
        return None

    @property
    def group_names(self) -> list[str] | None:
        return None

    def class_digests(self) -> frozenset[int]:
        """Numbers to know its classes by in other splits and data, however they are named or turned; empty without."""
        return frozenset()

    def function(self, task: dict[str, Tensor], x: Tensor) -> Tensor | None:
        """The true functions of tasks (T, …) at inputs (N, 1), without noise, (T, N, 1)."""
        return None

    def alike(self, indices: Sequence[int]) -> list[list[int]]:
        """These numbers in groups of tasks of one shape, which alone are sampled together; the first one's leads."""
        return [list(indices)]

    def sample(self, indices: Sequence[int]) -> MetaBatch:
        """The tasks of these numbers."""
        raise NotImplementedError


class EpisodeDataset(Dataset):
    """The map-style view of a distribution; a meta-batch is one vectorised call."""

    def __init__(self, distribution: TaskDistribution, meta_batch: int) -> None:
        self.distribution = distribution
        self.meta_batch = meta_batch

    def __getitems__(self, indices: list[int]) -> MetaBatch:
        batch: Any = self.distribution.sample(indices)
        return dataclasses.replace(batch, meta_batch=self.meta_batch)

    def __getitem__(self, index: int) -> MetaBatch:
        return self.__getitems__([index])


class TrainingTasks(Sampler[list[int]]):
    """The endless walk through the training tasks, B after B, each process its share.

    Args:
        meta_batch: B, the tasks of one meta-step over all processes; at least one for each process.
        rank: this process.
        world_size: number of processes.
        first_task: called when iteration starts; the number of the task to start at (more than 0 after a resume).

    Raises:
        ValueError: fewer tasks than processes.
    """

    def __init__(self, meta_batch: int, rank: int, world_size: int, first_task: Callable[[], int]) -> None:
        if meta_batch < world_size:
            raise ValueError(
                f"meta_batch_size is {meta_batch} but there are {world_size} processes: give each at least one task "
                f"(--data.init_args.meta_batch_size {world_size}) or use fewer devices"
            )
        self.meta_batch, self.rank, self.world_size, self.first_task = meta_batch, rank, world_size, first_task

    def __iter__(self) -> Iterator[list[int]]:
        start = self.first_task()
        while True:
            yield list(range(start + self.rank, start + self.meta_batch, self.world_size))
            start += self.meta_batch


class EvaluationTasks(Sampler[list[int]]):
    """Tasks 0 … total-1 once, in batches; each process a disjoint share, none repeated."""

    def __init__(self, total: int, batch: int, rank: int, world_size: int) -> None:
        if total < world_size:
            raise ValueError(f"{total} evaluation tasks for {world_size} processes: ask for at least one each")
        share = list(range(rank, total, world_size))
        # As many batches on every process: DDP's forward waits for the others.
        count = min(-(-total // (batch * world_size)), total // world_size)
        cuts = [len(share) * i // count for i in range(count + 1)]
        self.batches = [share[a:b] for a, b in pairwise(cuts)]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class EvaluationGroups(Sampler[list[int]]):
    """Tasks of several shapes once, in batches of one shape; each process has as many batches, of others.

    Where batches do not divide among the processes the first are repeated: metrics count a task once.

    Args:
        groups: numbers of tasks of one shape each.
        batch: most tasks of a batch.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(self, groups: Sequence[Sequence[int]], batch: int, rank: int, world_size: int) -> None:
        batches = [list(group[i : i + batch]) for group in groups for i in range(0, len(group), batch)]
        # As many on every process: DDP's forward waits for the others.
        whole = -(-len(batches) // world_size) * world_size
        self.batches = list(islice(cycle(batches), rank, whole, world_size))

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _as_is(batch: Any) -> Any:
    return batch


def episode_loader(
    distribution: TaskDistribution, sampler: Sampler[list[int]], meta_batch: int, workers: int, pin_memory: bool
) -> DataLoader:
    """A DataLoader whose batches are what the distribution samples."""
    return DataLoader(
        EpisodeDataset(distribution, meta_batch),
        batch_sampler=sampler,
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
    )
