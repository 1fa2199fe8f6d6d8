"""Backbones: networks from an input to features; ``out_features`` says how many."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.core.errors import at_least
from models.networks.batch_norm import BatchNorm, InstanceNorm, replace_batch_norm
from models.networks.modulation import FiLM


class Backbone(nn.Module):
    """(N, *input) to (N, out_features).

    ``input_shape`` is (channels, height, width), or (features,) for an MLP. ``maps`` is (channels, height, width) of
    features that are flattened maps, and None of others. Where ``particles`` is above 0, every parameter and buffer is
    of so many networks, (M, …).
    """

    out_features: int
    input_shape: tuple[int, ...]
    maps: tuple[int, int, int] | None = None
    particles: int = 0


def given(value: int | None, default: int) -> int:
    """A setting of a network that a run takes from its data, or the default where nobody gave any."""
    return default if value is None else value


class Conv4(Backbone):
    """Four blocks of 3×3 convolution, batch norm and ReLU: the field's standard backbone.

    Args:
        in_channels: 1 for Omniglot and Glyphs, 3 for colour images; None for those of a run's data, otherwise 1.
        hidden: filters of every block (64; 32 in MAML's miniImageNet).
        image_size: height and width of the input, pixels; likewise, otherwise 28.
        downsample: "stride" halves by strided convolution and averages over what is left (MAML's Omniglot network,
            Finn et al. 2017); "pool" halves by 2×2 max pooling and flattens (Vinyals et al. 2016, Snell et al. 2017).
        flatten: keep what is left where it is instead of averaging, also with strides (Nichol et al. 2018).
        halvings: blocks that halve, the first ones (2 in Sung et al. 2018).
        unpadded: blocks whose convolutions do not pad, the first ones (2 there: 28 pixels become 5, 84 become 19).
    """

    def __init__(
        self,
        in_channels: int | None = None,
        hidden: int = 64,
        image_size: int | None = None,
        downsample: Literal["stride", "pool"] = "stride",
        flatten: bool = False,
        halvings: int = 4,
        unpadded: int = 0,
    ) -> None:
        super().__init__()
        in_channels, image_size = given(in_channels, 1), given(image_size, 28)
        at_least(1, in_channels=in_channels, hidden=hidden, image_size=image_size)
        at_least(0, halvings=halvings, unpadded=unpadded)
        self.downsample, self.flatten, self.halvings = downsample, flatten or downsample == "pool", halvings
        self.input_shape = (in_channels, image_size, image_size)
        channels, convs, side = (in_channels, hidden, hidden, hidden), [], image_size
        for block, c in enumerate(channels):
            stride = 2 if downsample == "stride" and block < halvings else 1
            padding = int(block >= unpadded)
            convs.append(nn.Conv2d(c, hidden, 3, stride, padding))
            side = (side + 2 * padding - 3) // stride + 1
            if downsample == "pool" and block < halvings:
                side //= 2
            if side < 1:
                raise ValueError(f"image_size is {image_size} but nothing is left of that after {block + 1} blocks")
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(BatchNorm(hidden) for _ in channels)
        self.films = nn.ModuleList(FiLM(hidden) for _ in channels)
        for conv in convs:  # Glorot and Bengio 2010, as both reference implementations of this network
            nn.init.xavier_uniform_(conv.weight)
            nn.init.constant_(cast(Tensor, conv.bias), 0.0)
        self.maps = (hidden, side, side) if self.flatten else None
        self.out_features = hidden * side**2 if self.flatten else hidden

    def forward(self, x: Tensor) -> Tensor:
        for block, (conv, norm, film) in enumerate(zip(self.convs, self.norms, self.films, strict=True)):
            x = norm(conv(x))
            if self.downsample == "pool" and block < self.halvings:
                x = F.max_pool2d(x, 2)  # before ReLU: the same values from a quarter of the work
            x = F.relu(film(x))
        return x.flatten(1) if self.flatten else x.mean((2, 3))


class ResNet(Backbone):
    """Residual blocks of 3×3 convolutions, each with its 1×1 shortcut and 2×2 max pooling; the mean over what is left.

    By default the field's ResNet-12, three convolutions in each of four blocks (Oreshkin et al. 2018), with the widths
    of Lee et al. 2019, but for its dropout.

    Args:
        in_channels: 1 for Omniglot and Glyphs, 3 for colour images; None for those of a run's data, otherwise 3.
        widths: filters of each block.
        convs: of each block.
        image_size: height and width of the input, pixels; likewise, otherwise 84.
        halvings: blocks that halve, the first ones; None for all.
    """

    def __init__(
        self,
        in_channels: int | None = None,
        widths: Sequence[int] = (64, 160, 320, 640),
        convs: int = 3,
        image_size: int | None = None,
        halvings: int | None = None,
    ) -> None:
        super().__init__()
        in_channels, image_size = given(in_channels, 3), given(image_size, 84)
        at_least(1, in_channels=in_channels, blocks=len(widths), convs=convs, image_size=image_size)
        at_least(1, **{f"widths[{i}]": width for i, width in enumerate(widths)})
        at_least(0, halvings=halvings)
        halved = len(widths) if halvings is None else min(halvings, len(widths))
        if image_size >> halved < 1:
            raise ValueError(f"image_size is {image_size} but nothing is left of that after {halved} halvings")
        channels = [in_channels, *widths]
        self.blocks = nn.ModuleList(
            ResidualBlock(i, o, convs, k < halved) for k, (i, o) in enumerate(pairwise(channels))
        )
        self.input_shape, self.out_features = (in_channels, image_size, image_size), channels[-1]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))


class ResidualBlock(nn.Module):
    """Convolutions beside a 1×1 convolution, each with batch norm; LeakyReLU of slope 0.1; halved where asked for."""

    def __init__(self, in_channels: int, out_channels: int, convs: int, halve: bool) -> None:
        super().__init__()
        channels = [in_channels] + [out_channels] * convs
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in pairwise(channels))
        self.norms = nn.ModuleList(BatchNorm(out_channels) for _ in range(convs))
        self.films = nn.ModuleList(FiLM(out_channels) for _ in range(convs))
        self.shortcut, self.norm = nn.Conv2d(in_channels, out_channels, 1, bias=False), BatchNorm(out_channels)
        self.halve = halve
        for conv in (*self.convs, self.shortcut):  # He et al. 2015, as their code
            nn.init.kaiming_normal_(cast(nn.Conv2d, conv).weight, 0.1, "fan_out", "leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for k, (conv, norm, film) in enumerate(zip(self.convs, self.norms, self.films, strict=True)):
            y = film(norm(conv(F.leaky_relu(y, 0.1) if k else y)))
        y = y + self.norm(self.shortcut(x))
        if self.halve:
            y = F.max_pool2d(y, 2)  # before the nonlinearity: the same values from a quarter of the work
        return F.leaky_relu(y, 0.1)


class MLP(Backbone):
    """Fully connected layers with ReLU; batch norm where asked for.

    Args:
        in_features: size of the input; images are flattened.
        hidden: sizes of the hidden layers (40, 40 for MAML's sinusoid; 256, 128, 64, 64 with batch norm for its
            Omniglot without convolutions).
        batch_norm: normalise after every layer.
    """

    def __init__(self, in_features: int = 1, hidden: Sequence[int] = (40, 40), batch_norm: bool = False) -> None:
        super().__init__()
        sizes = [in_features, *hidden]
        for i, size in enumerate(sizes):
            at_least(1, **{"in_features" if i == 0 else f"hidden[{i - 1}]": size})
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(BatchNorm(s) if batch_norm else nn.Identity() for s in hidden)
        self.films = nn.ModuleList(FiLM(s) for s in hidden)
        self.input_shape = (in_features,)
        self.out_features = sizes[-1]

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer, norm, film in zip(self.layers, self.norms, self.films, strict=True):
            x = F.relu(film(norm(layer(x))))
        return x


class Conv2(Backbone):
    """Two 5×5 convolutions with max pooling and local response normalisation, two dense layers: HSML's view of images.

    It has no batch norm: what it sees of an image depends on no other (Yao et al. 2019, their code).

    Args:
        in_channels: 1 for Omniglot and Glyphs, 3 for colour images; None for those of a run's data, otherwise 1.
        hidden: filters of both convolutions.
        image_size: height and width of the input, pixels; likewise, otherwise 28.
        dense: sizes of the dense layers.
    """

    def __init__(
        self,
        in_channels: int | None = None,
        hidden: int = 32,
        image_size: int | None = None,
        dense: tuple[int, int] = (384, 64),
    ) -> None:
        super().__init__()
        in_channels, image_size = given(in_channels, 1), given(image_size, 28)
        at_least(1, in_channels=in_channels, hidden=hidden, image_size=image_size)
        self.convs = nn.ModuleList(nn.Conv2d(c, hidden, 5, padding=2) for c in (in_channels, hidden))
        side = -(-image_size // 4)
        self.layers = nn.ModuleList([nn.Linear(hidden * side**2, dense[0]), nn.Linear(*dense)])
        self.input_shape = (in_channels, image_size, image_size)
        self.out_features = dense[1]

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.convs
        x = self.respond(F.max_pool2d(F.relu(first(x)), 3, 2, 1))
        x = F.max_pool2d(self.respond(F.relu(second(x))), 3, 2, 1).flatten(1)
        for layer in self.layers:
            x = F.relu(layer(x))
        return x

    def respond(self, x: Tensor) -> Tensor:
        """Every value over a power of 1 and the mean square of the nine channels around it."""
        return F.local_response_norm(x, 9, alpha=1e-3, beta=0.75, k=1.0)


class ConvNet(Backbone):
    """3×3 convolutions with ReLU, in which what is seen of an image depends on no other; maps, flattened.

    By default the representation network of OML, six convolutions without normalisation (Javed and White, NeurIPS
    2019). Three without padding and strides, pooled after the first two and with instance norm, are ANML's networks
    (Beaulieu et al., ECAI 2020).

    Args:
        in_channels: 1 for Omniglot and Glyphs, 3 for colour images; None for those of a run's data, otherwise 1.
        hidden: filters of every convolution.
        image_size: height and width of the input, pixels; likewise, otherwise 28.
        strides: of each convolution.
        pooled: after how many of the convolutions, the first ones, 2×2 max pooling halves the maps.
        padding: of the convolutions, pixels.
        instance_norm: normalise each image's channels by their own mean and variance after every convolution.
    """

    def __init__(
        self,
        in_channels: int | None = None,
        hidden: int = 256,
        image_size: int | None = None,
        strides: Sequence[int] = (2, 1, 2, 1, 2, 2),
        pooled: int = 0,
        padding: int = 1,
        instance_norm: bool = False,
    ) -> None:
        super().__init__()
        in_channels, image_size = given(in_channels, 1), given(image_size, 28)
        at_least(1, in_channels=in_channels, hidden=hidden, image_size=image_size, convolutions=len(strides))
        at_least(1, **{f"strides[{i}]": stride for i, stride in enumerate(strides)})
        at_least(0, pooled=pooled, padding=padding)
        channels, side = [in_channels, *[hidden] * len(strides)], image_size
        for block, stride in enumerate(strides):
            side = (side + 2 * padding - 3) // stride + 1
            side = side // 2 if block < pooled else side
            if side < 1:
                raise ValueError(f"image_size is {image_size} but nothing is left of that after {block + 1} blocks")
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride, padding) for (i, o), stride in zip(pairwise(channels), strides, strict=True)
        )
        self.norms = nn.ModuleList(InstanceNorm(hidden) if instance_norm else nn.Identity() for _ in strides)
        self.films = nn.ModuleList(FiLM(hidden) for _ in strides)
        for conv in self.convs:  # He et al. 2015, as both reference codes
            nn.init.kaiming_normal_(cast(nn.Conv2d, conv).weight)
            nn.init.constant_(cast(Tensor, conv.bias), 0.0)
        self.pooled = pooled
        self.input_shape, self.maps = (in_channels, image_size, image_size), (hidden, side, side)
        self.out_features = hidden * side**2

    def forward(self, x: Tensor) -> Tensor:
        for block, (conv, norm, film) in enumerate(zip(self.convs, self.norms, self.films, strict=True)):
            x = norm(conv(x))
            if block < self.pooled:
                x = F.max_pool2d(x, 2)  # before ReLU: the same values from a quarter of the work
            x = F.relu(film(x))
        return x.flatten(1)


class DropBlock(nn.Module):
    """Leaves out squares of feature maps in training, more of them from batch to batch (Ghiasi et al., NeurIPS 2018).

    Learn2learn's own counts batches where no checkpoint sees it, in evaluation too, and cannot be mapped over tasks.

    Args:
        size: of a square, features.
        rate: share that is left out after ``ramp`` batches; before, in proportion.
        ramp: batches.
    """

    def __init__(self, size: int, rate: float, ramp: int = 40_000) -> None:
        super().__init__()
        self.size, self.rate, self.ramp = size, rate, ramp
        self.batches = 0  # a number, since inner loops may not change tensors from outside

    def forward(self, x: Tensor, gamma: float) -> Tensor:
        """Maps (N, C, H, W); what learn2learn's block makes of its own count as ``gamma`` is not heeded."""
        if not self.training:
            return x
        self.batches += 1
        side, left = x.shape[2], self.rate * min(1.0, self.batches / self.ramp)
        share = left / self.size**2 * side**2 / (side - self.size + 1) ** 2
        corners = torch.rand_like(x[..., self.size - 1 :, self.size - 1 :]) < share
        kept = 1 - F.max_pool2d(F.pad(corners.to(x.dtype), (self.size - 1,) * 4), self.size, 1)
        return x * kept * (kept.numel() / kept.sum())

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.batches)

    def set_extra_state(self, state: Tensor) -> None:
        self.batches = int(state)


