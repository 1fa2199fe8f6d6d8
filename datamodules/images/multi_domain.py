"""Several image data sets as the domains of one task distribution."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.core.episodes import Episodes, TaskDistribution
from datamodules.core.errors import DataError
from datamodules.core.streams import TaskStreams
from datamodules.images.tasks import DEFAULT_ROOT, ImageClasses, ImageDataModule, ImageTasks


@dataclass
class Domain:
    """What the tasks of one domain show.

    Attributes:
        source: the images and their split into classes.
        rotate: degrees that every image is turned by, against the clock.
        invert: every pixel's brightness becomes 255 minus itself.
    """

    source: ImageDataModule
    rotate: Literal[0, 90, 180, 270] = 0
    invert: bool = False

    def seen(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) uint8 as the domain shows them."""
        turned = torch.rot90(images, self.rotate // 90, (2, 3))
        return 255 - turned if self.invert else turned


class MixtureTasks(TaskDistribution):
    """Tasks of several domains, each task all of one; episode i is a pure function of (seed, split, i).

    Args:
        domains: the tasks of each, by name. Which one a task is of is its number in ``Episodes.task["domain"]``.
        seed, split: of the episodes.
    """

    seed: int

    def __init__(self, domains: dict[str, ImageTasks], *, seed: int, split: str) -> None:
        self.domains, self.seed, self.split = domains, seed, split
        self.task_groups = ("domain", tuple(domains))
        parts = list(domains.values())
        # Where the rows and the class ids of each domain begin.
        self.first_row = np.cumsum([0, *(len(tasks.images) for tasks in parts)])
        self.first_class = np.cumsum([0, *(len(tasks.class_names) for tasks in parts)])

    @property
    def class_names(self) -> list[str]:
        """Names by the class ids of ``Episodes.task["classes"]``."""
        return [f"{domain}: {name}" for domain, tasks in self.domains.items() for name in tasks.class_names]

    @property
    def group_names(self) -> list[str]:
        """Domains by the class ids of ``Episodes.task["classes"]``."""
        return [domain for domain, tasks in self.domains.items() for _ in tasks.class_names]

    def class_digests(self) -> frozenset[int]:
        return frozenset().union(*(tasks.class_digests() for tasks in self.domains.values()))

    def sample(self, indices: Sequence[int]) -> Episodes:
        rng, index = TaskStreams(self.seed, self.split, indices), np.asarray(indices, np.int64)
        domain = rng.integers(len(self.domains))
        drawn, order = [], []
        for number, tasks in enumerate(self.domains.values()):
            places = np.flatnonzero(domain == number)
            if len(places):
                part = tasks.draw(index[places].tolist(), rng.of(places))
                row, first_class = int(self.first_row[number]), int(self.first_class[number])
                facts = {"classes": part.task["classes"] + first_class, "domain": torch.full((len(places),), number)}
                of_images = {"support_rows": part.support_rows, "query_rows": part.query_rows}
                rows = {name: None if of is None else of + row for name, of in of_images.items()}
                drawn.append(dataclasses.replace(part, task=facts, **rows))
                order.append(places)
        back = torch.from_numpy(np.argsort(np.concatenate(order)))

        def together(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in drawn])[back]

        names = ("support_x", "support_y", "query_x", "query_y", "index", "support_rows", "query_rows", "unlabelled_x")
        columns: dict[str, Any] = {name: together(name) for name in names if getattr(drawn[0], name) is not None}
        facts = {name: torch.cat([part.task[name] for part in drawn])[back] for name in drawn[0].task}
        return Episodes(**columns, ways=drawn[0].ways, task=facts, task_groups=self.task_groups)


class ImageMixture(ImageDataModule):
    """Image data sets, and versions of them, as domains; all classes of a task come from one, each as often as another.

    A domain's source says what its classes are. Ways, shots, queries and seed are the mixture's, so that versions of
    one source split its classes alike. A user's own pictures are taken for the first domain's.

    Args:
        domains: by name.
        common: see ImageDataModule; ``root`` is that of the sources which name none of their own.
    """

    def __init__(self, domains: dict[str, Domain], **common: Any) -> None:
        super().__init__(**common)
        if not domains:
            raise ValueError("domains are none but must be one or more")
        shared = ("ways", "shots", "queries", "train_ways", "train_shots", "train_queries", "max_train_shots")
        shared += ("unlabelled", "warp", "meta_batch_size", "seed")
        for name, domain in domains.items():
            for method in ("build", "normalize"):
                if getattr(type(domain.source), method) is not getattr(ImageDataModule, method):
                    raise ValueError(f"domain {name!r}: {type(domain.source).__name__} cannot be part of a mixture")
            for setting in shared:
                setattr(domain.source, setting, getattr(self, setting))
            if domain.source.root == DEFAULT_ROOT:
                domain.source.root = self.root
        self.domains = domains

    def prepare_data(self) -> None:
        for domain in self.domains.values():
            domain.source.trainer = self.trainer
            domain.source.prepare_data()

    def to_store(self, image: Any) -> Tensor:
        first = next(iter(self.domains.values()))
        return first.seen(first.source.to_store(image)[None])[0]

    @property
    def stored_form(self) -> str:
        name, first = next(iter(self.domains.items()))
        turned = f", turned by {first.rotate}°" if first.rotate else ""
        return f"{first.source.stored_form}{turned}{', inverted' if first.invert else ''} (as the domain {name!r})"

    def build(self, split: str) -> MixtureTasks:
        """The tasks of one split.

        Raises:
            DataError: domains with images of different shapes.
        """
        parts: dict[str, ImageTasks] = {}
        for name, domain in self.domains.items():
            classes = domain.source.classes(split)
            seen = ImageClasses(domain.seen(classes.images), classes.counts, classes.names, classes.groups)
            parts[name] = domain.source.tasks(seen, split)
        shapes = {name: "×".join(map(str, tasks.images.shape[1:])) for name, tasks in parts.items()}
        if len(set(shapes.values())) > 1:
            told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise DataError(
                f"a mixture's images have one shape, but these are {told}: set the sources' size and channels"
            )
        return MixtureTasks(parts, seed=self.seed, split=split)
