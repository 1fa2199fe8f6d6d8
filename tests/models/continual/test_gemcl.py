"""GeMCL."""

import numpy as np
import pytest
import torch
from scipy import stats

from datamodules.core.episodes import Support
from models import MLP, GeMCL
from models.continual.gemcl import ClassMoments
from models.core.chance import Chance
from tests.support.gradients import assert_equals_finite_differences
from tests.support.streams import image_streams

ALPHA, BETA = 2.5, 1.7


def learner(features: int = 3, **settings) -> GeMCL:
    torch.manual_seed(0)
    model = GeMCL(MLP(64, (features,)), **{"alpha": ALPHA, "beta": BETA} | settings).double().eval()
    with torch.no_grad():
        for parameter in (model.log_alpha, model.log_beta):  # to all of float64's digits
            parameter.copy_(torch.log((parameter.exp() * 1e4).round() / 1e4))
    return model


def classes(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(rng.normal(0, 2, 3), rng.uniform(0.3, 2, 3), (n, 3)) for n in (4, 1, 7)]


def learned(model: GeMCL, parts: list[tuple[np.ndarray, np.ndarray]], ways: int = 4) -> ClassMoments:
    state = model.begin(ways, Chance.of(torch.tensor(0)))
    for x, y in parts:
        state = model.update(state, Support(torch.from_numpy(x), torch.from_numpy(y), ways))
    return state


def scores(model: GeMCL, state: ClassMoments, queries: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.predict(state, torch.from_numpy(queries)).numpy()


def test_is_students_t_of_each_class():
    """Catches degrees of freedom, a scale, or a constant that differs with the number of examples: against SciPy.

    The posterior is restated as a Normal-Gamma's whose mean has no observations; class 3 has no examples.
    """
    model, own = learner(), classes()
    state = learned(model, [(x, np.full(len(x), k)) for k, x in enumerate(own)])
    queries = np.random.default_rng(1).normal(0, 3, (9, 3))
    found = scores(model, state, queries)
    for k, x in enumerate(own):
        n = len(x)
        alpha, beta = ALPHA + n / 2, BETA + ((x - x.mean(0)) ** 2).sum(0) / 2
        t = stats.t(2 * alpha, x.mean(0), np.sqrt(beta / alpha * (1 + 1 / n)))
        np.testing.assert_allclose(found[:, k], t.logpdf(queries).sum(1), rtol=1e-9)
    assert (found[:, 3] == -np.inf).all()


def test_predictive_density_is_the_integral_over_means_and_precisions():
    """Catches a formula that is wrong in the same way in code and textbook: one feature, integrated numerically."""
    model, x, query = learner(1), np.array([0.3, 1.1, -0.4]), 1.9
    state = learned(model, [(x[:, None], np.zeros(3, np.int64))], 1)

    mean, log_precision = np.meshgrid(np.linspace(-40, 40, 4001), np.linspace(-12, 6, 721))
    precision = np.exp(log_precision)
    # A Normal-Gamma of no observations has precision^(1/2) beside the Gamma; the step to its logarithm another factor.
    prior = precision**0.5 * stats.gamma(ALPHA, scale=1 / BETA).pdf(precision) * precision

    def joint(of: np.ndarray) -> float:
        squares = sum((value - mean) ** 2 for value in of)
        return (prior * (precision / (2 * np.pi)) ** (len(of) / 2) * np.exp(-precision / 2 * squares)).sum()

    expected = np.log(joint(np.append(x, query)) / joint(x))
    np.testing.assert_allclose(scores(model, state, np.array([[query]])), expected, rtol=1e-3)


def test_map_is_the_gaussian_of_the_likeliest_precision():
    """Catches another mode: against SciPy's normal at the maximum that a fine grid of precisions has."""
    model, x = learner(1, predictive="map"), classes()[0][:, :1]
    state = learned(model, [(x, np.zeros(len(x), np.int64))], 1)
    precision = np.linspace(1e-3, 20, 400_001)
    log_posterior = 0.5 * np.log(precision) + stats.gamma(ALPHA, scale=1 / BETA).logpdf(precision)
    log_posterior += len(x) / 2 * np.log(precision) - precision / 2 * ((x - x.mean()) ** 2).sum()
    best = precision[log_posterior.argmax()]
    queries = np.linspace(-3, 3, 7)[:, None]
    expected = stats.norm(x.mean(), best**-0.5).logpdf(queries)
    np.testing.assert_allclose(scores(model, state, queries), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("far", [0.0, 1e6])
def test_in_any_order_and_parts_it_is_the_posterior_of_all_at_once(far):
    """Catches moments of parts that do not add up to those of all, and ones that lose to rounding what lies far off."""
    model = learner()
    x = np.concatenate(classes(3)) + far
    y = np.repeat([2, 0, 1], (4, 1, 7))
    at_once = learned(model, [(x, y)])
    order = np.random.default_rng(2).permutation(len(x))
    singly = learned(model, [(x[i : i + 1], y[i : i + 1]) for i in order])
    for a, b in zip(at_once, singly, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-7 if far else 1e-12)
    for k in range(3):
        np.testing.assert_allclose(at_once.deviations[k] / max(1, (y == k).sum()), x[y == k].var(0), rtol=1e-6)


def test_meta_gradient():
    """Catches a prior that is not learned, and gradients that classes without examples make no numbers."""
    model = learner(alpha=3.0, beta=2.0).train()
    assert_equals_finite_differences(model, image_streams())
