"""ALFA: a network gives each inner step its learning rates and weight decays, from weights and gradients met there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.core.episodes import Support
from datamodules.core.errors import at_least
from models.core.base_learner import BaseLearner, Parameters, entry
from models.core.gradient_learner import GradientLearner
from models.core.inner_loop import Adapted, adapted, call, inner_gradient, inner_path, split_parameters
from models.core.learner import Paper
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNormMode


class ALFA(GradientLearner):
    """MAML with adaptive learning of hyperparameters for fast adaptation: θ' = β ∘ θ - α ∘ ∇L(θ) (eq. 4).

    Before each step a generator, two layers with ReLU between, maps the task's learning state, the means of every
    tensor's weights and of its gradients, to two numbers for every tensor. They multiply rates a and decays b that are
    meta-learned for each tensor and step: α = a·α(state), β = 1 - b·β(state). Where the generator is 1 throughout, that
    is MAML with learned rates and weight decays.

    Args:
        backbone: the base learner without its head.
        outputs: rows of the head: ways, or the dimension of y.
        inner_rate: what a starts from.
        weight_decay: λ of an inner step of θ - rate (∇L(θ) + λ θ); b starts from inner_rate · λ.
        inner_steps: gradient steps in meta-training.
        eval_inner_steps: gradient steps in evaluation; None takes as many as in training.
        random_init: leave the base learner as it was drawn, and learn to adapt it: the paper's ablation. Each weight
            then has a meta-learned decay of its own, inner_rate · λ at first, which b multiplies from 1 on.
        first_order: leave out second derivatives.
        adapt_normalization: adapt batch norm's scale and shift too; the reference code does not.
        code_size: of a task embedding that the generator reads beside the learning state; 0 for none. It is the
            buffer ``code``, zeros, whose place a task's own takes by functional replacement.
        batch_norm, **others: see MetaLearner.
    """

    paper = Paper(
        "Baik, Choi, Choi, Kim and Lee",
        "Meta-Learning with Adaptive Hyperparameters",
        "NeurIPS",
        2020,
        "https://arxiv.org/abs/2011.00209",
    )
    tasks = frozenset({"classification", "regression"})
    code: Tensor

    def __init__(
        self,
        backbone: Backbone,
        outputs: int = 5,
        inner_rate: float = 0.01,
        weight_decay: float = 5e-4,
        inner_steps: int = 5,
        eval_inner_steps: int | None = None,
        random_init: bool = False,
        first_order: bool = False,
        adapt_normalization: bool = False,
        code_size: int = 0,
        batch_norm: BatchNormMode = "transductive",
        **others: Any,
    ) -> None:
        super().__init__(outputs, inner_steps, eval_inner_steps, batch_norm, **others)
        at_least(0, code_size=code_size)
        self.learner = BaseLearner(backbone, outputs)
        self.first_order, self.code_size = first_order, code_size
        start = split_parameters(self.learner, adapt_normalization)[0]
        self.adapting = tuple(start)
        steps, tensors, decay = max(1, inner_steps), len(start), inner_rate * weight_decay
        self.rates = nn.Parameter(torch.full((steps, tensors), inner_rate))
        self.decays = nn.Parameter(torch.full((steps, tensors), 1.0 if random_init else decay))
        self.own_decays = nn.ParameterDict(
            {entry(n): nn.Parameter(torch.full_like(p, decay)) for n, p in start.items() if random_init}
        )
        self.generator = nn.Sequential(
            nn.Linear(2 * tensors + code_size, 2 * tensors), nn.ReLU(), nn.Linear(2 * tensors, 2 * tensors)
        )
        self.register_buffer("code", torch.zeros(code_size), persistent=False)
        if random_init:
            self.learner.requires_grad_(False)

    @property
    def embedding_size(self) -> int:
        return len(self.adapting)

    def embed_task(self, support: Support) -> Tensor:
        """Of the learning state before the first step what differs by task: the means of the gradients."""
        start, loss = self.problem(support)
        return means(inner_gradient(loss, start, 0))

    def class_rows(self) -> Parameters:
        own = {entry(name) for name in self.learner.head_parameters()}
        return super().class_rows() | {f"own_decays.{n}": p for n, p in self.own_decays.items() if n in own}

    def problem(self, support: Support) -> tuple[Parameters, Any]:
        """Parameters to start from, and the support loss of such parameters at a step."""
        own = dict(self.learner.named_parameters())
        start = self.learner.resize_head({name: own[name] for name in self.adapting}, support.ways)

        def loss(parameters: Parameters, step: int) -> Tensor:
            outputs = call(self.learner, parameters, support.x, self.statistics_source, step)
            return self.support_loss(outputs, support)

        return start, loss

    def adaptation(self, support: Support) -> Iterator[Adapted]:
        start, loss = self.problem(support)
        by_name = {name: self.own_decays[entry(name)] for name in start if self.own_decays}
        own_decays = self.learner.resize_head(by_name, support.ways)

        def update(step: int, parameters: Parameters, gradient: Parameters, *_: Any) -> tuple[Parameters, None]:
            state = torch.cat([means(parameters), means(gradient), self.code])
            rate, decay = self.generator(state).chunk(2)
            place = min(step, len(self.rates) - 1)
            rates = dict(zip(start, rate * self.rates[place], strict=True))
            decays = dict(zip(start, decay * self.decays[place], strict=True))
            if own_decays:
                decays = {name: d * own_decays[name] for name, d in decays.items()}
            return {n: (1 - decays[n]) * p - rates[n] * gradient[n] for n, p in parameters.items()}, None

        path = inner_path(loss, start, update, self.steps, first_order=self.first_order)
        for step, (parameters, _) in enumerate(path):
            yield adapted(self.learner, parameters, support, self.batch_norm, step)


def means(tensors: Parameters) -> Tensor:
    """The mean of each tensor, (tensors,)."""
    return torch.stack([t.mean() for t in tensors.values()])
