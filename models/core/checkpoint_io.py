"""Checkpoints as files: written whole or not at all, read without running code."""

from __future__ import annotations

import errno
import hashlib
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from datamodules.core.errors import ConfigError
from datamodules.core.files import write_atomically

CHECKPOINTS = "checkpoints"  # folder of a run

VERSION = "pytorch-lightning_version"
# What Lightning leaves in a checkpoint beside the weights, and of what type each part is.
PARTS = {
    **{"global_step": int, "epoch": int, VERSION: str, "loops": dict, "callbacks": dict},
    **{"optimizer_states": list, "lr_schedulers": list},
}

# A checkpoint is a zip archive, at whose end there may be a comment: torch passes over it.
_SEAL = b"metabolt sha256 "
_END, _END_SIZE = b"PK\x05\x06", 22  # of a zip archive without a comment; its last two bytes are the comment's length


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint is there whole or not at all, also after a kill or on a full disk, and loads as weights only.

    It is written with a checksum of all its bytes, which every load verifies. One that cannot be written is kept in
    memory, in place of an earlier one of the same path, and tried again with every further save.
    """

    def __init__(self) -> None:
        super().__init__()
        self._unwritten: dict[Path, bytes] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        self._unwritten[Path(path)] = sealed(buffer.getvalue())
        for late, error in self.write().items():
            # A long training is worth more than this checkpoint: what was there before is untouched.
            cure = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the folder"
            rank_zero_warn(f"could not write {late} ({error.strerror}): training goes on, {cure} before it ends")

    def write(self) -> dict[Path, OSError]:
        """Write what is not written yet; what cannot be, and why."""
        failed = {}
        for path, content in list(self._unwritten.items()):
            try:
                write_atomically(path, content)
                del self._unwritten[path]
            except OSError as error:
                failed[path] = error
        return failed

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        # As Lightning's own: what a GPU wrote loads where there is none, and the strategy moves it on.
        content = load_checkpoint(path, "cpu" if map_location is None else map_location)
        refuse_foreign(content, path)
        if VERSION not in content:
            raise ConfigError(f"{path} is not a checkpoint of a run (it holds no {VERSION}): give another file")
        return content


def sealed(archive: bytes) -> bytes:
    """A zip archive with its checksum as its comment."""
    comment = _SEAL + hashlib.sha256(archive).hexdigest().encode()
    return archive[:-2] + struct.pack("<H", len(comment)) + comment


def identity(path: str | Path) -> str:
    """What tells a checkpoint's content from every other: its checksum as it was written, or else that of the file.

    Returns:
        64 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _END_SIZE - len(_SEAL) - 64))
        tail = file.read()
        if tail.startswith(_END) and tail[_END_SIZE:].startswith(_SEAL):
            return tail[_END_SIZE + len(_SEAL) :].decode("ascii", "replace")
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_damaged(path: str | Path) -> None:
    """See whether a checkpoint's bytes are those that were written: by its checksum, or else by those of its parts.

    Raises:
        ConfigError: they are not.
        OSError: it cannot be read.
    """
    size = Path(path).stat().st_size
    comment = len(_SEAL) + 64
    with open(path, "rb") as file:
        file.seek(max(0, size - _END_SIZE - comment))
        tail = file.read()
        if tail.startswith(_END) and tail[_END_SIZE:].startswith(_SEAL):
            digest, left = hashlib.sha256(), size - comment - 2
            file.seek(0)
            while left:
                part = file.read(min(left, 2**24))
                digest.update(part)
                left -= len(part)
            digest.update(b"\0\0")
            whole = digest.hexdigest().encode() == tail[_END_SIZE + len(_SEAL) :]
            whole = whole and tail[_END_SIZE - 2 : _END_SIZE] == struct.pack("<H", comment)
        else:  # of another program, unless its seal is what was damaged
            with zipfile.ZipFile(file) as archive:
                whole = tail[-_END_SIZE:].startswith(_END) and archive.testzip() is None
    if not whole:
        raise ConfigError(f"{path} is damaged, its checksum is another than when it was written: give another file")


def refuse_missing(path: str | Path, cure: str, what: str = "checkpoint") -> None:
    """See whether there is a checkpoint.

    Args:
        path: where it should be.
        cure: what to do, unless another one of the run is there, which is named then.
        what: is missing.

    Raises:
        ConfigError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return
    others = [
        folder / f"{name}.ckpt" for folder in (path.parent, path, path / CHECKPOINTS) for name in ("best", "last")
    ]
    if (other := next((file for file in others if file.is_file()), None)) is not None:
        cure = f"give {other}, which is there"
    raise ConfigError(f"no {what} at {path}: {cure}")


def refuse_foreign(content: Any, path: str | Path) -> None:
    """See whether what a file holds is a checkpoint of a run.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise ConfigError(f"{path} is not a checkpoint of a run (it holds no state_dict): give another file")
    for part, kind in PARTS.items():
        if part in content and not isinstance(content[part], kind):
            found = type(content[part]).__name__
            raise ConfigError(
                f"{path} is not a checkpoint of a run (its {part} is {found}, not {kind.__name__}): give another file"
            )


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint that is whole; it runs no code (``weights_only=True``).

    Raises:
        ConfigError: the file is not a whole checkpoint.
    """
    try:
        refuse_damaged(path)
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
