"""ALPaCA."""

import numpy as np
import torch
from scipy import stats
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import DotProduct

from datamodules.core.episodes import Support
from models import MLP, ALPaCA
from models.continual.alpaca import Posterior
from models.core.chance import Chance
from tests.support.gradients import assert_equals_finite_differences
from tests.support.streams import image_streams

FEATURES, NOISE = 3, 0.4


def learner(prior: bool = True) -> ALPaCA:
    torch.manual_seed(0)
    model = ALPaCA(MLP(64, (FEATURES,)), noise=NOISE).double().eval()
    with torch.no_grad():
        model.log_noise.copy_(torch.tensor(NOISE, dtype=torch.float64).log())
        if prior:
            model.mean.normal_(0, 0.3)
            model.root.add_(0.3 * torch.randn(FEATURES + 1, FEATURES + 1))  # what is above the diagonal does not count
    return model


def examples(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return np.c_[rng.normal(0, 1, (n, FEATURES)), np.ones(n)], np.r_[0, 1, 2, rng.integers(0, 3, n - 3)]


def learned(model: ALPaCA, x: np.ndarray, y: np.ndarray, sizes: list[int], ways: int = 4) -> Posterior:
    state, at = model.begin(ways, Chance.of(torch.tensor(0))), 0
    for size in sizes:
        part = slice(at, at := at + size)
        state = model.update(state, Support(torch.from_numpy(x[part]), torch.from_numpy(y[part]), ways))
    return state


def log_odds(logits: np.ndarray) -> np.ndarray:
    """Of the classes that have examples, less their mean."""
    return logits[:, :3] - logits[:, :3].mean(1, keepdims=True)


def test_is_the_posterior_predictive_by_weights():
    """Catches a prior's precision taken for its covariance, a mean that the prior has no part in, and noise left out of
    the prediction: restated by the covariance of weights, labels' densities by SciPy. Class 3 has no examples."""
    model, (x, y), (q, _) = learner(), examples(11), examples(6, 1)
    with torch.no_grad():
        found = model.predict(learned(model, x, y, [4, 1, 6]), torch.from_numpy(q)).numpy()
    root = np.tril(model.root.detach().numpy())
    prior = NOISE**2 * np.linalg.inv(root @ root.T)  # of each column of weights
    onehot = np.eye(4)[y]
    gain = prior @ x.T @ np.linalg.inv(x @ prior @ x.T + NOISE**2 * np.eye(len(x)))
    start = np.repeat(model.mean.detach().numpy()[:, None], 4, 1)
    mean = start + gain @ (onehot - x @ start)
    covariance = prior - gain @ x @ prior
    expected = np.empty((len(q), 4))
    for i, one in enumerate(q):
        variance = NOISE**2 + one @ covariance @ one
        for c in range(4):
            expected[i, c] = stats.norm(one @ mean, variance**0.5).logpdf(np.eye(4)[c]).sum()
    np.testing.assert_allclose(log_odds(found), log_odds(expected), rtol=1e-8, atol=1e-10)
    assert (found[:, 3] == -np.inf).all()


def test_is_a_gaussian_process_of_the_linear_kernel():
    """Catches what both of our restatements may share: scikit-learn's, with weights of variance σ²."""
    model, (x, y), (q, _) = learner(prior=False), examples(20), examples(5, 1)
    with torch.no_grad():
        state = learned(model, x, y, [20])
        logits = model.predict(state, torch.from_numpy(q)).numpy()
    kernel = NOISE**2 * DotProduct(0.0, "fixed")
    process = GaussianProcessRegressor(kernel, alpha=NOISE**2, optimizer=None).fit(x, np.eye(4)[y])
    mean, deviation = process.predict(q, return_std=True)
    expected = mean / (deviation[:, :1] ** 2 + NOISE**2)
    np.testing.assert_allclose(log_odds(logits), log_odds(expected), rtol=1e-6, atol=1e-8)


def test_in_any_order_and_parts_it_is_the_posterior_of_all_at_once():
    """Catches an update that depends on what came before it."""
    model, (x, y) = learner(), examples(40)
    order = np.random.default_rng(3).permutation(40)
    at_once, singly = learned(model, x, y, [40]), learned(model, x[order], y[order], [1] * 40)
    for a, b in zip(at_once, singly, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_meta_gradient():
    """Catches a prior that is not learned, and derivatives of the Cholesky factor that mapping over streams breaks."""
    assert_equals_finite_differences(learner().train(), image_streams())
