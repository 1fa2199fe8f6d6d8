"""The inner loop: parameters as dictionaries, gradient steps on a support set, and what batch norm needs of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

from datamodules.core.episodes import Support, Task
from models.core.base_learner import Parameters
from models.networks.batch_norm import (
    BatchNorm,
    BatchNormMode,
    Source,
    Statistics,
    normalize_by,
    recording,
    statistics_of,
)

State = TypeVar("State")
Value = TypeVar("Value")
# Tensors that take the places of parameters now: they are trained, though without a graph they do not say so.
_given: ContextVar[frozenset[int]] = ContextVar("given", default=frozenset())


class Adapted(NamedTuple):
    """A base learner after adaptation.

    Attributes:
        parameters: all that are not the module's own.
        statistics: of batch norm, by the support set under these parameters; None in the other modes.
        support_x: which every query is normalised along with; None in the other modes.
        step: gradient steps taken so far.
    """

    parameters: Parameters
    statistics: Statistics | None = None
    support_x: Tensor | None = None
    step: int = 0


def call(module: nn.Module, parameters: Parameters, x: Tensor, source: Source = "batch", step: int = 0) -> Tensor:
    """``module(x)`` with these parameters, normalised as ``normalize_by`` has it; those not given are the module's."""
    with normalize_by(source, step):
        return functional_call(module, parameters, (x,))


class _Around(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def with_values(module: nn.Module, values: Parameters, function: Callable[[], Value]) -> Value:
    """``function()``, while these tensors take the places of the module's parameters and buffers of their names."""
    token = _given.set(_given.get() | {id(value) for value in values.values()})
    try:
        return functional_call(_Around(module), {f"inside.{n}": v for n, v in values.items()}, (function,))
    finally:
        _given.reset(token)


def adapted(module: nn.Module, parameters: Parameters, support: Support, mode: BatchNormMode, step: int = 0) -> Adapted:
    """These parameters together with what batch norm in this mode needs of the support set."""
    statistics = None
    if mode == "support":
        statistics = statistics_of(lambda: functional_call(module, parameters, (support.x,)), max(step - 1, 0))
    return Adapted(parameters, statistics, support.x if mode == "per_query" else None, step)


def query(module: nn.Module, state: Adapted, x: Tensor, source: Source) -> Tensor:
    """The adapted module's outputs (Q, outputs) for queries (Q, *input).

    Args:
        module: the base learner.
        state: of the task.
        x: the queries.
        source: of batch norm's statistics, where the state brings none.
    """
    # The queries after step k share the place of the support batch that step k was taken on (Antoniou et al., 2019).
    place = max(state.step - 1, 0)
    support_x = state.support_x
    if support_x is None or source != "batch":
        return call(module, state.parameters, x, state.statistics or source, place)

    def alone(one: Tensor) -> Tensor:
        return call(module, state.parameters, torch.cat([support_x, one[None]]), source, place)[-1]

    return vmap(alone, randomness="different")(x)


def task_features(backbone: nn.Module, task: Task, mode: BatchNormMode, source: Source) -> tuple[Tensor, Tensor]:
    """Features of a task's support set and of its queries, (S, features) and (Q, features), for meta-training.

    Both as in evaluation; but where running averages are in use there, support and queries make one batch, as in the
    reference code of prototypical networks: a support set alone may be too small to normalise by.
    """
    support = task.support
    if mode == "running":
        features = call(backbone, {}, torch.cat([support.x, task.query_x]), source)
        return features[: len(support.x)], features[len(support.x) :]
    state = adapted(backbone, {}, support, mode)
    return call(backbone, {}, support.x, source), query(backbone, state, task.query_x, source)


def class_means(values: Tensor, support: Support) -> Tensor:
    """The mean (ways, …) of what the examples of each class have, (S, …); shots may differ by class.

    Raises:
        ValueError: a class has no example; where tasks are mapped over it is not seen.
    """
    members = support.members().to(values.dtype)
    if torch._C._functorch.peek_interpreter_stack() is None and not (some := members.any(0)).all():
        missing = int(some.logical_not().nonzero()[0])
        raise ValueError(f"class {missing} of {support.ways} has no example in the support set")
    return (members.T @ values) / members.sum(0)[:, None]


@contextmanager
def inner(parameters: Parameters, mixed_precision: bool = False) -> Iterator[None]:
    """What the inner loop computes inside: not recorded, and in its parameters' own precision.

    Second derivatives lose too much in the Trainer's mixed precision, which ``mixed_precision`` takes all the same.
    """
    device = next(iter(parameters.values())).device.type
    with recording(None), nullcontext() if mixed_precision else torch.autocast(device, enabled=False):
        yield


def inner_gradient(
    loss: Callable[..., Tensor], parameters: Parameters, *others: Any, mixed_precision: bool = False
) -> Parameters:
    """The gradient of a support loss by its first argument."""
    with inner(parameters, mixed_precision):
        return grad(loss)(parameters, *others)


UpdateRule = Callable[[int, Parameters, Parameters, Tensor, Any], tuple[Parameters, Any]]
"""One inner step: from its number, the parameters, the gradient and the value of the support loss and what the rule
keeps from step to step, the next parameters and what it keeps of this one."""


def inner_path(
    loss: Callable[[Parameters, int], Tensor],
    parameters: Parameters,
    rule: UpdateRule,
    steps: int,
    memory: Any = None,
    first_order: bool = False,
    first_step: int = 0,
) -> Iterator[tuple[Parameters, Any]]:
    """Steps of an update rule on a support loss: yields parameters and memory before the first step and after each one.

    Differentiable through every step with respect to ``parameters`` and to what the rule uses, and usable under
    ``no_grad`` and ``inference_mode``, where it keeps no graph.

    Args:
        loss: the support loss of the parameters that adapt, at a step counted from 0.
        parameters: to start from.
        rule: makes a step; no mixed precision is used inside of it.
        steps: number of steps, 0 or more.
        memory: what the rule keeps, before the first step.
        first_order: take gradients and values of the loss as constants.
        first_step: the number of the first step, where a path goes on.
    """
    yield parameters, memory
    for step in range(first_step, first_step + steps):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not first_order), inner(parameters):
            gradient, value = grad_and_value(loss)(parameters, step)
        with inner(parameters):
            parameters, memory = rule(step, parameters, gradient, value, memory)
        yield parameters, memory


