"""Digits."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from datamodules import Digits


def test_splits_have_the_same_classes_and_share_no_image():
    """Catches an image in two splits, one that is lost, and labels that went astray: against scikit-learn's own."""
    data = Digits(size=8, seed=3)
    parts = {split: data.classes(split) for split in ("train", "val", "test")}
    assert [len(p.images) for p in parts.values()] == [359, 719, 719]
    everything = np.concatenate([p.images.flatten(1).numpy() for p in parts.values()])
    label = np.concatenate([np.repeat(range(10), p.counts) for p in parts.values()])
    shades, digit = load_digits(return_X_y=True)
    own = {(tuple(x), y) for x, y in zip(everything.tolist(), label, strict=True)}
    assert own == {(tuple(x), y) for x, y in zip(np.rint(shades * 255 / 16).astype(int).tolist(), digit, strict=True)}
    assert len(own) == 1797  # no two images are the same
    assert not torch.equal(parts["val"].images, Digits(size=8, seed=4).classes("val").images)


def test_enlarged_digits_are_as_legible():
    """Catches an enlargement that shifts, crops or inverts what pictures of a user are made to look like."""
    train, test = Digits().classes("test"), Digits().classes("val")
    x, y = (np.concatenate([v.images.flatten(1).numpy()]) for v in (train, test))
    known = KNeighborsClassifier(1).fit(x, np.repeat(range(10), train.counts))
    assert known.score(y, np.repeat(range(10), test.counts)) > 0.95
