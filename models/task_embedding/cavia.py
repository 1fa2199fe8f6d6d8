"""CAVIA: the inner loop finds a context vector, which is all that a task changes, and the task's embedding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from datamodules.core.episodes import Support, Task
from datamodules.core.errors import at_least
from models.core.base_learner import BaseLearner, Parameters
from models.core.gradient_learner import GradientLearner
from models.core.inner_loop import Adapted, adapted, call, last, sgd_path, with_gradient
from models.core.learner import Paper
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNormMode, Statistics, record, recording
from models.networks.modulation import modulation_points
from models.networks.wrappers import Around

CONTEXT = "backbone.context"
"""The name of the context in a base learner."""


class Contextual(Around):
    """Another backbone, conditioned on a context vector.

    The context is a buffer of zeros named ``context``, (size,), that is in no checkpoint: a task's own takes its place
    by ``functional_call``.

    Args:
        backbone: that is conditioned.
        size: of the context.
        conditioning: "concatenated" to every input, flattened; or "film", by which γ and β of the blocks are one linear
            layer's outputs, γ as it comes and not 1 + γ.
        blocks: with "film", which of the backbone's modulation points, counted from 1.
    """

    context: Tensor

    def __init__(
        self, backbone: Backbone, size: int, conditioning: Literal["concatenated", "film"], blocks: Sequence[int]
    ) -> None:
        super().__init__(backbone)
        self.register_buffer("context", torch.zeros(size), persistent=False)
        self.concatenated = conditioning == "concatenated"
        self.modulated: list[str] = []
        self.films = nn.ModuleList()
        kind = type(backbone).__name__
        if self.concatenated:
            if len(backbone.input_shape) != 1 or (inputs := backbone.input_shape[0] - size) < 1:
                raise ValueError(
                    f"backbone {kind} takes inputs of {list(backbone.input_shape)}, which leaves none beside a context "
                    f"of {size}: give an MLP in_features of the input's size and {size} more, or conditioning film"
                )
            self.input_shape = (inputs,)
            return
        points = list(modulation_points(backbone).items())
        if not blocks or not {*blocks} <= {*range(1, len(points) + 1)}:
            raise ValueError(
                f"blocks are {list(blocks)} but backbone {kind} has {len(points)} places to modulate, counted from 1: "
                "give some of them" + ("" if points else ", of another backbone, or conditioning concatenated")
            )
        for name, film in (points[block - 1] for block in sorted({*blocks})):
            film.activate()
            self.modulated.append(name)
            layer = nn.Linear(size, 2 * film.channels)
            # As the reference code; the bias, which is γ and β before the first step, is PyTorch's, up to 1/√size.
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
            self.films.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        if self.concatenated:
            x = x.flatten(1)
            return self.backbone(torch.cat([x, self.context.expand(len(x), -1)], 1))
        modulation: Parameters = {}
        for name, layer in zip(self.modulated, self.films, strict=True):
            modulation[f"{name}.scale"], modulation[f"{name}.shift"] = layer(self.context).chunk(2)
        return functional_call(self.backbone, modulation, (x,))


class CAVIA(GradientLearner):
    """Adapts a context vector φ alone, from zero for every task; all parameters are shared and meta-learned.

    φ ← φ − α ∇ L_support(φ), from φ = 0; the meta-gradient by the shared parameters passes through all steps.
    The adapted context is the task's embedding.

    Args:
        backbone: the base learner without its head; with a concatenated context its inputs are those of the data and
            ``context_size`` more.
        outputs: rows of the head: ways, or the dimension of y.
        context_size: of φ; 5 for sinusoids, 100 for images.
        conditioning: how the context reaches the network: "concatenated" to the input of the first layer, as published
            for regression, or "film", as published for images.
        blocks: with "film", which modulation points of the backbone, counted from 1; the third alone in the reference
            code.
        inner_rate: α, the learning rate of the inner loop.
        inner_steps: gradient steps in meta-training; 1 for sinusoids, 2 for images.
        eval_inner_steps: gradient steps in evaluation; None takes as many as in training.
        first_order: take the inner gradients as constants.
        clamp: every element of each single task's meta-gradient is brought to ± this before the mean over tasks, as in
            the reference code's regression; None leaves them. Its images clamp the mean: gradient_clip_val of the
            Trainer, by value.
        batch_norm, **others: see MetaLearner.
    """

    paper = Paper(
        "Zintgraf, Shiarlis, Kurin, Hofmann and Whiteson",
        "Fast Context Adaptation via Meta-Learning",
        "ICML",
        2019,
        "https://arxiv.org/abs/1810.03642",
    )
    tasks = frozenset({"classification", "regression"})

    def __init__(
        self,
        backbone: Backbone,
        outputs: int = 1,
        context_size: int = 5,
        conditioning: Literal["concatenated", "film"] = "concatenated",
        blocks: Sequence[int] = (3,),
        inner_rate: float = 1.0,
        inner_steps: int = 1,
        eval_inner_steps: int | None = None,
        first_order: bool = False,
        clamp: float | None = 10.0,
        batch_norm: BatchNormMode = "transductive",
        **others: Any,
    ) -> None:
        super().__init__(outputs, inner_steps, eval_inner_steps, batch_norm, **others)
        at_least(1, context_size=context_size)
        if clamp is not None and not clamp > 0:
            raise ValueError(f"clamp is {clamp} but must be above 0, or null for none")
        self.learner = BaseLearner(Contextual(backbone, context_size, conditioning, blocks), outputs)
        self.context_size, self.inner_rate = context_size, inner_rate
        self.first_order, self.clamp = first_order, clamp

    def path(self, support: Support, shared: Parameters) -> Iterator[Adapted]:
        """Gradient descent on the context, from zero; ``shared`` are parameters of the base learner, by name."""
        shared = self.learner.resize_head(shared, support.ways)
        start = {CONTEXT: self.learner.head.weight.new_zeros(self.context_size)}

        def support_loss(context: Parameters, step: int) -> Tensor:
            return self.support_loss(call(self.learner, shared | context, support.x, self.statistics_source), support)

        path = sgd_path(support_loss, start, self.inner_rate, self.steps, self.first_order)
        for step, context in enumerate(path):
            yield adapted(self.learner, shared | context, support, self.batch_norm, step)

    def adaptation(self, support: Support) -> Iterator[Adapted]:
        yield from self.path(support, self.learner.head_parameters())

    def objective(self, task: Task) -> tuple[Any, ...]:
        if self.clamp is None:
            return super().objective(task)
        shared: Parameters = {n: p for n, p in self.learner.named_parameters() if p.requires_grad}

        def query_loss(shared: Parameters) -> tuple[Tensor, tuple[Tensor, Statistics]]:
            statistics: Statistics = {}
            with recording(statistics if self.batch_norm == "running" else None, differentiable=False):
                prediction = self.predict(last(self.path(task.support, shared)), task.query_x)
            return self.loss(prediction, task.query_y), (prediction, statistics)

        # The task's own meta-gradient, here and now; what the backward pass is given of it is linear in the parameters.
        with torch.no_grad():
            gradient, (loss, (prediction, statistics)) = grad_and_value(query_loss, has_aux=True)(shared)
        record(statistics)
        clamped = [(g.clamp(-self.clamp, self.clamp) * shared[name]).sum() for name, g in gradient.items()]
        return with_gradient(loss, torch.stack(clamped).sum()), prediction

    @property
    def embedding_size(self) -> int:
        return self.context_size

    def embed_task(self, support: Support) -> Tensor:
        """The adapted context."""
        return self.adapt(support).parameters[CONTEXT]