def sgd_path(
    loss: Callable[[Parameters, int], Tensor],
    parameters: Parameters,
    rate: float | Callable[[int], Parameters],
    steps: int,
    first_order: bool = False,
    clip: float | None = None,
) -> Iterator[Parameters]:
    """Gradient descent from ``parameters`` (Finn et al., ICML 2017, eq. 1): ``inner_path`` of one rule.

    Args:
        loss, parameters, steps, first_order: see ``inner_path``; FOMAML is of first order.
        rate: the inner learning rate; or for each step one for each parameter, of its shape or a scalar.
        clip: what each entry of an inner gradient is limited to, either way.
    """

    def descend(step: int, at: Parameters, gradient: Parameters, *_: Any) -> tuple[Parameters, None]:
        if clip is not None:
            gradient = {name: g.clamp(-clip, clip) for name, g in gradient.items()}
        rates = rate(step) if callable(rate) else dict.fromkeys(at, rate)
        return {name: p - rates[name] * gradient[name] for name, p in at.items()}, None

    for reached, _ in inner_path(loss, parameters, descend, steps, first_order=first_order):
        yield reached


def mini_batches(
    examples: int, batch: int, steps: int, device: Any, generator: torch.Generator | None = None
) -> Tensor:
    """Which examples each step takes, (steps, batch): passes through shuffled examples, end to end.

    Fewer examples than ``batch`` make the batch. With a generator of one seed they are the same for every task.
    """
    batch = min(batch, examples)
    passes = -(-steps * batch // examples)
    order = torch.rand(passes, examples, generator=generator, device=device).argsort(-1)
    return order.flatten()[: steps * batch].view(steps, batch)


def shuffled_passes(
    examples: int, batch: int, passes: int, device: Any, generator: torch.Generator
) -> Iterator[Tensor]:
    """Which examples each step takes, (batch,): passes through shuffled ones, whose last step takes what is left."""
    for _ in range(passes):
        yield from torch.rand(examples, generator=generator, device=device).argsort().split(batch)


def flat(parameters: Parameters) -> Tensor:
    """All elements of the parameters, end to end, (N,)."""
    return torch.cat([p.flatten() for p in parameters.values()])


def unflat(elements: Tensor, like: Parameters) -> Parameters:
    """Parameters of the names and shapes of ``like`` from their elements, (N,)."""
    parts = elements.split([p.numel() for p in like.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(like.items(), parts, strict=True)}


def with_gradient(value: Tensor, surrogate: Tensor) -> Tensor:
    """A scalar of this value whose gradient is that of ``surrogate``."""
    return value.detach() + surrogate - surrogate.detach()


def last(path: Iterable[State]) -> State:
    """The end of a path, of which nothing else is kept."""
    return deque(path, maxlen=1).pop()


def split_parameters(module: nn.Module, adapt_normalization: bool) -> tuple[Parameters, Parameters]:
    """The trainable parameters in two: those that the inner loop adapts, and batch norm's scales and shifts.

    With ``adapt_normalization`` the second part is empty.
    """
    fixed = set()
    if not adapt_normalization:
        fixed = {id(p) for m in module.modules() if isinstance(m, BatchNorm) for p in m.parameters()}
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad or id(p) in _given.get()]
    return {n: p for n, p in named if id(p) not in fixed}, {n: p for n, p in named if id(p) in fixed}
