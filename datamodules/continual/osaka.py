"""OSAKA streams: few-shot tasks that stay for a while and then give way to another, at times of another domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.continual.streams import StreamDataModule, Streams, StreamTasks, enough, keys
from datamodules.core.episodes import checksum
from datamodules.core.errors import DataError, at_least
from datamodules.core.streams import TaskStreams
from datamodules.images.multi_domain import Domain
from datamodules.images.tasks import DEFAULT_ROOT, ImageClasses

_TASKS, _IMAGES = 2, 3  # what the streams of chance of an experience are drawn for, beside when tasks change


class OsakaTasks(StreamTasks):
    """Streams of tasks; experience j of stream i is a pure function of (seed, split, i, j).

    Args:
        domains: the classes of each.
        probabilities: of each, by its name.
        stay: that the next experience is of the same task.
        ways, experiences, shots, queries, points: see OsakaStreams; shots and queries of each class.
        seed, split: of the streams.

    Raises:
        DataError: too few classes or images, or images of different shapes.
    """

    def __init__(
        self,
        domains: dict[str, ImageClasses],
        probabilities: dict[str, float],
        stay: float,
        ways: int,
        experiences: int,
        shots: int,
        queries: int,
        points: tuple[int, ...],
        *,
        seed: int,
        split: str,
    ) -> None:
        for name, classes in domains.items():
            enough(len(classes), ways, split, f"classes of {name!r}", "ways")
            if (least := int(classes.counts.min())) < shots + queries:
                raise DataError(
                    f"a class of {name!r} ({split}) has {least} images but an experience needs {shots} shots + "
                    f"{queries} queries of each: lower shots or queries"
                )
        parts = list(domains.values())
        if len(shapes := {"×".join(map(str, part.images.shape[1:])) for part in parts}) > 1:
            raise DataError(f"images of all domains have one shape, but these are {', '.join(sorted(shapes))}")
        self.parts, self.probabilities = parts, np.array([probabilities[name] for name in domains])
        self.images = torch.cat([part.images for part in parts])
        self.counts = np.concatenate([part.counts for part in parts])
        self.starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        self.sizes = np.array([len(part) for part in parts])
        self.stay, self.ways, self.experiences = stay, ways, experiences
        self.shots, self.queries, self.points, self.seed, self.split = shots, queries, points, seed, split

    def class_digests(self) -> frozenset[int]:
        return frozenset().union(*(part.digests() for part in self.parts))

    def sample(self, indices: Sequence[int]) -> Streams:
        t, j = len(indices), self.experiences
        changes = TaskStreams(self.seed, self.split, indices).uniform(0.0, 1.0, j) >= self.stay
        changes[:, 0] = True
        number = changes.cumsum(1) - 1  # of each experience's task
        domain, classes = (np.take_along_axis(drawn, number[..., None], 1) for drawn in self.tasks(indices))
        rng = self.of_each(indices, _IMAGES)
        counts = self.counts[classes].reshape(-1, self.ways)
        rows = self.starts[classes][..., None] + rng.choice(counts, self.shots + self.queries, self.ways).reshape(
            t, j, self.ways, -1
        )
        needed, numbered = np.unique(rows, return_inverse=True)
        among = torch.from_numpy(numbered).view(rows.shape)
        label = torch.arange(self.ways)[:, None]
        return Streams(
            inputs=self.images[torch.from_numpy(needed)],
            rows=among[..., : self.shots].flatten(2),
            y=label.expand(t, j, -1, self.shots).flatten(2),
            query_rows=among[..., self.shots :].flatten(2),
            query_y=label.expand(t, j, -1, self.queries).flatten(2),
            index=torch.as_tensor(np.asarray(indices, np.int64)),
            key=keys(self.seed, self.split, indices),
            digest=checksum(torch.from_numpy(rows.reshape(t, -1)) + 1),
            classes=self.ways,
            points=self.points,
            task={"boundaries": torch.from_numpy(changes), "domains": torch.from_numpy(domain[..., 0])},
        )

    def of_each(self, indices: Sequence[int], purpose: int) -> TaskStreams:
        """Streams of chance of every experience, or task, of streams, one after another, (T · J,)."""
        index, place = np.repeat(np.asarray(indices), self.experiences), np.tile(range(self.experiences), len(indices))
        return TaskStreams(self.seed, self.split, index, purpose, place)

    def tasks(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Of the m-th task of each stream the domain (T, J, 1) and the classes (T, J, ways), in the order of labels."""
        rng = self.of_each(indices, _TASKS)
        lot = rng.uniform(0.0, 1.0, 1)
        domain = np.minimum((lot >= self.probabilities.cumsum()).sum(1), len(self.sizes) - 1)
        first = np.concatenate([[0], self.sizes.cumsum()[:-1]])[domain]
        classes = first[:, None] + rng.choice(self.sizes[domain], self.ways)
        shape = (len(indices), self.experiences, -1)
        return domain.reshape(shape), classes.reshape(shape)


