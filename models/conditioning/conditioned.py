"""Any learner, conditioned on any task embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Episodes, Support, Task
from datamodules.core.errors import ConfigError
from models.core.base_learner import Parameters
from models.core.conditioning import Conditioning
from models.core.inner_loop import with_values
from models.core.learner import MetaLearner, Paper
from models.core.task_embedding import TaskEmbedding
from models.networks.batch_norm import BatchNormMode

Control = Literal["shuffled", "constant"]
EMBEDDING = "task_embedding"  # what a task leaves, beside what the learner has it leave


class ConditionedState(NamedTuple):
    """A learner's state of one task, and what took the places of its parameters for it."""

    state: Any
    values: Parameters


class Conditioned(MetaLearner):
    """A learner whose parameters depend on what task it is: an embedding of the support set says how.

    For each task the conditioning maps the task embedding to tensors that take the places of the learner's own: initial
    parameters, scales and shifts of features, rates of the inner loop. The learner then does with its task what it
    always does; the meta-gradient passes through the tensors into conditioning and embedding, which are trained along.

    Whether the embedding matters is told by controls in evaluation: with another task's embedding ("shuffled") or with
    the mean of the training tasks' ("constant"). One that loses nothing by them is decorative. Controls that are
    trained are embeddings: ``models.ConstantEmbedding``, which conditions on nothing, and ``models.TaskLabel``, the
    oracle.

    Args:
        embedding: of the task, from its support set.
        conditioning: what the embedding sets.
        learner: of gradient steps, or one that embeds and compares. What it says of optimizer and scheduler is not
            used.
        batch_norm, chunk: see MetaLearner; None are the learner's own.
        **others: see MetaLearner.
    """

    paper = Paper(
        "Vuorio, Sun, Hu and Lim",
        "Multimodal Model-Agnostic Meta-Learning via Task-Aware Modulation",
        "NeurIPS",
        2019,
        "https://arxiv.org/abs/1910.13616",
    )
    tasks = frozenset({"classification", "regression"})
    mean_embedding: Tensor
    MEAN_OF = 100  # meta-batches, about, that the mean embedding is of

    def __init__(
        self,
        embedding: TaskEmbedding,
        conditioning: Conditioning,
        learner: MetaLearner,
        batch_norm: BatchNormMode | None = None,
        chunk: int | None = None,
        **others: Any,
    ) -> None:
        learner.batch_norm = batch_norm or learner.batch_norm
        super().__init__(batch_norm=learner.batch_norm, chunk=chunk or learner.chunk, **others)
        if type(learner).training_step is not MetaLearner.training_step or not learner.tasks <= self.tasks:
            raise ConfigError(
                f"{type(learner).__name__} has a training step of its own, which conditioning does not reach: choose a "
                "learner of gradient steps, as MAML, or one that compares embeddings, as ProtoNet"
            )
        embedding.attach(learner)
        conditioning.attach(learner, embedding.embedding_size)
        self.learner, self.embedding, self.conditioning = learner, embedding, conditioning
        self.tasks, self.reads_facts = learner.tasks, learner.reads_facts or embedding.reads_facts
        self.selects_by = learner.selects_by
        for stage in self.metrics.values():
            stage.declared.update(learner.declared_metrics())  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        self.register_buffer("mean_embedding", torch.zeros(embedding.embedding_size))
        self.register_buffer("means_taken", torch.tensor(0.0))
        self._control: Control | None = None

    @property
    def outputs(self) -> int | None:
        """Rows of the learner's head, if it has one."""
        return getattr(self.learner, "outputs", None)

    @property
    def embedding_size(self) -> int:
        return self.embedding.embedding_size

    @property
    def controls(self) -> tuple[str, ...]:
        return ("shuffled", "constant")

    def control(self, name: str) -> None:
        if name not in self.controls:
            raise ConfigError(f"control is {name} but must be one of {', '.join(self.controls)}")
        self._control = name  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def transductive(self) -> bool:
        return self.learner.transductive

    def check(self, data: EpisodicDataModule) -> str | None:
        return self.learner.check(data) or self.embedding.check(data)

    def embed_task(self, support: Support) -> Tensor:
        return self.embedding.embed_task(support)

    def values(self, embedding: Tensor) -> Parameters:
        """What takes the places of the learner's parameters and buffers, by their names in it."""
        return self.conditioning(embedding, dict(self.learner.named_parameters()))

    def adapt(self, support: Support) -> ConditionedState:
        values = self.values(self._seen(self.embed_task(support)))
        return ConditionedState(with_values(self.learner, values, lambda: self.learner.adapt(support)), values)

    def adaptation(self, support: Support) -> Iterator[ConditionedState]:
        values = self.values(self._seen(self.embed_task(support)))
        along = with_values(self.learner, values, lambda: list(self.learner.adaptation(support)))
        return (ConditionedState(state, values) for state in along)

    def predict(self, state: ConditionedState, query_x: Tensor) -> Any:
        return with_values(self.learner, state.values, lambda: self.learner.predict(state.state, query_x))

    def objective(self, task: Task) -> tuple[Any, ...]:
        embedding = self.embed_task(task.support)
        loss, prediction, *kept = with_values(
            self.learner, self.values(embedding), lambda: self.learner.objective(task)
        )
        return loss, prediction, {**(kept[0] if kept else {}), EMBEDDING: embedding.detach()}

    def update_from_tasks(self, values: dict[str, Any]) -> None:
        self.means_taken += 1
        share = 1 / self.means_taken.clamp(max=self.MEAN_OF)
        self.mean_embedding.lerp_(values.pop(EMBEDDING).to(self.mean_embedding), share)
        if values:
            self.learner.update_from_tasks(values)

    # With controls ---------------------------------------------------------------------------------------------------

    def _seen(self, embedding: Tensor) -> Tensor:
        return self.mean_embedding if self._control == "constant" else embedding

    def predictions(self, batch: Episodes) -> Any:
        if self._control != "shuffled":
            return super().predictions(batch)
        return self._with_others(batch, lambda state, x: self.predict(state, x))

    def predictions_by_parts(self, batch: Episodes, size: int) -> Tensor:
        if self._control != "shuffled":
            return super().predictions_by_parts(batch, size)
        return self._with_others(batch, lambda state, x: torch.stack([self.predict(state, p) for p in x.split(size)]))

    def _with_others(self, batch: Episodes, predict: Callable[[ConditionedState, Tensor], Tensor]) -> Tensor:
        """Predictions of every task by the embedding of the next one of its meta-batch."""
        if len(batch) < 2:
            raise ConfigError("a task alone in its meta-batch has no other's embedding: choose another --tasks")

        def of(task: Task, other: Tensor) -> Tensor:
            values = self.values(other)
            adapt = partial(self.learner.adapt, task.support)
            return predict(ConditionedState(with_values(self.learner, values, adapt), values), task.query_x)

        embeddings = self.map(lambda task: self.embed_task(task.support), batch)
        return self.map(of, batch, embeddings.roll(-1, 0))
