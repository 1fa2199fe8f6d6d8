"""Learners that modulate a backbone by the code of a task's support set, and the networks by which they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.core.episodes import Support, Task
from datamodules.core.errors import at_least
from models.conditioning.modulated import ModulatedLearner
from models.core.base_learner import Parameters
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNorm, normalize_by
from models.networks.modulation import activated


class ImageSetEncoder(nn.Module):
    """A set of images as the mean of their codes: blocks of 3×3 convolution, batch norm, ReLU and 2×2 max pooling.

    Batch norm is always by the set itself, as in the reference code: the code of a set depends on nothing else.

    Args:
        in_channels: of the images.
        size: filters of every block, and size of the code.
        blocks: five as published; pooling ends where one pixel is left.
    """

    def __init__(self, in_channels: int, size: int = 64, blocks: int = 5) -> None:
        super().__init__()
        at_least(1, size=size, blocks=blocks)
        self.size = size
        self.convs = nn.ModuleList(
            nn.Conv2d(in_channels if k == 0 else size, size, 3, padding=1) for k in range(blocks)
        )
        self.norms = nn.ModuleList(BatchNorm(size) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        """Images (S, C, H, W) to a code (size,)."""
        with normalize_by("batch"):
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = F.relu(norm(conv(x)))
                x = F.max_pool2d(x, 2) if min(x.shape[2:]) > 1 else x
        return x.mean((0, 2, 3))


class Processor(nn.Module):
    """Three linear layers, each beside an identity, with ReLU between them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for k, layer in enumerate(self.layers):
            x = F.relu(x) if k else x
            x = x + layer(x)
        return x


class LayerGenerator(nn.Module):
    """Scale and shift of one layer's channels from the code of a task: γ = 1 + r ⊙ h(z), β = s ⊙ g(z).

    Args:
        code: size of z.
        channels: of the layer.
        deviation: of the factors r and s at the start: the layer is hardly modulated.
    """

    def __init__(self, code: int, channels: int, deviation: float = 0.001) -> None:
        super().__init__()
        self.shared = nn.Linear(code, channels)
        self.scale, self.shift = Processor(channels), Processor(channels)
        self.scale_factor, self.shift_factor = (nn.Parameter(deviation * torch.randn(channels)) for _ in range(2))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.shared(z))
        return 1 + self.scale_factor * self.scale(x), self.shift_factor * self.shift(x)


class FiLMGenerator(nn.Module):
    """Scales and shifts of all modulated layers of a backbone, by their names in it, from the code of a task.

    Args:
        code: size of the code.
        points: channels of the modulated layers, by name.
    """

    def __init__(self, code: int, points: Mapping[str, int]) -> None:
        super().__init__()
        self.points = tuple(points)
        self.generators = nn.ModuleList(LayerGenerator(code, channels) for channels in points.values())

    def forward(self, z: Tensor) -> Parameters:
        found: Parameters = {}
        for name, generator in zip(self.points, self.generators, strict=True):
            found[f"{name}.scale"], found[f"{name}.shift"] = generator(z)
        return found

    def penalty(self) -> Tensor:
        """The sum of the squared factors."""
        return torch.stack([p.square().sum() for n, p in self.named_parameters() if n.endswith("_factor")]).sum()


class SetAdaptation(nn.Module):
    """What makes the code of a support set, and of the code the modulation of a backbone; labels play no part.

    Args:
        input_shape: (channels, height, width) of the images.
        points: channels of the modulated layers, by name.
        size: of the code.
    """

    def __init__(self, input_shape: Sequence[int], points: Mapping[str, int], size: int = 64) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(f"the set encoder takes images, not inputs of shape {tuple(input_shape)}")
        self.encoder = ImageSetEncoder(input_shape[0], size)
        self.generator = FiLMGenerator(size, points)


class AdaptiveLearner(ModulatedLearner):
    """Modulates the backbone by the code of a task's support set.

    Args:
        backbone: the embedding, with places where it can be modulated; as published frozen (``Pretrained``), any other
            is trained along.
        conditioned: modulate it; otherwise the features are the same for all tasks.
        code: size of the support set's code.
        penalty: of the sum of the squared factors of all scales and shifts.
        **others: see EmbeddingLearner.
    """

    def __init__(
        self, backbone: Backbone, conditioned: bool = True, code: int = 64, penalty: float = 0.001, **others: Any
    ) -> None:
        super().__init__(backbone, **others)
        self.conditioned, self.code, self.penalty = conditioned, code, penalty
        if conditioned:
            self.adaptation_network = SetAdaptation(backbone.input_shape, activated(backbone), code)
            self.conditioned_on(code)

    def modulation(self, x: Tensor, support: Support) -> Parameters:
        return self.adaptation_network.generator(self.seen(lambda: self.embed_task(support)))

    @property
    def embedding_size(self) -> int:
        return self.code if self.conditioned else 0

    def embed_task(self, support: Support) -> Tensor:
        """The code of the support set."""
        return self.adaptation_network.encoder(support.x)

    def objective(self, task: Task) -> tuple[Any, ...]:
        loss, prediction, left = super().objective(task)
        if self.conditioned:
            loss = loss + self.penalty * self.adaptation_network.generator.penalty()
        return loss, prediction, left
