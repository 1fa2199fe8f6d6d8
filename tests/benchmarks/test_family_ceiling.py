"""How well a support set tells a function's family at all."""

import math

import torch

from benchmarks.family_ceiling import likelihoods
from datamodules.regression.functions import MODES


def test_likelihood_of_a_line_is_that_of_its_integral():
    """Catches parameters by another law, noise that is no standard deviation, and families out of order.

    For two points, of a line well inside of its prior, the mean over slope and intercept, uniform in [-3, 3]², is
    2πσ² / (36 |x₁ - x₂|).
    """
    x, y = torch.tensor([[-1.0, 2.0], [0.0, 1.5]]), torch.tensor([[0.5, -0.4], [0.3, 0.1]])
    expected = [math.log(2 * math.pi * 0.3**2 / (36 * abs(a - b))) for a, b in x.tolist()]
    found = likelihoods(x, y, 0.3, 400_000)
    torch.testing.assert_close(found[:, MODES.index("line")], torch.tensor(expected).double(), atol=0.03, rtol=0)
    # Points on a sinusoid that no other family has.
    x = torch.linspace(-5, 5, 12)[None]
    assert likelihoods(x, 3 * torch.sin(x - 1), 0.3, 20_000).argmax() == MODES.index("sinusoid")
