"""A user's picture, as data sets of images store their own."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

DEPTHS = (1, 8, 10, 12, 14, 16)  # bits of a sample, as cameras, microscopes and scanners have them
_FULL_DEPTH = {"PPM", "JPEG2000"}  # formats whose deep samples Pillow stretches to 16 bits itself
_BITS_PER_SAMPLE, _SAMPLE_FORMAT, _MAX_SAMPLE, _PHOTOMETRIC = 258, 339, 281, 262  # TIFF 6.0
_INK = 0.3  # of full ink: less is the soft edge of a stroke, or paper that is not even


def upright(image: Image.Image) -> Image.Image:
    """A picture the way up that its camera says, opaque, deep greyscale brought to 0 … 255.

    Transparency is seen on white. Greyscale of more than 8 bits (modes I, I;16 and F) goes by what the file says
    of its depth, otherwise by its own values, see ``levels``. Everything that is made of a picture starts here, so that
    training and prediction see the same.

    Returns:
        Mode F with values in [0, 255] for deep greyscale; otherwise an 8-bit mode that converts to L and RGB.

    Raises:
        ValueError: a picture without a finite value.
    """
    if image.mode.startswith(("I", "F")):
        deep = levels(np.asarray(image), _declared_white(image))
        if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:  # white is 0, which Pillow minds for 8 bits alone
            deep = 255 - deep
        if isinstance(clear := image.info.get("transparency"), int):
            deep[np.asarray(image) == clear] = 255
        turn = image.getexif().get(0x0112)
        image = Image.fromarray(deep.astype(np.float32))
        image.getexif()[0x0112] = turn or 1
        return ImageOps.exif_transpose(image)
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def levels(values: np.ndarray, white: float | None = None) -> np.ndarray:
    """Samples of a deep greyscale picture as brightness 0 … 255.

    Black is 0. White is, where it is not given: 1 for fractions in [0, 1]; for whole numbers the largest of the fewest
    bits among ``DEPTHS`` that hold them; for others the largest value. A picture with negative values goes from its
    smallest value to its largest.

    Args:
        values: (H, W) integers or floats; what is not finite is taken for black.
        white: the value of white, if the file says so.

    Returns:
        (H, W) float64.

    Raises:
        ValueError: no value is finite.
    """
    deep = values.astype(np.float64)
    finite = np.isfinite(deep)
    if not finite.any():
        raise ValueError("it holds no finite value")
    low, high = min(float(deep[finite].min()), 0.0), float(deep[finite].max())
    deep[~finite] = low
    if low < 0:
        white = high
    elif white is None or white < high:
        whole = values.dtype.kind != "f" or (high > 1 and bool((deep == np.rint(deep)).all()))
        fits = [2.0**bits - 1 for bits in DEPTHS if high < 2**bits] if whole else [1.0] if high <= 1 else []
        white = fits[0] if fits else high
    return (deep - low) * (255 / max(white - low, 1e-30))


def _declared_white(image: Image.Image) -> float | None:
    """The value of white in a deep greyscale file that says it."""
    if image.format in _FULL_DEPTH:
        return 2.0**16 - 1
    tags = getattr(image, "tag_v2", {})
    first = lambda tag: np.atleast_1d(tags.get(tag, 0))[0]  # noqa: E731
    if first(_SAMPLE_FORMAT) == 3:  # floats
        return None
    if (most := float(first(_MAX_SAMPLE))) > 0:
        return most
    bits = int(first(_BITS_PER_SAMPLE))
    return 2.0**bits - 1 if 8 < bits < 16 else None  # 16 and 32 are the container's, whatever it holds


def ink_form(size: int, fill: tuple[float, float] | None = None) -> str:
    """What ``ink`` makes of pictures, as the end of a sentence."""
    enlarged = "" if fill is None else f", enlarged and centred where the ink spans less than {100 * fill[0]:.0f} %"
    return f"drawings of {size}×{size} pixels, bright strokes on black, whatever their colours{enlarged}"


def ink(image: Image.Image, size: int = 28, fill: tuple[float, float] | None = None) -> Tensor:
    """A picture of a character as bright strokes on black, which is how the data sets of characters store theirs.

    Transparency is seen on white. The paper is what most of the border shows; contrast is stretched so that paper is 0
    and full ink is 255; the picture is made smaller with antialiasing and padded with paper to a square. A picture
    that is stored so already comes back as it is.

    Args:
        image: any mode, size and polarity.
        size: height and width of the result, pixels.
        fill: shares of the frame's longer side, from the smallest to the largest, that the longer side of the ink has
            in the data set. A drawing with less is brought to their middle and centred; others keep size and place.

    Returns:
        (1, size, size) uint8.
    """
    image = upright(image)
    grey = np.asarray(image if image.mode == "F" else image.convert("L"), np.float64)
    paper = float(np.median(np.concatenate([grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]])))
    # Ink is on the side of the paper's brightness on which the picture goes further.
    strokes = paper - grey if paper - grey.min() >= grey.max() - paper else grey - paper
    strokes = strokes.clip(0) * (255 / max(float(strokes.max()), 1.0))
    if fill is not None:
        strokes = _filling(strokes, *fill)
    scale = size / max(strokes.shape)
    height, width = (max(1, round(n * scale)) for n in strokes.shape)
    picture = Image.fromarray(strokes.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    small = np.asarray(picture)
    if 0 < small.max() < 128:  # thin strokes of a large picture fade when they are made smaller
        small = small * (255 / small.max())
    result = np.zeros((size, size), np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    result[top : top + height, left : left + width] = np.rint(small)
    return torch.from_numpy(result)[None]


def _filling(strokes: np.ndarray, least: float, most: float) -> np.ndarray:
    """A drawing (H, W) with values in [0, 255], or the square about its ink where that is small, see ``ink``."""
    rows, columns = (np.flatnonzero((strokes > _INK * 255).any(axis)) for axis in (1, 0))
    if not len(rows):
        return strokes
    spans = [int(at[-1] - at[0]) + 1 for at in (rows, columns)]
    if max(spans) >= least * max(strokes.shape):
        return strokes
    side = max(spans) + 2 * round(max(spans) * (1 / (least + most) - 0.5))
    square, inside, seen = np.zeros((side, side)), [], []  # paper, where the picture ends
    for at, span, length in zip((rows, columns), spans, strokes.shape, strict=True):
        start = int(at[0]) - (side - span) // 2
        low, high = max(start, 0), min(start + side, length)
        inside.append(slice(low - start, high - start))
        seen.append(slice(low, high))
    square[tuple(inside)] = strokes[tuple(seen)]
    return square
