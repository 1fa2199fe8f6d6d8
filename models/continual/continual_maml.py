"""Continual-MAML: fast weights for the task at hand, slow ones to begin the next from, whenever it comes."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad_and_value

from datamodules.continual.streams import Streams
from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Support
from datamodules.core.errors import at_least
from datamodules.core.metric import Metric
from models.continual.learner import ContinualLearner, Stream
from models.core.base_learner import BaseLearner, Parameters, entry
from models.core.chance import Chance
from models.core.inner_loop import call, inner, inner_path, last
from models.core.learner import Paper
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNormMode

Boundary = Literal["gain", "loss", "never"]
OuterOptimizer = Literal["adam", "sgd"]
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # of Adam (Kingma and Ba, ICLR 2015)


class Slow(NamedTuple):
    """What is learned over tasks.

    Attributes:
        parameters: φ, the initialisation.
        rates: of the inner loop, of each parameter's shape, or scalars.
        mean, square: Adam's averages of the gradients of both, and of these squared; empty with SGD.
        steps: taken so far, ().
    """

    parameters: Parameters
    rates: Parameters
    mean: tuple[Parameters, Parameters] | tuple[()]
    square: tuple[Parameters, Parameters] | tuple[()]
    steps: Tensor


class Phase(NamedTuple):
    """A learner on ONE stream.

    Attributes:
        slow: see there.
        fast: θ, what it predicts with.
        walked: sums of the gradients that led from the initialisation to θ.
        met: whether there was an experience, () bool.
        boundary: whether the last one was taken for the first of a task, () bool.
    """

    slow: Slow
    fast: Parameters
    walked: Parameters
    met: Tensor
    boundary: Tensor


def chosen(which: Tensor, first: Any, second: Any) -> Any:
    """The first of two parts of a state where ``which``, () bool, holds, otherwise the second."""
    if isinstance(first, Tensor):
        return torch.where(which, first, second)
    if isinstance(first, dict):
        return {name: chosen(which, first[name], second[name]) for name in first}
    parts = [chosen(which, a, b) for a, b in zip(first, second, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)


class ContinualMAML(ContinualLearner):
    """Meta-trained as MAML on tasks one by one; on a stream it goes on to learn, fast weights and slow ones.

    A batch is predicted with the fast weights θ; once its labels are known (algorithm 2 of the paper, and its released
    code where they part):

    1. It begins a task where adapting the initialisation φ to it leaves a loss lower by ``threshold`` or more than that
       of θ (``boundary``: "gain"), or where the loss of θ is that high ("loss").
    2. In a task the batch is what the fast weights are tested on: φ takes a step by ∇_θ L(θ), of first order, at a rate
       times 1 - exp(-λ L(θ)), the update modulation: what was known moves little. Learned rates take one, too.
    3. Fast weights of a new task begin at φ. In a task they go on from where they are (``prolonged``), or begin anew.

    MAML without updates is ``outer_rate`` 0 without ``prolonged``; online gradient descent is ``boundary`` "never" and
    ``outer_rate`` 0.

    Args:
        backbone: the base learner without its head. All of its parameters adapt.
        outputs: classes of a task.
        inner_rate: α.
        inner_steps: gradient steps on a batch, in meta-training and on a stream.
        first_order: take inner gradients as constants in meta-training; on a stream they always are.
        learned_rates: a rate for each parameter, learned along with it.
        boundary: how a task's first batch is recognised, see above.
        threshold: γ, nats.
        outer_rate: η, of φ on a stream.
        outer: its optimizer.
        modulation: λ; None for none.
        prolonged: see above.
        batch_norm, **others: see MetaLearner.
    """

    paper = Paper(
        "Caccia, Rodríguez, Ostapenko, Normandin, Lin, Page-Caccia, Laradji, Rish, Lacoste, Vázquez and Charlin",
        "Online Fast Adaptation and Knowledge Accumulation (OSAKA): a New Approach to Continual Learning",
        "NeurIPS",
        2020,
        "https://arxiv.org/abs/2003.05856",
    )
    own_metrics = {
        "boundaries_found": Metric("higher", "share of changes of task that were recognised", share=True),
        "false_boundaries": Metric("lower", "share of other experiences taken for a change", share=True),
    }

    def __init__(
        self,
        backbone: Backbone,
        outputs: int = 5,
        inner_rate: float = 0.1,
        inner_steps: int = 8,
        first_order: bool = True,
        learned_rates: bool = False,
        boundary: Boundary = "gain",
        threshold: float = 2.5,
        outer_rate: float = 1e-4,
        outer: OuterOptimizer = "adam",
        modulation: float | None = 0.25,
        prolonged: bool = True,
        batch_norm: BatchNormMode = "transductive",
        **others: Any,
    ) -> None:
        super().__init__(batch_norm=batch_norm, **others)
        at_least(1, outputs=outputs)
        at_least(0, inner_steps=inner_steps, outer_rate=outer_rate, modulation=modulation)
        if batch_norm in ("support", "per_query"):
            raise ValueError(f"batch_norm is {batch_norm} but ContinualMAML takes transductive, running or none")
        self.learner = BaseLearner(backbone, outputs)
        self.inner_rate, self.inner_steps, self.first_order = inner_rate, inner_steps, first_order
        self.boundary: Boundary = boundary
        self.outer: OuterOptimizer = outer
        self.threshold, self.outer_rate, self.modulation, self.prolonged = threshold, outer_rate, modulation, prolonged
        self.rates = nn.ParameterDict()
        if learned_rates:
            for name, p in self.learner.named_parameters():
                if p.requires_grad:
                    self.rates[entry(name)] = nn.Parameter(torch.full_like(p, inner_rate))

    def check(self, data: EpisodicDataModule) -> str | None:
        if getattr(data, "remember", 0):
            return "ContinualMAML remembers no classes from before a stream: set data.remember to 0"
        return None

    # Meta-training --------------------------------------------------------------------------------------------------

    def initialisation(self, classes: int) -> tuple[Parameters, Parameters]:
        """φ and the rates as meta-training left them, for so many classes."""
        parameters: Parameters = {n: p for n, p in self.learner.named_parameters() if p.requires_grad}
        if self.rates:
            rates = {n: self.rates[entry(n)] for n in parameters}
            rates = self.learner.resize_head(rates, classes)
        else:
            rates = {n: p.new_tensor(self.inner_rate) for n, p in parameters.items()}
        return self.learner.resize_head(parameters, classes), rates

    def batch_loss(self, parameters: Parameters, experience: Support) -> Tensor:
        """L of parameters on an experience."""
        return self.loss(call(self.learner, parameters, experience.x, self.statistics_source), experience.y)

    def adapted(
        self, start: Parameters, rates: Parameters, experience: Support, walked: Parameters, first_order: bool = True
    ) -> tuple[Parameters, Parameters]:
        """Parameters after the inner loop on an experience, and ``walked`` with its gradients added."""

        def loss(at: Parameters, step: int) -> Tensor:
            return self.batch_loss(at, experience)

        def descend(step: int, at: Parameters, gradient: Parameters, value: Tensor, walked: Parameters) -> Any:
            parameters = {n: p - rates[n] * gradient[n] for n, p in at.items()}
            return parameters, {n: w + gradient[n] for n, w in walked.items()}

        return last(inner_path(loss, start, descend, self.inner_steps, walked, first_order))

    def objective(self, task: Stream) -> tuple[Tensor, Tensor]:
        """MAML's, of each experience by itself: its own queries after adaptation to it."""
        start, rates = self.initialisation(task.classes)
        predictions = []
        for number in range(len(task.x)):
            parameters, _ = self.adapted(start, rates, task.experience(number), {}, self.first_order)
            predictions.append(self.predict_with(parameters, task.query_x[number]))
        prediction = torch.cat(predictions)
        return self.loss(prediction, task.query_y.flatten()), prediction

    # On a stream ----------------------------------------------------------------------------------------------------

    def begin(self, classes: int, chance: Chance) -> Phase:
        parameters, rates = self.initialisation(classes)
        both = (parameters, rates)
        zeros: Any = tuple({n: torch.zeros_like(v) for n, v in part.items()} for part in both)
        averages = zeros if self.outer == "adam" else ()
        like = next(iter(parameters.values()))
        slow = Slow(parameters, rates, averages, averages, like.new_zeros(()))
        walked = zeros[0] if self.rates else {}
        return Phase(slow, parameters, walked, torch.zeros_like(chance.key > 0), torch.zeros_like(chance.key > 0))

    def update(self, state: Phase, experience: Support) -> Phase:
        with inner(state.fast):
            gradient, before = grad_and_value(self.batch_loss)(state.fast, experience)
        nothing = {n: torch.zeros_like(w) for n, w in state.walked.items()}
        anew = self.adapted(state.slow.parameters, state.slow.rates, experience, nothing)
        boundary = self.begins_task(before, self.batch_loss(anew[0], experience)) | ~state.met
        slow = chosen(boundary, state.slow, self.stepped(state, gradient, before))
        start, walked = (state.fast, state.walked) if self.prolonged else (slow.parameters, nothing)
        fast, walked = chosen(boundary, anew, self.adapted(start, slow.rates, experience, walked))
        return Phase(slow, fast, walked, torch.ones_like(state.met), boundary)

    def begins_task(self, before: Tensor, after: Tensor) -> Tensor:
        """Whether a batch is of another task, () bool, from its losses by θ and by φ adapted to it."""
        if self.boundary == "never":
            return torch.zeros_like(before, dtype=torch.bool)
        return (before - after if self.boundary == "gain" else before) >= self.threshold

    def stepped(self, state: Phase, gradient: Parameters, loss: Tensor) -> Slow:
        """The slow weights after a step by the loss of the fast ones and its gradient."""
        weight = 1.0 if self.modulation is None else 1 - torch.exp(-self.modulation * loss)
        # θ is φ less the rates times what was walked, which is taken as constant.
        of_rates = {n: -gradient[n] * w for n, w in state.walked.items()}
        slow, steps = state.slow, state.slow.steps + 1
        moved, means, squares = [], [], []
        for k, (values, slopes) in enumerate(((slow.parameters, gradient), (slow.rates, of_rates))):
            part, mean, square = dict(values), {}, {}
            for n, v in values.items():
                g = weight * slopes[n] if n in slopes else torch.zeros_like(v)
                if slow.mean:
                    mean[n] = BETA1 * slow.mean[k][n] + (1 - BETA1) * g
                    square[n] = BETA2 * slow.square[k][n] + (1 - BETA2) * g.square()
                    g = mean[n] / (1 - BETA1**steps) / ((square[n] / (1 - BETA2**steps)).sqrt() + EPS)
                part[n] = v - self.outer_rate * g
            moved.append(part)
            means.append(mean)
            squares.append(square)
        averages = (tuple(means), tuple(squares)) if slow.mean else ((), ())
        return Slow(moved[0], moved[1], *averages, steps)  # pyright: ignore[reportArgumentType]

    def predict(self, state: Phase, query_x: Tensor) -> Tensor:
        return self.predict_with(state.fast, query_x)

    def predict_with(self, parameters: Parameters, x: Tensor) -> Tensor:
        """Logits (Q, classes) of the base learner with these parameters."""
        return call(self.learner, parameters, x, self.statistics_source)

    # What is measured -----------------------------------------------------------------------------------------------

    def noted(self, state: Phase) -> dict[str, Tensor]:
        return {"boundary": state.boundary}

    def followed(self, streams: Streams) -> dict[str, Tensor]:
        known = {"boundaries": streams.task["boundaries"]} if "boundaries" in streams.task else {}
        return super().followed(streams) | known

    def metrics_of_streams(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Where it is known when tasks change, also how often that was recognised; the first experience aside.

        Of a stream whose task never changes all changes count as found.
        """
        metrics = super().metrics_of_streams(found)
        if "boundaries" not in found:
            return metrics
        true, said = found["boundaries"][:, 1:], found["boundary"][:, 1:]
        missed, alarms = (true & ~said).sum(1), (said & ~true).sum(1)
        return metrics | {
            "boundaries_found": 1 - missed / true.sum(1).clamp(min=1),
            "false_boundaries": alarms / (~true).sum(1).clamp(min=1),
        }