class Network(Backbone):
    """Any module of torch as a backbone: what it makes of a batch, flattened.

    Args:
        network: from (N, *input_shape) to (N, …).
        input_shape: of one input; None for that of a run's data.
    """

    def __init__(self, network: nn.Module, input_shape: Sequence[int] | None = None) -> None:
        super().__init__()
        if input_shape is None:
            raise ValueError("input_shape is None: give the shape of an input, as [1, 28, 28]")
        self.network, self.input_shape = replace_batch_norm(nn.Sequential(network)), tuple(input_shape)
        like = next(self.network.parameters(), torch.zeros(()))
        try:
            with torch.no_grad():
                self.out_features = self(like.new_zeros(2, *self.input_shape)).shape[1]
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{type(network).__name__} does not take inputs of {self.input_shape}: {error}") from error

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).flatten(1)


class Learn2Learn(Backbone):
    """A backbone of learn2learn's, with our batch norm in place of its own.

    Args:
        name: "cnn4", "resnet12" or "wrn28".
        in_channels: of the input, None for 3; the residual networks take 3.
        hidden: filters of cnn4.
        image_size: height and width of the input, pixels; likewise, otherwise 84.
    """

    def __init__(
        self,
        name: Literal["cnn4", "resnet12", "wrn28"] = "cnn4",
        in_channels: int | None = None,
        hidden: int = 64,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        in_channels, image_size = given(in_channels, 3), given(image_size, 84)
        import learn2learn.vision.models as l2l  # not on the import path of those who do not use it

        if name == "cnn4":
            self.out_features = hidden * (image_size // 16) ** 2
            body = l2l.CNN4Backbone(hidden_size=hidden, channels=in_channels, max_pool=True)
        else:
            if in_channels != 3:
                raise ValueError(f"learn2learn's {name} takes 3 channels, not {in_channels}")
            body = l2l.ResNet12Backbone() if name == "resnet12" else l2l.WRN28Backbone()
            self.out_features = 640
        self.input_shape = (in_channels, image_size, image_size)
        for block in body.modules():
            if getattr(block, "drop_block", False):
                block.DropBlock = DropBlock(block.block_size, block.drop_rate)  # pyright: ignore
        self.body = replace_batch_norm(body)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).flatten(1)
