"""Picture files in folders: which they are, and which lie below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageFile

NO_PICTURES = {"thumbs.db", "desktop.ini"}  # what Windows leaves in folders of pictures
# Taken for pictures unopened: a folder may hold many thousands, and one that cannot be read must not vanish in silence.
SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".avif", ".jp2"),
    *(".pgm", ".ppm", ".pbm", ".pnm", ".tga", ".ico"),
}


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, but for hidden files and what an operating system leaves there."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name.lower() not in NO_PICTURES)


def below(folder: Path, entered: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """All visible files below a folder, sorted folder by folder; a link back to a folder above is not followed.

    Args:
        folder: where to look.
        entered: device and inode of the folders above it.
    """
    status = folder.stat()
    if (place := (status.st_dev, status.st_ino)) in entered:
        return
    for entry in visible(folder):
        if entry.is_dir():
            yield from below(entry, entered | {place})
        else:
            yield entry


def open_picture(file: Path) -> Image.Image:
    """A file opened as a picture, of which the header alone is read.

    Raises:
        OSError: it is no regular file (opening a pipe would wait for ever), cannot be read or is no picture.
    """
    if file.exists() and not file.is_file():
        raise OSError(f"it is no regular file: {os.fspath(file)}")
    return Image.open(file)


def is_picture(file: Path) -> bool:
    """Whether a file is a picture: by its suffix, or else by its header."""
    if not file.is_file():
        return False
    if file.suffix.lower() in SUFFIXES:
        return True
    try:
        with open_picture(file) as image:
            return not isinstance(image, ImageFile.StubImageFile)  # data that another program draws
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
