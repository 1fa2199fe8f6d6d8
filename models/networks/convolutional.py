"""Deep convolutional encoder and decoder, the one the mirror of the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.core.errors import at_least
from models.networks.backbones import Backbone, given
from models.networks.batch_norm import BatchNorm
from models.networks.modulation import FiLM


class ConvEncoder(Backbone):
    """Blocks of 3×3 convolutions with batch norm and ELU, the last one of each block with stride 2; maps, flattened.

    By default the shared encoder of the Neural Statistician: 28 pixels become 256 maps of 4×4.

    Args:
        in_channels: 1 for Omniglot and Glyphs, 3 for colour images; None for those of a run's data, otherwise 1.
        widths: filters of each block.
        convs: of each block.
        image_size: height and width of the input, pixels; likewise, otherwise 28.
    """

    def __init__(
        self,
        in_channels: int | None = None,
        widths: Sequence[int] = (64, 128, 256),
        convs: int = 3,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        in_channels, image_size = given(in_channels, 1), given(image_size, 28)
        at_least(1, in_channels=in_channels, blocks=len(widths), convs=convs, image_size=image_size)
        at_least(1, **{f"widths[{i}]": width for i, width in enumerate(widths)})
        channels = [in_channels, *(width for width in widths for _ in range(convs))]
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, 1 if (k + 1) % convs else 2, 1) for k, (i, o) in enumerate(pairwise(channels))
        )
        self.norms = nn.ModuleList(BatchNorm(width) for width in channels[1:])
        self.films = nn.ModuleList(FiLM(width) for width in channels[1:])
        side = -(-image_size // 2 ** len(widths))
        self.maps, self.input_shape = (channels[-1], side, side), (in_channels, image_size, image_size)
        self.out_features = channels[-1] * side**2

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm, film in zip(self.convs, self.norms, self.films, strict=True):
            x = F.elu(film(norm(conv(x))))
        return x.flatten(1)


class ConvDecoder(nn.Module):
    """Vectors to logits of images: maps that 3×3 convolutions follow and transposed 2×2 ones double, block by block.

    Batch norm and ELU after each but the last, which is 1×1. What is too large is cut off.

    Args:
        inputs: size of a vector.
        shape: (channels, height, width) of an image.
        widths: filters of each block, the last one first.
        convs: of each block, the transposed one included.
    """

    def __init__(
        self, inputs: int, shape: tuple[int, ...], widths: Sequence[int] = (64, 128, 256), convs: int = 3
    ) -> None:
        super().__init__()
        at_least(1, convs=convs, **{f"widths[{i}]": width for i, width in enumerate(widths)})
        sides = [-(-side // 2 ** len(widths)) for side in shape[1:]]
        self.shape, self.start = shape, (widths[-1], *sides)
        self.linear = nn.Linear(inputs, widths[-1] * sides[0] * sides[1])
        # The last 3×3 convolution does not pad where the maps are to be cut anyway: 16 pixels become 14, and then 28.
        tight = min(side * 2 ** len(widths) - size for side, size in zip(sides, shape[1:], strict=True)) >= 4
        layers: list[nn.Module] = []
        before = widths[-1]
        for block, width in enumerate(reversed(widths)):
            for k in range(convs - 1):
                last = block == len(widths) - 1 and k == convs - 2
                layers.append(nn.Conv2d(before, width, 3, padding=0 if tight and last else 1))
                before = width
            layers.append(nn.ConvTranspose2d(before, width, 2, stride=2))
            before = width
        self.convs = nn.ModuleList(layers)
        self.norms = nn.ModuleList(BatchNorm(layer.out_channels) for layer in layers)  # pyright: ignore
        self.last = nn.Conv2d(before, shape[0], 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, C, H, W) of vectors (N, inputs)."""
        # As the convolutions before it have their maps in memory: twice as fast on a CPU.
        x = self.linear(x).unflatten(-1, self.start).contiguous(memory_format=torch.channels_last)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.elu(norm(conv(x)))
        return self.last(x)[..., : self.shape[1], : self.shape[2]]
