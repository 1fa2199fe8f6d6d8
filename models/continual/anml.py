"""ANML: a neuromodulated meta-learning algorithm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from models.continual.head_learner import HeadLearner, split_head
from models.continual.learner import Stream
from models.core.base_learner import BaseLearner, Parameters
from models.core.inner_loop import last, sgd_path
from models.core.learner import Paper
from models.networks.backbones import Backbone
from models.networks.batch_norm import normalize_by


class Gated(BaseLearner):
    """The prediction network: logits of a backbone's features, each times its gate."""

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.head(self.backbone(x) * gates)


class ANML(HeadLearner):
    """A neuromodulatory network of its own opens and closes the features of the prediction network, for each image.

    In meta-training (Algorithm 1) the prediction network, convolutions and head, learns a class by one step of SGD for
    each of its images, while the neuromodulatory network stays as it is; the loss at the end, on these images and on
    remembered ones of all classes, is differentiated through the steps by the weights of both. On a stream of
    evaluation a new head learns from gated features (``eval_adapts``: or the whole prediction network).

    Args:
        modulator: the convolutions of the neuromodulatory network, whose features a linear layer makes gates of.
        backbone: those of the prediction network.
        classes: of the meta-training split, rows of its head; None: as many as the data has.
        inner_rate: of the steps in meta-training.
        first_order: take the steps' gradients as constants, as the authors' released code does.
        redraw: the head's row of the class that is learned anew; otherwise it is that which was meta-learned.
        **others: see HeadLearner and MetaLearner.
    """

    paper = Paper(
        "Beaulieu, Frati, Miconi, Lehman, Stanley, Clune and Cheney",
        "Learning to Continually Learn",
        "ECAI",
        2020,
        "https://arxiv.org/abs/2002.09571",
    )
    asks_learned = True

    def __init__(
        self,
        modulator: Backbone,
        backbone: Backbone,
        classes: int | None = None,
        inner_rate: float = 0.1,
        first_order: bool = False,
        redraw: bool = True,
        **others: Any,
    ) -> None:
        super().__init__(backbone, classes, **others)
        if inner_rate < 0:
            raise ValueError(f"inner_rate is {inner_rate} but must be at least 0")
        self.inner_rate, self.first_order, self.redraw = inner_rate, first_order, redraw
        self.modulator = modulator
        self.gate = nn.Linear(modulator.out_features, backbone.out_features)
        head = self.learner.head
        self.learner = Gated(backbone, self.classes)
        self.learner.head = head

    def gates(self, x: Tensor) -> Tensor:
        """Of each feature of images (N, *input), in (0, 1), (N, features)."""
        return self.gate(self.modulator(x)).sigmoid()

    def features(self, inputs: Tensor) -> Tensor:
        return self.learner.backbone(inputs) * self.gates(inputs)

    def prepared(self, inputs: Tensor) -> Tensor:
        return torch.cat([inputs.flatten(1), self.gates(inputs)], 1)

    def logits(self, parameters: Parameters, prepared: Tensor) -> Tensor:
        pixels, gates = prepared.split([prepared.shape[1] - self.gate.out_features, self.gate.out_features], 1)
        x = pixels.unflatten(1, self.learner.backbone.input_shape)
        with normalize_by(self.statistics_source):
            return functional_call(self.learner, parameters, (x, gates))

    def objective(self, task: Stream) -> tuple[Tensor, Tensor]:
        inputs, targets = self.queries(task)  # the first of them are those that are learned
        learned_y = task.y.flatten()
        with normalize_by(self.statistics_source):
            prepared = self.prepared(inputs)
        parameters = dict(self.learner.named_parameters())
        if self.redraw:
            parameters |= split_head(self.redrawn(task))

        def loss(parameters: Parameters, step: int) -> Tensor:
            return self.loss(self.logits(parameters, prepared[step : step + 1]), learned_y[step : step + 1])

        steps = sgd_path(loss, parameters, self.inner_rate, len(learned_y), self.first_order)
        prediction = self.logits(last(steps), prepared)
        return self.loss(prediction, targets), prediction
