"""MAML with implicit gradients: the meta-gradient depends on where the inner loop ends, not on its path."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from datamodules.core.episodes import Support, Task
from datamodules.core.errors import at_least
from datamodules.core.metric import Metric
from models.core.base_learner import BaseLearner, Parameters
from models.core.gradient_learner import GradientLearner
from models.core.inner_loop import (
    Adapted,
    adapted,
    call,
    inner,
    inner_gradient,
    split_parameters,
    with_gradient,
)
from models.core.learner import Paper
from models.core.second_order import conjugate_gradient, hessian_product, inner_product
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNormMode

Loss = Callable[[Parameters], Tensor]
LENGTHS = tuple(0.25**k for k in reversed(range(6)))  # of a Newton step, tried one after the other


class IMAML(GradientLearner):
    """Solves a regularised inner problem, G(φ) = L(φ) + λ/2 ‖φ - θ‖² on the support set (eq. 3), and differentiates
    its solution φ* implicitly (lemma 1): memory and the meta-gradient do not grow with the inner steps.

    All gradients follow from v = (H + λI)⁻¹ ∇L_query(φ*), H the Hessian of the support loss at φ*, found by conjugate
    gradients: λv by θ, -⟨φ* - θ, v⟩ by λ. They hold as far as ∇G(φ*) is 0, so its norm is among the training metrics.

    Args:
        backbone: the base learner without its head.
        outputs: rows of the head: ways, or the dimension of y.
        solver: of the inner problem: gradient descent on G, or "hessian_free", Newton steps by conjugate gradients,
            each of the length among 1, ¼, 1/16, … and 0 that brings G down most.
        inner_rate: learning rate of gradient descent; it converges below 2 / (λ + H's greatest eigenvalue).
        inner_steps: steps of the solver in meta-training.
        eval_inner_steps: steps in evaluation; None takes as many as in training.
        proximal_lambda: λ, above 0.
        learned_lambda: meta-learn λ from there on, by its logarithm.
        eval_lambda: λ in evaluation; None keeps that of training, as the paper has it; the reference code takes 0.
        cg_steps: of conjugate gradients, for the meta-gradient and for each Newton step.
        cg_damping: δ in ((1 + δ) I + H/λ) g = ∇L_query for the meta-gradient; the paper's is 0, the reference code's 1.
        adapt_normalization: adapt batch norm's scale and shift too; else they are meta-learned, which takes their
            influence on φ* into account.
        batch_norm, **others: see MetaLearner.
    """

    paper = Paper(
        "Rajeswaran, Finn, Kakade and Levine",
        "Meta-Learning with Implicit Gradients",
        "NeurIPS",
        2019,
        "https://arxiv.org/abs/1909.04630",
    )
    tasks = frozenset({"classification", "regression"})

    own_metrics = {"inner_gradient": Metric("lower")}

    def __init__(
        self,
        backbone: Backbone,
        outputs: int = 5,
        solver: Literal["gradient", "hessian_free"] = "gradient",
        inner_rate: float = 0.1,
        inner_steps: int = 16,
        eval_inner_steps: int | None = None,
        proximal_lambda: float = 2.0,
        learned_lambda: bool = False,
        eval_lambda: float | None = None,
        cg_steps: int = 5,
        cg_damping: float = 0.0,
        adapt_normalization: bool = False,
        batch_norm: BatchNormMode = "transductive",
        **others: Any,
    ) -> None:
        super().__init__(outputs, inner_steps, eval_inner_steps, batch_norm, **others)
        at_least(1, cg_steps=cg_steps)
        if proximal_lambda <= 0:
            raise ValueError(f"proximal_lambda is {proximal_lambda} but must be above 0")
        for name, value in {"eval_lambda": eval_lambda, "cg_damping": cg_damping}.items():
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value} but must be at least 0")
        if solver == "hessian_free" and eval_lambda == 0:
            raise ValueError("eval_lambda is 0 but must be above 0 for the Hessian-free solver")
        self.learner = BaseLearner(backbone, outputs)
        self.solver = solver
        self.inner_rate = inner_rate
        self.eval_lambda = eval_lambda
        self.cg_steps, self.cg_damping = cg_steps, cg_damping
        self.adapt_normalization = adapt_normalization
        self.proximal_lambda = proximal_lambda
        self.log_lambda = nn.Parameter(torch.tensor(math.log(proximal_lambda))) if learned_lambda else None

    @property
    def strength(self) -> float | Tensor:
        """λ."""
        if self.eval_lambda is not None and not self.training:
            return self.eval_lambda
        return self.proximal_lambda if self.log_lambda is None else self.log_lambda.exp()

    def inner_problem(self, support: Support) -> tuple[Parameters, Parameters, Loss]:
        """θ, the parameters ψ that the inner loop leaves as they are, and the support loss L of φ."""
        start, fixed = split_parameters(self.learner, self.adapt_normalization)

        def support_loss(parameters: Parameters) -> Tensor:
            outputs = call(self.learner, parameters | fixed, support.x, self.statistics_source)
            return self.support_loss(outputs, support)

        return self.learner.resize_head(start, support.ways), fixed, support_loss

    def proximal_gradient(self, loss: Loss, at: Parameters, start: Parameters) -> Parameters:
        """∇G(φ)."""
        strength = self.strength
        return {n: g + strength * (at[n] - start[n]) for n, g in inner_gradient(loss, at).items()}

    def solve(self, loss: Loss, at: Parameters, target: Parameters, damping: float = 0.0) -> Parameters:
        """(H + λI)⁻¹ of a vector, by ((1 + damping) I + H/λ) g = target, of which it is g/λ."""
        strength, product = self.strength, hessian_product(loss, at)

        def system(vector: Parameters) -> Parameters:
            return {n: (1 + damping) * vector[n] + h / strength for n, h in product(vector).items()}

        return {n: g / strength for n, g in conjugate_gradient(system, target, self.cg_steps).items()}

    @torch.no_grad()
    def improve(self, loss: Loss, at: Parameters, start: Parameters) -> Parameters:
        """φ after one more step of the solver."""

        def objective(parameters: Parameters) -> Tensor:
            apart = {n: p - start[n] for n, p in parameters.items()}
            with inner(parameters):
                return loss(parameters) + self.strength / 2 * inner_product(apart, apart)

        gradient = self.proximal_gradient(loss, at, start)
        if self.solver == "gradient":
            return {n: p - self.inner_rate * gradient[n] for n, p in at.items()}
        direction = self.solve(loss, at, gradient)
        best, least = at, objective(at)
        for length in LENGTHS:
            trial = {n: p - length * direction[n] for n, p in at.items()}
            value = objective(trial)
            best = {n: torch.where(value <= least, trial[n], p) for n, p in best.items()}
            least = torch.minimum(value, least)
        return best

    def adaptation(self, support: Support) -> Iterator[Adapted]:
        start, fixed, loss = self.inner_problem(support)
        parameters = {n: p.detach() for n, p in start.items()}
        yield adapted(self.learner, parameters | fixed, support, self.batch_norm)
        for step in range(self.steps):
            parameters = self.improve(loss, parameters, start)
            yield adapted(self.learner, parameters | fixed, support, self.batch_norm, step + 1)

    def objective(self, task: Task) -> tuple[Any, ...]:
        start, fixed, support_loss = self.inner_problem(task.support)
        state = self.adapt(task.support)
        solution = {n: state.parameters[n] for n in start}

        def query_loss(parameters: Parameters) -> Tensor:
            at = adapted(self.learner, parameters | fixed, task.support, self.batch_norm, state.step)
            return self.loss(self.predict(at, task.query_x), task.query_y)

        with torch.no_grad():
            v = self.solve(support_loss, solution, inner_gradient(query_loss, solution), self.cg_damping)
        # Of no value at φ*, but the gradient of ⟨∇G(φ*), v⟩ by θ, λ and ψ, at constant φ* and v, is what L_query loses
        # as φ* moves with them.
        gradient = self.proximal_gradient(support_loss, solution, start)
        prediction = self.predict(state, task.query_x)
        loss = self.loss(prediction, task.query_y)
        norm = inner_product(gradient, gradient).detach().sqrt()
        surrogate = loss - inner_product(gradient, v)
        return with_gradient(loss, surrogate), prediction, {"metrics": {"inner_gradient": norm}}
