"""Nearest pictures against distances worked out one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from datamodules.core.episodes import Support
from models import NearestNeighbour
from tests.support.toy import ToyImages


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    """Blobs of ink of unequal sizes on 12×9 pixels."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 0.6, (n, 1, 12, 9))
    for i in range(n):
        top, left = rng.integers(0, 5, 2)
        x[i, 0, top : top + rng.integers(2, 7), left : left + rng.integers(2, 5)] += 0.4
    return torch.from_numpy(x)


def modified_hausdorff(a: np.ndarray, b: np.ndarray) -> float:
    """Of two images (H, W), centred on their ink."""
    a, b = (np.argwhere(image > 0.5) for image in (a, b))
    a, b = a - a.mean(0), b - b.mean(0)
    apart = cdist(a, b)
    return max(apart.min(1).mean(), apart.min(0).mean())


@pytest.mark.parametrize("distance", ["pixel", "hausdorff"])
def test_logits_are_of_the_nearest_of_each_class(distance):
    """Catches a mean over shots, the larger of minima for the means, padding taken for ink, and a wrong centre."""
    x, q = pictures(6), pictures(4, seed=1)
    y = torch.tensor([2, 0, 0, 1, 2, 2])
    learner = NearestNeighbour(distance, scale=0.3).double()
    with torch.no_grad():
        logits = learner.predict(learner.adapt(Support(x, y, 3)), q)
    for i in range(4):
        for k in range(3):
            of_class = x[y == k, 0].numpy()
            if distance == "pixel":
                apart = [((q[i, 0].numpy() - image) ** 2).sum() for image in of_class]
            else:
                apart = [modified_hausdorff(q[i, 0].numpy(), image) for image in of_class]
            assert float(logits[i, k]) == pytest.approx(-0.3 * min(apart), rel=1e-6)


def test_hausdorff_does_not_see_where_the_picture_lies():
    """Catches pictures that are not centred: a shifted copy is at distance 0, and for pixels it is not."""
    x = torch.zeros(2, 1, 10, 10)
    x[0, 0, 1:4, 2:4] = x[1, 0, 5:8, 6:8] = 1
    for distance, apart in (("hausdorff", 0.0), ("pixel", 12.0)):
        learner = NearestNeighbour(distance, scale=1.0)
        found = learner.distances(learner.pictures(x[:1]), learner.pictures(x[1:]))
        assert found.item() == pytest.approx(apart, abs=1e-6)


def test_a_blank_picture_is_predicted_without_preference():
    """Catches 0 / 0 where a picture has no ink: no metric may be lost to it."""
    learner = NearestNeighbour("hausdorff")
    x = torch.cat([pictures(3).float(), torch.zeros(1, 1, 12, 9)])
    with torch.no_grad():
        blank = learner.predict(learner.adapt(Support(x[:3], torch.arange(3), 3)), x[3:])
        beside = learner.predict(learner.adapt(Support(x[1:], torch.arange(3), 3)), x[1:3])
    assert torch.equal(blank, blank[:, :1].expand(-1, 3))
    assert beside.isfinite().all()
    assert beside.argmax(1).tolist() == [0, 1]


def test_the_scale_learns_the_likelihood_alone():
    """Catches a scale without gradient or of the wrong sign: its derivative is that of a finite difference."""
    data = ToyImages(ways=3, shots=2, queries=4)
    task = data.on_device(data.distribution("train").sample([0]))[0]
    learner = NearestNeighbour(scale=0.01).double()
    task = type(task)(Support(task.support.x.double(), task.support.y, 3), task.query_x.double(), task.query_y)
    loss = learner.objective(task)[0]
    (gradient,) = torch.autograd.grad(loss, learner.log_scale)
    step = 1e-6
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            learner.log_scale += sign * step
            values.append(float(learner.objective(task)[0]))
            learner.log_scale -= sign * step
    assert float(gradient) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)
    assert float(gradient) != 0
