"""What is put around a backbone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from datamodules.core.errors import at_least
from datamodules.core.streams import TaskStreams
from datamodules.images.augmentation import Warp, moved
from models.networks.backbones import Backbone, given


class Around(Backbone):
    """What is put around another backbone: it takes the same inputs, and gives as many features."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.input_shape, self.out_features, self.maps = backbone.input_shape, backbone.out_features, backbone.maps


class Pixels(Backbone):
    """An image's pixels as its features, without a parameter: averaged to a smaller size, if asked for.

    Args:
        size: height and width in pixels that images are averaged to; None leaves them.
        in_channels, image_size: of the input; None for those of a run's data.
    """

    def __init__(self, size: int | None = None, in_channels: int | None = None, image_size: int | None = None) -> None:
        super().__init__()
        channels, given_size = given(in_channels, 1), given(image_size, 28)
        self.size = given_size if size is None else size
        at_least(1, size=self.size)
        self.input_shape = (channels, given_size, given_size)
        self.out_features = channels * self.size**2

    def forward(self, x: Tensor) -> Tensor:
        if self.size != x.shape[-1]:
            x = F.interpolate(x, (self.size, self.size), mode="area")
        return x.flatten(1)


class UnitLength(Around):
    """Another backbone's features, scaled to unit length."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.backbone(x), dim=-1)


class Averaged(Around):
    """In evaluation, the mean of another backbone's features of an image and of warped copies of it.

    In training it is that backbone. The copies are by the same maps for every image, so that no prediction depends on
    another one, nor on a seed.

    Args:
        backbone: of images.
        copies: warped, beside the image itself.
        warp: how far.
    """

    maps_of_copies: Tensor

    def __init__(self, backbone: Backbone, copies: int = 8, warp: Warp = Warp()) -> None:
        super().__init__(backbone)
        at_least(1, copies=copies)
        if len(backbone.input_shape) != 3:
            raise ValueError("Averaged warps images, and its backbone takes none")
        of_copies = warp.maps(TaskStreams(0, "test", [0]), copies, *backbone.input_shape[1:])
        self.register_buffer("maps_of_copies", of_copies[0], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        z = self.backbone(x)
        if self.training:
            return z
        for of_copy in self.maps_of_copies.to(x):
            z = z + self.backbone(moved(x, of_copy.expand(len(x), 2, 3)))
        return z / (1 + len(self.maps_of_copies))
