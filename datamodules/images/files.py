"""Picture files in folders: which they are, and which lie below a folder."""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageFile

NO_PICTURES = {"thumbs.db", "desktop.ini"}  # what Windows leaves in folders of pictures
# Taken for pictures unopened: a folder may hold many thousands, and one that cannot be read must not vanish in silence.
SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".avif", ".jp2"),
    *(".pgm", ".ppm", ".pbm", ".pnm", ".tga", ".ico"),
}

# What Pillow, zipfile and what they rest on raise for a file that is damaged, hostile or of a kind they do not know.
UNREADABLE = (
    *(OSError, EOFError, SyntaxError, ValueError, RuntimeError, OverflowError, MemoryError, struct.error),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, Image.DecompressionBombError),
)


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


def sorted_out(files: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Those of some files that are pictures, and the others, in their order."""
    found: tuple[list[Path], list[Path]] = ([], [])
    for file in files:
        found[not is_picture(file)].append(file)
    return found


def some(files: Sequence[Path], root: Path) -> str:
    """The first few of some files, relative to a folder, for a message."""
    return ", ".join(str(file.relative_to(root)) for file in files[:3]) + (", …" if len(files) > 3 else "")


def open_regular(file: Path) -> BinaryIO:
    """A file opened for reading.

    Raises:
        OSError: it is no regular file (opening a pipe would wait for ever), or cannot be read.
    """
    if file.exists() and not file.is_file():
        raise OSError("it is no regular file")
    return open(file, "rb")


@contextmanager
def open_picture(file: Path) -> Iterator[Image.Image]:
    """A file opened as a picture, of which the header alone is read; errors are among UNREADABLE."""
    with open_regular(file) as stream, Image.open(stream) as image:
        yield image


def is_picture(file: Path) -> bool:
    """Whether a file is a picture: by its suffix, or else by its header."""
    if not file.is_file():
        return False
    if file.suffix.lower() in SUFFIXES:
        return True
    try:
        with open_picture(file) as image:
            return not isinstance(image, ImageFile.StubImageFile)  # data that another program draws
    except UNREADABLE:
        return False
