"""When checkpoints are written: the last one periodically and on a signal, the best by validation."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from datamodules.core.errors import ConfigError
from models.core.checkpoint_io import AtomicCheckpointIO


class BestCheckpoint(ModelCheckpoint):
    """``best.ckpt``: the weights of the best meta-validation so far.

    Args:
        folder: of the checkpoints.
        monitor: the metric that counts.
        better: "higher" or "lower".
    """

    def __init__(self, folder: Path, monitor: str, better: str) -> None:
        super().__init__(
            dirpath=folder,
            filename="best",
            monitor=monitor,
            mode="min" if better == "lower" else "max",
            save_top_k=1,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )


def unwritten(trainer: pl.Trainer) -> dict[Path, OSError]:
    """Checkpoints that cannot be written, and why; tried again, and the same in all processes."""
    checkpoint_io = trainer.strategy.checkpoint_io
    failed = checkpoint_io.write() if isinstance(checkpoint_io, AtomicCheckpointIO) else {}
    return trainer.strategy.broadcast(failed)


def saved_at(trainer: pl.Trainer) -> int:
    """The meta-updates that a run's last checkpoint has, as far as this process saved one; else -1."""
    return max((c.saved_at for c in trainer.callbacks if isinstance(c, LastCheckpoint)), default=-1)  # pyright: ignore


class LastCheckpoint(Checkpoint):
    """``last.ckpt``: where a run goes on.

    Written every ``every_n_steps`` meta-updates, after every validation, at the end, and when the process is asked to
    stop: SIGTERM (and the first Ctrl-C) lets the meta-update finish, saves, and stops. Saving always falls between
    meta-updates, so gradient accumulation resumes exactly too. Weights that are not finite are never saved: they stop
    the training, with one line that says so.

    Args:
        folder: of the checkpoints.
        every_n_steps: meta-updates between periodic saves.
    """

    def __init__(self, folder: Path, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(f"checkpoint_every is {every_n_steps} but must be at least 1")
        self.path = folder / "last.ckpt"
        self.every_n_steps = every_n_steps
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}
        self.saved_at = -1  # meta-updates

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # In place of Lightning's own handler, which talks to other processes from within the signal.
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._receiver(trainer))

    def _receiver(self, trainer: pl.Trainer) -> Callable[[int, Any], None]:
        def receive(number: int, frame: Any) -> None:
            if self._signal is not None:
                if number == signal.SIGINT:
                    raise KeyboardInterrupt
                return
            self._signal = number
            launcher = trainer.strategy.launcher
            if launcher is not None and hasattr(launcher, "kill"):
                launcher.kill(signal.SIGTERM)

        return receive

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self._validates(trainer):
            return  # saved, and stopped where that is asked, after its validation, so that resume does not skip it
        if self._stop_requested(trainer):
            self.save(trainer)
            raise SIGTERMException
        if trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._refuse_divergence(trainer)  # before the best one is saved

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.save(trainer)
            if self._stop_requested(trainer):
                raise SIGTERMException

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer)
        if failed := unwritten(trainer):
            path, error = next(iter(failed.items()))
            raise ConfigError(
                f"meta-training is done, but {path} could not be written ({error.strerror}): make room for it, and go "
                "on with --ckpt_path last"
            )

    def save(self, trainer: pl.Trainer) -> None:
        if trainer.global_step != self.saved_at:
            self._refuse_divergence(trainer)
            trainer.save_checkpoint(self.path)
            if self.path not in unwritten(trainer):
                self.saved_at = trainer.global_step

    def _refuse_divergence(self, trainer: pl.Trainer) -> None:
        lost = [name for name, p in trainer.lightning_module.named_parameters() if not p.isfinite().all()]
        if lost:
            by_itself = not trainer.lightning_module.automatic_optimization
            clip = "--model.init_args.max_grad_norm" if by_itself else "--trainer.gradient_clip_val 1"
            saved = f"{self.path} is from before" if self.saved_at > 0 else "nothing was saved yet"
            raise ConfigError(
                f"meta-training diverged: {lost[0]} is not finite after {trainer.global_step} meta-updates ({saved}): "
                f"lower the rates, or clip gradients with {clip}"
            )

    def _stop_requested(self, trainer: pl.Trainer) -> bool:
        stop = self._signal is not None
        if trainer.world_size > 1:
            stop = bool(
                trainer.strategy.reduce(torch.tensor(float(stop), device=trainer.strategy.root_device), reduce_op="sum")
            )
        if stop:
            rank_zero_info("stopping: this step is saved")
        return stop

    @staticmethod
    def _validates(trainer: pl.Trainer) -> bool:
        every = trainer.val_check_batch
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        return bool(trainer.enable_validation and every and every != float("inf") and batches % every == 0)
