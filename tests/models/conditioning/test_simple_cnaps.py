"""Simple CNAPs against prototypical networks, numpy's covariance, SciPy's densities and scikit-learn's LDA and QDA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis

from datamodules.core.episodes import Support
from models import MLP, Conv4, ProtoNet, SimpleCNAPs
from models.networks.batch_norm import normalize_by
from tests.support.gradients import assert_is_gradient, episodes, meta_gradient

DOUBLE = torch.float64


def on_features(size: int = 3, **settings) -> SimpleCNAPs:
    """A learner whose backbone leaves its input, (N, size), as it is."""
    return SimpleCNAPs(MLP(size, hidden=()), conditioned=False, **settings).double().eval()


def modulating(learner: SimpleCNAPs) -> None:
    """Give it factors of the modulation that are no longer small."""
    for generator in learner.adaptation_network.generator.generators:
        generator.scale_factor.data.normal_()
        generator.shift_factor.data.normal_()


def problem(shots=(4, 1, 6), size: int = 3, queries: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat(np.arange(len(shots)), shots))
    spread = rng.normal(size=(len(shots), size, size))
    x = np.stack([2 * spread[k] @ rng.normal(size=size) + 3 * spread[k, 0] for k in y])
    return x, y, 3 * rng.normal(size=(queries, size))


def regularized(x: np.ndarray, y: np.ndarray, beta: float) -> np.ndarray:
    """Q of every class, by numpy's covariance."""
    of_task, found = np.cov(x.T), []
    for k in range(y.max() + 1):
        own = x[y == k]
        share = len(own) / (len(own) + 1)
        of_class = np.cov(own.T) if len(own) > 1 else 0 * of_task
        found.append(share * of_class + (1 - share) * of_task + beta * np.eye(x.shape[1]))
    return np.array(found)


def scores(learner: SimpleCNAPs, x: np.ndarray, y: np.ndarray, q: np.ndarray) -> np.ndarray:
    x, y, q = (torch.from_numpy(v) for v in (x, y, q))
    with torch.no_grad():
        return learner.predict(learner.adapt(Support(x, y, int(y.max()) + 1)), q).numpy()


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_covariances_are_numpys_mixed_by_shots(beta):
    """Catches division by n, λ of another class, a covariance about another mean, within classes for all, or nan for
    one shot; and scores that are not log-densities without their normalisation."""
    (x, y, q), learner = problem(), on_features(regularization=beta)
    expected = regularized(x, y, beta)
    support = Support(torch.from_numpy(x), torch.from_numpy(y), 3)
    np.testing.assert_allclose(learner.covariances(support.x, support), expected, rtol=1e-10)
    got = scores(learner, x, y, q)
    for k in range(3):
        gaussian = multivariate_normal(x[y == k].mean(0), expected[k])
        constant = np.linalg.slogdet(2 * np.pi * expected[k])[1] / 2
        np.testing.assert_allclose(got[:, k], gaussian.logpdf(q) + constant, rtol=1e-8)


def test_by_the_identity_it_is_half_a_prototypical_network():
    """Catches a distance that is not squared, without its ½, or to other centres than the class means."""
    torch.manual_seed(0)
    learner = SimpleCNAPs(Conv4(hidden=4, image_size=8), conditioned=False).double()
    plain = ProtoNet(learner.backbone).double()
    learner.covariances = lambda z, support: torch.eye(z.shape[1]).to(z).expand(support.ways, -1, -1)
    task = episodes(tasks=1)[0]
    for mode in (learner.train(), learner.eval()):
        plain.train(mode.training)
        torch.testing.assert_close(learner.objective(task)[1], plain.objective(task)[1] / 2, rtol=1e-9, atol=1e-12)
        got, expected = (m.predict(m.adapt(task.support), task.query_x) for m in (learner, plain))
        torch.testing.assert_close(got, expected / 2, rtol=1e-9, atol=1e-12)


def test_isotropic_classes_scale_the_prototypical_network_by_hand():
    """Catches a mixture other than λ Σ_k + (1 - λ) Σ + β I, where all of them are multiples of the identity."""
    corners = np.array([[1, 0], [-1, 0], [0, 1], [0, -1.0]])
    x, y = (5 * corners[:, None] + 2 * corners).reshape(-1, 2), np.arange(4).repeat(4)
    own, of_all = 2 * 4 / 3, (4 * 2 * 25 + 4 * 2 * 4) / 15  # each of two axes, of n - 1 examples
    q = 0.8 * own + 0.2 * of_all + 1.0
    queries = np.random.default_rng(1).normal(size=(5, 2))
    expected = -((queries[:, None] - 5 * corners) ** 2).sum(-1) / (2 * q)
    np.testing.assert_allclose(scores(on_features(2), x, y, queries), expected, rtol=1e-10)


