"""Continual-MAML: boundaries, the update of slow weights, and fast weights that stay or begin anew."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.optim import Adam

from datamodules.continual.streams import Streams
from datamodules.core.episodes import Support
from models import MLP, ContinualMAML
from models.continual.continual_maml import Phase
from models.core.chance import Chance
from tests.support.gradients import assert_is_gradient

CHANGES = [True, False, False, True, False, True, False, False, False]


def learner(**settings) -> ContinualMAML:
    """Of two classes on the plane; a linear model where nothing is hidden."""
    torch.manual_seed(3)
    hidden = settings.pop("hidden", [])
    common = {"outputs": 2, "inner_rate": 1.0, "inner_steps": 3, "batch_norm": "none"}
    return ContinualMAML(MLP(2, hidden), **{**common, **settings}).double()


def flipping(streams: int = 1) -> Streams:
    """Streams of batches of six points whose label is the sign of their first number, turned over at each change."""
    g, j = torch.Generator().manual_seed(0), len(CHANGES)
    x = torch.randn(streams * j * 8, 2, generator=g, dtype=torch.float64)
    x[:, 0] += x[:, 0].sign()  # a margin
    turned = torch.tensor(CHANGES).cumsum(0) % 2
    y = ((x[:, 0] > 0).long().view(streams, j, 8) + turned[:, None]) % 2
    place = torch.arange(len(x)).view(streams, j, 8)
    number = torch.arange(streams)
    return Streams(
        inputs=x,
        rows=place[..., :6],
        y=y[..., :6],
        query_rows=place[..., 6:],
        query_y=y[..., 6:],
        index=number,
        key=number + 11,
        digest=number,
        classes=2,
        points=(j,),
        meta_batch=streams,
        task={"boundaries": torch.tensor([CHANGES]).expand(streams, -1)},
    )


def support(streams: Streams, j: int) -> Support:
    return streams.experience(0, j)


def loss(model: ContinualMAML, parameters: dict, batch: Support) -> torch.Tensor:
    return F.cross_entropy(functional_call(model.learner, parameters, (batch.x,)), batch.y)


def descended(model: ContinualMAML, start: dict, batch: Support, steps: int = 3, rate: float = 1.0) -> dict:
    """Plain gradient descent, by torch's own autograd."""
    at = {n: p.detach().clone().requires_grad_() for n, p in start.items()}
    for _ in range(steps):
        g = torch.autograd.grad(loss(model, at, batch), list(at.values()))
        at = {n: (p - rate * d).detach().requires_grad_() for (n, p), d in zip(at.items(), g, strict=True)}
    return at


def after(model: ContinualMAML, streams: Streams, experiences: int) -> Phase:
    with torch.no_grad():
        state = model.begin(2, Chance.of(streams.key[0]))
        for j in range(experiences):
            state = model.update(state, support(streams, j))
    return state


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name].detach(), rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("boundary", ["gain", "loss"])
def test_recognises_every_change_of_a_stream_and_no_other(boundary):
    """Catches losses that are compared the wrong way round, of the wrong weights, or after the labels were learned; on
    a stream whose labels turn over, of which all changes are known."""
    model = learner(boundary=boundary, threshold=1.0, outer_rate=0.001).eval()
    with torch.inference_mode():
        found = model.followed(flipping(2))
        metrics = model.metrics_of_streams(found)
    assert found["boundary"].tolist() == [CHANGES, CHANGES]
    assert metrics["boundaries_found"].tolist() == [1, 1] and metrics["false_boundaries"].tolist() == [0, 0]
    # Whoever does not know of a change is wrong at it and right otherwise: predicted before it was learned.
    expected = 1 - torch.tensor(CHANGES[1:]).double()
    torch.testing.assert_close((found["online"][:, 1:] > 0.5).double(), expected.expand(2, -1))


def test_shares_of_boundaries_are_counted_by_hand():
    """Catches shares of all experiences, the first one counted, and a share of nothing that is no number."""
    true = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]]).bool()
    said = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 1, 0]]).bool()
    model = learner().eval()
    found = model.followed(flipping(2)) | {"boundaries": true, "boundary": said}
    metrics = model.metrics_of_streams(found)
    assert metrics["boundaries_found"].tolist() == [0.5, 1]
    assert metrics["false_boundaries"].tolist() == [0.5, 0.25]


def test_modulated_step_is_the_formula():
    """Catches a step of φ by other weights' loss or gradient, a modulation of the wrong sign, and one at a boundary:
    φ - η (1 - exp(-λ L(θ))) ∇L(θ) inside of a task, φ unmoved at its beginning."""
    model, stream = learner(outer="sgd", outer_rate=0.3, modulation=0.7, threshold=1.0).eval(), flipping()
    first, second, third = (after(model, stream, n) for n in (1, 2, 3))
    initial = dict(model.learner.named_parameters())
    same(first.slow.parameters, initial)
    for before, now, j in ((first, second, 1), (second, third, 2)):
        theta = {n: p.clone().requires_grad_() for n, p in before.fast.items()}
        value = loss(model, theta, support(stream, j))
        g = torch.autograd.grad(value, list(theta.values()))
        weight = 0.3 * (1 - torch.exp(-0.7 * value))
        expected = {n: before.slow.parameters[n] - weight * d for n, d in zip(theta, g, strict=True)}
        same(now.slow.parameters, expected)
    changed = after(model, stream, 4)  # the fourth begins a task
    assert changed.boundary and not third.boundary
    same(changed.slow.parameters, third.slow.parameters)
    same(changed.fast, descended(model, third.slow.parameters, support(stream, 3)))


