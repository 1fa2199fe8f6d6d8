"""Networks from an input to features, and what is put around them."""

from __future__ import annotations

import learn2learn.vision.models as l2l
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor, nn
from torch.func import vmap

from datamodules.images.augmentation import Warp
from models import MLP, Averaged, Conv4, ProtoNet, ResNet
from models.networks.backbones import Backbone
from models.networks.batch_norm import normalize_by


def test_resnet_is_learn2learns_resnet12():
    """Catches a shortcut, a slope, a pooling or a batch norm that is elsewhere than in the field's ResNet-12."""
    torch.manual_seed(0)
    theirs = l2l.ResNet12Backbone(wider=False, dropblock_dropout=0.0, avg_pool=True).double().train()
    ours = ResNet(widths=(64, 128, 256, 512)).double().train()
    for block, layer in zip(ours.blocks, (getattr(theirs, f"layer{i}")[0] for i in (1, 2, 3, 4)), strict=True):
        pairs = [(getattr(layer, f"conv{i + 1}"), block.convs[i]) for i in range(3)]
        pairs += [(getattr(layer, f"bn{i + 1}"), block.norms[i]) for i in range(3)]
        pairs += [(layer.downsample[0], block.shortcut), (layer.downsample[1], block.norm)]
        for source, target in pairs:
            if isinstance(source, nn.BatchNorm2d):
                source.weight.data.uniform_(0.5, 1.5)
                source.bias.data.normal_()
            own = dict(source.named_parameters())
            target.load_state_dict(target.state_dict() | own)
    x = torch.rand(2, 3, 84, 84, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x).flatten(1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("halvings", "side"), [(None, 28), (3, 28), (0, 8)])
def test_resnet_gives_what_it_declares_and_vmap_maps_it(halvings, side):
    """Catches features of another number than declared, and layers that are wrong under vmap."""
    backbone = ResNet(1, (3, 4, 5, 6), convs=2, image_size=side, halvings=halvings).double()
    x = torch.rand(2, 5, *backbone.input_shape, dtype=torch.float64)
    mapped = vmap(backbone)(x)
    assert mapped.shape == (2, 5, backbone.out_features)
    torch.testing.assert_close(mapped, torch.stack([backbone(one) for one in x]), rtol=1e-10, atol=1e-12)


def test_resnet_refuses_more_halvings_than_pixels():
    """Catches maps of no pixels, whose mean is not a number."""
    ResNet(1, (2, 2, 2), image_size=8)
    with pytest.raises(ValueError, match="image_size is 7"):
        ResNet(1, (2, 2, 2), image_size=7)


class Pixels(Backbone):
    """The image itself."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.input_shape, self.out_features = (1, side, side), side**2

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def test_averaged_features_are_the_mean_over_copies_by_scipy():
    """Catches copies that leave the image out, count one twice, differ by image, or are there in training."""
    side = 12
    averaged = Averaged(Pixels(side), copies=3, warp=Warp(20.0, 0.2, 0.1, 2.0)).double()
    x = torch.rand(4, 1, side, side, dtype=torch.float64)
    assert torch.equal(averaged.train()(x), x.flatten(1))
    centres = (torch.arange(side, dtype=torch.float64) + 0.5) * 2 / side - 1
    rows, columns = torch.meshgrid(centres, centres, indexing="ij")
    expected = x.flatten(1).clone()
    for across, down in averaged.maps_of_copies.double():
        from_x, from_y = (m[0] * columns + m[1] * rows + m[2] for m in (across, down))
        places = torch.stack([from_y, from_x]).add(1).mul(side / 2).sub(0.5)
        for image, total in zip(x, expected, strict=True):
            warped = map_coordinates(image[0].numpy(), places.numpy(), order=1, mode="nearest")
            total += torch.from_numpy(warped).flatten()
    torch.testing.assert_close(averaged.eval()(x), expected / 4, rtol=1e-6, atol=1e-6)
    assert averaged.maps_of_copies.unique(dim=0).shape[0] == 3


def test_averaged_learner_loads_what_another_number_of_copies_saved():
    """Catches maps in the checkpoint, which would tie it to the copies that it was trained with."""
    one, two = (ProtoNet(Averaged(Conv4(hidden=2), copies=n)) for n in (1, 2))
    two.load_state_dict(one.state_dict())
    x = torch.rand(2, 1, 28, 28)
    with normalize_by("running"):
        torch.testing.assert_close(one.train().embed(x), two.train().embed(x))
        assert not torch.allclose(one.eval().embed(x), two.eval().embed(x))


def test_averaged_refuses_what_is_no_image():
    """Catches an error from deep inside, on the first evaluation."""
    with pytest.raises(ValueError, match="images"):
        Averaged(MLP(3))
