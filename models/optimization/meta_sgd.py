"""Meta-SGD: the initialisation, and the rate and direction of the inner step, are learned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.core.episodes import Support
from models.core.base_learner import BaseLearner, Parameters, entry
from models.core.gradient_learner import GradientLearner
from models.core.inner_loop import (
    Adapted,
    adapted,
    call,
    sgd_path,
    split_parameters,
)
from models.core.learner import Paper
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNormMode


class MetaSGD(GradientLearner):
    """MAML with a meta-learned rate for every element of every parameter that adapts: θ' = θ - α ∘ ∇L(θ) (eq. 3).

    Rates are free to turn negative: their vector is a direction as much as a step size.

    Args:
        backbone: the base learner without its head.
        outputs: rows of the head: ways, or the dimension of y.
        inner_rate: what the rates start from: two numbers, uniform between them, as published; or one for all.
        inner_steps: gradient steps in meta-training, one in the paper.
        eval_inner_steps: gradient steps in evaluation; None takes as many as in training.
        first_order: leave out second derivatives.
        adapt_normalization: adapt batch norm's scale and shift too, each with its own rate.
        batch_norm, **others: see MetaLearner.
    """

    paper = Paper(
        "Li, Zhou, Chen and Li",
        "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning",
        "arXiv",
        2017,
        "https://arxiv.org/abs/1707.09835",
    )
    tasks = frozenset({"classification", "regression"})

    def __init__(
        self,
        backbone: Backbone,
        outputs: int = 5,
        inner_rate: float | tuple[float, float] = (0.005, 0.1),
        inner_steps: int = 1,
        eval_inner_steps: int | None = None,
        first_order: bool = False,
        adapt_normalization: bool = False,
        batch_norm: BatchNormMode = "transductive",
        **others: Any,
    ) -> None:
        super().__init__(outputs, inner_steps, eval_inner_steps, batch_norm, **others)
        self.learner = BaseLearner(backbone, outputs)
        self.first_order = first_order
        self.adapt_normalization = adapt_normalization
        low, high = inner_rate if isinstance(inner_rate, (tuple, list)) else (inner_rate, inner_rate)
        start, _ = split_parameters(self.learner, adapt_normalization)
        rates = {entry(n): nn.Parameter(torch.empty_like(p).uniform_(low, high)) for n, p in start.items()}
        self.rates = nn.ParameterDict(rates)

    def class_rows(self) -> Parameters:
        of_rates = [f"rates.{name.replace('.', '_')}" for name in self.learner.head_parameters()]
        return super().class_rows() | {n: p for n, p in self.named_parameters() if n in of_rates}

    def adaptation(self, support: Support) -> Iterator[Adapted]:
        start, fixed = split_parameters(self.learner, self.adapt_normalization)
        rates = self.learner.resize_head({name: self.rates[entry(name)] for name in start}, support.ways)

        def support_loss(parameters: Parameters, step: int) -> Tensor:
            return self.support_loss(call(self.learner, parameters | fixed, support.x, self.statistics_source), support)

        path = sgd_path(
            support_loss,
            self.learner.resize_head(start, support.ways),
            lambda step: rates,
            self.steps,
            self.first_order,
        )
        for step, parameters in enumerate(path):
            yield adapted(self.learner, parameters | fixed, support, self.batch_norm, step)
