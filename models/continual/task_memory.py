"""Task memory: past tasks' examples in an external memory, of which a new task takes what it needs."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap

from datamodules.continual.streams import Streams
from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Support
from datamodules.core.errors import at_least
from datamodules.core.metric import Metric
from models.continual.descent import slopes, with_one
from models.continual.learner import ContinualLearner, Stream
from models.continual.records import By, Entries, Records, Writes, chosen, destinations
from models.core.chance import Chance
from models.core.learner import Paper
from models.core.predictions import cross_entropies
from models.core.task_embedding import TaskEmbedding
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNormMode, normalize_by

NEAR = 1e-3  # ε of MbPA's kernel 1 / (ε + d²)


class TaskState(NamedTuple):
    """A learner on ONE stream.

    Attributes:
        head: (classes, features + 1), its last column the bias.
        memory: see ``models.continual.records.Store``.
        experiences: so far, () int64.
        retrieved: experiences that what was retrieved last is of, (R,) int64; -1 where there was nothing.
        chance: the stream's own.
    """

    head: Tensor
    memory: Any
    experiences: Tensor
    retrieved: Tensor
    chance: Chance


class TaskMemory(ContinualLearner):
    """Retrieves what it has of tasks like a new one, and adapts a linear head to both.

    An external memory of fixed capacity keeps examples as features, each with its label, the task embedding of its
    experience and its loss when it came. At an experience the task is embedded, the examples nearest to it are
    retrieved, and a head is adapted to them along with the new ones by gradient descent, its rate meta-learned; then
    the new ones are written. With ``local`` the head of each query is adapted further, to what is nearest to the query:
    memory-based parameter adaptation.

    In meta-training each experience's queries are predicted just after it; the gradient passes through the steps to
    rate, backbone and embedding as far as they are trained. Which examples are retrieved has no gradient.

    Args:
        backbone: of the features.
        embedding: of an experience, as a set of inputs; None is the mean of its features.
        keep: M, examples that the memory has places for; 0 is no memory.
        retrieve: R, examples that an experience is given, or "all".
        by: what they are nearest by: the task "embedding" of their experience, or the "feature" of any new example.
            "random" draws them: experience replay, the control.
        writes: which examples give way, see ``models.continual.records.Writes``.
        start: where the head begins at each experience: at "zero", or where the "last" one left it.
        steps: of gradient descent on the head.
        rate: of these steps, at the beginning of meta-training.
        local: examples that each query's head is adapted to, by as many steps; 0 leaves it as it is.
        **others: see MetaLearner.
    """

    paper = Paper(
        "Sprechmann, Jayakumar, Rae, Pritzel, Badia, Uria, Vinyals, Hassabis, Pascanu and Blundell",
        "Memory-based Parameter Adaptation",
        "ICLR",
        2018,
        "https://arxiv.org/abs/1802.10542",
    )
    own_metrics = {
        "return_accuracy": Metric("higher", "accuracy on a group that returns, just after it", share=True),
        "precision": Metric("higher", "share of the retrieved that is of the group that returns", share=True),
        "usage": Metric("higher", "share of the memory that was ever retrieved", share=True),
    }

    def __init__(
        self,
        backbone: Backbone,
        embedding: TaskEmbedding | None = None,
        keep: int = 200,
        retrieve: int | Literal["all"] = 20,
        by: By = "embedding",
        writes: Writes = "reservoir",
        start: Literal["zero", "last"] = "zero",
        steps: int = 10,
        rate: float = 0.1,
        local: int = 0,
        batch_norm: BatchNormMode = "running",
        **others: Any,
    ) -> None:
        super().__init__(batch_norm=batch_norm, **others)
        at_least(0, keep=keep, retrieve=None if retrieve == "all" else retrieve, steps=steps, local=local)
        if rate <= 0:
            raise ValueError(f"rate is {rate} but must be above 0")
        self.backbone, self.embedding = backbone, embedding
        self.keep, self.steps, self.local = keep, steps, min(local, keep)
        self.retrieve = keep if retrieve == "all" else min(retrieve, keep)
        self.by: By = by
        self.writes: Writes = writes
        self.start_from = start
        self.log_rate = nn.Parameter(torch.tensor(math.log(rate)))
        self._size = backbone.out_features + 1

    def check(self, data: EpisodicDataModule) -> str | None:
        if getattr(data, "remember", 0):
            return "TaskMemory has nothing in its memory before a stream: set data.remember to 0"
        return None

    # On a stream ----------------------------------------------------------------------------------------------------

    def encode(self, inputs: Tensor) -> Tensor:
        """Features with a 1 at their end; beyond it the inputs, where an embedding has to see them."""
        features = with_one(self.backbone(inputs))
        return features if self.embedding is None else torch.cat([features, inputs.flatten(1).to(features.dtype)], 1)

    def begin(self, classes: int, chance: Chance) -> TaskState:
        like = next(self.backbone.parameters())
        size = self._size - 1 if self.embedding is None else self.embedding.embedding_size
        memory = self.empty(size, classes, like)
        none = torch.full((self.retrieve,), -1, dtype=torch.int64, device=like.device)
        return TaskState(like.new_zeros(classes, self._size), memory, none.new_zeros(()), none, chance)

    def empty(self, embedding: int, classes: int, like: Tensor) -> Any:
        """The memory at the beginning of a stream."""
        return Records.empty(self.keep, self._size, embedding, classes, like)

    def update(self, state: TaskState, experience: Support) -> TaskState:
        features, task = experience.x[:, : self._size], self.embedded(experience.x)
        place, there, chance = self.retrieved(state, features, task)
        x, y = state.memory.at(place)
        memory = state.memory.counted(place, there)
        head = torch.zeros_like(state.head) if self.start_from == "zero" else state.head
        weight = torch.cat([torch.ones_like(features[:, 0]), there.to(features.dtype)])
        head = self.descended(head, torch.cat([features, x]), torch.cat([experience.y, y]), weight)
        if self.keep:
            loss = cross_entropies(features @ state.head.T, experience.y)
            entries = Entries(features, experience.y, task, state.experiences, loss)
            where, met, chance = destinations(self.writes, memory, entries, chance)
            memory = memory.put(where, entries, met)
        of_experience = torch.where(there, state.memory.experience[place], -1)
        return TaskState(head, memory, state.experiences + 1, of_experience, chance)

    def embedded(self, x: Tensor) -> Tensor:
        """The task embedding of an experience's encoded examples (N, …), (d,)."""
        if self.embedding is None:
            return x[:, : self._size - 1].mean(0)
        inputs = x[:, self._size :].unflatten(1, self.backbone.input_shape)
        one_class = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        with normalize_by(self.statistics_source):
            return self.embedding.embed_task(Support(inputs, one_class, 1))

    def retrieved(self, state: TaskState, features: Tensor, task: Tensor) -> tuple[Tensor, Tensor, Chance]:
        """Places of the memory (R,), whether something is there (R,), and the chance."""
        held, chance = state.memory.held, state.chance
        if self.by == "random":
            score, chance = chance.uniform(len(held))
        elif self.retrieve < self.keep:
            to = task[None] if self.by == "embedding" else features
            score = state.memory.distances(to, self.by)
        else:
            score = torch.zeros_like(state.memory.loss)
        return *chosen(score, held, self.retrieve), chance

    def descended(self, head: Tensor, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """A head after steps on the mean cross-entropy of examples (N, features + 1) that count by ``weight`` (N,)."""
        share = (weight / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny))[:, None]
        for _ in range(self.steps):
            head = head - self.log_rate.exp() * ((slopes(x @ head.T, y) * share).T @ x)
        return head

    def predict(self, state: TaskState, query_x: Tensor) -> Tensor:
        x = query_x[:, : self._size]
        return vmap(lambda one: self.local_logits(state, one))(x) if self.local else x @ state.head.T

    def local_logits(self, state: TaskState, x: Tensor) -> Tensor:
        """Of one query (features + 1,), by a head that is adapted to what is nearest to it, (classes,)."""
        distance = state.memory.distances(x[None], "feature")
        place, there = chosen(distance, state.memory.held, self.local)
        kernel = there / (NEAR + distance[place])
        return self.descended(state.head, *state.memory.at(place), kernel) @ x

    def objective(self, task: Stream) -> tuple[Tensor, Tensor]:
        """The mean loss on the queries of each experience just after it."""
        with normalize_by(self.statistics_source):
            encoded = self.encode(torch.cat([task.x.flatten(0, 1), task.query_x.flatten(0, 1)]))
        examples = task.y.numel()
        seen = task._replace(x=encoded[:examples].unflatten(0, task.x.shape[:2]))
        asked = encoded[examples:].unflatten(0, task.query_x.shape[:2])
        state, predictions = self.begin(task.classes, task.chance), []
        for number in range(len(task.x)):
            state = self.update(state, seen.experience(number))
            predictions.append(self.predict(state, asked[number]))
        prediction = torch.cat(predictions)
        return self.loss(prediction, task.query_y.flatten()), prediction

    # What is measured -----------------------------------------------------------------------------------------------

    def noted(self, state: TaskState) -> dict[str, Tensor]:
        held = state.memory.held
        used = ((state.memory.used > 0) & held).sum() / held.sum().clamp(min=1)
        return {"retrieved": state.retrieved, "usage": used}

    def with_facts(self, found: dict[str, Tensor], streams: Streams) -> dict[str, Tensor]:
        """Where groups return: which visits were returns, and what of the retrieved is of the group."""
        if "visits" not in streams.task:
            return found
        retrieved = found["retrieved"]
        visits, returns = (streams.task[n][:, : retrieved.shape[1]] for n in ("visits", "returns"))
        of_group = visits.gather(1, retrieved.flatten(1).clamp(min=0)).view_as(retrieved)
        right = (of_group == visits[..., None]) & (retrieved >= 0)
        return found | {"right": right, "returns": returns.bool()}

    def metrics_of_streams(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        metrics = super().metrics_of_streams(found) | {"usage": found["usage"][:, -1]}
        if "returns" in found:
            returns = found["returns"].to(found["after"].dtype)
            retrieved = ((found["retrieved"] >= 0).sum(-1) * returns).sum(1)
            metrics["precision"] = (found["right"].sum(-1) * returns).sum(1) / retrieved.clamp(min=1)
            metrics["return_accuracy"] = (found["after"] * returns).sum(1) / returns.sum(1).clamp(min=1)
        return metrics
