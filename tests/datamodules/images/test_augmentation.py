"""Warped training images, against maps that are known exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.core.streams import TaskStreams
from datamodules.images.augmentation import Warp
from tests.support.image_tasks import classes, same, tasks
from tests.support.toy import ToyImages

STILL = {"rotation": 0.0, "scale": 0.0, "shear": 0.0, "shift": 0.0}


class Fixed(TaskStreams):
    """Draws the same number for all six of an image's settings' directions but one."""

    def __init__(self, place: int, value: float) -> None:
        super().__init__(0, "train", [0])
        self.place, self.value = place, value

    def uniform(self, low: float = 0.0, high: float = 1.0, *shape: int) -> np.ndarray:
        drawn = np.zeros((1, *shape))
        drawn[..., self.place] = self.value
        return drawn


def test_no_warp_changes_no_pixel():
    """Would catch a grid of other pixel centres, which blurs every image."""
    images = classes().images[None]
    assert torch.equal(Warp(**STILL)(images, TaskStreams(0, "train", [0])), images)


def test_shift_turn_and_stretch_against_moved_pixels():
    """Would catch x for y, pixels for fractions, degrees for radians, or a scale that is its inverse."""
    images = torch.randint(0, 256, (1, 3, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    right = Warp(**STILL | {"shift": 2.0})(images, Fixed(4, -1.0))
    assert torch.equal(right[..., 2:], images[..., :-2])
    down = Warp(**STILL | {"shift": 2.0})(images, Fixed(5, -1.0))
    assert torch.equal(down[..., 2:, :], images[..., :-2, :])
    turned = Warp(**STILL | {"rotation": 90.0})(images, Fixed(0, 1.0))
    assert torch.equal(turned, torch.rot90(images, 1, (3, 4)))
    line = torch.zeros(1, 1, 1, 9, 9)
    line[..., 4, 3:6] = 240
    wide = Warp(**STILL | {"scale": 0.8})(line.to(torch.uint8), Fixed(1, 1.0))
    assert (wide[..., 4, :] > 120).sum() == 5  # three pixels, drawn 1.8 times as wide
    assert torch.equal(wide[..., 4, :], wide[..., 4, :].flip(-1))
    upright = line.mT
    slanted = Warp(**STILL | {"shear": 1.0})(upright.to(torch.uint8), Fixed(3, 1.0))
    assert [slanted[0, 0, 0, row].argmax().item() for row in (3, 4, 5)] == [5, 4, 3]


def test_every_image_has_a_warp_of_its_own_that_its_task_fixes():
    """Would catch one warp for a whole task, or one that depends on the other tasks of the batch."""
    images = torch.rand(1, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).mul(255).to(torch.uint8)
    warped = Warp()(images.expand(1, 10, -1, -1, -1), TaskStreams(0, "train", [3]))[0]
    assert len({tuple(image.flatten().tolist()) for image in warped}) == 10
    distribution = tasks(warp=Warp())
    batch = distribution.sample(range(6))
    assert all(same(distribution.sample([i]), 0, batch, i) for i in range(6))
    assert batch.support_rows is None  # nothing may take it for an image of the split
    unlabelled = tasks(warp=Warp(), unlabelled=1).sample(range(6)).unlabelled_x
    whole = {tuple(image.flatten().tolist()) for image in classes().images}
    assert not any(tuple(image.flatten().tolist()) in whole for image in unlabelled.flatten(0, 1))
    plain = tasks().sample(range(6))
    assert torch.equal(plain.task["classes"], batch.task["classes"])


def test_only_training_is_warped():
    """Would catch an evaluation on warped images."""
    warped, plain = ToyImages(warp=Warp()), ToyImages()
    for split in ("val", "test"):
        assert same(warped.distribution(split).sample([0]), 0, plain.distribution(split).sample([0]), 0)
    assert not same(warped.distribution("train").sample([0]), 0, plain.distribution("train").sample([0]), 0)


@pytest.mark.parametrize("settings", [{"rotation": -1.0}, {"scale": 1.0}, {"shift": -0.5}])
def test_impossible_warps_are_refused(settings):
    """Would catch an image of no size, told by none."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        Warp(**settings)
