"""Distances of Fisher embeddings against scipy, torch's own divergences and sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial import distance as scipy_distance
from scipy.stats import entropy as scipy_entropy
from torch.distributions import Normal, kl_divergence

from models.task_embedding import distances


def two(size: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.rand(2, size, generator=g, dtype=torch.float64).pow(3) + 1e-4)


def test_cosine_is_of_each_ones_share_of_both():
    """Catches a cosine of the raw embeddings, or of one share alone."""
    a, b = (t.numpy() for t in two())
    expected = scipy_distance.cosine(a / (a + b + 1e-8), b / (a + b + 1e-8))
    assert float(distances.cosine(*two())) == pytest.approx(expected, rel=1e-9)
    # By hand: shares (¼, ½) and (¾, ½).
    one, other = torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, 2.0]).double()
    by_hand = 1 - (3 / 16 + 1 / 4) / ((1 / 16 + 1 / 4) * (9 / 16 + 1 / 4)) ** 0.5
    assert float(distances.cosine(one, other)) == pytest.approx(by_hand, abs=1e-8)


def test_kl_and_jsd_are_those_of_gaussians():
    """Catches variances taken for precisions, a mean precision for the mean variance, and a sum for a mean."""
    a, b = two()
    of_a, of_b = (Normal(torch.zeros_like(v), (v + 1e-8).rsqrt()) for v in (a, b))
    largest = torch.maximum(kl_divergence(of_a, of_b), kl_divergence(of_b, of_a)).sum()
    torch.testing.assert_close(distances.kl(a, b), largest, rtol=1e-9, atol=0)
    variance = (1 / (a + 1e-8) + 1 / (b + 1e-8)) / 2
    middle = Normal(torch.zeros_like(a), variance.sqrt())
    expected = (kl_divergence(of_a, middle) + kl_divergence(of_b, middle)).mean() / 2
    torch.testing.assert_close(distances.jsd(a, b), expected, rtol=1e-9, atol=0)


def test_entropy_is_of_whom_a_weight_is_for():
    """Catches bits for nats, and an entropy of embeddings instead of shares."""
    a, b = (t.numpy() for t in two())
    share = a / (a + b + 1e-8)
    expected = np.log(2) - np.mean([scipy_entropy([s, 1 - s]) for s in share])
    assert float(distances.entropy(*two())) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("name", distances.DISTANCES)
def test_distances_are_symmetric_and_zero_to_oneself(name):
    """Catches a divergence in one direction, and logarithms of filters that no task uses."""
    a, b = two()
    distance = distances.DISTANCES[name]
    torch.testing.assert_close(distance(a, b), distance(b, a))
    assert float(distance(a, b)) > 0.01 > abs(float(distance(a, a)))
    a[:5], b[3:8] = 0.0, 0.0  # a filter whose units are all dead
    assert torch.isfinite(distance(a, b))


def test_the_asymmetric_distance_prefers_the_complex_task():
    """Catches a sign: of two tasks as far from b, the one that is farther from the trivial task is the nearer to it."""
    b = torch.tensor([1.0, 1.0, 1.0, 1.0]).double()
    plain, complex_ = torch.tensor([1.0, 1.0, 1.0, 2.0]).double(), torch.tensor([1.0, 1.0, 2.0, 1.0]).double()
    nothing = torch.tensor([0.1, 0.1, 0.1, 0.2]).double()
    d = distances.cosine
    assert float(d(plain, b)) == pytest.approx(float(d(complex_, b)))
    assert float(d(complex_, nothing)) > float(d(plain, nothing))
    ours = [distances.asymmetric(a, b, nothing, weight=0.5) for a in (plain, complex_)]
    assert float(ours[1]) < float(ours[0])
    assert float(ours[0]) == pytest.approx(float(d(plain, b) - 0.5 * d(plain, nothing)))
    assert distances.trivial(b, 0.1).tolist() == [0.1] * 4


def test_pairwise_has_a_row_for_each_of_the_first():
    """Catches a transposed table, which symmetric distances of one set hide."""
    g = torch.Generator().manual_seed(1)
    a, b = (torch.rand(n, 6, generator=g, dtype=torch.float64) for n in (3, 4))
    found = distances.pairwise(distances.cosine, a, b)
    assert found.shape == (3, 4)
    assert float(found[2, 1]) == pytest.approx(float(distances.cosine(a[2], b[1])))
