"""Meta-SGD: a learned rate for every element, with its gradient, against finite differences and learn2learn."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import MLP, Conv4, MetaSGD
from tests.support.gradients import assert_equals_finite_differences, episodes, meta_gradient


def small(**settings) -> MetaSGD:
    torch.manual_seed(2)
    backbone = Conv4(hidden=4, image_size=8)
    return MetaSGD(backbone, outputs=3, **{"inner_rate": (-0.1, 0.4), **settings}).double()


@pytest.mark.parametrize("batch_norm", ["transductive", "support", "none"])
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_meta_gradient_equals_finite_differences(inner_steps, batch_norm):
    """Catches rates outside of the graph, and a first-order gradient of the initialisation."""
    learner = small(inner_steps=inner_steps, batch_norm=batch_norm, adapt_normalization=True, chunk=2)
    assert_equals_finite_differences(learner, episodes())


def test_a_rate_for_every_element_free_to_turn_negative():
    """Catches one rate per tensor, rates that the meta-optimizer lacks, and a bound at zero."""
    learner = small(adapt_normalization=True)
    rates, weights = list(learner.rates.values()), list(learner.learner.parameters())
    assert sorted(tuple(r.shape) for r in rates) == sorted(tuple(p.shape) for p in weights)
    assert sum(r.numel() for r in rates) * 2 == sum(p.numel() for p in learner.parameters())
    learner.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=1e-3)
    in_optimizer = {id(p) for group in learner.configure_optimizers().param_groups for p in group["params"]}
    assert in_optimizer == {id(p) for p in learner.parameters()}
    task = episodes(tasks=1)[0]
    with torch.no_grad():
        for r in rates:
            r.fill_(-0.5)
    before = learner.loss(learner.predict(next(iter(learner.adaptation(task.support))), task.support.x), task.support.y)
    after = learner.loss(learner.predict(learner.adapt(task.support), task.support.x), task.support.y)
    assert after > before  # uphill


def test_published_start_of_the_rates():
    """Catches rates that start outside of the paper's range."""
    learner = MetaSGD(MLP(hidden=(40, 40)), outputs=1)
    values = torch.cat([r.flatten() for r in learner.rates.values()])
    assert 0.005 <= values.min() < 0.01
    assert 0.095 < values.max() <= 0.1


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="learn2learn does not build there")
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_meta_gradient_equals_learn2learns(inner_steps):
    """Catches any difference from the field's reference: weights' and rates' gradients, several tasks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import learn2learn as l2l

    learner = MetaSGD(MLP(in_features=2, hidden=(8, 8)), outputs=1, inner_rate=0.125, inner_steps=inner_steps).double()
    g = torch.Generator().manual_seed(0)
    batch = episodes(tasks=3)
    shape = (3, 6)
    batch.support_x, batch.query_x = (torch.randn(*shape, 2, generator=g, dtype=torch.float64) for _ in range(2))
    batch.support_y, batch.query_y = (torch.randn(*shape, 1, generator=g, dtype=torch.float64) for _ in range(2))
    batch.ways = 0
    ours = meta_gradient(learner, batch)

    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    for p, q in zip(model.parameters(), learner.learner.parameters(), strict=True):
        p.data.copy_(q.data)
    theirs = l2l.algorithms.MetaSGD(model, lr=0.125)
    for t in range(3):
        clone = theirs.clone()
        for _ in range(inner_steps):
            clone.adapt(F.mse_loss(clone(batch.support_x[t]), batch.support_y[t]))
        (F.mse_loss(clone(batch.query_x[t]), batch.query_y[t]) / 3).backward()
    for (name, _), p, rate in zip(learner.learner.named_parameters(), model.parameters(), theirs.lrs, strict=True):
        torch.testing.assert_close(ours[f"learner.{name}"], p.grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(ours[f"rates.{name.replace('.', '_')}"], rate.grad, rtol=1e-9, atol=1e-12)
