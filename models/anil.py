"""Almost no inner loop: MAML that adapts the head alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from datamodules.base import at_least
from datamodules.episodes import Support
from models.backbones import Backbone
from models.base import MetaLearner, Paper
from models.functional import Adapted, Parameters, adapted, base_learner, call, for_ways, last, query, sgd_path
from models.normalization import BatchNormMode


class ANIL(MetaLearner):
    """MAML whose inner loop adapts the head only; the features are meta-learned and stay as they are (section 4.1).

    Args:
        backbone: the base learner without its head.
        outputs: rows of the head: ways, or the dimension of y.
        inner_rate: α, the learning rate of the inner loop.
        inner_steps: gradient steps in meta-training.
        eval_inner_steps: gradient steps in evaluation; None takes as many as in training.
        first_order: leave out second derivatives.
        batch_norm, **others: see MetaLearner.
    """

    paper = Paper(
        "Raghu, Raghu, Bengio and Vinyals",
        "Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of MAML",
        "ICLR",
        2020,
        "https://arxiv.org/abs/1909.09157",
    )
    tasks = frozenset({"classification", "regression"})

    def __init__(
        self,
        backbone: Backbone,
        outputs: int = 5,
        inner_rate: float = 0.1,
        inner_steps: int = 5,
        eval_inner_steps: int | None = None,
        first_order: bool = False,
        batch_norm: BatchNormMode = "transductive",
        **others: Any,
    ) -> None:
        super().__init__(batch_norm=batch_norm, **others)
        at_least(1, outputs=outputs)
        at_least(0, inner_steps=inner_steps, eval_inner_steps=eval_inner_steps)
        self.learner = base_learner(backbone, outputs)
        self.outputs = outputs
        self.inner_rate = inner_rate
        self.inner_steps = inner_steps
        self.eval_inner_steps = inner_steps if eval_inner_steps is None else eval_inner_steps
        self.first_order = first_order

    def adaptation(self, support: Support) -> Iterator[Adapted]:
        head = for_ways({n: p for n, p in self.learner.named_parameters() if n.startswith("head.")}, support.ways)
        features = call(
            self.learner.get_submodule("backbone"), {}, support.x, self.statistics_source
        )  # once: no step changes them

        def support_loss(parameters: Parameters, step: int) -> Tensor:
            weight, bias = parameters["head.weight"], parameters["head.bias"]
            return self.loss(F.linear(features.to(weight.dtype), weight, bias), support.y)

        steps = self.inner_steps if self.training else self.eval_inner_steps
        path = sgd_path(support_loss, head, self.inner_rate, steps, self.first_order)
        for step, parameters in enumerate(path):
            yield adapted(self.learner, parameters, support, self.batch_norm, step)

    def adapt(self, support: Support) -> Adapted:
        return last(self.adaptation(support))

    def predict(self, state: Adapted, query_x: Tensor) -> Tensor:
        return query(self.learner, state, query_x, self.statistics_source)
