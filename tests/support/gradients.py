"""Meta-gradients on small tasks, and finite differences to check them by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch

from datamodules.core.episodes import Episodes
from models import MetaLearner


def episodes(tasks=3, ways=3, shots=2, queries=2, size=8, dtype=torch.float64, seed=1) -> Episodes:
    g = torch.Generator().manual_seed(seed)
    label = torch.arange(ways)
    return Episodes(
        support_x=torch.rand(tasks, ways * shots, 1, size, size, generator=g, dtype=dtype),
        support_y=label.repeat_interleave(shots).expand(tasks, -1),
        query_x=torch.rand(tasks, ways * queries, 1, size, size, generator=g, dtype=dtype),
        query_y=label.repeat_interleave(queries).expand(tasks, -1),
        index=torch.arange(tasks),
        ways=ways,
        meta_batch=tasks,
    )


def meta_gradient(learner: MetaLearner, batch: Episodes) -> dict[str, torch.Tensor]:
    learner.zero_grad()
    loss, *_ = learner.map(learner.objective, batch)
    loss.mean().backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in learner.named_parameters()}


def assert_is_gradient(
    gradient: Mapping[str, torch.Tensor],
    parameters: Iterable[tuple[str, torch.Tensor]],
    objective: Callable[[], Any],
    rel: float = 1e-5,
    abs: float = 2e-7,
    steps: tuple[float, ...] = (1e-8, 1e-7, 1e-6),
) -> None:
    """Gradients by name, each along a random direction, against central differences of what they are of.

    A long step crosses a kink of ReLU, where the inner gradient jumps; a short one leaves the rounding of sums, which
    no two machines share. One of the steps must agree: a wrong gradient agrees with none.

    Args:
        gradient: of the objective.
        parameters: that it is of, at the point; there must be a gradient of each.
        objective: a scalar, the same whenever it is computed at one point.
        rel, abs: tolerances.
        steps: along the direction; one is enough where nothing has a kink.
    """

    def difference(parameter: torch.Tensor, direction: torch.Tensor, step: float) -> float:
        start, values = parameter.detach().clone(), []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.copy_(start + sign * step * direction)
                values.append(float(objective()))
            parameter.copy_(start)
        return (values[0] - values[1]) / (2 * step)

    g = torch.Generator().manual_seed(3)
    checked = 0
    for checked, (name, parameter) in enumerate(parameters, 1):  # noqa: B007
        assert name in gradient, f"{name} has no gradient"
        direction = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
        exact = (gradient[name] * direction).sum().item()
        numeric = [difference(parameter, direction, step) for step in steps]
        assert any(exact == pytest.approx(n, rel=rel, abs=abs) for n in numeric), (name, exact, numeric)
    assert checked


def gradients_of(learner: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what a backward pass left, by parameter."""
    return {n: p.grad.clone() for n, p in learner.named_parameters() if p.grad is not None}


def assert_equals_finite_differences(learner: MetaLearner, batch: Episodes) -> None:
    """The meta-gradient of every parameter against central differences of the objective."""
    gradient = meta_gradient(learner, batch)
    assert_is_gradient(gradient, learner.named_parameters(), lambda: learner.map(learner.objective, batch)[0].mean())
