"""Elastic weight consolidation: what earlier experiences need of a weight holds it where it is."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import jacrev

from datamodules.core.episodes import Support
from datamodules.core.errors import at_least
from models.continual.online_sgd import Online, OnlineSGD
from models.core.base_learner import Parameters
from models.core.inner_loop import inner
from models.core.learner import Paper
from models.networks.backbones import Backbone

Form = Literal["separate", "online"]


class Anchors(NamedTuple):
    """All penalties so far, Σᵢ ½ Fᵢ (θ - θᵢ)² for each parameter up to a constant: they add up to one quadratic.

    Attributes:
        precision: Σ Fᵢ.
        pull: Σ Fᵢ θᵢ.
    """

    precision: Parameters
    pull: Parameters


class EWC(OnlineSGD):
    """Gradient steps on the loss and ½ λ Σᵢ Fᵢ (θ - θᵢ)² over earlier experiences i (Kirkpatrick et al. 2017, eq. 3).

    Fᵢ is the diagonal of the Fisher information at the end of experience i, mean over examples of the expectation over
    the model's own classes of squared gradients of log p: the true one, not that of the labels.

    Args:
        backbone: see OnlineSGD.
        penalty: λ.
        form: "separate" is the paper's, a penalty around the end of each experience; "online" has one penalty around
            the end of the last, with γ times what was before (Schwarz et al., ICML 2018, eqs. 8 and 9).
        decay: γ, of "online".
        fisher_examples: of each experience, its first, that F is measured on.
        **others: see OnlineSGD.
    """

    paper = Paper(
        "Kirkpatrick, Pascanu, Rabinowitz, Veness, Desjardins and others",
        "Overcoming catastrophic forgetting in neural networks",
        "PNAS",
        2017,
        "https://doi.org/10.1073/pnas.1611835114",
    )

    def __init__(
        self,
        backbone: Backbone,
        penalty: float = 100.0,
        form: Form = "separate",
        decay: float = 1.0,
        fisher_examples: int = 200,
        **others: Any,
    ) -> None:
        super().__init__(backbone, **others)
        at_least(0, penalty=penalty, decay=decay)
        at_least(1, fisher_examples=fisher_examples)
        self.penalty, self.decay, self.fisher_examples = penalty, decay, fisher_examples
        self.form: Form = form

    def keep(self, parameters: Parameters, classes: int) -> Anchors:
        return Anchors(*({n: torch.zeros_like(p) for n, p in parameters.items()} for _ in range(2)))

    def step(self, state: Online, x: Tensor, y: Tensor) -> Online:
        gradient, at = self.gradient(state.parameters, x, y), state.parameters
        held = {n: f * at[n] - state.kept.pull[n] for n, f in state.kept.precision.items()}
        return self.descended(state, {n: g + self.penalty * held[n] for n, g in gradient.items()})

    def close(self, state: Online, experience: Support) -> Online:
        fisher, at, (precision, pull) = self.fisher(state.parameters, experience), state.parameters, state.kept
        if self.form == "online":
            precision = {n: self.decay * precision[n] + f for n, f in fisher.items()}
            pull = {n: f * at[n] for n, f in precision.items()}
        else:
            precision = {n: precision[n] + f for n, f in fisher.items()}
            pull = {n: pull[n] + f * at[n] for n, f in fisher.items()}
        return state._replace(kept=Anchors(precision, pull))

    def fisher(self, parameters: Parameters, experience: Support) -> Parameters:
        """The diagonal of the Fisher information, by parameter."""
        total = {n: torch.zeros_like(p) for n, p in parameters.items()}
        examples = experience.x[: self.fisher_examples]
        with inner(parameters):
            for x in examples.split(1):
                log_p = self.logits(parameters, x)[0].log_softmax(0)
                slopes = jacrev(lambda at, x=x: self.logits(at, x)[0].log_softmax(0))(parameters)
                for name, slope in slopes.items():
                    total[name] = total[name] + torch.tensordot(log_p.exp(), slope.square(), 1)
        return {n: f / len(examples) for n, f in total.items()}
