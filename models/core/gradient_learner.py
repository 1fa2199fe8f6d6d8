"""What learners share that adapt a base learner's parameters by gradient steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from datamodules.core.episodes import Support
from datamodules.core.errors import at_least
from models.core.base_learner import BaseLearner
from models.core.inner_loop import Adapted, last, query
from models.core.learner import MetaLearner
from models.networks.batch_norm import BatchNormMode


class GradientLearner(MetaLearner):
    """Takes gradient steps on the support set, and predicts by the base learner of the parameters after the last.

    An algorithm makes its base learner, ``learner``, and overrides ``adaptation``.

    Args:
        outputs: rows of the head: ways, or the dimension of y.
        inner_steps: in meta-training.
        eval_inner_steps: in evaluation; None takes as many as in training.
        batch_norm, **others: see MetaLearner.
    """

    learner: BaseLearner

    def __init__(
        self,
        outputs: int,
        inner_steps: int,
        eval_inner_steps: int | None = None,
        batch_norm: BatchNormMode = "transductive",
        **others: Any,
    ) -> None:
        super().__init__(batch_norm=batch_norm, **others)
        at_least(1, outputs=outputs)
        at_least(0, inner_steps=inner_steps, eval_inner_steps=eval_inner_steps)
        self.outputs, self.inner_steps = outputs, inner_steps
        self.eval_inner_steps = inner_steps if eval_inner_steps is None else eval_inner_steps

    @property
    def steps(self) -> int:
        """How many inner steps are taken now."""
        return self.inner_steps if self.training else self.eval_inner_steps

    def adapt(self, support: Support) -> Adapted:
        return last(self.adaptation(support))

    def predict(self, state: Adapted, query_x: Tensor) -> Tensor:
        return query(self.learner, state, query_x, self.statistics_source)
