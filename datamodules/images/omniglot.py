"""Omniglot (Lake, Salakhutdinov and Tenenbaum, Science 2015): 1623 characters of 50 alphabets, 20 drawers each."""

from __future__ import annotations

import io
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from datamodules.core.download import DownloadError, download, writable_folder
from datamodules.core.errors import DataError
from datamodules.core.streams import SPLITS
from datamodules.images.cache import load_or_build
from datamodules.images.files import UNREADABLE, open_regular
from datamodules.images.preprocessing import ink, ink_form
from datamodules.images.tasks import ImageClasses, ImageDataModule, Rotations, refuse_overlap, shuffled

SIZE = 28
Protocol = Literal["maml", "vinyals", "alphabets", "minimal"]

MIRRORS = [
    "https://raw.githubusercontent.com/brendenlake/omniglot/master/python",
    "https://github.com/brendenlake/omniglot/raw/master/python",
]
# Of the published archives, which is what a mirror must serve.
MD5 = {
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}

# Characters of each alphabet, by the set that Lake et al. put it in: 964 and 659.
CHARACTERS: dict[str, dict[str, int]] = {
    "images_background": {
        "Alphabet_of_the_Magi": 20,
        "Anglo-Saxon_Futhorc": 29,
        "Arcadian": 26,
        "Armenian": 41,
        "Asomtavruli_(Georgian)": 40,
        "Balinese": 24,
        "Bengali": 46,
        "Blackfoot_(Canadian_Aboriginal_Syllabics)": 14,
        "Braille": 26,
        "Burmese_(Myanmar)": 34,
        "Cyrillic": 33,
        "Early_Aramaic": 22,
        "Futurama": 26,
        "Grantha": 43,
        "Greek": 24,
        "Gujarati": 48,
        "Hebrew": 22,
        "Inuktitut_(Canadian_Aboriginal_Syllabics)": 16,
        "Japanese_(hiragana)": 52,
        "Japanese_(katakana)": 47,
        "Korean": 40,
        "Latin": 26,
        "Malay_(Jawi_-_Arabic)": 40,
        "Mkhedruli_(Georgian)": 41,
        "N_Ko": 33,
        "Ojibwe_(Canadian_Aboriginal_Syllabics)": 14,
        "Sanskrit": 42,
        "Syriac_(Estrangelo)": 23,
        "Tagalog": 17,
        "Tifinagh": 55,
    },
    "images_evaluation": {
        "Angelic": 20,
        "Atemayar_Qelisayer": 26,
        "Atlantean": 26,
        "Aurek-Besh": 26,
        "Avesta": 26,
        "Ge_ez": 26,
        "Glagolitic": 45,
        "Gurmukhi": 45,
        "Kannada": 41,
        "Keble": 26,
        "Malayalam": 47,
        "Manipuri": 40,
        "Mongolian": 30,
        "Old_Church_Slavonic_(Cyrillic)": 45,
        "Oriya": 46,
        "Sylheti": 28,
        "Syriac_(Serto)": 23,
        "Tengwar": 25,
        "Tibetan": 42,
        "ULOG": 26,
    },
}

# The split of Vinyals et al. 2016 as Snell et al. 2017 published it: whole alphabets, but for Gurmukhi, whose last four
# characters are tested on and whose others are trained on. What is in neither table is trained on.
VINYALS_VAL = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
VINYALS_TEST_FROM = {
    "Gurmukhi": 42,
    "Kannada": 1,
    "Keble": 1,
    "Malayalam": 1,
    "Manipuri": 1,
    "Mongolian": 1,
    "Old_Church_Slavonic_(Cyrillic)": 1,
    "Oriya": 1,
    "Sylheti": 1,
    "Syriac_(Serto)": 1,
    "Tengwar": 1,
    "Tibetan": 1,
    "ULOG": 1,
}

