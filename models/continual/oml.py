"""OML: online aware meta-learning of a representation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.continual.descent import all_slopes, with_one
from models.continual.head_learner import HeadLearner
from models.continual.learner import Stream
from models.core.learner import Paper
from models.networks.backbones import Backbone
from models.networks.batch_norm import normalize_by


class OML(HeadLearner):
    """Learns features over which a linear head, trained by one step for each example as it comes, forgets little.

    Meta-training imitates it (Algorithm 2): the head's rows of the stream's classes are drawn anew, each example is one
    step of SGD on the head, and the loss at the end, on other examples of these classes and on what is remembered of
    others, is differentiated through all of the steps. As the gradient of a linear head has a closed form, the head
    after the steps is W_0 - α Σ_t (softmax_t - onehot_t) φ_tᵀ, and no step costs a pass through it (``all_slopes``).

    Args:
        backbone: the representation network (RLN).
        classes: of the meta-training split, rows of its head; None: as many as the data has.
        inner_rate: α, the rate of the steps in meta-training.
        first_order: take the steps' gradients as constants.
        redraw: the head's rows of a stream's classes anew; otherwise they are those that were meta-learned.
        **others: see HeadLearner and MetaLearner.
    """

    paper = Paper(
        "Javed and White",
        "Meta-Learning Representations for Continual Learning",
        "NeurIPS",
        2019,
        "https://arxiv.org/abs/1905.12588",
    )

    def __init__(
        self,
        backbone: Backbone,
        classes: int | None = None,
        inner_rate: float = 0.03,
        first_order: bool = False,
        redraw: bool = True,
        **others: Any,
    ) -> None:
        super().__init__(backbone, classes, **others)
        if inner_rate < 0:
            raise ValueError(f"inner_rate is {inner_rate} but must be at least 0")
        self.inner_rate, self.first_order, self.redraw = inner_rate, first_order, redraw

    def objective(self, task: Stream) -> tuple[Tensor, Tensor]:
        x, y, (query_x, query_y) = task.x.flatten(0, 1), task.y.flatten(), self.queries(task)
        with normalize_by(self.statistics_source):
            features = with_one(self.features(torch.cat([x, query_x])))
        learned, asked = features[: len(x)], features[len(x) :]
        head = self.redrawn(task) if self.redraw else self.head
        if self.first_order:
            learned = learned.detach()
        taken = all_slopes(head.detach() if self.first_order else head, learned, y, self.inner_rate)
        logits = asked @ head.T - self.inner_rate * (asked @ learned.T) @ taken
        return self.loss(logits, query_y), logits
