"""Controls of a task embedding: what a learner does with another task's, or with none that tells of the task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

from datamodules.core.episodes import Episodes, Task
from datamodules.core.errors import ConfigError
from models.core.learner import MetaLearner

EMBEDDING = "task_embedding"
"""Among what a task leaves, the embedding that the learner was conditioned on."""
Value = TypeVar("Value")
# By the id of the learner, since one may be a part of another: embeddings to see, and lists to keep those seen in.
_given: ContextVar[dict[int, Tensor]] = ContextVar("given_embeddings", default={})  # noqa: B039 (never changed in place)
_kept: ContextVar[dict[int, list[Tensor]]] = ContextVar("kept_embeddings", default={})  # noqa: B039


@contextmanager
def _with(variable: ContextVar[dict[int, Value]], learner: MetaLearner, value: Value) -> Iterator[None]:
    token = variable.set({**variable.get(), id(learner): value})
    try:
        yield
    finally:
        variable.reset(token)


class Controlled(MetaLearner):
    """A learner that a task embedding conditions, with controls of it in evaluation.

    "shuffled" gives a task the embedding of the next one of its meta-batch, "constant" the mean of the training tasks'.
    A subclass calls ``conditioned_on`` in its constructor, if it is conditioned, and takes the embedding of a task from
    ``seen`` wherever it uses one.
    """

    MEAN_OF = 100  # meta-batches, about, that the mean embedding is of
    mean_embedding: Tensor
    means_taken: Tensor
    _control: str | None = None
    _controlled = False

    def conditioned_on(self, size: int) -> None:
        """Embeddings (size,) condition the learner."""
        self._controlled = True
        self.register_buffer("mean_embedding", torch.zeros(size))
        self.register_buffer("means_taken", torch.tensor(0.0))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        if self._controlled:  # checkpoints of before this was kept
            for name in ("mean_embedding", "means_taken"):
                state_dict.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, *others)

    @property
    def controls(self) -> tuple[str, ...]:
        return ("shuffled", "constant") if self._controlled else ()

    def control(self, name: str) -> None:
        if name not in self.controls:
            raise ConfigError(f"control is {name} but must be one of {', '.join(self.controls) or 'none'}")
        if name == "constant" and not self.means_taken:
            raise ConfigError(
                "the checkpoint has no mean of the training tasks' embeddings: train again for --controls"
            )
        self._control = name

    def seen(self, embed: Callable[[], Tensor]) -> Tensor:
        """The embedding of a task that it is conditioned on: its own, unless a control has another.

        Args:
            embed: computes the task's own.
        """
        if (given := _given.get().get(id(self))) is not None:
            return given
        if self._control == "constant" and not self.training:
            return self.mean_embedding
        embedding = embed()
        if (kept := _kept.get().get(id(self))) is not None:
            kept.append(embedding.detach())
        return embedding

    def objective(self, task: Task) -> tuple[Any, ...]:
        embeddings: list[Tensor] = []
        with _with(_kept, self, embeddings):
            loss, prediction, *left = super().objective(task)
        own = {EMBEDDING: embeddings[-1]} if embeddings else {}
        return loss, prediction, {**(left[0] if left else {}), **own}

    def update_from_tasks(self, values: dict[str, Any]) -> None:
        if (embedding := values.pop(EMBEDDING, None)) is not None:
            self.means_taken += 1
            share = 1 / self.means_taken.clamp(max=self.MEAN_OF)
            self.mean_embedding.lerp_(embedding.to(self.mean_embedding), share)
        if values:
            super().update_from_tasks(values)

    def predictions(self, batch: Episodes) -> Any:
        if self._control != "shuffled":
            return super().predictions(batch)
        return self._with_others(batch, self.predict)

    def predictions_by_parts(self, batch: Episodes, size: int) -> Tensor:
        if self._control != "shuffled":
            return super().predictions_by_parts(batch, size)
        return self._with_others(batch, lambda state, x: torch.stack([self.predict(state, p) for p in x.split(size)]))

    def _with_others(self, batch: Episodes, predict: Callable[[Any, Tensor], Any]) -> Any:
        """Predictions of every task by the embedding of the next one of its meta-batch."""
        if len(batch) < 2:
            raise ConfigError("a task alone in its meta-batch has no other's embedding: choose another --tasks")

        def of(task: Task, other: Tensor) -> Any:
            with _with(_given, self, other):
                return predict(self.adapt(task.support), task.query_x)

        embeddings = self.map(lambda task: self.embed_task(task.support), batch)
        return self.map(of, batch, embeddings.roll(-1, 0))
