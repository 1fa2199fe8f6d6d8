"""Learners whose linear head alone learns from a stream of evaluation, over features that no experience changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Support
from datamodules.core.errors import at_least
from models.continual.chosen_rate import ChosenRate
from models.continual.descent import Descent, StreamOptimizer, all_slopes, drawn_head, slopes, with_one
from models.continual.learner import Stream
from models.core.base_learner import BaseLearner
from models.core.chance import Chance
from models.core.training_classes import expect_classes
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNormMode

HEAD = "head"
RATES = (1e-4, 3e-4, 1e-3, 3e-3)


class HeadLearner(ChosenRate):
    """On a stream a new head, drawn at random, is trained by one step for each example, in the order of arrival.

    In meta-training there is a head of all classes of the split, ``learner.head``.

    Args:
        backbone: of the features.
        classes: of the meta-training split; None: as many as the data has.
        eval_rates: see ChosenRate.
        eval_optimizer: of the steps on a stream: "adam", as in OML's and ANML's reference code, or "sgd".
        passes: through each experience, one after another.
        batch_norm, **others: see MetaLearner.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: int | None = None,
        eval_rates: Sequence[float] = RATES,
        eval_optimizer: StreamOptimizer = "adam",
        passes: int = 1,
        batch_norm: BatchNormMode = "running",
        **others: Any,
    ) -> None:
        super().__init__(eval_rates, batch_norm=batch_norm, **others)
        if classes is None:
            raise ValueError("classes is None and the data does not tell: give those of the meta-training split")
        at_least(1, classes=classes, passes=passes)
        self.classes, self.passes = classes, passes
        self.eval_optimizer: StreamOptimizer = eval_optimizer
        self.learner = BaseLearner(backbone, classes)
        torch.nn.init.kaiming_normal_(self.learner.head.weight)
        torch.nn.init.zeros_(self.learner.head.bias)

    def check(self, data: EpisodicDataModule) -> str | None:
        if not getattr(data, "own_labels", True):
            return f"the head of {type(self).__name__} has a row for each class: set data.own_labels to true"
        return super().check(data)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            expect_classes(self.trainer.datamodule, self.classes)

    @property
    def head(self) -> Tensor:
        """Of meta-training, (classes, features + 1)."""
        return torch.cat([self.learner.head.weight, self.learner.head.bias[:, None]], 1)

    def redrawn(self, stream: Stream) -> Tensor:
        """``head`` with weights drawn anew for the classes that a stream teaches, so that it knows none before."""
        y = stream.y.flatten()
        members = Support(y, y, self.classes).members()  # (N, classes)
        drawn, _ = drawn_head(stream.chance, len(y), self.learner.backbone.out_features, self.learner.head.weight)
        weight = drawn[:, :-1][members.int().argmax(0)]  # that of a class's first example
        weight = torch.where(members.any(0)[:, None], weight, self.learner.head.weight)
        return torch.cat([weight, self.learner.head.bias[:, None]], 1)

    # On a stream ------------------------------------------------------------------------------------------------------

    def encode(self, inputs: Tensor) -> Tensor:
        return with_one(self.learner.backbone(inputs))

    def begin(self, classes: int, chance: Chance) -> Descent:
        head, _ = drawn_head(chance, classes, self.learner.backbone.out_features, self.learner.head.weight)
        return Descent.of({HEAD: head}, self.eval_optimizer)

    def update(self, state: Descent, experience: Support) -> Descent:
        x, y, rate = experience.x, experience.y, self.eval_rate
        for _ in range(self.passes):
            if not state.mean:
                head = state.parameters[HEAD]
                state = state.stepped({HEAD: all_slopes(head, x, y, rate).T @ x}, rate)
                continue
            for one, label in zip(x, y, strict=True):
                slope = slopes(state.parameters[HEAD] @ one, label)
                state = state.stepped({HEAD: torch.outer(slope, one)}, rate)
        return state

    def predict(self, state: Descent, query_x: Tensor) -> Tensor:
        return query_x @ state.parameters[HEAD].T
