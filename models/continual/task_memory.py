"""Task memory: past tasks' examples in an external memory, of which a new task takes what it needs."""

from __future__ import annotations

import math
from pathlib import Path
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
from models.continual.memory_file import FILE, Filed, FileStore, MemoryFile, Search, faiss_of
from models.continual.records import By, Entries, Records, Store, Writes, chosen, destinations
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
        memory: ``Records``, or ``Filed`` where they are on disk.
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
        on_disk: where a run is one stream (``models.Online``), keep the memory in a file of the run's folder, of which
            no more is held in memory than labels and numbers of each place.
        search: on disk, see ``models.continual.memory_file.MemoryFile``.
        **others: see MetaLearner.
    """

    paper = Paper(
        "Sprechmann, Jayakumar, Rae, Pritzel, Badia, Uria, Vinyals, Hassabis, Pascanu and Blundell",
        "Memory-based Parameter Adaptation",
        "ICLR",
        2018,
        "https://arxiv.org/abs/1802.10542",
    )
    selects_by = "learning_accuracy"
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
        steps: int = 100,
        rate: float = 0.3,
        local: int = 0,
        on_disk: bool = False,
        search: Search = "exact",
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
        self.on_disk = on_disk
        self.search: Search = search
        if on_disk:
            at_least(1, keep=keep)
            faiss_of(search)
        self._file: MemoryFile | None = None
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
        memory = Records.empty(0 if self._file else self.keep, self._size, self._embedding, classes, like)
        if self._file:
            counted = torch.zeros(self.keep, dtype=torch.int64, device=like.device)
            memory = Filed(counted.new_zeros(()), counted, memory.met)
        none = torch.full((self.retrieve,), -1, dtype=torch.int64, device=like.device)
        return TaskState(like.new_zeros(classes, self._size), memory, none.new_zeros(()), none, chance)

    @property
    def _embedding(self) -> int:
        """d of the task embedding."""
        return self._size - 1 if self.embedding is None else self.embedding.embedding_size

    def memory(self, state: TaskState) -> Store:
        """The memory of a state."""
        kept = state.memory
        if self._file is None or not isinstance(kept, Filed):
            return kept
        if int(kept.sequence) == self._file.sequence:
            return FileStore(self._file, kept.used, kept.met, state.head)
        if int(kept.sequence):
            raise ValueError("the task memory on disk is that of another state: it goes on from the last one alone")
        return Records.empty(1, self._size, self._embedding, len(kept.met), state.head)  # of no experience

    def update(self, state: TaskState, experience: Support) -> TaskState:
        features, task = experience.x[:, : self._size], self.embedded(experience.x)
        memory = self.memory(state)
        place, there, chance = self.retrieved(memory, state.chance, features, task)
        of_experience = torch.where(there, memory.experience[place], -1)
        x, y = memory.at(place)
        memory = memory.counted(place, there)
        head = torch.zeros_like(state.head) if self.start_from == "zero" else state.head
        weight = torch.cat([torch.ones_like(features[:, 0]), there.to(features.dtype)])
        head = self.descended(head, torch.cat([features, x]), torch.cat([experience.y, y]), weight)
        if self.keep:
            loss = cross_entropies(features @ state.head.T, experience.y)
            entries = Entries(features, experience.y, task, state.experiences, loss)
            where, met, chance = destinations(self.writes, memory, entries, chance)
            memory = memory.put(where, entries, met)
        return TaskState(head, memory.kept, state.experiences + 1, of_experience, chance)

    def embedded(self, x: Tensor) -> Tensor:
        """The task embedding of an experience's encoded examples (N, …), (d,)."""
        if self.embedding is None:
            return x[:, : self._size - 1].mean(0)
        inputs = x[:, self._size :].unflatten(1, self.backbone.input_shape)
        one_class = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        with normalize_by(self.statistics_source):
            return self.embedding.embed_task(Support(inputs, one_class, 1))

    def retrieved(self, memory: Store, chance: Chance, features: Tensor, task: Tensor) -> tuple[Tensor, Tensor, Chance]:
        """Places of the memory (R,), whether something is there (R,), and the chance."""
        if self.by == "random":
            lots, chance = chance.uniform(self.keep)
            return *chosen(lots, memory.held, self.retrieve), chance
        if self.retrieve == self.keep:
            return *chosen(torch.zeros_like(memory.loss), memory.held, self.keep), chance
        to = task[None] if self.by == "embedding" else features
        place, there, _ = memory.nearest(to, self.by, self.retrieve)
        return place, there, chance

    def descended(self, head: Tensor, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """A head after steps on the mean cross-entropy of examples (N, features + 1) that count by ``weight`` (N,)."""
        share = (weight / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny))[:, None]
        for _ in range(self.steps):
            head = head - self.log_rate.exp() * ((slopes(x @ head.T, y) * share).T @ x)
        return head

    def predict(self, state: TaskState, query_x: Tensor) -> Tensor:
        x = query_x[:, : self._size]
        if not self.local:
            return x @ state.head.T
        if self._file is None:
            return vmap(lambda one: self.local_logits(state, one))(x)
        return torch.stack([self.local_logits(state, one) for one in x])

    def local_logits(self, state: TaskState, x: Tensor) -> Tensor:
        """Of one query (features + 1,), by a head that is adapted to what is nearest to it, (classes,)."""
        memory = self.memory(state)
        place, there, distance = memory.nearest(x[None], "feature", self.local)
        kernel = there / (NEAR + distance)
        return self.descended(state.head, *memory.at(place), kernel) @ x

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

    # On disk --------------------------------------------------------------------------------------------------------

    def open_store(self, folder: Path | None, state: dict[str, Any] | None, source: Path | None, trains: bool) -> None:
        if not self.on_disk or not (trains or self.local):  # without local steps the head is all that predicts
            return
        where = folder if trains else source
        path, dtype = None if where is None else where / FILE, next(self.backbone.parameters()).dtype
        self._file = MemoryFile(path, self.keep, self._size, self._embedding, dtype, self.search, trains)
        if state is None:
            self._file.clear()
        else:
            self._file.load(state, None if source is None else source / FILE)

    def save_store(self) -> dict[str, Any] | None:
        return None if self._file is None else self._file.state_dict()

    def close_store(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    # What is measured -----------------------------------------------------------------------------------------------

    def noted(self, state: TaskState) -> dict[str, Tensor]:
        memory = self.memory(state)
        held = memory.held
        used = ((memory.used > 0) & held).sum() / held.sum().clamp(min=1)
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
