"""Meta-gradients on small tasks, and finite differences to check them by."""

from __future__ import annotations

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


def assert_equals_finite_differences(learner: MetaLearner, batch: Episodes) -> None:
    """The meta-gradient of every parameter, along a random direction, against central differences of the objective.

    A long step crosses a kink of ReLU, where the inner gradient jumps; a short one leaves the rounding of sums, which
    no two machines share. One of the steps must agree: a wrong gradient agrees with none.
    """
    gradient = meta_gradient(learner, batch)

    def objective() -> float:
        with torch.no_grad():
            return learner.map(learner.objective, batch)[0].mean().item()

    def difference(parameter: torch.Tensor, direction: torch.Tensor, step: float) -> float:
        start, values = parameter.detach().clone(), []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.copy_(start + sign * step * direction)
                values.append(objective())
            parameter.copy_(start)
        return (values[0] - values[1]) / (2 * step)

    g = torch.Generator().manual_seed(3)
    for name, parameter in learner.named_parameters():
        direction = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
        exact = (gradient[name] * direction).sum().item()
        numeric = (difference(parameter, direction, step) for step in (1e-8, 1e-7, 1e-6))
        assert any(exact == pytest.approx(n, rel=1e-5, abs=2e-7) for n in numeric), (name, exact)
