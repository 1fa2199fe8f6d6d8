"""What gradient-based learners share: parameters as dictionaries, the inner loop, the map over tasks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.utils._pytree import tree_map

from datamodules.episodes import Support, Task
from models.backbones import Backbone
from models.normalization import BatchNorm, BatchNormMode, Source, Statistics, normalize_by, recording, statistics_of

Parameters = dict[str, Tensor]
State = TypeVar("State")


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


def base_learner(backbone: Backbone, outputs: int) -> nn.Sequential:
    """A backbone and a linear head of so many rows."""
    module = nn.Sequential()
    module.add_module("backbone", backbone)
    module.add_module("head", nn.Linear(backbone.out_features, outputs))
    return module


def call(module: nn.Module, parameters: Parameters, x: Tensor, source: Source = "batch", step: int = 0) -> Tensor:
    """``module(x)`` with these parameters, normalised as ``normalize_by`` has it; those not given are the module's."""
    with normalize_by(source, step):
        return functional_call(module, parameters, (x,))


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
    """The mean (ways, …) of what the examples of each class have, (S, …); shots may differ by class."""
    members = F.one_hot(support.y, support.ways).to(values.dtype)
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


def hessian_product(loss: Callable[[Parameters], Tensor], parameters: Parameters) -> Callable[[Parameters], Parameters]:
    """The product of a support loss's Hessian at ``parameters`` with a vector.

    The Hessian is its own transpose, so one gradient and its graph serve all products: 15 times as fast on a CPU as a
    forward derivative of the gradient for each, with convolutions and batch norm.
    """
    with inner(parameters):
        product = vjp(grad(loss), parameters)[1]

    def times(vector: Parameters) -> Parameters:
        with inner(parameters):
            return product(vector)[0]

    return times


def inner_product(a: Parameters, b: Parameters) -> Tensor:
    """The sum of the products of all elements of two dictionaries."""
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def conjugate_gradient(product: Callable[[Parameters], Parameters], target: Parameters, steps: int) -> Parameters:
    """x with ``product(x)`` near ``target``, by so many steps of conjugate gradients from 0.

    ``product`` is that of a symmetric matrix. Where the curvature along a direction is not positive x stays what it is
    (Steihaug, SIAM J. Numer. Anal. 1983), and is ``target`` if that is the first direction.
    """
    x = {name: torch.zeros_like(t) for name, t in target.items()}
    residual, direction, square = target, target, inner_product(target, target)
    for step in range(steps):
        image = product(direction)
        curvature = inner_product(direction, image)
        goes = curvature > 0  # tasks are mapped over: no branch can be taken for one of them alone
        length = torch.where(goes, square / torch.where(goes, curvature, 1.0), float(step == 0))
        x = {name: v + length * direction[name] for name, v in x.items()}
        residual = {name: r - length * image[name] for name, r in residual.items()}
        new = inner_product(residual, residual)
        turn = new / torch.where(goes, square, 1.0)
        direction = {
            name: torch.where(goes, r + turn * direction[name], direction[name]) for name, r in residual.items()
        }
        square = new
    return x


def sgd_path(
    loss: Callable[[Parameters, int], Tensor],
    parameters: Parameters,
    rate: float | Callable[[int], Parameters],
    steps: int,
    first_order: bool = False,
) -> Iterator[Parameters]:
    """Gradient descent from ``parameters``: yields them before the first step and after each one.

    Differentiable through every step with respect to ``parameters`` (Finn et al., ICML 2017, eq. 1), and usable
    under ``no_grad`` and ``inference_mode``, where it keeps no graph.

    Args:
        loss: the support loss of the parameters that adapt, at a step counted from 0.
        parameters: to start from.
        rate: the inner learning rate; or for each step one for each parameter, of its shape or a scalar.
        steps: number of steps, 0 or more.
        first_order: take the inner gradients as constants (FOMAML).
    """
    yield parameters
    for step in range(steps):
        gradient = inner_gradient(loss, parameters, step)
        if first_order:
            gradient = {name: g.detach() for name, g in gradient.items()}
        rates = rate(step) if callable(rate) else dict.fromkeys(parameters, rate)
        parameters = {name: p - rates[name] * gradient[name] for name, p in parameters.items()}
        yield parameters


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
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    return {n: p for n, p in named if id(p) not in fixed}, {n: p for n, p in named if id(p) in fixed}


