"""Checkpoints as files: written whole or not at all, read without running code."""

from __future__ import annotations

import errno
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from datamodules.core.errors import ConfigError
from datamodules.core.files import write_atomically

CHECKPOINTS = "checkpoints"  # folder of a run


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint is there whole or not at all, also after a kill or on a full disk, and loads as weights only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            write_atomically(Path(path), buffer.getvalue())
        except OSError as error:
            # A long training is worth more than this checkpoint: what was there before is untouched.
            cure = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the folder"
            rank_zero_warn(f"could not write {path} ({error.strerror}): training goes on, {cure} before it ends")

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return load_checkpoint(path, map_location)


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint, which runs no code (``weights_only=True``).

    Raises:
        ConfigError: the file is not a whole checkpoint.
    """
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except (
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        ValueError,
        LookupError,
        TypeError,
        OSError,
    ) as error:
        raise ConfigError(f"{path} is not a whole checkpoint ({type(error).__name__}): give another file") from error
