"""What a learned optimizer is compared with steps as it should."""

from __future__ import annotations

import pytest
import torch
from numpy.polynomial.chebyshev import Chebyshev

from benchmarks.learned_optimizers import adam, by_rule, descent, first_below, of_quadratics, tuned
from datamodules import Quadratics
from models import MLP, LearnedOptimizer

STEPS = 12


@pytest.fixture
def problem():
    torch.manual_seed(0)
    learner = LearnedOptimizer(MLP(5, []), 1, head_bias=False).double().eval()
    batch = Quadratics(dimension=5).distribution("test").sample(range(4))
    return learner, batch.apply(lambda t: t.double() if t.is_floating_point() else t)


@pytest.mark.parametrize(
    ("rule", "reference"),
    [(descent(0.05), lambda p: torch.optim.SGD([p], 0.05)), (adam(0.05), lambda p: torch.optim.Adam([p], 0.05))],
)
def test_baselines_are_torchs_own(rule, reference, problem):
    """Catches a baseline that is worse than it is: another bias correction, epsilon or gradient."""
    learner, batch = problem
    curves = by_rule(learner, rule)(batch, STEPS)
    for t in range(len(batch)):
        theta = learner.learner.head.weight.detach().clone().requires_grad_()
        optimizer = reference(theta)
        for step in range(STEPS + 1):
            loss = (batch.support_x[t] @ theta.T - batch.support_y[t]).square().mean()
            assert float(curves[t, step]) == pytest.approx(loss.item(), rel=1e-9)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@pytest.mark.parametrize("chebyshev", [False, True])
def test_the_best_steps_leave_of_the_error_what_their_polynomial_says(chebyshev, problem):
    """Catches a wrong recursion or curvature: after k steps the error along each curvature λ is its share of a
    polynomial, (1 - 2 λ / (L + μ))^k, or Chebyshev's of ((L + μ - 2 λ) / (L - μ)) over that of λ = 0."""
    learner, batch = problem
    curves = of_quadratics(learner, chebyshev)(batch, STEPS)
    for t in range(len(batch)):
        w, y = batch.support_x[t], batch.support_y[t]
        curvature, along = torch.linalg.eigh(2 * w.T @ w / 5)
        error = along.T @ (learner.learner.head.weight.detach().T - torch.linalg.solve(w, y))
        low, high = curvature[0], curvature[-1]
        for step in range(STEPS + 1):
            if chebyshev:
                polynomial = Chebyshev.basis(step)
                left = polynomial(((high + low - 2 * curvature) / (high - low)).numpy())
                left = torch.as_tensor(left / polynomial(float((high + low) / (high - low))))
            else:
                left = (1 - 2 * curvature / (low + high)) ** step
            expected = (curvature / 2 * (left * error[:, 0]) ** 2).sum()
            assert float(curves[t, step]) == pytest.approx(float(expected), rel=1e-6, abs=1e-12)


def test_rates_are_the_best_for_their_number_of_steps(problem):
    """Catches a rate of another number of steps, or one that diverges chosen for what it is not."""
    learner, batch = problem
    chosen = tuned(descent, learner, batch, [1, 10])
    for steps, rate in zip((1, 10), chosen, strict=True):
        own = float(by_rule(learner, descent(rate))(batch, steps)[:, steps].mean())
        for other in (rate * 10 ** (1 / 6), rate / 10 ** (1 / 6)):
            assert own <= float(by_rule(learner, descent(other))(batch, steps)[:, steps].mean()) + 1e-12


def test_speed_up_counts_steps_to_a_level():
    """Catches an off-by-one, and a level that is never reached taken for one reached at once."""
    curve = torch.tensor([3.0, 2.0, 1.0, 0.5])
    assert [first_below(curve, level) for level in (3.0, 1.5, 0.5, 0.4)] == [0, 2, 3, None]
