"""Batch norm by each source of statistics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from learn2learn.vision.models import resnet12
from torch import nn
from torch.func import vmap

from datamodules import Support
from models import HSML, LEO, MAML, Learn2Learn, Network, ProtoNet
from models.networks.backbones import Backbone, DropBlock
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


class Theirs(Backbone):
    """A user's own backbone, with torch's batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3, 2), nn.BatchNorm2d(6)
        self.input_shape, self.out_features = (1, 8, 8), 6
        with torch.no_grad():
            self.norm.running_mean.uniform_()

    def forward(self, x):
        return self.norm(self.conv(x)).relu().mean((2, 3))


VIEW = {"outputs": 3, "embedding": Network(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)), (1, 8, 8))}


@pytest.mark.parametrize(
    "make", [ProtoNet, lambda b: MAML(b, outputs=3, inner_rate=0.1), LEO, lambda b: HSML(b, **VIEW, inner_rate=0.1)]
)
def test_a_users_backbone_normalises_as_it_is_told(make):
    """Catches torch's own layers in a learner: modes without an effect, averages that evaluation moves, and a MAML that
    dies in a transformation; and statistics of a trained network that are lost."""
    torch.manual_seed(0)
    backbone = Theirs()
    mean = backbone.norm.running_mean
    learner = make(backbone).eval()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in learner.modules())
    assert torch.equal(backbone.norm.running_mean, mean)
    g = torch.Generator().manual_seed(1)
    support = Support(torch.rand(6, 1, 8, 8, generator=g), torch.tensor([0, 1, 2] * 2), 3)
    found = []
    for mode in ("transductive", "support", "running"):
        learner.batch_norm = mode
        with torch.no_grad():
            found.append(learner.predict(learner.adapt(support), torch.rand(4, 1, 8, 8, generator=g.manual_seed(2))))
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[1], found[2])
    assert torch.equal(backbone.norm.running_mean, mean)


def test_any_module_is_a_backbone():
    """Catches features of another number than the module gives, and inputs that it does not take."""
    network = Network(nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5)), (2, 6, 6))
    assert network.out_features == 5 * 16
    learner = ProtoNet(network).eval()
    support = Support(torch.rand(3, 2, 6, 6), torch.arange(3), 3)
    assert learner.predict(learner.adapt(support), torch.rand(4, 2, 6, 6)).shape == (4, 3)
    with pytest.raises(ValueError, match="Linear does not take inputs of"):
        Network(nn.Linear(3, 4), (2, 6, 6))


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


def test_drop_block_counts_what_it_trained_on_and_a_checkpoint_knows():
    """Catches a ramp that evaluation moves or a resume begins anew, and layers that training cannot map over."""
    backbone = Learn2Learn("resnet12", in_channels=3, image_size=84)
    blocks = [m for m in backbone.modules() if isinstance(m, DropBlock)]
    assert len(blocks) == 2
    x = torch.rand(1, 2, 3, 84, 84)
    with torch.no_grad():
        assert vmap(backbone.train(), randomness="different")(x).shape == (1, 2, 640)
        backbone.eval()(x[0])
    assert [b.batches for b in blocks] == [1, 1]
    other = Learn2Learn("resnet12", in_channels=3, image_size=84)
    other.load_state_dict(backbone.state_dict())
    assert [m.batches for m in other.modules() if isinstance(m, DropBlock)] == [1, 1]


def test_drop_block_leaves_out_what_learn2learns_does():
    """Catches another share than the reference's at the end of the ramp and half-way, and a scale that is not 1."""
    torch.manual_seed(0)
    x = torch.ones(400, 3, 10, 10)
    for batches, rate in ((40_000, 0.1), (19_999, 0.05)):
        ours, theirs = DropBlock(5, 0.1).train(), resnet12.DropBlock(5).train()
        ours.batches = batches
        gamma = rate / 25 * 100 / 36
        left = [(ours(x, 0.0) == 0).float().mean().item(), (theirs(x, gamma=gamma) == 0).float().mean().item()]
        assert left[0] == pytest.approx(left[1], abs=0.006)
        kept = ours(x, 0.0)
        assert kept.mean() == pytest.approx(1.0, abs=1e-5)
        # Whatever is left out belongs to a square that is left out whole.
        squares = 1 - F.max_pool2d((kept > 0).float(), 5, 1)
        covered = F.max_pool2d(F.pad(squares, (4,) * 4), 5, 1)
        assert torch.equal(covered > 0, kept == 0)
