"""Batch normalisation whose statistics are an explicit choice, right under ``vmap`` and twice differentiable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BatchNormMode = Literal["transductive", "support", "per_query", "running", "none"]
"""Where the statistics that normalise a query come from.

transductive: the batch of queries itself, so a prediction depends on the other queries (MAML as published).
support: the task's support set under the adapted parameters (MetaBN; Bronskill et al., ICML 2020).
per_query: the support set and this one query, a pass for every query (Reptile without transduction; Nichol et al.,
    2018). Gradient learners do so in meta-training, too; embedding learners take support set and queries at once.
running: averages over meta-training (Ioffe and Szegedy, 2015), as Prototypical Networks use them.
none: no normalisation; scale and shift remain.
"""

Statistics = dict[tuple["BatchNorm", int], tuple[Tensor, Tensor]]
"""Mean and variance, (channels,) each, of every batch-norm layer at an inner step (0 where steps share them)."""

Source = Literal["batch", "running", "none"] | Statistics

_source: ContextVar[tuple[Source, int]] = ContextVar("source", default=("batch", 0))
_record: ContextVar[tuple[Statistics, bool] | None] = ContextVar("record", default=None)


@contextmanager
def normalize_by(source: Source, step: int = 0) -> Iterator[None]:
    """Choose the statistics that every BatchNorm inside the block uses.

    Args:
        source: "batch", the statistics of the input; "running", the layer's averages; "none"; or given statistics.
        step: the inner step, for layers whose steps have their own averages, scales and shifts (``per_step``).
    """
    token = _source.set((source, step))
    try:
        yield
    finally:
        _source.reset(token)


@contextmanager
def recording(record: Statistics | None, differentiable: bool = True) -> Iterator[None]:
    """Put the statistics of every batch that is normalised by its own into ``record``; None records nothing.

    What is recorded inside a ``torch.func`` transformation must not be used outside of it. Where no gradient is to pass
    through the statistics, ``differentiable=False`` takes those that the layer computes anyway.
    """
    token = _record.set(None if record is None else (record, differentiable))
    try:
        yield
    finally:
        _record.reset(token)


def record(statistics: Statistics) -> None:
    """Put statistics into the innermost record: those that a transformation inside of it recorded and returned."""
    if (ambient := _record.get()) is not None:
        ambient[0].update(statistics)


def statistics_of(forward: Callable[[], Tensor], step: int = 0) -> Statistics:
    """The statistics of the batches that a forward pass normalises by their own."""
    statistics: Statistics = {}
    with normalize_by("batch", step), recording(statistics):
        forward()
    return statistics


class BatchNorm(nn.Module):
    """Batch normalisation over (N, C) or (N, C, H, W), affine.

    ``vmap`` over ``nn.BatchNorm2d(affine=True)`` gives a wrong second-order gradient without a word; the statistics
    alone, with scale and shift as an operation of their own, give the right one at the same speed.

    Args:
        channels: C.
        momentum: weight of the newest batch in the running averages.
        eps: added to the variance.

    Attributes:
        fixed: normalise by the running averages whatever is asked for, and never move them: part of a frozen backbone.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps, self.fixed = momentum, eps, False
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.steps = 0

    def per_step(self, steps: int) -> None:
        """Give each inner step averages, scale and shift of its own, (steps, channels); later steps share the last."""
        self.steps = steps
        for name in ("weight", "bias"):
            setattr(self, name, nn.Parameter(getattr(self, name).detach().repeat(steps, 1)))
        for name in ("running_mean", "running_var"):
            setattr(self, name, getattr(self, name).repeat(steps, 1))

    def forward(self, x: Tensor) -> Tensor:
        (source, step), record = _source.get(), _record.get()
        source = "running" if self.fixed else source
        step = min(step, self.steps - 1) if self.steps else 0
        own = (self.weight, self.bias, self.running_mean, self.running_var)
        scale, shift, running_mean, running_var = (t[step] for t in own) if self.steps else own
        shape = (-1,) + (1,) * (x.dim() - 2)
        if source == "batch":
            fused = torch._C._functorch.peek_interpreter_stack() is None  # no transformation: the fused layer is right
            weight, bias = (scale, shift) if fused else (None, None)
            if record is not None and not record[1]:
                x, mean, rstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, self.eps)
                record[0][self, step] = (mean.detach(), rstd.detach().square().reciprocal() - self.eps)
            else:
                if record is not None:
                    over = [0, *range(2, x.dim())]
                    record[0][self, step] = (x.mean(over), x.var(over, correction=0))
                x = F.batch_norm(x, None, None, weight, bias, training=True, eps=self.eps)
            if fused:
                return x
        elif source != "none":
            mean, var = (running_mean, running_var) if source == "running" else source[self, step]
            x = (x - mean.view(shape)) * torch.rsqrt(var + self.eps).view(shape)
        return torch.addcmul(shift.view(shape), x, scale.view(shape))

    @torch.no_grad()
    def update_running(self, mean: Tensor, var: Tensor, step: int = 0) -> None:
        """Move the running averages, those of the inner step, towards a batch's statistics, (channels,) each."""
        for average, new in ((self.running_mean, mean), (self.running_var, var)):
            (average[step] if self.steps else average).lerp_(new.to(average), self.momentum)


class InstanceNorm(nn.Module):
    """Instance normalisation over (N, C, H, W), affine: each image's channels by their own statistics, in every mode.

    As for batch norm, ``vmap`` over torch's own affine layer gives a wrong second-order gradient.

    Args:
        channels: C.
        eps: added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
        x = (x - mean) * torch.rsqrt(var + self.eps)
        return torch.addcmul(self.bias.view(-1, 1, 1), x, self.weight.view(-1, 1, 1))


def replace_batch_norm(module: nn.Module) -> nn.Module:
    """Swap every ``nn.BatchNorm*`` of a foreign backbone for ``BatchNorm``, with its parameters, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            own = BatchNorm(child.num_features, 0.1 if child.momentum is None else child.momentum, child.eps)
            if child.affine:
                own.weight, own.bias = child.weight, child.bias
            else:
                own.requires_grad_(False)
            if child.track_running_stats:
                own.running_mean, own.running_var = child.running_mean, child.running_var
            own.train(child.training)
            setattr(module, name, own)
        else:
            replace_batch_norm(child)
    return module
