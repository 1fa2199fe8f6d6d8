"""What a task memory keeps of a stream's examples, which it gives to a new task, and which give way."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from models.continual.memory import Policy, arrivals, places
from models.core.chance import Chance

Writes = Literal[Policy, "least_used", "surprise"]
"""``models.continual.memory.Policy``, or: the example "least_used" gives way, of those retrieved as rarely the oldest;
with "surprise" those stay whose loss was highest when they were written, before they were learned."""
By = Literal["embedding", "feature", "random"]
BLOCK = 65_536  # keys whose distances are computed together


class Entries(NamedTuple):
    """Examples of ONE experience that are to be written: x (N, features), y (N,), the experience's task embedding (d,),
    its number (), and losses before they were learned, (N,)."""

    x: Tensor
    y: Tensor
    task: Tensor
    experience: Tensor
    loss: Tensor


class Store(Protocol):
    """What is asked of a memory of M places, whether it is in the state or on disk.

    Attributes:
        experience: that each example is of, (M,) int64.
        loss: of each, when it was written, (M,).
        order: number of each among all examples so far, (M,) int64.
        used: how often each was retrieved, (M,) int64.
        held: which places are taken, (M,) bool.
        met: examples of each class so far, whether kept or not, (classes,) int64.
    """

    @property
    def experience(self) -> Tensor: ...
    @property
    def loss(self) -> Tensor: ...
    @property
    def order(self) -> Tensor: ...
    @property
    def used(self) -> Tensor: ...
    @property
    def held(self) -> Tensor: ...
    @property
    def met(self) -> Tensor: ...

    @property
    def kept(self) -> Any:
        """What of it is in the state."""
        ...

    def nearest(self, to: Tensor, by: By, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """The places whose features, or task embeddings, are the nearest to any of (K, …).

        Returns:
            So many places in their own order, or all M; whether something is there; and the squared distances.
        """
        ...

    def at(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """x (R, features) and y (R,) at places (R,)."""
        ...

    def counted(self, place: Tensor, there: Tensor) -> Any:
        """The memory after these places were used, but for those where nothing is ``there``, (R,) bool."""
        ...

    def put(self, place: Tensor, entries: Entries, met: Tensor) -> Any:
        """The memory with entries at places (N,), one after another, -1 for those that are not kept; ``met`` anew."""
        ...


class Records(NamedTuple):
    """M places in the state of ONE stream, see Store. Nothing is written in place.

    Attributes:
        x: features, (M, features).
        y: labels, (M,) int64.
        task: embedding of the experience of each, (M, d).
    """

    x: Tensor
    y: Tensor
    task: Tensor
    experience: Tensor
    loss: Tensor
    order: Tensor
    used: Tensor
    held: Tensor
    met: Tensor

    @classmethod
    def empty(cls, size: int, features: int, embedding: int, classes: int, like: Tensor) -> Records:
        """Nothing yet; tensors of the device and precision of ``like``."""
        none = like.new_zeros(size, dtype=torch.int64)
        x, task = like.new_zeros(size, features), like.new_zeros(size, embedding)
        return cls(x, none, task, none, like.new_zeros(size), none, none, none.bool(), none.new_zeros(classes))

    @property
    def kept(self) -> Records:
        return self

    def nearest(self, to: Tensor, by: By, number: int) -> tuple[Tensor, Tensor, Tensor]:
        distance = nearest_of(self.x if by == "feature" else self.task, to)
        place, there = chosen(distance, self.held, number)
        return place, there, distance[place]

    def at(self, place: Tensor) -> tuple[Tensor, Tensor]:
        return self.x[place], self.y[place]

    def counted(self, place: Tensor, there: Tensor) -> Records:
        return self._replace(used=count(self.used, place, there))

    def put(self, place: Tensor, entries: Entries, met: Tensor) -> Records:
        taken, source = arrivals(place, len(self.y))
        order = self.met.sum() + source

        def written(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(taken.view(-1, *[1] * (old.dim() - 1)), new.to(old.dtype), old)

        return Records(
            written(entries.x[source], self.x),
            written(entries.y[source], self.y),
            written(entries.task, self.task),
            written(entries.experience, self.experience),
            written(entries.loss[source], self.loss),
            written(order, self.order),
            written(torch.zeros_like(order), self.used),
            self.held | taken,
            met,
        )


def nearest_of(keys: Tensor, to: Tensor) -> Tensor:
    """The least squared distance of each of the keys (M, d) to any of (K, d), exact, block by block: (M,)."""
    parts = [(part[:, None] - to).square().sum(-1).amin(1) for part in keys.split(max(1, BLOCK // len(to)))]
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def count(used: Tensor, place: Tensor, there: Tensor) -> Tensor:
    """``used`` (M,) with one more at each place (R,) where something is ``there``."""
    return used + torch.zeros_like(used).scatter_add(0, place, there.long())


def chosen(score: Tensor, held: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """So many places of the lowest score (M,), in their own order, and whether something is there, both (R,)."""
    place = torch.where(held, score, torch.inf).argsort(stable=True)[:number].sort().values
    return place, held[place]


def destinations(writes: Writes, memory: Store, entries: Entries, chance: Chance) -> tuple[Tensor, Tensor, Chance]:
    """Where entries go, (N,), -1 for those that are not kept; ``met`` after them, and the chance."""
    size = len(memory.held)
    if writes in get_args(Policy):
        return places(writes, memory.met, size, entries.y, chance)  # pyright: ignore[reportArgumentType]
    met = memory.met + (entries.y[:, None] == torch.arange(len(memory.met), device=entries.y.device)).sum(0)
    worth = torch.where(memory.held, memory.used if writes == "least_used" else memory.loss, -torch.inf)
    oldest = memory.order.argsort(stable=True)
    first = oldest[worth[oldest].argsort(stable=True)]  # places in the order in which they give way
    number = torch.arange(len(entries.y), device=first.device)
    if writes == "least_used":
        return first[number % size], met, chance
    rank = entries.loss.argsort(descending=True, stable=True).argsort()  # of each entry by its loss, 0 the highest
    place = first[rank.clamp(max=size - 1)]
    stays = (rank < size) & (entries.loss > worth[place])
    return torch.where(stays, place, -1), met, chance