class Estimator:
    """Our covariance of a class, for scikit-learn: it gives the examples of one class, without their mean or with."""

    def __init__(self, x: np.ndarray) -> None:
        self.of_task = np.cov(x.T)

    def fit(self, x: np.ndarray):
        share = len(x) / (len(x) + 1)
        self.covariance_ = share * np.cov(x.T) + (1 - share) * self.of_task + np.eye(x.shape[1])
        return self

    def get_params(self, deep: bool = True) -> dict:
        return {}


def centred(values: np.ndarray) -> np.ndarray:
    """Without what classes share."""
    return values - values.mean(1, keepdims=True)


def test_equal_covariances_give_linear_discriminant_analysis():
    """Catches scores that are not linear where classes have one covariance: those of scikit-learn's LDA, up to what
    classes share."""
    rng = np.random.default_rng(2)
    offsets = rng.normal(size=(7, 3)) @ rng.normal(size=(3, 3))
    means = 2 * rng.normal(size=(4, 3))
    x, y = (means[:, None] + offsets).reshape(-1, 3), np.arange(4).repeat(7)
    q = 3 * rng.normal(size=(9, 3))
    lda = LinearDiscriminantAnalysis(solver="lsqr", priors=np.full(4, 0.25), covariance_estimator=Estimator(x))
    expected = lda.fit(x, y).decision_function(q)
    np.testing.assert_allclose(centred(scores(on_features(), x, y, q)), centred(expected), rtol=1e-8)


def test_own_covariances_give_quadratic_discriminant_analysis_without_its_determinants():
    """Catches covariances that are not each class's own. QDA also has -½ log det Q_k, which Simple CNAPs leaves out:
    with it, scores are scikit-learn's, and without it they are not, unless determinants agree."""
    x, y, q = problem((5, 4, 8))
    qda = QuadraticDiscriminantAnalysis(solver="eigen", priors=np.full(3, 1 / 3), covariance_estimator=Estimator(x))
    expected = centred(qda.fit(x, y).decision_function(q))
    got = scores(on_features(), x, y, q)
    determinants = np.linalg.slogdet(regularized(x, y, 1.0))[1]
    np.testing.assert_allclose(centred(got - determinants / 2), expected, rtol=1e-8)
    assert np.abs(centred(got) - expected).max() > 0.1


def test_single_precision_serves_large_features():
    """Catches an inverse that loses all digits, or a factorization that fails, of 640 features up to ten, one
    shot and five: against double precision."""
    g = torch.Generator().manual_seed(0)
    for shots in (1, 5):
        x, q = (10 * torch.rand(n, 640, generator=g, dtype=DOUBLE) for n in (5 * shots, 20))
        support = Support(x, torch.arange(5).repeat_interleave(shots), 5)
        learner = SimpleCNAPs(MLP(640, hidden=()), conditioned=False).eval()
        with torch.no_grad():
            expected = learner.predict(learner.adapt(support), q)
            single = Support(x.float(), support.y, 5)
            got = learner.predict(learner.adapt(single), q.float())
            with torch.autocast("cpu", torch.bfloat16):
                same = learner.predict(learner.adapt(single), q.float())
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=0)
        torch.testing.assert_close(same, got)


@pytest.mark.parametrize("settings", [{"conditioned": False}, {"conditioned": True, "chunk": 2}])
def test_meta_gradient_equals_finite_differences(settings):
    """Catches covariances taken as constants, a factorization that is not differentiated, and a set encoder that the
    gradient does not reach; mapped over tasks too."""
    torch.manual_seed(3)
    learner = SimpleCNAPs(Conv4(hidden=4, image_size=8), code=5, penalty=0.1, **settings).double().train()
    if learner.conditioned:
        modulating(learner)
    batch = episodes(tasks=2)
    looked_at = [(n, p) for n, p in learner.named_parameters() if "generator" not in n or n.endswith("factor")]
    gradient = meta_gradient(learner, batch)
    assert_is_gradient(gradient, looked_at, lambda: learner.map(learner.objective, batch)[0].mean())


def test_modulated_features_are_what_is_compared():
    """Catches class statistics of features without modulation, or queries of them."""
    torch.manual_seed(3)
    learner = SimpleCNAPs(Conv4(hidden=4, image_size=8), code=5).double().eval()
    modulating(learner)
    task = episodes(tasks=1)[0]
    with torch.no_grad(), normalize_by("running"):
        modulation = learner.modulation(task.support.x, task.support)
        z, zq = (learner.embed(x, modulation).numpy() for x in (task.support.x, task.query_x))
        expected = scores(on_features(4), z, task.support.y.numpy(), zq)
        np.testing.assert_allclose(learner.predict(learner.adapt(task.support), task.query_x), expected, rtol=1e-9)
        assert learner.embedding_size == len(learner.embed_task(task.support)) == 5