def for_ways(parameters: Parameters, ways: int) -> Parameters:
    """Parameters, or what has their shapes, with the rows of the head for so many classes; 0 leaves them."""
    if not ways:
        return parameters
    return {n: fit_outputs(p, ways) if n.startswith("head.") else p for n, p in parameters.items()}


def fit_outputs(weight: Tensor, outputs: int) -> Tensor:
    """A linear head's rows (or bias) for another number of classes.

    The first ``outputs`` rows; classes beyond the trained ones start from the mean row, which serves any class when
    labels are permuted (Ye and Chao, ICLR 2022).
    """
    if outputs <= len(weight):
        return weight[:outputs]
    return torch.cat([weight, weight.mean(0, keepdim=True).expand(outputs - len(weight), *weight.shape[1:])])


def automatic_chunk(tensors: tuple[Tensor, ...]) -> int:
    """How many tasks to map over at once.

    On a GPU all: a loop over tasks is bound by kernel launches. On a CPU some 500,000 input elements, at least 16
    tasks: measured with the 4-layer network on Omniglot, more gains nothing and only takes memory.
    """
    tasks = len(tensors[0])
    if tensors[0].device.type != "cpu":
        return tasks
    return min(tasks, max(16, 500_000 // max(1, sum(t.numel() for t in tensors) // tasks)))


def map_tasks(
    function: Callable[..., Any], *tensors: Tensor, chunk: int | None = None, randomness: str = "different"
) -> Any:
    """Apply a function of one task to every task of a meta-batch.

    Args:
        function: takes one task's slice of every tensor; returns a tensor, or a dict or tuple of tensors.
        tensors: each (T, …).
        chunk: tasks vmapped together; 1 loops in Python; None chooses (``automatic_chunk``).
        randomness: whether tasks that are vmapped together draw "different" random numbers or the "same".

    Returns:
        What the function returns, every tensor with a leading (T,).
    """
    tasks = len(tensors[0])
    chunk = chunk or automatic_chunk(tensors)
    if chunk == 1:
        results = [tree_map(lambda t: t[None], function(*(t[i] for t in tensors))) for i in range(tasks)]
    else:
        mapped = vmap(function, randomness=randomness)
        results = [mapped(*(t[i : i + chunk] for t in tensors)) for i in range(0, tasks, chunk)]
    return results[0] if len(results) == 1 else tree_map(lambda *parts: torch.cat(parts), *results)


class EmbedOnce:
    """Embeds every image of a split once, however many tasks show it.

    For evaluation only, where an embedding depends on nothing but its image and the weights stay as they are.

    Args:
        embed: images (N, *input) to embeddings (N, features).
        at_once: images embedded together.
    """

    def __init__(self, embed: Callable[[Tensor], Tensor], at_once: int = 1024) -> None:
        self.embed, self.at_once = embed, at_once
        self.slot = torch.empty(0, dtype=torch.long)  # of each row of the split in values, -1 where not embedded yet
        self.values: Tensor | None = None

    def __call__(self, x: Tensor, rows: Tensor) -> Tensor:
        """Embeddings (T, n, features) of images (T, n, *input), the rows (T, n) of the split."""
        flat, images = rows.flatten(), x.flatten(0, 1)
        top = int(flat.max()) + 1
        self.slot = self.slot.to(flat.device)
        if top > len(self.slot):
            self.slot = torch.cat([self.slot, self.slot.new_full((top - len(self.slot),), -1)])
        place = torch.full_like(self.slot, -1)
        place[flat] = torch.arange(len(flat), device=flat.device)
        new = torch.nonzero((place >= 0) & (self.slot < 0)).flatten()
        if len(new):
            embedded = torch.cat([self.embed(part) for part in images[place[new]].split(self.at_once)])
            start = 0 if self.values is None else len(self.values)
            self.slot[new] = torch.arange(start, start + len(new), device=flat.device)
            self.values = embedded if self.values is None else torch.cat([self.values, embedded])
        assert self.values is not None
        return self.values[self.slot[flat]].unflatten(0, rows.shape)
