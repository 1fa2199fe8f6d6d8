"""Convolutions of which no image depends on another, and instance norm."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

from models import ConvNet
from models.networks.batch_norm import InstanceNorm


def test_instance_norm_is_torchs_and_maps():
    """Catches the unbiased variance, a norm over the batch, and an affine part that is lost where images are mapped."""
    torch.manual_seed(0)
    ours, theirs = InstanceNorm(3).double(), nn.InstanceNorm2d(3, affine=True).double()
    for layer in (ours, theirs):
        layer.weight.data = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)
        layer.bias.data = torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)
    x = torch.randn(4, 2, 3, 5, 4, dtype=torch.float64)
    expected = torch.stack([theirs(one) for one in x])
    torch.testing.assert_close(vmap(ours)(x), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours(x[0]), expected[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "features"),
    [
        ({"hidden": 256, "image_size": 84, "padding": 0}, 2304),  # OML's network at its 84 pixels
        ({"hidden": 256}, 1024),
        ({"hidden": 256, "strides": (1, 1, 1), "pooled": 2, "padding": 0}, 2304),  # ANML's prediction network
        ({"hidden": 112, "strides": (1, 1, 1), "pooled": 2, "padding": 0}, 1008),  # its neuromodulatory network
    ],
)
def test_has_the_published_sizes(settings, features):
    """Catches a stride, a pooling or a padding that is elsewhere: the numbers of features are the papers'."""
    network = ConvNet(**settings)
    assert network.out_features == features
    side = network.input_shape[1]
    with torch.no_grad():
        assert network(torch.zeros(1, 1, side, side)).shape == (1, features)


def test_is_what_it_says():
    """Catches ReLU before the norm, pooling of the wrong convolutions, and images that depend on each other."""
    torch.manual_seed(0)
    network = ConvNet(2, 3, 9, strides=(1, 2), pooled=1, instance_norm=True)
    x = torch.rand(3, 2, 9, 9)
    z = x
    for k, (conv, norm) in enumerate(zip(network.convs, network.norms, strict=True)):
        z = F.relu(F.instance_norm(conv(z), weight=norm.weight, bias=norm.bias))  # pyright: ignore
        z = F.max_pool2d(z, 2) if k == 0 else z
    torch.testing.assert_close(network(x), z.flatten(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network(x[:1]), network(x)[:1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="image_size is 4"):
        ConvNet(1, 3, 4, strides=(1, 1), pooled=2, padding=0)
