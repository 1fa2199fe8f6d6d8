"""Learners that train a new linear head on a stream of evaluation, one example after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Support
from datamodules.core.errors import at_least
from models.continual.chosen_rate import ChosenRate
from models.continual.descent import Descent, StreamOptimizer, all_slopes, drawn_head, slopes, with_one
from models.continual.learner import Stream
from models.core.base_learner import BaseLearner, Parameters
from models.core.chance import Chance
from models.core.inner_loop import call, inner_gradient
from models.core.training_classes import expect_classes
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNormMode

HEAD = "head"
Adapts = Literal["head", "network"]
RATES = (1e-4, 3e-4, 1e-3, 3e-3)


class HeadLearner(ChosenRate):
    """On a stream a new head, drawn at random, is trained by one step for each example, in the order of arrival.

    In meta-training there is a head of all classes of the split, ``learner.head``.

    Args:
        backbone: of the features.
        classes: of the meta-training split; None: as many as the data has.
        eval_rates: see ChosenRate.
        eval_optimizer: of the steps on a stream: "adam", as in OML's and ANML's reference code, or "sgd".
        eval_adapts: "head" alone, over features that no experience changes; or the whole "network", from where it was
            meta-trained to.
        passes: through each experience, one after another.
        batch_norm, **others: see MetaLearner.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: int | None = None,
        eval_rates: Sequence[float] = RATES,
        eval_optimizer: StreamOptimizer = "adam",
        eval_adapts: Adapts = "head",
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
        self.eval_adapts: Adapts = eval_adapts
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

    # The network ----------------------------------------------------------------------------------------------------

    def features(self, inputs: Tensor) -> Tensor:
        """Features (P, F) of inputs, by the network as it was meta-trained."""
        return self.learner.backbone(inputs)

    def prepared(self, inputs: Tensor) -> Tensor:
        """What ``logits`` takes in the place of inputs (P, *input), (P, …): what of them no experience changes."""
        return inputs

    def logits(self, parameters: Parameters, prepared: Tensor) -> Tensor:
        """Of prepared inputs, by the learner with these parameters in the places of its own."""
        return call(self.learner, parameters, prepared, self.statistics_source)

    # On a stream ----------------------------------------------------------------------------------------------------

    def encode(self, inputs: Tensor) -> Tensor:
        return self.prepared(inputs) if self.eval_adapts == "network" else with_one(self.features(inputs))

    def start(self, chance: Chance) -> tuple[Parameters, Chance]:
        """The backbone's parameters before a stream, by their names in ``learner``, where the network adapts."""
        named = self.learner.named_parameters()
        return {n: p for n, p in named if p.requires_grad and not self.learner.in_head(n)}, chance

    def begin(self, classes: int, chance: Chance) -> Descent:
        head, chance = drawn_head(chance, classes, self.learner.backbone.out_features, self.learner.head.weight)
        if self.eval_adapts == "head":
            return Descent.of({HEAD: head}, self.eval_optimizer)
        parameters, _ = self.start(chance)
        return Descent.of(parameters | split_head(head), self.eval_optimizer)

    def update(self, state: Descent, experience: Support) -> Descent:
        step = self.step_of_network if self.eval_adapts == "network" else self.step_of_head
        for _ in range(self.passes):
            if self.eval_adapts == "head" and self.eval_optimizer == "sgd":
                taken = all_slopes(state.parameters[HEAD], experience.x, experience.y, self.eval_rate)
                state = state.stepped({HEAD: taken.T @ experience.x}, self.eval_rate)
                continue
            for x, y in zip(experience.x, experience.y, strict=True):
                state = step(state, x, y)
        return state

    def step_of_head(self, state: Descent, x: Tensor, y: Tensor) -> Descent:
        """After one example, of features (F + 1,) and label ()."""
        slope = slopes(state.parameters[HEAD] @ x, y)
        return state.stepped({HEAD: torch.outer(slope, x)}, self.eval_rate)

    def step_of_network(self, state: Descent, x: Tensor, y: Tensor) -> Descent:
        """After one example, a prepared input and its label ()."""

        def loss(parameters: Parameters) -> Tensor:
            return self.loss(self.logits(parameters, x[None]), y[None])

        return state.stepped(inner_gradient(loss, state.parameters), self.eval_rate)

    def predict(self, state: Descent, query_x: Tensor) -> Tensor:
        if self.eval_adapts == "network":
            return self.logits(state.parameters, query_x)
        return query_x @ state.parameters[HEAD].T


def split_head(head: Tensor) -> Parameters:
    """A head (classes, features + 1) as the parameters of a base learner."""
    return {"head.weight": head[:, :-1], "head.bias": head[:, -1]}
