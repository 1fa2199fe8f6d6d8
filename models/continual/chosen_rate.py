"""Learners that take gradient steps on a stream, at a rate that meta-validation chooses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from datamodules.continual.streams import Streams
from datamodules.core.errors import ConfigError
from datamodules.core.metric import Metric
from models.continual.learner import ContinualLearner
from models.core.metrics import TaskMetrics

SAME = 0.01  # by how much a rate may differ from itself, in a checkpoint of bfloat16


class ChosenRate(ContinualLearner):
    """A learner whose steps on a stream have a rate, ``eval_rate``, in evaluation.

    Of several rates each meta-validation follows its streams at every one, and keeps that with the best accuracy on
    examples that were not learned; its metrics are the validation's. No test stream has a part in it. The choice is in
    the checkpoint: a test, or ``app.evaluate``, has it from there, unless it is given one rate alone.

    Args:
        eval_rates: what meta-validation chooses from; one is taken as it is.
        **others: see MetaLearner.

    Attributes:
        chosen_rate: () float32, 0 before the first validation.
    """

    own_metrics = {"eval_rate": Metric(label="rate of the steps on a stream, chosen by meta-validation")}
    chosen_rate: Tensor

    def __init__(self, eval_rates: Sequence[float], **others: Any) -> None:
        super().__init__(**others)
        if not eval_rates or not all(math.isfinite(rate) and rate > 0 for rate in eval_rates):
            raise ValueError(f"eval_rates is {list(eval_rates)} but must be one or more rates above 0")
        self.eval_rates = tuple(sorted(set(eval_rates)))
        self.register_buffer("chosen_rate", torch.zeros(()))
        self._tried: float | None = None
        if len(self.eval_rates) > 1:
            for place in range(len(self.eval_rates)):
                self.metrics[f"{_stage(place)}_tasks"] = TaskMetrics(self.declared_metrics())

    @property
    def eval_rate(self) -> float:
        """The rate of steps on streams of evaluation.

        Raises:
            ConfigError: there are several, and no validation chose one of them.
        """
        if self._tried is not None:
            return self._tried
        if len(self.eval_rates) == 1:
            return self.eval_rates[0]
        chosen = float(self.chosen_rate)
        if same := [rate for rate in self.eval_rates if abs(chosen / rate - 1) < SAME]:
            return same[0]
        why = f"meta-validation chose {chosen:.6g}" if chosen else "no meta-validation chose one"
        raise ConfigError(
            f"eval_rates is {list(self.eval_rates)} but {why}: give one, --model.init_args.eval_rates [{self._middle}]"
        )

    @property
    def _middle(self) -> float:
        return self.eval_rates[len(self.eval_rates) // 2]

    @contextmanager
    def at_rate(self, rate: float) -> Iterator[None]:
        """Inside of it ``eval_rate`` is this."""
        before, self._tried = self._tried, rate
        try:
            yield
        finally:
            self._tried = before

    @property
    def followed_at_once(self) -> int | None:
        # On a CPU what steps change stays in the cache where one stream is followed at a time.
        return 1 if self.device.type == "cpu" else None

    def evaluation_step(self, batch: Streams, stage: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if stage != "val" or len(self.eval_rates) == 1:
            return super().evaluation_step(batch, stage)
        for place, rate in enumerate(self.eval_rates):
            with self.at_rate(rate):
                super().evaluation_step(batch, _stage(place))

    def metrics_of_streams(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().metrics_of_streams(found) | self.metrics_of_rate(found["matrix"])

    def metrics_of_rate(self, matrix: Tensor) -> dict[str, Tensor]:
        """The rate of each stream, of accuracies (T, …)."""
        return {"eval_rate": matrix.new_full(matrix.shape[:1], self.eval_rate)}

    def on_validation_epoch_end(self) -> None:
        if len(self.eval_rates) > 1:
            tried = [self.stage_metrics(_stage(place)) for place in range(len(self.eval_rates))]
            accuracies = [metrics.compute()["accuracy"] for metrics in tried]  # over all processes
            best = max(range(len(tried)), key=lambda place: accuracies[place])
            self.chosen_rate.fill_(self.eval_rates[best])
            self.metrics["val_tasks"], self.metrics[f"{_stage(best)}_tasks"] = (
                cast(TaskMetrics, tried[best]),
                self.stage_metrics("val"),
            )
            for place in range(len(tried)):
                self.stage_metrics(_stage(place)).reset()
        super().on_validation_epoch_end()


def _stage(place: int) -> str:
    """What the metrics of a validation at one of the rates are kept under."""
    return f"rate{place}"
