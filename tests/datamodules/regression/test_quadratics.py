"""Random quadratics: what they are, and that a task is a function of its number."""

from __future__ import annotations

import pytest
import torch

from datamodules import Quadratics


def test_queries_are_the_support_set_and_entries_are_standard_normal():
    """Catches rows that are scaled, shared between tasks or splits, and queries other than what is minimised."""
    data = Quadratics(dimension=10, seed=3)
    batch = data.distribution("train").sample(range(400))
    assert batch.support_x.shape == (400, 10, 10) and batch.support_y.shape == (400, 10, 1)
    assert torch.equal(batch.support_x, batch.query_x) and torch.equal(batch.support_y, batch.query_y)
    for entries in (batch.support_x, batch.support_y):
        error = entries.numel() ** -0.5
        assert abs(float(entries.mean())) < 5 * error
        assert abs(float(entries.square().mean()) - 1) < 5 * 2**0.5 * error
    correlation = (batch.support_x[:, :, :1] * batch.support_y).mean()
    assert abs(float(correlation)) < 5 * batch.support_y.numel() ** -0.5
    assert data.task_shape() == {"shots": 10, "queries": 10}


def test_a_task_is_a_function_of_seed_split_and_number():
    """Catches tasks that depend on their batch, and splits that share them."""
    data = Quadratics(seed=3)
    whole, one = (data.distribution("test").sample(n) for n in ([4, 7], [7]))
    assert torch.equal(whole.support_x[1], one.support_x[0])
    assert not torch.equal(one.support_x, data.distribution("train").sample([7]).support_x)
    assert not torch.equal(one.support_x, Quadratics(seed=4).distribution("test").sample([7]).support_x)


def test_an_empty_problem_is_refused():
    """Catches a dimension of 0."""
    with pytest.raises(ValueError, match="dimension"):
        Quadratics(dimension=0)
