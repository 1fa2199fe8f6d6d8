"""What becomes of pictures of more than 8 bits, in colour data and as ink."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.images.image_folder import ImageFolder
from datamodules.images.preprocessing import ink, levels, upright

RAMP = np.linspace(0, 1, 64).reshape(8, 8) ** 2  # black to white, mostly dark: ink on which side is no tie
# Values of black to white as files hold them, by what wrote the file.
DEEP = {
    "10 bit": np.rint(RAMP * 1023).astype(np.uint16),
    "12 bit": np.rint(RAMP * 4095).astype(np.uint16),
    "16 bit": np.rint(RAMP * 65535).astype(np.uint16),
    "8 bit in 16": np.rint(RAMP * 255).astype(np.uint16),
    "12 bit in 32": np.rint(RAMP * 4095).astype(np.int32),
    "int32": np.rint(RAMP * (2**31 - 1)).astype(np.int32),
    "signed": np.rint(RAMP * 4000 - 1000).astype(np.int32),
    "float [0, 1]": RAMP.astype(np.float32),
    "float [0, 255]": np.rint(RAMP * 255).astype(np.float32),
    "float [-1, 1]": (2 * RAMP - 1).astype(np.float32),
    "float above 1": (1.02 * RAMP).astype(np.float32),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_greyscale_keeps_its_brightness(kind: str, tmp_path: Path) -> None:
    """Pictures of 10 and 12 bits that turn black, fractions that turn black, large integers that turn white; another
    brightness from a file than from memory, or in one of the two ways that pictures take."""
    Image.fromarray(DEEP[kind]).save(tmp_path / "a.tiff")
    with Image.open(tmp_path / "a.tiff") as image:
        grey = ImageFolder(size=8, channels=1).to_store(image)[0]
        colour = ImageFolder(size=8).to_store(image)
        drawn = ink(image, 8)[0]
    expected = np.rint(255 * RAMP)
    assert np.abs(grey.numpy() - expected).max() <= 1
    assert all(torch.equal(channel, grey) for channel in colour)
    eight = ink(Image.fromarray(expected.astype(np.uint8)), 8)[0]
    assert (drawn.int() - eight.int()).abs().max() <= 2


def test_a_dark_picture_stays_dark() -> None:
    """A contrast that is stretched picture by picture, so that night becomes day."""
    assert levels(np.full((4, 4), 5000, np.uint16)).max() == pytest.approx(255 * 5000 / (2**13 * 2 - 1))
    assert levels(np.full((4, 4), 0.25, np.float32)).max() == pytest.approx(255 / 4)
    assert levels(np.zeros((4, 4), np.int32)).max() == 0


def test_what_the_file_says_of_its_depth_is_believed(tmp_path: Path) -> None:
    """A dark picture of 12 bits that is taken for one of 10; white paper of a TIFF whose white is 0."""
    dark = Image.fromarray(np.full((4, 4), 1000, np.uint16))
    dark.save(tmp_path / "a.tif", tiffinfo={281: 4095})
    dark.save(tmp_path / "b.tif", tiffinfo={262: 0})
    for name, expected in (("a.tif", 255 * 1000 / 4095), ("b.tif", 255 - 255 * 1000 / 1023)):
        with Image.open(tmp_path / name) as image:
            assert np.asarray(upright(image)).max() == pytest.approx(expected, abs=1e-3)


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    """NaN pixels that make the whole picture NaN, and a picture of nothing else that passes for black."""
    spoilt = RAMP.astype(np.float32)
    spoilt[0, 0], spoilt[0, 1] = np.nan, np.inf
    assert np.isfinite(levels(spoilt)).all() and levels(spoilt).max() == 255
    with pytest.raises(ValueError, match="no finite value"):
        levels(np.full((2, 2), np.nan, np.float32))
