"""Glyphs: few-shot tasks over the letters of 15 scripts, drawn from the fonts that matplotlib installs.

The task distribution that needs no download: characters in the size and polarity of our Omniglot, 20 images each.
Nothing of the meta-test scripts, nor a letter that looks like one of theirs, is in meta-training.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from datamodules.core.download import writable_folder
from datamodules.images.cache import load_or_build
from datamodules.images.preprocessing import ink, ink_form
from datamodules.images.tasks import ImageClasses, ImageDataModule

VERSION = 1  # of the images: whatever changes a pixel or a class must raise it
SIZE, INSTANCES = 28, 20

# By what the characters' Unicode names start with. Of two letters that look the same, the one of the earlier script
# stays, so that an alphabet of the meta-test split is not hollowed out by Latin.
SCRIPTS: dict[str, tuple[str, ...]] = {
    "test": ("HEBREW", "NKO", "LAO", "TIFINAGH", "ARMENIAN"),
    "val": ("GREEK", "OLD ITALIC", "OGHAM"),
    "train": ("GEORGIAN", "LATIN", "CYRILLIC", "CANADIAN SYLLABICS", "ARABIC", "COPTIC", "LISU"),
}
# Letters of meta-training that the eye takes for one of the other splits, though the measure below tells them apart.
_LEFT_OUT = "kßẞǂϮϯҺѰѱԞԟჁ"

_FACES = (  # but no serif italics, in which some Cyrillic letters are other shapes
    *("DejaVuSans", "DejaVuSans-Oblique", "DejaVuSans-Bold", "DejaVuSans-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold"),
    *("DejaVuSansMono", "DejaVuSansMono-Oblique", "DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique"),
)
_EM = 96  # pixels to the em of a clean drawing
_CANVAS = 80  # height and width of a clean drawing
_LETTER = 56  # longer side of the letter in it
_SMALLEST = 0.42  # ems; what is smaller is a raised or combining form of another letter
_BODY = 0.25  # a part of a letter belongs to its body from this share of the largest part's area on
_PROPORTION = 2.0  # height by width of one letter may be this many times that of the other
_SAME, _SAME_ACROSS = 0.03, 0.08  # unlikeness, within and across splits, that is too little: judged on drawn pairs

_ANGLE, _SLANT, _STRETCH = 0.18, 0.2, 0.12  # radians; sideways per height; log of width and of 1/height
_KNOTS, _BEND = 5, 0.065  # control points to a side; largest move, half canvases
_ROOM = 1.3  # half canvases that are looked at, so that the warped letter is all there
_SIZES, _SHIFT, _MARGIN = (18.0, 23.0), 2.0, 2.5  # pixels: longer side, largest move, free border before the pen
_FILL = (0.52, 0.86)  # shares of SIZE: longer side of the ink, which bends and pens take beyond _SIZES
_PENS = (1.6, 3.0)  # pixels: stroke width
_DENSEST = 0.4  # of the distance from stroke to stroke, that a stroke may be wide
_BLUR = 1.4  # half pixels: standard deviation


@dataclass
class Letter:
    """One letter, drawn clean.

    Attributes:
        code: its code point.
        script: what its Unicode name starts with.
        faces: its drawing in each face that has it, (F, _CANVAS, _CANVAS) float32 in [0, 1].
    """

    code: int
    script: str
    faces: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.script.title()}/U+{self.code:04X} {unicodedata.name(chr(self.code)).lower()}"


def _is_base(char: str) -> bool:
    """Whether this is a letter in its own right: no accent, hook or other addition, no ligature or variant."""
    composed = any(f" {word} " in unicodedata.name(char) for word in ("WITH", "LIGATURE", "DIGRAPH"))
    single = unicodedata.normalize("NFKD", char) == char and not composed
    return unicodedata.category(char) in ("Lu", "Ll", "Lo") and single and char not in _LEFT_OUT


def _draw(font: ImageFont.FreeTypeFont, char: str) -> np.ndarray | None:
    """The letter at one size, centred, (_CANVAS, _CANVAS); None where it is empty or too small for a letter."""
    page = Image.new("L", (3 * _EM, 3 * _EM))
    ImageDraw.Draw(page).text((_EM, _EM), char, fill=255, font=font)
    box = page.getbbox()
    if box is None:
        return None
    width, height = box[2] - box[0], box[3] - box[1]
    if max(width, height) < _SMALLEST * _EM:
        return None
    scale = _LETTER / max(width, height)
    picture = page.crop(box).resize(
        (max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS
    )
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    canvas.paste(picture, ((_CANVAS - picture.width) // 2, (_CANVAS - picture.height) // 2))
    return np.asarray(canvas, np.float32) / 255


def draw_letters(scripts: Sequence[str]) -> list[Letter]:
    """Every base letter of these scripts that a face has, in the order of the scripts, then of the code points."""
    import matplotlib  # only here: a run that finds the cache does not wait for it
    from matplotlib.ft2font import FT2Font

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    letters: dict[int, Letter] = {}
    for face in _FACES:
        path = str(folder / f"{face}.ttf")
        font = ImageFont.truetype(path, _EM, layout_engine=ImageFont.Layout.BASIC)
        for code in sorted(FT2Font(path).get_charmap()):
            char = chr(code)
            script = next((s for s in scripts if unicodedata.name(char, "").startswith(s + " ")), None)
            if script is None or not _is_base(char) or (drawing := _draw(font, char)) is None:
                continue
            letter = letters.setdefault(code, Letter(code, script, np.zeros((0, _CANVAS, _CANVAS), np.float32)))
            letter.faces = np.concatenate([letter.faces, drawing[None]])
    return sorted(letters.values(), key=lambda letter: (scripts.index(letter.script), letter.code))


def _bodies(pictures: Tensor) -> Tensor:
    """Letters (N, H, W) without their dots and other small detached parts."""
    ink_here = (pictures > 0.35).float()[:, None]
    label = ink_here * torch.arange(1, ink_here[0].numel() + 1.0).view(1, 1, *pictures.shape[1:])
    while True:  # a part's largest label floods it
        spread = functional.max_pool2d(label, 3, 1, 1) * ink_here
        if torch.equal(spread, label):
            break
        label = spread
    part = label.flatten(1).long()
    area = torch.zeros(len(part), part.shape[1] + 1).scatter_add_(1, part, (part > 0).float())
    large = (area >= _BODY * area.amax(1, keepdim=True)).gather(1, part) & (part > 0)
    return pictures * functional.max_pool2d(large.view_as(ink_here).float(), 3, 1, 1)[:, 0]


def _boxes(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and sizes (height, width) of the ink of (N, H, W), pixels, each (N, 2)."""
    centres, sizes = [], []
    for axis in (1, 2):
        seen = (pictures > 0.3).any(3 - axis)
        at = torch.arange(seen.shape[1], dtype=torch.float32)
        low = at.where(seen, torch.inf).amin(1)
        high = at.where(seen, -torch.inf).amax(1) + 1
        centres.append((low + high) / 2)
        sizes.append(high - low)
    return torch.stack(centres, 1), torch.stack(sizes, 1)


