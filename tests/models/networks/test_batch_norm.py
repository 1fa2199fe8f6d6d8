"""Batch norm by each source of statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import vmap

from models import Learn2Learn
from models.networks.batch_norm import BatchNorm, normalize_by, recording, replace_batch_norm


def layer() -> BatchNorm:
    torch.manual_seed(0)
    norm = BatchNorm(3).double()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4, 5)])
def test_batch_statistics_equal_torchs_layer_with_and_without_vmap(shape):
    """Catches a wrong axis, variance or order of scale and shift in either of the two forms."""
    norm, x = layer(), torch.randn(shape, dtype=torch.float64)
    native = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(3).double()
    native.load_state_dict({"weight": norm.weight, "bias": norm.bias}, strict=False)
    torch.testing.assert_close(norm(x), native(x))
    torch.testing.assert_close(vmap(norm)(x[None])[0], native(x))


def test_given_running_and_no_statistics():
    """Catches statistics of the batch used where others were asked for."""
    norm, x = layer(), torch.randn(6, 3, dtype=torch.float64)
    mean, var = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5
    expected = (x - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias
    with normalize_by({(norm, 0): (mean, var)}):
        torch.testing.assert_close(norm(x), expected)
    norm.momentum = 1.0
    norm.update_running(mean, var)
    with normalize_by("running"):
        torch.testing.assert_close(norm(x), expected)
    with normalize_by("none"):
        torch.testing.assert_close(norm(x), x * norm.weight + norm.bias)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("differentiable", [False, True])
def test_recorded_statistics_reproduce_the_batch(differentiable, mapped):
    """Catches recorded statistics that are not those the batch was normalised by."""
    norm, x = layer(), torch.randn(6, 3, 2, 2, dtype=torch.float64)
    record = {}

    def forward(x):
        with recording(inner := {}, differentiable):
            y = norm(x)
        return y, inner[norm, 0]

    expected, (mean, var) = vmap(forward)(x[None]) if mapped else forward(x)
    if mapped:
        expected, mean, var = expected[0], mean[0], var[0]
    record[norm, 0] = (mean, var)
    torch.testing.assert_close(expected, nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, True))
    with normalize_by(record):
        torch.testing.assert_close(norm(x), expected)
    with normalize_by(record):
        torch.testing.assert_close(norm(x[:1]), expected[:1])


def test_foreign_batch_norm_is_replaced_with_its_parameters():
    """Catches a layer left behind in a nested module, which would be wrong under vmap without a word."""
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(nn.BatchNorm2d(4, affine=True), nn.ReLU()))
    nn.init.normal_(body[1][0].weight)
    weight = body[1][0].weight
    replace_batch_norm(body)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in body.modules())
    assert body[1][0].weight is weight


@pytest.mark.parametrize(("name", "size"), [("cnn4", 28), ("resnet12", 84), ("wrn28", 84)])
def test_learn2learns_backbones(name, size):
    """Catches a declared number of features that the network does not give, and layers that vmap cannot map."""
    backbone = Learn2Learn(name, in_channels=3, hidden=8, image_size=size).eval()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules())
    x = torch.rand(1, 2, 3, size, size)
    with torch.no_grad():
        mapped = vmap(backbone)(x)
        assert mapped.shape == (1, 2, backbone.out_features)
        torch.testing.assert_close(mapped[0], backbone(x[0]), rtol=1e-3, atol=1e-4)
