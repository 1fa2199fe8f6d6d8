"""Model-agnostic meta-learning, second and first order, with the options of MAML++."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.core.episodes import Support, Task
from datamodules.core.errors import at_least
from models.core.base_learner import BaseLearner, Parameters
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
from models.networks.batch_norm import BatchNorm, BatchNormMode


class MAML(GradientLearner):
    """Finds an initialisation from which a few gradient steps on a support set do well on the queries.

    The inner loop is gradient descent on the support loss (eq. 1); the meta-gradient passes through all of its steps.
    With batch norm by batch statistics, as published, a prediction depends on the other queries of the batch: set
    ``batch_norm`` to "support" for predictions one by one.

    MAML++ (Antoniou, Edwards and Storkey, ICLR 2019) is this with ``learned_rates``, ``per_step_norm``,
    ``multi_step_updates``, ``first_order_updates`` and a cosine ``scheduler``.

    Args:
        backbone: the base learner without its head.
        outputs: rows of the head: ways, or the dimension of y.
        inner_rate: α, the learning rate of the inner loop.
        inner_steps: gradient steps in meta-training.
        eval_inner_steps: gradient steps in evaluation; None takes as many as in training.
        first_order: leave out second derivatives (FOMAML).
        adapt_normalization: adapt batch norm's scale and shift too; the reference code does not.
        inner_clip: what each entry of an inner gradient is limited to, either way; MMAML has 10 on functions. None
            leaves gradients as they are.
        learned_rates: meta-learn a rate for each step and tensor, from ``inner_rate`` on; steps beyond the trained ones
            take the last one's.
        per_step_norm: give each step its own scale, shift and running averages of batch norm.
        multi_step_updates: meta-updates over which the query losses after all steps count, the earlier ones less and
            less; 0 for the last step's alone.
        first_order_updates: meta-updates that are of first order before the second order sets in.
        batch_norm, **others: see MetaLearner.
    """

    paper = Paper(
        "Finn, Abbeel and Levine",
        "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
        "ICML",
        2017,
        "https://arxiv.org/abs/1703.03400",
    )
    tasks = frozenset({"classification", "regression"})

    def __init__(
        self,
        backbone: Backbone,
        outputs: int = 5,
        inner_rate: float = 0.4,
        inner_steps: int = 1,
        eval_inner_steps: int | None = None,
        first_order: bool = False,
        adapt_normalization: bool = False,
        inner_clip: float | None = None,
        learned_rates: bool = False,
        per_step_norm: bool = False,
        multi_step_updates: int = 0,
        first_order_updates: int = 0,
        batch_norm: BatchNormMode = "transductive",
        **others: Any,
    ) -> None:
        super().__init__(outputs, inner_steps, eval_inner_steps, batch_norm, **others)
        if inner_clip is not None and inner_clip <= 0:
            raise ValueError(f"inner_clip is {inner_clip} but must be above 0: leave it out for gradients as they are")
        at_least(0, multi_step_updates=multi_step_updates, first_order_updates=first_order_updates)
        self.learner = BaseLearner(backbone, outputs)
        self.inner_rate, self.inner_clip = inner_rate, inner_clip
        self.first_order, self.first_order_updates = first_order, first_order_updates
        self.adapt_normalization = adapt_normalization
        self.per_step_norm, self.multi_step_updates = per_step_norm, multi_step_updates
        if per_step_norm:
            for layer in self.learner.modules():
                if isinstance(layer, BatchNorm):
                    layer.per_step(max(1, inner_steps))
        tensors = len(split_parameters(self.learner, adapt_normalization)[0])
        rates = torch.full((max(1, inner_steps), tensors), inner_rate)
        self.rates = nn.Parameter(rates) if learned_rates else None

    def rate(self, step: int) -> Parameters:
        """The rate of each tensor at a step."""
        assert self.rates is not None
        names = split_parameters(self.learner, self.adapt_normalization)[0]
        return dict(zip(names, self.rates[min(step, len(self.rates) - 1)], strict=True))

    def adaptation(self, support: Support) -> Iterator[Adapted]:
        start, fixed = split_parameters(self.learner, self.adapt_normalization)

        def support_loss(parameters: Parameters, step: int) -> Tensor:
            outputs = call(self.learner, parameters | fixed, support.x, self.statistics_source, step)
            return self.support_loss(outputs, support)

        rate = self.inner_rate if self.rates is None else self.rate
        first_order = self.first_order or self.meta_updates < self.first_order_updates
        start = self.learner.resize_head(start, support.ways)
        path = sgd_path(support_loss, start, rate, self.steps, first_order, self.inner_clip)
        for step, parameters in enumerate(path):
            yield adapted(self.learner, parameters | fixed, support, self.batch_norm, step)

    def step_weights(self) -> list[float]:
        """What the query loss after 0, 1, … steps weighs in the meta-objective (MAML++, eq. 3).

        All steps alike at first, the earlier ones then falling to 0.03 of that, as in its reference code.
        """
        steps, done = self.inner_steps, self.meta_updates
        if done >= self.multi_step_updates or steps == 0:
            return [0.0] * steps + [1.0]
        early = max(1 - done / self.multi_step_updates, 0.03) / steps
        return [0.0] + [early] * (steps - 1) + [1 - early * (steps - 1)]

    def objective(self, task: Task) -> tuple[Any, ...]:
        averages = self.per_step_norm and self.batch_norm == "running"  # which the queries of every step are to move
        loss, prediction = task.query_x.new_zeros(()), task.query_x
        for state, weight in zip(self.adaptation(task.support), self.step_weights(), strict=True):
            if weight or (averages and state.step):
                prediction = self.predict(state, task.query_x)
                loss = loss + weight * self.loss(prediction, task.query_y)
        return loss, prediction
