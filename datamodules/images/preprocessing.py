"""A user's picture, as the data sets of characters store their own."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def ink(image: Image.Image, size: int = 28) -> Tensor:
    """A picture of a character as bright strokes on black, which is how the data sets of characters store theirs.

    Transparency is seen on white. The paper is what most of the border shows; contrast is stretched so that paper is 0
    and full ink is 255; the picture is made smaller with antialiasing and padded with paper to a square. A picture
    that is stored so already comes back as it is.

    Args:
        image: any mode, size and polarity.
        size: height and width of the result, pixels.

    Returns:
        (1, size, size) uint8.
    """
    image = ImageOps.exif_transpose(image)  # a phone's photo says which way up it is
    if image.mode.startswith(("I", "F")):  # 16 and 32 bits, which convert("L") would clip
        deep = np.asarray(image, np.float64)
        grey = (deep - deep.min()) * (255 / max(float(np.ptp(deep)), 1e-9))
    else:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        grey = np.asarray(image.convert("L"), np.float64)
    paper = float(np.median(np.concatenate([grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]])))
    # Ink is on the side of the paper's brightness on which the picture goes further.
    strokes = paper - grey if paper - grey.min() >= grey.max() - paper else grey - paper
    strokes = strokes.clip(0) * (255 / max(float(strokes.max()), 1.0))
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
