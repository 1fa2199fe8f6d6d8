"""Meta-gradients on small tasks, and finite differences to check them by."""

from __future__ import annotations

import pytest
import torch

from datamodules.episodes import Episodes
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

    ReLU's kinks make the inner gradient jump, so the step must be too small to cross one.
    """
    gradient = meta_gradient(learner, batch)

    def objective() -> float:
        with torch.no_grad():
            return learner.map(learner.objective, batch)[0].mean().item()

    g = torch.Generator().manual_seed(3)
    for name, parameter in learner.named_parameters():
        direction = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
        step, values = 1e-8, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step * direction
            values.append(objective())
            with torch.no_grad():
                parameter -= sign * step * direction
        numeric = (values[0] - values[1]) / (2 * step)
        exact = (gradient[name] * direction).sum().item()
        assert exact == pytest.approx(numeric, rel=1e-5, abs=2e-7), name
