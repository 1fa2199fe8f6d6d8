"""Rainbow tasks: a sequence of the same classes in other colours, sizes and turns, whose images arrive bit by bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.continual.streams import enough
from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Episodes, TaskDistribution
from datamodules.core.errors import DataError, at_least
from datamodules.core.streams import TaskStreams
from datamodules.images.tasks import DEFAULT_ROOT, ImageClasses, ImageDataModule

COLOURS = {  # of the background, RGB
    "red": (255, 0, 0),
    "orange": (255, 127, 0),
    "yellow": (255, 255, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "indigo": (75, 0, 130),
    "violet": (148, 0, 211),
}
SCALES, TURNS = 2, 4
VARIATIONS = len(COLOURS) * SCALES * TURNS
_SEQUENCE, _CLASSES, _SPLIT, _ARRIVAL = 1, 2, 3, 4  # what streams of chance are drawn for

Drawn = Literal["all", "current"]


def half_size(images: Tensor) -> Tensor:
    """Images (N, C, H, W) uint8 at half their size, in the middle of what was nothing."""
    h, w = images.shape[-2:]
    small = F.interpolate(images.float(), (h // 2, w // 2), mode="area").round().byte()
    top, left = (h - h // 2) // 2, (w - w // 2) // 2
    return F.pad(small, (left, w - w // 2 - left, top, h - h // 2 - top))


class RainbowTasks(TaskDistribution):
    """The sequence: which tasks exist at a training step, and with which images, is a function of (seed, step) alone.

    Meta-training task i is of step i // ``meta_batch``. In the other splits task i is the i-th of the sequence, with
    all images that arrive as its support set and the held-out ones as its queries.

    Args:
        classes: one-channel images.
        ways, shots, queries, held_out, arrivals, arrival_steps, task_steps, drawn, tasks: see RainbowImages.
        meta_batch: tasks of a meta-update.
        seed, split: of the tasks.

    Raises:
        DataError: too few classes or images, or images that have colours of their own.
    """

    seed: int

    def __init__(
        self,
        classes: ImageClasses,
        ways: int,
        shots: int,
        queries: int,
        *,
        held_out: int,
        arrivals: int | None,
        arrival_steps: int,
        task_steps: int,
        drawn: Drawn,
        tasks: int,
        meta_batch: int,
        seed: int,
        split: str,
    ) -> None:
        enough(len(classes), ways, split, "classes", "ways")
        if (channels := classes.images.shape[1]) != 1:
            raise DataError(f"the source's images have {channels} channels but what is coloured has 1: choose another")
        chosen = np.sort(TaskStreams(seed, "train", [0], _CLASSES).choice(len(classes), ways)[0])
        self.classes = classes.select(chosen.tolist())
        k = int(self.classes.counts.argmin())
        if (least := int(self.classes.counts[k])) <= held_out:
            raise DataError(
                f"class {self.classes.names[k]!r} has {least} images but {held_out} are held out: lower held_out"
            )
        self.ways, self.shots, self.queries, self.held_out = ways, shots, queries, held_out
        self.arrivals = min(least - held_out, -(-task_steps // arrival_steps), arrivals or least)
        self.arrival_steps, self.task_steps, self.drawn = arrival_steps, task_steps, drawn
        self.tasks, self.meta_batch, self.seed, self.split = tasks, meta_batch, seed, split
        self.order = np.argsort(TaskStreams(seed, "train", [0], _SEQUENCE).bits(VARIATIONS)[0])
        # An image that is held out is so in every task: none has been learned in another colour.
        lots = TaskStreams(seed, "train", range(ways), _SPLIT).uniform(0.0, 1.0, int(self.classes.counts.max()))
        lots[np.arange(lots.shape[1]) >= self.classes.counts[:, None]] = 2.0  # no such image
        rows = self.classes.starts[:, None] + np.argsort(lots, 1, "stable")[:, :least]
        self.held, arriving = rows[:, :held_out], rows[:, held_out:]  # (ways, …)
        turn = np.argsort(TaskStreams(seed, "train", range(tasks), _ARRIVAL).bits(ways, arriving.shape[1]), -1)
        self.arriving = np.take_along_axis(arriving[None], turn, -1)[..., : self.arrivals]  # (tasks, ways, arrivals)
        images = self.classes.images
        turned = [torch.rot90(images, r, (2, 3)) for r in range(TURNS)]
        self.versions = torch.stack([*turned, *map(half_size, turned)])  # (SCALES * TURNS, N, 1, H, W)

    @property
    def class_names(self) -> list[str]:
        return self.classes.names

    @property
    def group_names(self) -> list[str]:
        return self.classes.groups

    def description(self, number: int) -> str:
        """What the task of this number is: "red, half size, 90°"."""
        scale, turn, colour = self.variation(np.array(number))
        return f"{list(COLOURS)[int(colour)]}, {('full', 'half')[int(scale)]} size, {90 * int(turn)}°"

    def variation(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scale, turn and colour of tasks, each by its number in the sequence."""
        rest, colour = np.divmod(self.order[number], len(COLOURS))
        return *np.divmod(rest, TURNS), colour

    def moment(self, step: int) -> tuple[int, int]:
        """The current task at a training step and how many of its batches have arrived; after the last (tasks, 0)."""
        task = step // self.task_steps
        return (task, int(self.arrived(np.array(task), np.array(step)))) if task < self.tasks else (self.tasks, 0)

    def arrived(self, number: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Batches of tasks, which are no later than the current one, that have arrived by these steps."""
        since = np.minimum(step - number * self.task_steps, self.task_steps - 1)
        return np.minimum(1 + since // self.arrival_steps, self.arrivals)

    def sample(self, indices: Sequence[int]) -> Episodes:
        index = np.asarray(indices, np.int64)
        if self.split != "train":
            return self.whole(index)
        step = index // self.meta_batch
        last = np.minimum(step // self.task_steps, self.tasks - 1)
        rng = TaskStreams(self.seed, self.split, indices)
        number = rng.integers(last + 1)
        number = number if self.drawn == "all" else last
        lots = rng.uniform(0.0, 1.0, self.ways, self.arrivals)
        arrived = self.arrived(number, step)
        lots[np.broadcast_to(np.arange(self.arrivals) >= arrived[:, None, None], lots.shape)] = 2.0
        # Where too few have arrived, they are taken again, the queries those of the support set at last.
        place = np.arange(self.shots + self.queries) % arrived[:, None]  # (T, shots + queries)
        order = np.argsort(lots, -1, "stable")
        taken = np.take_along_axis(order, place[:, None].repeat(self.ways, 1), -1)
        rows = np.take_along_axis(self.arriving[number], taken, -1)
        return self.episodes(number, rows[..., : self.shots], rows[..., self.shots :], index)

    def whole(self, numbers: Sequence[int] | np.ndarray, arrived: int | None = None) -> Episodes:
        """Tasks (T,) with the first so many arrivals, None for all, as support sets, and held-out images as queries.

        After the last task the sequence comes round.
        """
        index = np.asarray(numbers, np.int64)
        numbers = index % self.tasks
        held = np.broadcast_to(self.held, (len(numbers), *self.held.shape))
        return self.episodes(numbers, self.arriving[numbers][..., :arrived], held, index)

    def episodes(self, number: np.ndarray, support: np.ndarray, query: np.ndarray, index: np.ndarray) -> Episodes:
        """Tasks of these numbers, from rows of images (T, ways, …)."""
        scale, turn, colour = self.variation(number)
        version = scale * TURNS + turn
        first = ((colour * SCALES * TURNS + version) * len(self.classes.images))[:, None]
        told: dict[str, Any] = {}
        for name, rows in (("support", support), ("query", query)):
            label = torch.arange(self.ways).repeat_interleave(rows.shape[-1])
            rows = rows.reshape(len(rows), -1)
            told[f"{name}_x"] = self.coloured(version, colour, rows)
            told[f"{name}_y"] = label.expand(len(rows), -1)
            told[f"{name}_rows"] = torch.from_numpy(first + rows)
        facts = {"number": number, "colour": colour, "scale": scale, "turn": turn}
        return Episodes(
            **told,
            index=torch.from_numpy(index.copy()),
            ways=self.ways,
            task={
                "classes": torch.arange(self.ways).expand(len(index), -1),
                **{name: torch.from_numpy(np.array(values, np.int64)) for name, values in facts.items()},
            },
        )

    def coloured(self, version: np.ndarray, colour: np.ndarray, rows: np.ndarray) -> Tensor:
        """Black strokes on a background of a colour: (T, n, 3, H, W) uint8 of rows (T, n)."""
        ink = self.versions[torch.from_numpy(version)[:, None], torch.from_numpy(rows)]  # bright where there is any
        background = torch.tensor(list(COLOURS.values()), dtype=torch.int16)[torch.from_numpy(colour)]
        return ((255 - ink).to(torch.int32) * background[:, None, :, None, None] // 255).byte()


class RainbowImages(EpisodicDataModule):
    """Rainbow tasks, after Rainbow MNIST (Finn et al., ICML 2019): 7 colours × 2 scales × 4 turns, 56 tasks in a row.

    All tasks are the same ``ways`` classes; the seed chooses the classes, the order of the tasks and that of their
    images. A batch, one image of each class, of the current task arrives every ``arrival_steps`` meta-updates, the next
    task every ``task_steps``; what has arrived stays. A meta-training task is drawn uniformly from those that exist,
    the current one included, its support and query sets from its images that have arrived. Meta-validation and
    meta-test tasks are the whole sequence: these tasks are to be remembered, and validation selects nothing.

    Args:
        source: the images, of one channel. Its ways, shots, queries are not used, its seed and, unless it names
            another, its root are this one's.
        ways: classes.
        shots, queries: images of each class that a meta-training task has.
        held_out: images of each class that a task is tested on, the same ones in every colour.
        arrivals: batches of a task at most; None for as many as there are images and time.
        arrival_steps: meta-updates from one batch to the next.
        task_steps: meta-updates from one task to the next.
        drawn: meta-training tasks: "all" that exist, or the "current" one alone.
        tasks: of the sequence, the first ones of the 56.
        part: the source's split that the classes and images are of.
        root: folder of the data and its cache.
        meta_batch_size, eval_batch_size, workers, seed: see EpisodicDataModule.
        val_tasks, test_tasks: the first ones of the sequence; None for all.
    """

    def __init__(
        self,
        source: ImageDataModule,
        ways: int = 10,
        shots: int = 1,
        queries: int = 1,
        held_out: int = 5,
        arrivals: int | None = None,
        arrival_steps: int = 50,
        task_steps: int = 2000,
        drawn: Drawn = "all",
        tasks: int = VARIATIONS,
        part: Literal["train", "val", "test"] = "train",
        root: str = DEFAULT_ROOT,
        meta_batch_size: int = 25,
        val_tasks: int | None = None,
        test_tasks: int | None = None,
        eval_batch_size: int = 14,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        at_least(1, shots=shots, queries=queries, held_out=held_out, tasks=tasks)
        at_least(1, arrivals=arrivals, arrival_steps=arrival_steps, task_steps=task_steps)
        at_least(2, ways=ways)
        val_tasks, test_tasks = (tasks if n is None else n for n in (val_tasks, test_tasks))
        super().__init__(meta_batch_size, val_tasks, test_tasks, eval_batch_size, workers, seed)
        for name, number in {"tasks": tasks, "val_tasks": val_tasks, "test_tasks": test_tasks}.items():
            if number > (most := VARIATIONS if name == "tasks" else tasks):
                raise ValueError(f"{name} is {number} but the sequence has {most} tasks: lower it to {most}")
        source.seed = self.seed
        if source.root == DEFAULT_ROOT:
            source.root = root
        self.source, self.root, self.part = source, root, part
        self.ways, self.shots, self.queries, self.held_out = ways, shots, queries, held_out
        self.arrivals, self.arrival_steps, self.task_steps = arrivals, arrival_steps, task_steps
        self.tasks = tasks
        self.drawn: Drawn = drawn

    def prepare_data(self) -> None:
        self.source.trainer = self.trainer
        self.source.prepare_data()

    def task_shape(self) -> dict[str, int]:
        return {"ways": self.ways, "queries": self.held_out}

    def network_settings(self) -> dict[str, Any]:
        known = self.source.network_settings()
        if not known:
            return {}
        return known | {"in_channels": 3, "input_shape": [3, *known["input_shape"][1:]]}

    @property
    def identity(self) -> str:
        return f"{type(self.source).__name__}, {self.part}"

    @property
    def most_arrivals(self) -> int:
        """Batches of a task that there is time for; images may be fewer."""
        in_time = -(-self.task_steps // self.arrival_steps)
        return in_time if self.arrivals is None else min(in_time, self.arrivals)

    @property
    def selects(self) -> bool:
        return False

    def build(self, split: str) -> RainbowTasks:
        return RainbowTasks(
            self.source.classes(self.part),
            self.ways,
            self.shots,
            self.queries,
            held_out=self.held_out,
            arrivals=self.arrivals,
            arrival_steps=self.arrival_steps,
            task_steps=self.task_steps,
            drawn=self.drawn,
            tasks=self.tasks,
            meta_batch=self.meta_batch_size,
            seed=self.seed,
            split=split,
        )

    def sequence(self) -> RainbowTasks:
        """The tasks as meta-training meets them."""
        tasks = self.distribution("train")
        assert isinstance(tasks, RainbowTasks)
        return tasks

    def current(self, step: int) -> Episodes:
        """The current task at a training step, alone: all its images so far, and its held-out ones as queries."""
        task, arrived = self.sequence().moment(step)
        return self.sequence().whole([task], arrived)

    def on_device(self, episodes: Episodes) -> Episodes:
        return self.source.on_device(episodes)
