"""Online gradient descent on a stream, and what every learner that takes gradient steps on it shares."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Support
from datamodules.core.errors import at_least
from models.continual.learner import ContinualLearner
from models.core.base_learner import BaseLearner, Parameters
from models.core.chance import Chance
from models.core.inner_loop import call, inner_gradient
from models.core.learner import Paper
from models.core.predictions import cross_entropies
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNormMode


class Online(NamedTuple):
    """A learner on ONE stream.

    Attributes:
        parameters: of the base learner.
        kept: what an algorithm has beside them, tensors of fixed shapes.
        chance: the stream's own.
    """

    parameters: Parameters
    kept: Any
    chance: Chance


def as_buffers(module: nn.Module) -> dict[str, int]:
    """Make buffers of the parameters that would be trained: their names, and of each the inputs of one unit, or 0."""
    inputs = {}
    for prefix, part in module.named_modules():
        for name, p in list(part.named_parameters(recurse=False)):
            if p.requires_grad:
                inputs[f"{prefix}.{name}" if prefix else name] = math.prod(p.shape[1:]) if p.ndim > 1 else 0
                delattr(part, name)
                part.register_buffer(name, p.detach(), persistent=False)
    return inputs


def normal(shape: Sequence[int], chance: Chance) -> tuple[Tensor, Chance]:
    """Standard normal numbers, by Box and Muller."""
    (radius, turn), chance = chance.uniform(2, *shape)
    return (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * turn), chance


class OnlineSGD(ContinualLearner):
    """Gradient steps on each batch as it arrives, and nothing against forgetting: fine-tuning, the control.

    It has nothing to train before a stream, and is evaluated as it is, with ``--stage test``. On every stream it begins
    from weights of its own: normal of variance 2 / inputs (He et al., ICCV 2015), biases 0; a pretrained backbone that
    is frozen stays. An algorithm overrides ``keep``, ``open``, ``step``, ``wrote`` and ``close``.

    Args:
        backbone: features of an input; images are not normalised by one another, see ``batch_norm``.
        rate: of a step.
        batch: examples of a step.
        glances: steps on each batch.
        **others: see MetaLearner.
    """

    paper = Paper(
        "Robbins and Monro",
        "A Stochastic Approximation Method",
        "Annals of Mathematical Statistics",
        1951,
        "https://doi.org/10.1214/aoms/1177729586",
    )

    def __init__(
        self,
        backbone: Backbone,
        rate: float = 0.1,
        batch: int = 10,
        glances: int = 1,
        batch_norm: BatchNormMode = "none",
        **others: Any,
    ) -> None:
        super().__init__(batch_norm=batch_norm, **others)
        at_least(1, batch=batch, glances=glances)
        at_least(0, rate=rate)
        self.base = BaseLearner(backbone, 1)  # a stream says how many classes it has
        self.inputs = as_buffers(self.base)
        self.rate, self.batch, self.glances = rate, batch, glances

    def check(self, data: EpisodicDataModule) -> str | None:
        if getattr(data, "remember", 0):
            return f"{type(self).__name__} learns nothing before a stream: set data.remember to 0"
        return None

    # What an algorithm overrides ------------------------------------------------------------------------------------

    def keep(self, parameters: Parameters, classes: int) -> Any:
        """What it has beside parameters before the first experience."""
        return ()

    def open(self, state: Online) -> Online:
        """The state at the beginning of an experience."""
        return state

    def step(self, state: Online, x: Tensor, y: Tensor) -> Online:
        """The state after a glance at a batch."""
        return self.descended(state, self.gradient(state.parameters, x, y))

    def wrote(self, state: Online, x: Tensor, y: Tensor) -> Online:
        """The state after all glances at a batch."""
        return state

    def close(self, state: Online, experience: Support) -> Online:
        """The state at the end of an experience."""
        return state

    # What all share -------------------------------------------------------------------------------------------------

    def begin(self, classes: int, chance: Chance) -> Online:
        parameters, values = {}, dict(self.base.named_buffers())
        for name, inputs in self.inputs.items():
            value = values[name]
            shape = (classes, *value.shape[1:]) if self.base.in_head(name) else value.shape
            if inputs:
                drawn, chance = normal(shape, chance)
                parameters[name] = (drawn * (2 / inputs) ** 0.5).to(value.dtype)
            else:
                parameters[name] = value.new_zeros(shape) if name.endswith("bias") else value
        return Online(parameters, self.keep(parameters, classes), chance)

    def update(self, state: Online, experience: Support) -> Online:
        state = self.open(state)
        for x, y in self.batches(experience):
            for _ in range(self.glances):
                state = self.step(state, x, y)
            state = self.wrote(state, x, y)
        return self.close(state, experience)

    def batches(self, experience: Support) -> Iterator[tuple[Tensor, Tensor]]:
        """The examples as they arrive."""
        return zip(experience.x.split(self.batch), experience.y.split(self.batch), strict=True)

    def predict(self, state: Online, query_x: Tensor) -> Tensor:
        return self.logits(state.parameters, query_x)

    def logits(self, parameters: Parameters, x: Tensor) -> Tensor:
        """Of inputs (N, *input), (N, classes)."""
        return call(self.base, parameters, x, self.statistics_source)

    def mean_loss(self, parameters: Parameters, x: Tensor, y: Tensor, there: Tensor | None = None) -> Tensor:
        """Mean cross-entropy over the examples that are ``there``, (N,) bool; 0 where none is, None for all."""
        logits = self.logits(parameters, x)
        if there is None:
            return self.loss(logits, y)
        weight = there.to(logits.dtype)
        return cross_entropies(logits, y, weight).sum() / weight.sum().clamp(min=1)

    def gradient(self, parameters: Parameters, x: Tensor, y: Tensor, there: Tensor | None = None) -> Parameters:
        """Of ``mean_loss``."""
        return inner_gradient(self.mean_loss, parameters, x, y, there)

    def descended(self, state: Online, gradient: Parameters) -> Online:
        """The state after a step of gradient descent."""
        return state._replace(parameters={n: p - self.rate * gradient[n] for n, p in state.parameters.items()})

    @property
    def features(self) -> int:
        """Numbers of one input."""
        return math.prod(self.base.backbone.input_shape)