class OsakaStreams(StreamDataModule):
    """Online fast adaptation with unannounced changes of task and domain (OSAKA; Caccia et al., NeurIPS 2020).

    An experience is a batch of ``shots`` images of each of a task's ``ways`` classes, drawn anew each time. After it
    the task stays with probability ``stay``; otherwise another one comes, of a domain drawn by ``probabilities``, with
    other classes and labels. Nothing but the images tells: where tasks change is among the stream's facts, for those
    who measure. Meta-training streams are of one domain alone. All domains show classes of the split.

    Args:
        domains: by name, see Domain. Sources' ways, shots and queries are not used, their seed and, unless they name
            another, their root are this one's.
        trained: the name of the domain that meta-training streams are of.
        probabilities: of the domains, by name; None for the same of all.
        stay: α.
        ways: classes of a task.
        shots, queries: images of each class, that an experience teaches and that it is asked about besides.
        experiences: J.
        root: folder of the data and its cache.
        **common: see StreamDataModule.
    """

    def __init__(
        self,
        domains: dict[str, Domain],
        trained: str,
        probabilities: dict[str, float] | None = None,
        stay: float = 0.98,
        ways: int = 5,
        shots: int = 5,
        queries: int = 1,
        experiences: int = 1000,
        root: str = DEFAULT_ROOT,
        **common: Any,
    ) -> None:
        super().__init__(experiences, shots, queries, **common)
        at_least(2, ways=ways)
        if trained not in domains:
            raise ValueError(
                f"trained is {trained} but the domains are {', '.join(domains) or 'none'}: name one of them"
            )
        if not 0 <= stay <= 1:
            raise ValueError(f"stay is {stay} but must be a probability")
        probabilities = probabilities or dict.fromkeys(domains, 1 / len(domains))
        shares = probabilities.values()
        if probabilities.keys() != domains.keys() or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"probabilities are {probabilities} but must be of {', '.join(domains)}, and add up to 1")
        for domain in domains.values():
            domain.source.seed = self.seed
            if domain.source.root == DEFAULT_ROOT:
                domain.source.root = root
        # Configurations are written by name: no order is to be relied on.
        self.domains = {name: domains[name] for name in sorted(domains)}
        self.trained, self.probabilities, self.stay, self.ways, self.root = trained, probabilities, stay, ways, root

    def prepare_data(self) -> None:
        for domain in self.domains.values():
            domain.source.trainer = self.trainer
            domain.source.prepare_data()

    def task_shape(self) -> dict[str, int]:
        return {"ways": self.ways, **super().task_shape()}

    def network_settings(self) -> dict[str, Any]:
        return self.domains[self.trained].source.network_settings()

    @property
    def identity(self) -> str:
        told = (f"{n}: {type(d.source).__name__} {d.rotate}° {d.invert}" for n, d in self.domains.items())
        return f"{', '.join(told)}; {sorted(self.probabilities.items())}, {self.stay}"

    def build(self, split: str) -> OsakaTasks:
        train = split == "train"
        shown = {self.trained: self.domains[self.trained]} if train else self.domains
        classes = {}
        for name, domain in shown.items():
            own = domain.source.classes(split)
            classes[name] = ImageClasses(domain.seen(own.images), own.counts, own.names, own.groups)
        probabilities = {self.trained: 1.0} if train else self.probabilities
        experiences, shots, queries, points = self.shape_of(split)
        return OsakaTasks(
            classes,
            probabilities,
            self.stay,
            self.ways,
            experiences,
            shots,
            queries,
            points,
            seed=self.seed,
            split=split,
        )

    def normalize(self, inputs: Tensor) -> Tensor:
        return self.domains[self.trained].source.normalize(inputs)
