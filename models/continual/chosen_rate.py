"""Learners that take gradient steps on a stream, at a rate that meta-validation chooses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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
    the checkpoint: a test, or ``app.evaluate``, has it from there, unless it is given one rate alone. Where it is given
    several others, or no validation came before it, it begins with following the streams of meta-validation.

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
        rate = self._tried or self._settled
        if rate is None:
            raise ConfigError(
                f"eval_rates is {list(self.eval_rates)} but no meta-validation chose one of them: give one"
            )
        return rate

    @property
    def _settled(self) -> float | None:
        """What there is no choice of, or what was chosen, unless it is none of those that are given now."""
        if len(self.eval_rates) == 1:
            return self.eval_rates[0]
        return next((rate for rate in self.eval_rates if abs(float(self.chosen_rate) / rate - 1) < SAME), None)

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

    def choose(self) -> None:
        """Take the best of the rates at which streams of meta-validation were followed, and its metrics."""
        tried = [self.stage_metrics(_stage(place)) for place in range(len(self.eval_rates))]
        accuracies = [metrics.compute()["accuracy"] for metrics in tried]  # over all processes
        best = max(range(len(tried)), key=lambda place: accuracies[place])
        self.chosen_rate.fill_(self.eval_rates[best])
        unused = self.stage_metrics("val")
        self.metrics["val_tasks"], self.metrics[f"{_stage(best)}_tasks"] = tried[best], unused
        for place in range(len(tried)):
            self.stage_metrics(_stage(place)).reset()

    def on_validation_epoch_end(self) -> None:
        if len(self.eval_rates) > 1:
            self.choose()
        super().on_validation_epoch_end()

    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        if self._settled is not None:
            return
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        with self.trainer.precision_plugin.forward_context():
            for batch in data.val_dataloader():
                self.evaluation_step(data.on_after_batch_transfer(batch.to(self.device), 0), "val")
        self.choose()
        self.stage_metrics("val").reset()


def _stage(place: int) -> str:
    """What the metrics of a validation at one of the rates are kept under."""
    return f"rate{place}"
