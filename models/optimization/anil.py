"""Almost no inner loop: MAML that adapts the head alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from datamodules.core.episodes import Support
from models.core.base_learner import BaseLearner, Parameters
from models.core.gradient_learner import GradientLearner
from models.core.inner_loop import Adapted, adapted, call, sgd_path
from models.core.learner import Paper
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNormMode


class ANIL(GradientLearner):
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
        super().__init__(outputs, inner_steps, eval_inner_steps, batch_norm, **others)
        self.learner = BaseLearner(backbone, outputs)
        self.inner_rate = inner_rate
        self.first_order = first_order

    def adaptation(self, support: Support) -> Iterator[Adapted]:
        head = self.learner.resize_head(self.learner.head_parameters(), support.ways)
        # Once, as what batch norm needs of the support set: no step changes the features.
        features = call(self.learner.backbone, {}, support.x, self.statistics_source)
        start = adapted(self.learner, {}, support, self.batch_norm)

        def support_loss(parameters: Parameters, step: int) -> Tensor:
            weight, bias = parameters["head.weight"], parameters["head.bias"]
            return self.support_loss(F.linear(features.to(weight.dtype), weight, bias), support)

        path = sgd_path(support_loss, head, self.inner_rate, self.steps, self.first_order)
        for step, parameters in enumerate(path):
            yield start._replace(parameters=parameters, step=step)
