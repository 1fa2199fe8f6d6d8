"""Retrieval against scikit-learn's average precision, and the tasks that it is over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from benchmarks import retrieval
from tests.support.fixtures import fake_omniglot


def test_average_precision_is_scikit_learns():
    """Catches ranks that count from 0, a mean over the gallery, and precision of the farthest."""
    rng = np.random.default_rng(0)
    distances = rng.random((12, 30))
    query, gallery = rng.integers(4, size=12), rng.integers(4, size=30)
    right, average = retrieval.found(distances, query, gallery)
    expected = [average_precision_score(gallery == q, -d) for q, d in zip(query, distances, strict=True)]
    np.testing.assert_allclose(average, expected)
    assert right.tolist() == [float(gallery[d.argmin()] == q) for q, d in zip(query, distances, strict=True)]


def test_intervals_are_over_groups():
    """Catches tasks that are taken for independent trials: groups that are all right or all wrong make it wide."""
    groups = np.repeat(np.arange(20), 50)
    wrong_together = (groups % 2).astype(float)
    wrong_apart = np.tile([0.0, 1.0], 500)
    mean, half = retrieval.over_groups(wrong_together, groups)
    assert mean == pytest.approx(0.5)
    assert half == pytest.approx(1.96 * 0.5 / 20**0.5, rel=0.15)
    assert retrieval.over_groups(wrong_apart, groups)[1] < 0.01


def test_queries_and_gallery_share_alphabets_and_no_character(tmp_path: Path):
    """Catches a character, and so an image, that is found again; and halves of different alphabets."""
    data = fake_omniglot(tmp_path, drawers=6, smallest=10)(
        root=str(tmp_path), protocol="alphabets", within_alphabets=True, ways=4, shots=2, queries=1
    )
    query, gallery = retrieval.halves(data, 40)
    assert set(query.groups.tolist()) == set(gallery.groups.tolist()) == {5, 6, 7}
    known = {images.numpy().tobytes() for task in gallery.support_x for images in task}
    assert not known & {images.numpy().tobytes() for task in query.support_x for images in task}
    assert torch.equal(query.support_y, gallery.support_y)