def _window(pictures: Tensor, centre: Tensor, span: Tensor, size: int) -> Tensor:
    """The windows of (N, H, W) with these centres and spans (height, width), pixels, as (N, size, size)."""
    at = (torch.arange(size) + 0.5) / size - 0.5
    y, x = ((centre[:, i, None] + at * span[:, i, None]) / pictures.shape[i + 1] * 2 - 1 for i in (0, 1))
    grid = torch.stack([x[:, None].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], -1)
    return functional.grid_sample(pictures[:, None], grid, align_corners=False)[:, 0]


def unlikeness(letters: Sequence[Letter]) -> Tensor:
    """How far each pair of letters is from looking the same, (K, K) in [0, 1].

    The share of either letter's centre line that lies more than 1.5/28 of its size from all ink of the other, the
    larger of the two: a stroke that only one of them has counts in full, its width does not, nor a somewhat different
    curve. It is the least over what drawings of one letter differ in: slant, proportion and small detached parts.
    """
    pictures = torch.from_numpy(np.stack([letter.faces[0] for letter in letters]))
    pictures = functional.avg_pool2d(pictures[:, None], 2)[:, 0]
    y, x = np.mgrid[-2:3, -2:3]
    disc = torch.from_numpy((x * x + y * y <= 1.5**2).astype(np.float32))[None, None]

    def fitted(version: Tensor, stretch: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The centre line at one size, what is near the ink, each (K, 1024), and the log of height by width, (K,)."""
        centre, box = _boxes(version)
        span = box if stretch else box.amax(1, keepdim=True).expand(-1, 2)
        letter = (_window(version, centre, span * 32 / 28, 32)[:, None] > 0.5).float()
        near = (functional.conv2d(letter, disc, padding=2) > 0).float()
        depth, core = letter, letter
        for _ in range(4):  # the centre line is where the distance to the edge has its local maxima
            core = -functional.max_pool2d(-core, 3, 1, 1)
            depth = depth + core
        line = letter * (depth == functional.max_pool2d(depth, 3, 1, 1))
        return line.flatten(1), near.flatten(1), (box[:, 0] / box[:, 1]).log()

    result = torch.ones(len(letters), len(letters))
    for version in (pictures, _bodies(pictures)):
        for stretch in (False, True):
            line_a, near_a, slender_a = fitted(version, stretch)
            for slant in (-0.2, 0.0, 0.2):
                matrix = 1.25 * torch.tensor([[1, slant, 0], [0, 1, 0]]).expand(len(letters), -1, -1)
                grid = functional.affine_grid(matrix, [len(letters), 1, 50, 50], align_corners=False)
                slanted = functional.grid_sample(version[:, None], grid, align_corners=False)[:, 0]
                line_b, near_b, slender_b = fitted(slanted, stretch)
                share_a = line_a @ near_b.T / line_a.sum(1, keepdim=True)
                share_b = near_a @ line_b.T / line_b.sum(1)
                outside = 1 - torch.minimum(share_a, share_b)
                if stretch:
                    outside[(slender_a[:, None] - slender_b).abs() > math.log(_PROPORTION)] = 1
                result = torch.minimum(result, torch.minimum(outside, outside.T))
    return result.fill_diagonal_(0)


def select(letters: Sequence[Letter]) -> list[Letter]:
    """Of letters that look the same, the first one; letters of different splits have to differ by more."""
    distance = unlikeness(letters)
    split_of = {script: number for number, scripts in enumerate(SCRIPTS.values()) for script in scripts}
    split = torch.tensor([split_of[letter.script] for letter in letters])
    differ = distance > torch.where(split[:, None] == split, _SAME, _SAME_ACROSS)
    kept: list[int] = []
    for i in range(len(letters)):
        if bool(differ[i, kept].all()):
            kept.append(i)
    return [letters[i] for i in kept]


def render(letters: Sequence[Letter], instances: int = INSTANCES) -> Tensor:
    """Seeded drawings of each letter, (K * instances, 1, SIZE, SIZE) uint8; a letter's do not depend on the others."""
    return torch.cat([_vary(letters[i : i + 32], instances) for i in range(0, len(letters), 32)])


def _vary(letters: Sequence[Letter], instances: int) -> Tensor:
    """``render`` for as many letters as fit the processor's cache well."""
    streams = [np.random.default_rng([VERSION, letter.code]) for letter in letters]

    def draw(low: float, high: float, *shape: int) -> Tensor:
        each = [rng.uniform(low, high, (instances, *shape)) for rng in streams]
        return torch.from_numpy(np.concatenate(each).astype(np.float32))

    # Every face as often as the others, as far as the number of instances allows.
    faces = [
        letter.faces[rng.permutation(instances) % len(letter.faces)]
        for letter, rng in zip(letters, streams, strict=True)
    ]
    clean = torch.from_numpy(np.concatenate(faces))

    # The clean drawing seen through an affine map and a smooth random displacement, with room around it.
    angle, slant, stretch = draw(-_ANGLE, _ANGLE), draw(-_SLANT, _SLANT), draw(-_STRETCH, _STRETCH).exp()
    cos, sin = angle.cos(), angle.sin()
    affine = torch.stack(
        [cos * stretch, (slant * cos - sin) / stretch, sin * stretch, (slant * sin + cos) / stretch], 1
    )
    at = torch.linspace(-_ROOM, _ROOM, _CANVAS)
    plane = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1).view(1, -1, 2)
    knots = draw(-_BEND, _BEND, 2, _KNOTS, _KNOTS) + draw(-_BEND, _BEND, 2, _KNOTS, _KNOTS)
    bend = functional.interpolate(knots, (_CANVAS, _CANVAS), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    grid = (plane @ affine.view(-1, 2, 2).mT).view(-1, _CANVAS, _CANVAS, 2) + bend
    warped = functional.grid_sample(clean[:, None], grid, align_corners=False)[:, 0]

    # Size and place come last, from the ink's own box: no letter leaves the image.
    centre, box = _boxes(warped)
    scale = draw(*_SIZES) / box.amax(1)  # pixels of the result to one of the warped drawing
    room = (SIZE / 2 - _MARGIN - box * scale[:, None] / 2).clamp(0, _SHIFT)
    shift = draw(-1, 1, 2) * room
    span = (SIZE / scale)[:, None].expand(-1, 2)
    fine = _window(warped, centre - shift / scale[:, None], span, 2 * SIZE)

    # Pen: a blurred edge that is cut at a lower level moves outwards. The level takes the stroke to the wanted width.
    width = _stroke_width(fine)
    longest = box.amax(1) * scale * 2
    spacing = longest * torch.maximum(box.amin(1) * scale * 2, longest / 2) * width / fine.sum((1, 2))
    pen = torch.minimum(draw(*_PENS) * 2, _DENSEST * spacing)  # a letter of many strokes is drawn finely
    thinnest = torch.erf(width / (2 * math.sqrt(2) * _BLUR))  # the brightest that the blur leaves of a stroke
    level = torch.minimum(torch.special.ndtr((width - pen) / 2 / _BLUR), 0.6 * thinnest).clamp(0.15)
    at = torch.arange(2 * SIZE, dtype=torch.float32)
    blur = torch.exp(-((at[:, None] - at) ** 2) / (2 * _BLUR**2))
    blur = blur / blur.sum(1).amax()
    edge = blur @ fine @ blur.T
    fine = ((edge - level[:, None, None]) * _BLUR * math.sqrt(2 * math.pi) + 0.5).clamp(0, 1)
    return (functional.avg_pool2d(fine[:, None], 2) * 255).round().to(torch.uint8)


def _stroke_width(pictures: Tensor) -> Tensor:
    """Mean width of the strokes of (N, H, W), pixels, (N,): twice the area over the length of the edge."""
    rise = functional.pad(pictures, (1, 1, 1, 1))
    dy, dx = rise[:, 2:, 1:-1] - rise[:, :-2, 1:-1], rise[:, 1:-1, 2:] - rise[:, 1:-1, :-2]
    return 2 * pictures.sum((1, 2)) / ((dx**2 + dy**2).sqrt() / 2).sum((1, 2)).clamp(min=1)


class Glyphs(ImageDataModule):
    """Letters of scripts that meta-training never saw: 5 meta-test scripts, 3 of meta-validation, 7 of meta-training.

    Letters with a diacritic are left out, and letters that look alike are one class. Each class has 20 drawings
    (28x28): typefaces of different weights, slanted, stretched, bent and drawn with pens of different widths.
    """

    def prepare_data(self) -> None:
        self._all  # noqa: B018 - builds the cache

    @cached_property
    def _all(self) -> ImageClasses:
        # Kept, so that where no cache can be written, a process draws the letters once and not for every split.
        key = {"name": "glyphs", "version": VERSION, "size": SIZE, "instances": INSTANCES}
        path = Path(self.root) / "glyphs" / "glyphs.bin"
        if not path.is_file():
            path = writable_folder(path.parent) / path.name
        return load_or_build(path, key, build_classes)

    def classes(self, split: str) -> ImageClasses:
        everything = self._all
        wanted = {script.title() for script in SCRIPTS[split]}
        return everything.select([k for k, group in enumerate(everything.groups) if group in wanted])

    def to_store(self, image: Image.Image) -> Tensor:
        return ink(image, SIZE, _FILL)  # a learner that saw no small letter is sure of them, and wrong

    @property
    def stored_form(self) -> str:
        return ink_form(SIZE, _FILL)


def build_classes() -> ImageClasses:
    """All classes of all splits, drawn."""
    letters = select(draw_letters([script for scripts in SCRIPTS.values() for script in scripts]))
    counts = np.full(len(letters), INSTANCES, np.int64)
    names, groups = [letter.name for letter in letters], [letter.script.title() for letter in letters]
    return ImageClasses(render(letters), counts, names, groups)
