"""A folder of images, one folder for each class, as a task distribution."""

from __future__ import annotations

import hashlib
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from datamodules.core.download import writable_folder
from datamodules.core.errors import DataError, at_least
from datamodules.core.streams import SPLITS
from datamodules.images.cache import load_or_build
from datamodules.images.files import UNREADABLE, below, open_picture, some, sorted_out, visible
from datamodules.images.preprocessing import upright
from datamodules.images.tasks import ImageClasses, ImageDataModule, refuse_overlap, shuffled

SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


class ImageFolder(ImageDataModule):
    """Any ``root/<class>/…`` tree of images: a folder is a class, with all images in it and in folders within it.

    An image is whatever Pillow opens (jpeg, png, gif, tiff, webp, …; of several frames the first); what is none is left
    out, and said so. Greyscale of more than 8 bits is scaled as ``preprocessing.upright`` says. Images are scaled, with
    antialiasing (Lanczos), to cover size x size, and their middle is kept; transparency is seen on white. They are
    packed once into a cache in ``root``, or in the user's cache folder where ``root`` cannot be written, and again when
    a file is added, removed or changed.

    Args:
        size: height and width, pixels.
        channels: 3 for colour, 1 for grey.
        fractions: shares of meta-train, -val and -test in the classes, which are shuffled by ``seed``.
        train_classes, val_classes, test_classes: all three in place of ``fractions``: names of folders, or a text
            file with one name in a line. Folders that no list names are left out.
        common: see ImageDataModule.

    Raises:
        ValueError: fractions that are no shares of a whole, or some of the three lists only.
    """

    def __init__(
        self,
        size: int = 84,
        channels: Literal[1, 3] = 3,
        fractions: tuple[float, float, float] = (0.64, 0.16, 0.20),
        train_classes: list[str] | str | None = None,
        val_classes: list[str] | str | None = None,
        test_classes: list[str] | str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        at_least(1, size=size)
        if min(fractions) < 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
            raise ValueError(f"fractions are {tuple(fractions)} but must be three shares of a whole, of sum 1")
        self.lists = dict(zip(SPLITS, (train_classes, val_classes, test_classes), strict=True))
        missing = [f"{split}_classes" for split, names in self.lists.items() if names is None]
        if 0 < len(missing) < 3:
            raise ValueError(f"{' and '.join(missing)} must be given too: class lists replace fractions in all splits")
        self.size, self.channels, self.fractions = size, channels, fractions

    def prepare_data(self) -> None:
        """Packs the images.

        Raises:
            DataError: what the tree or the class lists lack for the tasks of any split, before an image is opened; an
                image that cannot be read.
        """
        counts = [len(files) for files in self._files.values()]
        dots = torch.zeros(sum(counts), 1, 1, 1, dtype=torch.uint8)
        # A dry run on images of one pixel: what is wrong with the test split shows now, not after the training.
        listing = ImageClasses(dots, np.array(counts), list(self._files), [""] * len(counts))
        evaluating = self.trainer is not None and self.trainer.state.fn == "test"
        for split in ("test",) if evaluating else SPLITS:
            self.tasks(self._select(listing, split), split)
        _ = self._all

    def to_store(self, image: Image.Image) -> Tensor:
        mode = "L" if self.channels == 1 else "RGB"
        image = upright(image)
        if image.mode == "F":
            image = Image.fromarray(np.rint(np.asarray(image)).astype(np.uint8))
        image = ImageOps.fit(image.convert(mode), (self.size, self.size), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(image))
        return pixels.view(self.size, self.size, self.channels).permute(2, 0, 1).contiguous()

    @property
    def stored_form(self) -> str:
        what = "grey" if self.channels == 1 else "colour"
        return f"the middle square of each in {what}, scaled to {self.size}×{self.size} pixels"

    def classes(self, split: str) -> ImageClasses:
        """The classes of one split.

        Raises:
            DataError: a class in two splits, or in a list but not in ``root``.
        """
        return self._select(self._all, split)

    def _select(self, classes: ImageClasses, split: str) -> ImageClasses:
        number = {name: i for i, name in enumerate(classes.names)}
        return classes.select([number[name] for name in self.split_names()[split]])

    def split_names(self) -> dict[str, list[str]]:
        """Names of the classes of each split."""
        names = list(self._files)
        if self.lists["train"] is None:
            order = shuffled(names, self.seed)
            first, second = (round(share * len(names)) for share in itertools.accumulate(self.fractions[:2]))
            return {"train": order[:first], "val": order[first:second], "test": order[second:]}
        splits = {split: _read_list(f"{split}_classes", given) for split, given in self.lists.items() if given}
        for split, listed in splits.items():
            if unknown := [name for name in listed if name not in self._files]:
                raise DataError(
                    f"{split}_classes names {unknown[0]!r}, which is no folder with images in {self.root}: correct "
                    "the list, or add the folder"
                )
        refuse_overlap(splits)
        return splits

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        """The image files of each class."""
        root = Path(self.root)
        if not root.is_dir():
            raise DataError(f"there is no folder {root}: set root to the folder that holds one folder for each class")
        found: dict[str, list[Path]] = {}
        left: list[Path] = []
        for entry in visible(root):
            pictures, others = sorted_out(below(entry)) if entry.is_dir() else ([], [])
            if pictures:
                found[entry.name] = pictures
            left += sorted(others) if pictures or others else [entry]
        if not found:
            raise DataError(
                f"{root} holds no images in folders: put those of each class into a folder of its own, as in "
                f"{root}/cat/1.jpg"
            )
        if {name.lower() for name in found} <= SPLIT_NAMES:
            raise DataError(
                f"the folders of {root} are splits, not classes ({', '.join(found)}): set root to a folder with one "
                "folder for each class, and give splits by train_classes, val_classes and test_classes"
            )
        if left:
            rank_zero_info(f"left out of {root}: {len(left)} that hold no image of a class ({some(left, root)})")
        return found

    @cached_property
    def _all(self) -> ImageClasses:
        tree = hashlib.sha256()
        for files in self._files.values():
            for file in files:
                status = file.stat()
                tree.update(f"{file.relative_to(self.root)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        key = {
            "name": "image folder",
            "size": self.size,
            "channels": self.channels,
            "tree": tree.hexdigest(),
            "deep": 2,
        }
        root = Path(self.root).resolve()
        folder = writable_folder(root)
        # The user's cache holds those of many roots.
        own = "" if folder == root else f"-{hashlib.sha256(str(root).encode()).hexdigest()[:12]}"
        return load_or_build(folder / f".metabolt-{self.size}x{self.channels}{own}.bin", key, self._pack)

    def _pack(self) -> ImageClasses:
        files = list(itertools.chain.from_iterable(self._files.values()))
        images = torch.empty(len(files), self.channels, self.size, self.size, dtype=torch.uint8)
        rank_zero_info(f"packing the {len(files)} images of {self.root}, once")
        with ThreadPoolExecutor() as pool:  # Pillow decodes and scales outside the interpreter's lock
            for row, image in enumerate(pool.map(self._read, files)):
                images[row] = image
        counts = [len(members) for members in self._files.values()]
        return ImageClasses(images, np.array(counts), list(self._files), [""] * len(counts))

    def _read(self, file: Path) -> Tensor:
        try:
            with open_picture(file) as image:
                # A large JPEG is decoded at a fraction of its size, still twice the one asked for or more.
                image.draft(None, (2 * self.size, 2 * self.size))
                return self.to_store(image)
        except UNREADABLE as error:
            raise DataError(f"{file} cannot be read ({error}): replace or remove it") from error


def _read_list(setting: str, given: list[str] | str) -> list[str]:
    """Class names, each once: as given, or the lines of a text file."""
    if not isinstance(given, str):
        return list(dict.fromkeys(given))
    try:
        lines = Path(given).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{setting} is the file {given}, which cannot be read ({error}): correct its path") from error
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))
