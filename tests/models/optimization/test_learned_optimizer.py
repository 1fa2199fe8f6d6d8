"""The learned optimizer: features, steps and meta-gradients against what is written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

from datamodules import Quadratics
from datamodules.core.episodes import Support
from models import MLP, Conv4, LearnedOptimizer
from models.optimization.evolution import evolution_gradient
from tests.support.gradients import assert_is_gradient, episodes, meta_gradient

DOUBLE = torch.float64
DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)


def on_quadratics(**settings) -> LearnedOptimizer:
    torch.manual_seed(0)
    settings = {"inner_steps": 6, "window": 6, "random_start": False, "scale": 0.1} | settings
    return LearnedOptimizer(MLP(4, []), 1, head_bias=False, **settings).double()


def quadratics(tasks: int = 3):
    batch = Quadratics(dimension=4).distribution("train").sample(range(tasks))
    return batch.apply(lambda t: t.double() if t.is_floating_point() else t)


def test_features_and_steps_equal_a_reference_of_explicit_sums():
    """Catches a running mean that lags, a norm over another tensor or of the old gradient, a time that starts at 1, a
    step of another sign or size: features written out as sums over all gradients so far, each parameter by itself."""
    torch.manual_seed(1)
    learner = LearnedOptimizer(MLP(1, [3]), 1, inner_steps=5, eval_inner_steps=5, scale=0.05).double().eval()
    support = Support(torch.randn(4, 1, dtype=DOUBLE), torch.randn(4, 1, dtype=DOUBLE), 0)
    states = list(learner.adaptation(support))
    theta = {n: p.detach().clone() for n, p in learner.learner.named_parameters()}
    gradients: list[dict[str, torch.Tensor]] = []
    for t, state in enumerate(states):
        for name, p in theta.items():
            torch.testing.assert_close(state.parameters[name], p, rtol=1e-9, atol=1e-13)
        loss = grad(lambda p: (functional_call(learner.learner, p, (support.x,)) - support.y).square().mean())
        gradients.append(loss(theta))
        new = {}
        for name, p in theta.items():
            columns = [gradients[-1][name], p]
            for d in DECAYS:
                columns.append(sum((1 - d) * d ** (t - s) * g[name] for s, g in enumerate(gradients)))
            columns = [c / math.sqrt(float((c**2).mean()) + 1e-5) for c in columns]
            new[name] = p.clone()
            for place in range(p.numel()):
                seen = [float(c.flatten()[place]) for c in columns]
                seen += [math.tanh(t / tau - 1) for tau in (1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5)]
                assert len(seen) == 19
                direction, magnitude = learner.network(torch.tensor(seen, dtype=DOUBLE)).tolist()
                new[name].view(-1)[place] -= 0.05 * direction * math.exp(1e-3 * magnitude)
        theta = new


def test_a_fixed_network_makes_the_step_that_it_should():
    """Catches direction and magnitude mixed up: a network whose direction is the normalised gradient and whose
    magnitude is 500, by hand, is descent along it by e^0.5 of the published scale."""
    learner = LearnedOptimizer(MLP(2, []), 1, head_bias=False, inner_steps=1).double()
    first, second, third = (m for m in learner.network if isinstance(m, nn.Linear))
    with torch.no_grad():
        for layer in (first, second, third):
            layer.weight.zero_()
            layer.bias.zero_()
        first.weight[0, 0], first.weight[1, 0] = 1.0, -1.0  # both halves of the gradient through ReLU
        second.weight[0, 0] = second.weight[1, 1] = 1.0
        third.weight[0, 0], third.weight[0, 1], third.bias[1] = 1.0, -1.0, 500.0
    learner.random_start = False
    x, y = torch.tensor([[1.0, 2.0]], dtype=DOUBLE), torch.tensor([[3.0]], dtype=DOUBLE)
    start, end = learner.train().adaptation(Support(x, y, 0))
    w = start.parameters["head.weight"]
    gradient = 2 * (w @ x[0] - 3.0) * x
    step = 1e-3 * math.exp(0.5) * gradient / (gradient.square().mean() + 1e-5).sqrt()
    torch.testing.assert_close(end.parameters["head.weight"], w - step, rtol=1e-12, atol=0)


@pytest.mark.parametrize("first_order", [False, True])
def test_meta_gradient_equals_finite_differences(first_order):
    """Catches a graph that is cut within a window: by differences where the whole horizon is one window; of first
    order it must differ, since gradients depend on parameters, and parameters on the optimizer."""
    learner, batch = on_quadratics(first_order=first_order), quadratics()
    gradient = meta_gradient(learner, batch)
    trained = [(n, p) for n, p in learner.named_parameters() if p.requires_grad]
    assert [n for n, _ in trained] == [n for n in gradient if n.startswith("network.")]

    def check():
        assert_is_gradient(gradient, trained, lambda: learner.map(learner.objective, batch)[0].mean())

    if first_order:
        with pytest.raises(AssertionError):
            check()
    else:
        check()


def test_windows_cut_the_gradient_and_nothing_else():
    """Catches windows that start anew, count time from 0, or let gradients through: the loss is that of one window, and
    the gradient the sum of the windows' own from fixed states."""
    batch = quadratics(1)
    whole, cut = on_quadratics(), on_quadratics(window=2)
    losses = [learner.map(learner.objective, batch)[0] for learner in (whole, cut)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    full, truncated = meta_gradient(whole, batch), meta_gradient(cut, batch)
    assert (full["network.4.weight"] - truncated["network.4.weight"]).norm() > 1e-4 * full["network.4.weight"].norm()
    task, expected = batch[0], 0.0
    states = [cut.start(0)]
    for first in (0, 2, 4):
        *_, end = cut.path(cut.weights(), task.support, states[-1], first, 2)
        states.append(type(end)({n: p.detach() for n, p in end.parameters.items()}, end.momenta.detach()))
    for first, state in zip((0, 2, 4), states, strict=False):
        along = list(cut.path(cut.weights(), task.support, state, first, 2))[1:]
        loss = sum((task.query_x @ s.parameters["head.weight"][0] - task.query_y[:, 0]).square().mean() for s in along)
        expected = expected + torch.autograd.grad(loss / 6, cut.network[4].weight)[0]
    torch.testing.assert_close(truncated["network.4.weight"], expected, rtol=1e-8, atol=1e-14)


def test_evolution_strategies_agree_with_the_gradient():
    """Catches an estimate of another sign or size: on a short unroll both kinds agree with autograd within five
    standard errors of Monte Carlo, element by element, and with it in direction."""
    batch, exact = quadratics(1), meta_gradient(on_quadratics(inner_steps=4, window=4), quadratics(1))
    for estimator in ("es", "pes"):
        learner = on_quadratics(inner_steps=4, window=4, estimator=estimator, deviation=1e-4, pairs=500)
        draws = []
        for seed in range(8):
            torch.manual_seed(seed)
            draws.append(meta_gradient(learner, batch)["network.4.weight"])
        mean, error = torch.stack(draws).mean(0), torch.stack(draws).std(0) / 8**0.5
        wanted = exact["network.4.weight"]
        assert ((mean - wanted).abs() < 6 * error).float().mean() > 0.95
        assert float((mean * wanted).sum() / (mean.norm() * wanted.norm())) > 0.8
        assert abs(float((mean * wanted).sum() / wanted.square().sum()) - 1) < 0.15


def test_persistent_evolution_strategies_are_unbiased_and_truncated_ones_are_not():
    """Catches noise that is not kept from window to window, or twins that share a state: for s' = a s + θ and the loss
    s after each window, of K steps, the gradient is known, and so is the truncated one."""
    a, steps, windows, pairs = 0.9, 2, 4, 50_000

    def unroll(parameters, state, window):
        for _ in range(steps):
            state = a * state + parameters["theta"]
        return state, state

    def slope(n):
        return sum(a**k for k in range(n))

    exact = sum(slope(steps * (w + 1)) for w in range(windows))
    truncated = windows * slope(steps)
    # A product of two normal numbers of correlation r has deviation (1 + r²)^½, and slopes add up to the exact one.
    tolerance = 5 * 2 * exact / pairs**0.5
    assert exact - truncated > 5 * tolerance
    theta = {"theta": torch.tensor(0.3, dtype=DOUBLE)}
    for persistent, expected in ((True, exact), (False, truncated)):
        torch.manual_seed(0)
        value, gradient, states = evolution_gradient(
            unroll, theta, torch.zeros((), dtype=DOUBLE), range(windows), 0.5, pairs, persistent
        )
        assert float(gradient["theta"]) == pytest.approx(expected, abs=tolerance)
        assert states.shape == (2 * pairs,)
        assert float(value) == pytest.approx(0.3 * exact, rel=1e-9)  # where all is linear, twins' noise cancels


def test_training_starts_anew_for_each_task_and_evaluation_from_one_place():
    """Catches a start that is learned, the same for all tasks, or another in each evaluation."""
    torch.manual_seed(0)
    learner = LearnedOptimizer(Conv4(hidden=4, image_size=8), 3, inner_steps=2, window=1)
    own = dict(learner.learner.named_parameters())
    first, second = learner.start(3).parameters, learner.start(3).parameters
    name = "backbone.convs.1.weight"
    assert not torch.equal(first[name], second[name])
    assert torch.equal(first[name].flatten().sort()[0], own[name].flatten().sort()[0])
    assert not any(p.requires_grad for p in own.values())
    fixed = learner.eval().start(3).parameters
    assert all(torch.equal(fixed[n], p) for n, p in own.items())
    batch = episodes(tasks=2, dtype=torch.float32)
    starts = learner.train().map(lambda task: learner.start(3).parameters[name], batch)
    assert not torch.equal(starts[0], starts[1])


@pytest.mark.parametrize(
    "settings", [{"window": 0}, {"inner_steps": 0}, {"pairs": 0}, {"deviation": 0.0}, {"scale": 0.0}]
)
def test_impossible_settings_are_refused(settings):
    """Catches settings that would fail, or learn nothing, only much later."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        LearnedOptimizer(MLP(4, []), 1, **settings)