@pytest.mark.parametrize("prolonged", [True, False])
def test_fast_weights_go_on_until_the_boundary_or_begin_anew(prolonged):
    """Catches adaptation that is never prolonged, or beyond a boundary, against descent by torch's own autograd."""
    model, stream = learner(outer_rate=0.01, threshold=1.0, prolonged=prolonged).eval(), flipping()
    for n in (1, 2, 3):
        before, now = after(model, stream, n - 1), after(model, stream, n)
        goes_on = before.fast if prolonged else now.slow.parameters
        start = before.slow.parameters if n == 1 else goes_on
        same(now.fast, descended(model, start, support(stream, n - 1)))


def test_adam_of_the_slow_weights_is_torchs():
    """Catches a bias correction by the experience's number, and averages that boundaries touch."""
    model, stream = learner(outer_rate=0.02, threshold=1.0, modulation=None).eval(), flipping()
    phi = {n: p.detach().clone().requires_grad_() for n, p in model.learner.named_parameters()}
    optimizer = Adam(phi.values(), lr=0.02)
    for j in range(len(CHANGES)):
        if not CHANGES[j]:
            theta = {n: p.clone().requires_grad_() for n, p in after(model, stream, j).fast.items()}
            g = torch.autograd.grad(loss(model, theta, support(stream, j)), list(theta.values()))
            for p, d in zip(phi.values(), g, strict=True):
                p.grad = d
            optimizer.step()
    state = after(model, stream, len(CHANGES))
    assert state.slow.steps == CHANGES.count(False)
    same(state.slow.parameters, phi)


def test_rates_take_the_gradient_through_the_whole_phase():
    """Catches a rate's gradient of its last steps alone, or of the phase before: by torch's own autograd through
    θ = φ - Σ α ∇ with the gradients as constants, as first order has them."""
    model, stream = learner(learned_rates=True, outer="sgd", outer_rate=0.5, modulation=None, threshold=1.0), flipping()
    model.eval()
    third, fourth = after(model, stream, 2), after(model, stream, 3)
    assert not fourth.boundary
    alpha = {n: r.clone().requires_grad_() for n, r in third.slow.rates.items()}
    start = {n: f + third.slow.rates[n] * third.walked[n] for n, f in third.fast.items()}
    theta = {n: start[n] - alpha[n] * third.walked[n] for n in alpha}
    g = torch.autograd.grad(loss(model, theta, support(stream, 2)), list(alpha.values()))
    same(fourth.slow.rates, {n: third.slow.rates[n] - 0.5 * d for n, d in zip(alpha, g, strict=True)})
    # What was walked is the way, over all of the phase: at the rates of the first experience, then at those of now.
    first, phi = after(model, stream, 1), dict(model.learner.named_parameters())
    way = {n: model.rates[n.replace(".", "_")] * w for n, w in first.walked.items()}
    way = {n: way[n] + third.slow.rates[n] * (third.walked[n] - w) for n, w in first.walked.items()}
    same({n: phi[n] - third.fast[n] for n in phi}, way)


@pytest.mark.parametrize("rates", [False, True])
def test_meta_gradient_equals_finite_differences(rates):
    """Catches a dropped second order, rates without a gradient, and experiences that learn from each other."""
    model = learner(hidden=[4], first_order=False, learned_rates=rates, inner_rate=0.3)
    batch = flipping(2)
    model.map(model.objective, batch)[0].mean().backward()
    gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    named = dict(model.named_parameters())
    assert_is_gradient(gradient, named.items(), lambda: model.map(model.objective, batch)[0].mean())
    once = model.map(model.objective, batch)[0]
    parts = [
        dataclasses.replace(
            batch,
            rows=batch.rows[:, [j]],
            y=batch.y[:, [j]],
            query_rows=batch.query_rows[:, [j]],
            query_y=batch.query_y[:, [j]],
        )
        for j in range(len(CHANGES))
    ]
    torch.testing.assert_close(once, torch.stack([model.map(model.objective, p)[0] for p in parts]).mean(0))


def test_state_is_a_function_of_the_stream_alone():
    """Catches a stream that learns from those it is mapped with."""
    model, both = learner(threshold=1.0, outer_rate=0.01).eval(), flipping(2)
    with torch.no_grad():
        together = model.followed(both)
        for i in range(2):
            cut = {
                n: getattr(both, n)[i : i + 1] for n in ("rows", "y", "query_rows", "query_y", "index", "key", "digest")
            }
            alone = model.followed(dataclasses.replace(both, **cut, task={}))
            for name, values in alone.items():
                torch.testing.assert_close(values[0], together[name][i], equal_nan=True, msg=name)
