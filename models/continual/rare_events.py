"""Learning to remember rare events: a memory of keys and values that is written at every example."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.core.episodes import Support
from datamodules.core.errors import at_least
from models.continual.learner import ContinualLearner, Stream
from models.core.chance import Chance
from models.core.learner import Paper
from models.networks.backbones import Backbone

EMPTY = -1  # the value of a slot that was never written


class KeyValueMemory(NamedTuple):
    """A memory of a fixed number of slots.

    Attributes:
        keys: (slots, size), of unit length where written.
        values: (slots,) int64, labels; ``EMPTY`` where nothing was written.
        ages: (slots,) int64, examples since a slot was written or was right.
        counts: (classes,) int64, examples that were written of each class.
        chance: breaks the ties of ages.
    """

    keys: Tensor
    values: Tensor
    ages: Tensor
    counts: Tensor
    chance: Chance

    @classmethod
    def of(cls, slots: int, size: int, classes: int, like: Tensor, chance: Chance) -> KeyValueMemory:
        """With nothing in it, of the kind of ``like``."""
        values = torch.full((slots,), EMPTY, device=like.device)
        counts = values.new_zeros(classes)
        return cls(like.new_zeros(slots, size), values, torch.zeros_like(values), counts, chance)

    def similarities(self, query: Tensor) -> Tensor:
        """Cosines (…, slots) of queries (…, size) of unit length; minus infinity for slots that are empty."""
        return (query @ self.keys.T).masked_fill(self.values == EMPTY, -torch.inf)

    def nearest(self, query: Tensor) -> Tensor:
        """The slot (…,) nearest to each query; the lowest of equals."""
        return self.similarities(query).argmax(-1)

    def written(self, query: Tensor, label: Tensor, spread: int) -> KeyValueMemory:
        """The memory after one query (size,) and its label, () int64 (section 3, memory update).

        Where the nearest slot has the label, its key becomes the mean direction of key and query; otherwise, or where
        there is none, key and value are written to the oldest slot, an age counting as up to ``spread`` more or less;
        an empty slot is older than any other. The slot's age is then 0, all others' one more.
        """
        slots = len(self.values)
        right = self.nearest(query)
        known = _at(self.values, right, slots) == label
        noise, chance = self.chance.uniform(slots)
        empty = (self.values == EMPTY) * 2.0**40
        oldest = (self.ages + empty + spread * (2 * noise - 1)).argmax(-1)
        place = torch.where(known, right, oldest)
        here = torch.arange(slots, device=query.device) == place
        key = torch.where(known, F.normalize(_at(self.keys, right, slots) + query, dim=-1), query)
        return KeyValueMemory(
            torch.where(here[:, None], key, self.keys),
            torch.where(here, label, self.values),
            torch.where(here, 0, self.ages + 1),
            self.counts + (torch.arange(len(self.counts), device=query.device) == label),
            chance,
        )


def _at(values: Tensor, place: Tensor, size: int) -> Tensor:
    """``values[place]`` for a place () that is a tensor, where tasks are mapped over."""
    return values[place[None]].squeeze(0)


class RareEvents(ContinualLearner):
    """Answers with the value of the nearest key, and writes every example to the memory once its label is told.

    The loss of an example is that of a margin (eq. 1): [q·n_b - q·n_p + α]₊, n_p being the nearest key with the right
    label and n_b the nearest with a wrong one, both among the k nearest keys. No gradient passes through what was
    written before: keys are what they were when written.

    Args:
        backbone: of the features.
        size: of keys.
        slots: of the memory.
        nearest: k.
        margin: α.
        spread: of ages, by which slots of about the same age are overwritten in random order.
        **others: see MetaLearner.
    """

    paper = Paper(
        "Kaiser, Nachum, Roy and Bengio",
        "Learning to Remember Rare Events",
        "ICLR",
        2017,
        "https://arxiv.org/abs/1703.03129",
    )

    def __init__(
        self,
        backbone: Backbone,
        size: int = 128,
        slots: int = 8192,
        nearest: int = 256,
        margin: float = 0.1,
        spread: int = 8,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        at_least(1, size=size, slots=slots, nearest=nearest)
        at_least(0, spread=spread)
        self.backbone, self.slots, self.margin, self.spread = backbone, slots, margin, spread
        self.pool = min(nearest, slots)
        self.project = nn.Linear(backbone.out_features, size)

    def encode(self, inputs: Tensor) -> Tensor:
        return F.normalize(self.project(self.backbone(inputs)), dim=-1)

    def begin(self, classes: int, chance: Chance) -> KeyValueMemory:
        like = self.project.weight.detach()
        return KeyValueMemory.of(self.slots, self.project.out_features, classes, like, chance)

    def update(self, state: KeyValueMemory, experience: Support) -> KeyValueMemory:
        for x, y in zip(experience.x.detach(), experience.y, strict=True):
            state = state.written(x, y, self.spread)
        return state

    def predict(self, state: KeyValueMemory, query_x: Tensor) -> Tensor:
        """The similarity of each class's nearest key, (Q, classes); minus infinity for classes without any."""
        similar, label = state.similarities(query_x), torch.arange(len(state.counts), device=query_x.device)
        return similar[:, None].masked_fill(state.values != label[:, None], -torch.inf).amax(-1)

    def objective(self, task: Stream) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        queries, labels = self.encode(task.x.flatten(0, 1)), task.y.flatten()
        state, losses, counted, logits = self.begin(task.classes, task.chance), [], [], []
        for query, label in zip(queries, labels, strict=True):
            logits.append(self.predict(state, query.detach()[None])[0])
            loss, counts = self.margin_loss(state, query, label)
            losses.append(loss)
            counted.append(counts)
            state = state.written(query.detach(), label, self.spread)
        counts = torch.stack(counted).to(queries)
        return (torch.stack(losses) * counts).sum() / counts.sum().clamp(min=1), torch.stack(logits)

    def margin_loss(self, memory: KeyValueMemory, query: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 1 of one query (size,), and whether the k nearest keys hold both a right and a wrong label."""
        similar = memory.similarities(query)
        pool = similar >= similar.topk(self.pool).values[-1]
        right = pool & (memory.values == label)
        wrong = pool & (memory.values != label) & (memory.values != EMPTY)
        both = right.any() & wrong.any()
        most = [similar.masked_fill(~of, -2.0).amax(-1) for of in (wrong, right)]
        return (most[0] - most[1] + self.margin).relu(), both

    def targets(self, batch: Any) -> Tensor:
        return batch.y.flatten(1)