# Lake et al. hold out no background alphabet. Ours are those of the Vinyals split: a choice already made, of alphabets
# with 22 to 46 characters each, so that 20-way episodes fit.
HELD_OUT = VINYALS_VAL
# background_small1.
SMALL = ("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin")

_DRAWING = re.compile(r"(^|/)[^/]+/character\d+/\d+_\d+\.png$")
MOST_NAMED = 6  # alphabets in a message
LARGEST = 1 << 20  # bytes of a drawing's file; the published ones have some 200
_CURE = "remove it, and a run downloads the data again"


def _vinyals(name: str) -> str:
    alphabet, character = name.split("/")
    if alphabet in VINYALS_VAL:
        return "val"
    first = VINYALS_TEST_FROM.get(alphabet)
    return "test" if first and int(character.removeprefix("character")) >= first else "train"


def _resized(png: bytes) -> np.ndarray:
    """A 105x105 drawing, black on white, as (28, 28) uint8, white on black; Lanczos, as MAML's code resizes."""
    with Image.open(io.BytesIO(png)) as image:
        return 255 - np.asarray(image.convert("L").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


class Omniglot(ImageDataModule):
    """Omniglot, 28x28, strokes 255 on background 0, packed once into ``root/omniglot/omniglot-28.bin``.

    Found under ``root``, ``root/omniglot`` or ``root/omniglot-py`` (torchvision's), as the two published zips, which
    are read as they are, or as the folders extracted from them; downloaded to ``root/omniglot`` otherwise. Where
    ``root`` cannot be written, the user's cache folder takes its place for what is written.

    Protocols, which are not comparable with one another (characters of meta-train/-val/-test):

    - ``maml``: 1100/100/423 characters at random, by ``seed``; each class of a task is turned by a random multiple of
      90 degrees, in meta-test too (Finn et al. 2017, their code).
    - ``vinyals``: the fixed lists of Vinyals et al. 2016, 1028/172/423; the four turns of a character are classes
      of their own in every split (4112/688/1692), as in Snell et al. 2017.
    - ``alphabets``: Lake et al. 2015. The 30 background alphabets, five of them (``HELD_OUT``) held out for validation,
      792/172; all classes of a task come from one alphabet; the 20 evaluation alphabets, 659, are the test.
    - ``minimal``: likewise, but trained on the five alphabets of background_small1 (136 characters); the alphabets of
      ``HELD_OUT`` that are not among them validate (150).

    Within alphabets, meta-training passes over alphabets with fewer characters than ``train_ways``, and says so; where
    ``within_alphabets`` asks for them, validation and test do with fewer than ``ways``.

    1200/423 characters, without any for validation, are ``maml`` with ``train_on_val``.

    Args:
        protocol: see above.
        download: fetch the archives when they are not there; False fails instead.
        mirrors: addresses of folders that serve the two archives, tried in turn.
        train_on_val: meta-train on the validation characters too, for a last training whose length is known (Snell et
            al. 2017); validation then selects nothing.
        rotations: of every split, in place of the protocol's own; see ImageTasks. "classes" with ``maml`` is what
            Sung et al. 2018 and Mishra et al. 2018 used.
        train_rotations: of meta-training alone.
        within_alphabets: all classes of a task come from one alphabet, which is the task's group, of one number in
            every split; None as the protocol has it.
        aligned: in all splits, the j-th example of every character of a task is by one drawer, and each j by another:
            with one shot and one query, as in the evaluation of Lake et al. 2015. (A drawer's number is his own within
            an alphabet.)
        common: see ImageDataModule.
    """

    # What a complete copy has; the tests put a smaller one in its place.
    characters: ClassVar[dict[str, dict[str, int]]] = CHARACTERS
    drawers: ClassVar[int] = 20
    checksums: ClassVar[dict[str, str]] = MD5
    maml_sizes: ClassVar[dict[str, int]] = {"train": 1100, "val": 100, "test": 423}

    def __init__(
        self,
        protocol: Protocol = "vinyals",
        download: bool = True,
        mirrors: list[str] = MIRRORS,
        train_on_val: bool = False,
        rotations: Rotations | None = None,
        train_rotations: Rotations | None = None,
        within_alphabets: bool | None = None,
        aligned: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.protocol = protocol
        self.download = download
        self.mirrors = mirrors
        self.train_on_val = train_on_val
        turned: dict[str, Rotations] = {"maml": "random", "vinyals": "classes"}
        self.rotations = dict.fromkeys(SPLITS, rotations or turned.get(protocol, "none"))
        if train_rotations is not None:
            self.rotations["train"] = train_rotations
        own = protocol in ("alphabets", "minimal")
        self.within_group = own if within_alphabets is None else within_alphabets
        self.asks_within = bool(within_alphabets)
        self.aligned = aligned

    @property
    def groups(self) -> list[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return [alphabet for alphabets in self.characters.values() for alphabet in alphabets]

    @property
    def selects(self) -> bool:
        return not self.train_on_val

    def prepare_data(self) -> None:
        _ = self._all

    def to_store(self, image: Image.Image) -> Tensor:
        return ink(image, SIZE)

    @property
    def stored_form(self) -> str:
        return ink_form(SIZE)

    def classes(self, split: str) -> ImageClasses:
        """The characters of one split, in the order background, evaluation; alphabet; number.

        Raises:
            DataError: no complete copy of the data, none to be had, or splits that overlap.
        """
        names = self.split_names()
        refuse_overlap(names)
        number = {name: i for i, name in enumerate(self._all.names)}
        if self.train_on_val:
            names["train"] = names["train"] + names["val"]
        chosen = self._all.select([number[name] for name in names[split]])
        passes_over = self.within_group and (split == "train" or self.asks_within)
        return self._large_enough(chosen, self.train_ways if split == "train" else self.ways) if passes_over else chosen

    def split_names(self) -> dict[str, list[str]]:
        """Names of the characters of each split."""
        background = self.characters["images_background"]
        names = [name for set_name in self.characters for name in self._names(set_name)]
        if self.protocol == "maml":
            order, sizes = shuffled(names, self.seed), self.maml_sizes
            train, val = sizes["train"], sizes["train"] + sizes["val"]
            return {"train": order[:train], "val": order[train:val], "test": order[val : val + sizes["test"]]}
        splits: dict[str, list[str]] = {split: [] for split in SPLITS}
        for name in names:
            alphabet = name.split("/")[0]
            if self.protocol == "vinyals":
                splits[_vinyals(name)].append(name)
            elif alphabet not in background:
                splits["test"].append(name)
            elif self.protocol == "minimal" and alphabet in SMALL:
                splits["train"].append(name)
            elif alphabet in HELD_OUT:
                splits["val"].append(name)
            elif self.protocol == "alphabets":
                splits["train"].append(name)
        return splits

    def _names(self, set_name: str) -> list[str]:
        alphabets = self.characters[set_name].items()
        return [f"{alphabet}/character{i:02d}" for alphabet, count in alphabets for i in range(1, count + 1)]

    def _large_enough(self, classes: ImageClasses, ways: int) -> ImageClasses:
        # Four background alphabets have 14 to 17 characters: without this, nobody could train 20-way episodes.
        sizes = {group: classes.groups.count(group) for group in dict.fromkeys(classes.groups)}
        if small := [group for group, size in sizes.items() if size < ways]:
            listed = ", ".join(small) if len(small) <= MOST_NAMED else f"{len(small)} of {len(sizes)} alphabets"
            rank_zero_info(f"{ways}-way tasks within alphabets pass over {listed}")
        return classes.select([i for i, group in enumerate(classes.groups) if group not in small])

    @cached_property
    def _all(self) -> ImageClasses:
        file = Path("omniglot") / f"omniglot-{SIZE}.bin"
        root = Path(self.root)
        folder = root if (root / file).exists() else self._home
        key = {"name": "omniglot", "size": SIZE, "resize": "lanczos", "strokes": 255, "drawers": self.drawers}
        return load_or_build(folder / file, key | {"characters": self.characters}, self._pack)

    @cached_property
    def _home(self) -> Path:
        return writable_folder(Path(self.root))

    def _pack(self) -> ImageClasses:
        names = [name for set_name in self.characters for name in self._names(set_name)]
        images = np.empty((len(names) * self.drawers, 1, SIZE, SIZE), np.uint8)
        drawings = (drawing for set_name in self.characters for drawing in _drawings(*self._source(set_name)))
        for row, drawing in enumerate(drawings):
            images[row, 0] = drawing
        groups = [name.split("/")[0] for name in names]
        return ImageClasses(torch.from_numpy(images), np.full(len(names), self.drawers), names, groups)

    def _source(self, set_name: str) -> tuple[Path, list[str]]:
        """The archive or folder of one set, and its image files by character and drawer."""
        root = Path(self.root)
        folders = list(dict.fromkeys([root, root / "omniglot", root / "omniglot-py", self._home / "omniglot"]))
        found = [path for f in folders for path in (f / f"{set_name}.zip", f / set_name) if path.exists()]
        for path in found or [self._download(set_name)]:
            files = _members(path)
            if not (lack := self._lack(set_name, files)):
                return path, files
        raise DataError(f"{path} is no complete copy of Omniglot's {set_name}: {lack}; {_CURE}")

    def _lack(self, set_name: str, files: Sequence[str]) -> str:
        """What a set's files lack, or nothing."""
        counts = Counter("/".join(file.split("/")[-3:-1]) for file in files)
        for name in self._names(set_name):
            if (count := counts.pop(name, 0)) != self.drawers:
                return f"{name} has {count} drawings, not {self.drawers}"
        return f"{min(counts)} is none of its characters" if counts else ""

    def _download(self, set_name: str) -> Path:
        folder = self._home / "omniglot"
        by_hand = f"put {set_name}.zip of https://github.com/brendenlake/omniglot (python/) into {folder}"
        if not self.download:
            raise DataError(f"no {set_name}.zip in {folder}, and download is false: {by_hand}, or set it to true")
        urls = [f"{mirror.rstrip('/')}/{set_name}.zip" for mirror in self.mirrors]
        try:
            return download(urls, folder / f"{set_name}.zip", self.checksums[set_name])
        except DownloadError as error:
            raise DataError(f"{error}; {by_hand}, or try again: it resumes") from error


def _members(source: Path) -> list[str]:
    """Drawings in an archive or folder, by alphabet, character and drawer; none if it cannot be read."""
    try:
        if source.is_dir():
            files = [file.relative_to(source).as_posix() for file in source.rglob("*.png")]
        elif source.is_file():  # a pipe would be waited at for ever
            with zipfile.ZipFile(source) as archive:
                files = archive.namelist()
        else:
            return []
    except UNREADABLE:
        return []
    return sorted((f for f in files if _DRAWING.search(f)), key=lambda f: f.split("/")[-3:])


def _drawings(source: Path, files: Sequence[str]) -> Iterator[np.ndarray]:
    """The files of an archive or folder as (28, 28) uint8 each."""
    with zipfile.ZipFile(source) if source.is_file() else nullcontext() as archive:
        for file in files:
            try:
                with archive.open(file) if archive else open_regular(source / file) as stream:
                    content = stream.read(LARGEST + 1)
                if len(content) > LARGEST:
                    raise ValueError(f"it is larger than {LARGEST} bytes, which no drawing is")
                drawing = _resized(content)
            except UNREADABLE as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise DataError(f"{file} in {source} is damaged ({reason}); {_CURE}") from error
            yield drawing
