"""The cache of prepared images: one file that is whole and of the right contents, or is not used."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.images.tasks import ImageClasses

log = logging.getLogger(__name__)

# A file is three parts: the line "<_FORMAT> <sha256 of all that follows>", a line of JSON, the bytes of the images.
_FORMAT = b"metabolt-images-1"
_SEAL = len(_FORMAT) + 1 + 64 + 1


class _UnusableError(Exception):
    """Why a cache file is not trusted."""


def load_or_build(path: Path, key: dict[str, Any], build: Callable[[], ImageClasses]) -> ImageClasses:
    """The images in ``path``, or those that ``build`` makes, which are then kept there.

    A file that is damaged, half-written or of another key is built again, with a warning. Several processes may build
    at once: each moves a complete file into place. Where the file cannot be written, the run goes on without it.

    Args:
        path: the cache file; its folder is made where it is missing.
        key: what the images depend on (name, version, parameters), of JSON types.
        build: makes the images, (N, C, H, W) uint8.

    Raises:
        TypeError: ``build`` made images that are not uint8.
    """
    path, key = Path(path), json.loads(json.dumps(key))  # a tuple comes back from JSON as a list
    try:
        return _read(path, key)
    except FileNotFoundError:
        pass
    except (_UnusableError, OSError) as error:
        log.warning("%s is built again: %s", path, error)
    classes = build()
    if classes.images.dtype != torch.uint8:
        raise TypeError(f"the cache holds uint8 images, not {classes.images.dtype}")
    try:
        _write(path, key, classes)
    except OSError as error:
        log.warning("%s is not kept, the next run prepares it again: %s", path, error.strerror or error)
    return classes


def _read(path: Path, key: dict[str, Any]) -> ImageClasses:
    if path.exists() and not path.is_file():  # a pipe would be waited at
        raise _UnusableError("it is no regular file")
    data = np.fromfile(path, np.uint8)
    seal, body = data[:_SEAL].tobytes(), data[_SEAL:]
    if not seal.startswith(_FORMAT + b" "):
        raise _UnusableError("it is not a cache file of this version")
    if seal != _FORMAT + b" " + hashlib.sha256(body.data).hexdigest().encode() + b"\n":
        raise _UnusableError("its checksum does not match (half-written or damaged)")
    # The checksum holds, so what follows is what was written.
    end = int(np.argmax(body == ord("\n")))
    header = json.loads(body[:end].tobytes())
    if header["key"] != key:
        changed = sorted(k for k in header["key"].keys() | key.keys() if header["key"].get(k) != key.get(k))
        raise _UnusableError(f"it was built with another {', '.join(changed)}")
    images = torch.from_numpy(body[end + 1 :]).view(header["shape"])
    return ImageClasses(images, np.array(header["counts"], np.int64), header["names"], header["groups"])


def _write(path: Path, key: dict[str, Any], classes: ImageClasses) -> None:
    images = classes.images.contiguous().numpy()
    header = {
        "key": key,
        "shape": list(images.shape),
        "counts": classes.counts.tolist(),
        "names": classes.names,
        "groups": classes.groups,
    }
    line = json.dumps(header).encode() + b"\n"
    digest = hashlib.sha256(line)
    digest.update(images.reshape(-1).data)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the move is atomic; not from tempfile, whose files other users could not read.
    part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            file.write(_FORMAT + b" " + digest.hexdigest().encode() + b"\n" + line)
            file.write(images.reshape(-1).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
