"""Any learner, conditioned on any task embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Support, Task
from datamodules.core.errors import ConfigError
from models.core.base_learner import Parameters
from models.core.conditioning import Conditioning
from models.core.controls import EMBEDDING, Controlled
from models.core.inner_loop import with_values
from models.core.learner import MetaLearner, Paper
from models.core.task_embedding import TaskEmbedding
from models.networks.batch_norm import BatchNormMode


class ConditionedState(NamedTuple):
    """A learner's state of one task, and what took the places of its parameters for it."""

    state: Any
    values: Parameters


class Conditioned(Controlled):
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
        self.conditioned_on(embedding.embedding_size)

    @property
    def outputs(self) -> int | None:
        """Rows of the learner's head, if it has one."""
        return getattr(self.learner, "outputs", None)

    @property
    def embedding_size(self) -> int:
        return self.embedding.embedding_size

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

    def values_of(self, support: Support) -> Parameters:
        return self.values(self.seen(lambda: self.embed_task(support)))

    def adapt(self, support: Support) -> ConditionedState:
        values = self.values_of(support)
        return ConditionedState(with_values(self.learner, values, lambda: self.learner.adapt(support)), values)

    def adaptation(self, support: Support) -> Iterator[ConditionedState]:
        values = self.values_of(support)
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
        super().update_from_tasks({EMBEDDING: values.pop(EMBEDDING)})
        if values:
            self.learner.update_from_tasks(values)
