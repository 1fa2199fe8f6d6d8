"""How long a meta-training took, over all its resumes."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl


class Stopwatch(pl.Callback):
    """Counts the seconds of a meta-training whose steps were kept: what a kill lost does not count.

    Attributes:
        seconds: of the wall clock, validations and pictures included.
        processor_seconds: that this process's threads computed.
    """

    def __init__(self) -> None:
        self.seconds = self.processor_seconds = 0.0
        self._started: tuple[float, float] | None = None

    def read(self) -> tuple[float, float]:
        """Seconds and processor seconds so far."""
        wall, processor = (0.0, 0.0) if self._started is None else self._started
        now = (wall, processor) if self._started is None else (time.monotonic(), time.process_time())
        return self.seconds + now[0] - wall, self.processor_seconds + now[1] - processor

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.monotonic(), time.process_time()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (self.seconds, self.processor_seconds), self._started = self.read(), None

    def state_dict(self) -> dict[str, Any]:
        return dict(zip(("seconds", "processor_seconds"), self.read(), strict=True))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.processor_seconds = state_dict["seconds"], state_dict["processor_seconds"]
