"""A conditional neural process written out in NumPy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from datamodules.core.episodes import Support
from models import CNP


def run(network: nn.Module, x: np.ndarray) -> np.ndarray:
    """Linear layers and ReLUs by hand."""
    for layer in (m for m in network.modules() if not list(m.children())):
        if isinstance(layer, nn.Linear):
            x = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        else:
            x = np.maximum(x, 0)
    return x


@pytest.mark.parametrize("encoders", [1, 2])
def test_is_the_papers_equations(encoders):
    """Catches a sum for the mean, a code that queries get before their own layers, a ReLU too many around the mean, a
    variance for the deviation, and a first layer whose columns are the wrong inputs'."""
    torch.manual_seed(0)
    learner = CNP(inputs=2, hidden=6, encoders=encoders, least_deviation=0.2).double().eval()
    x, y = np.random.default_rng(0).normal(size=(9, 2)), np.random.default_rng(1).normal(size=(9, 1))
    query = np.random.default_rng(2).normal(size=(4, 2))
    support = Support(torch.from_numpy(x), torch.from_numpy(y), 0)
    codes = []
    for encoder in learner.encoders:
        assert sum(isinstance(m, nn.Linear) for m in encoder.point.modules()) == 4
        assert sum(isinstance(m, nn.Linear) for m in encoder.whole.modules()) == 2
        of_points = np.stack([run(encoder.point, np.concatenate([x[i], y[i]])) for i in range(9)])
        codes.append(run(encoder.whole, of_points.sum(0) / 9))
    code = np.concatenate(codes)
    np.testing.assert_allclose(learner.embed_task(support).detach(), code, rtol=1e-12)
    weight, bias = (p.detach().numpy() for p in learner.decoder.first.parameters())
    prediction = learner.predict(learner.adapt(support), torch.from_numpy(query))
    for j in range(4):
        mean, raw = run(learner.decoder.rest, weight @ np.concatenate([code, query[j]]) + bias)
        assert prediction.mean[0, j, 0].item() == pytest.approx(mean, rel=1e-12)
        assert prediction.deviation[0, j, 0].item() == pytest.approx(0.2 + 0.8 * np.log1p(np.exp(raw)), rel=1e-12)


def test_sizes_are_those_of_the_published_results():
    """Catches a layer too many or too few: the parameters that the code has of which the results are, counted from its
    sizes: two encoders of 2-128-128-128-128 and 128-128-128, and a decoder of 257-128-128-2."""

    def linear(*sizes: int) -> int:
        return sum((a + 1) * b for a, b in pairwise(sizes))

    encoder = linear(2, 128, 128, 128, 128) + linear(128, 128, 128)
    expected = 2 * encoder + linear(257, 128, 128, 2)
    assert sum(p.numel() for p in CNP(encoders=2).parameters()) == expected
