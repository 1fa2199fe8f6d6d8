"""ABML's layers, divergence and posterior against closed forms; its meta-gradient against finite differences."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Gamma, Normal, kl_divergence
from torch.func import functional_call, vmap

from datamodules.core.episodes import Episodes, Support
from models import ABML, MLP, Conv4
from models.networks import bayesian_layers as layers
from tests.support import gradients
from tests.support.gradients import assert_is_gradient, gradients_of

DOUBLE = torch.float64
episodes = partial(gradients.episodes, tasks=2, queries=1)


def lines(shots=4, queries=5) -> Episodes:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, shots + queries, 1, generator=g, dtype=DOUBLE)
    y = x * torch.tensor([0.5, -1.0], dtype=DOUBLE)[:, None, None] + 0.3
    return Episodes(x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:], torch.arange(2), 0, 2)


def small(**settings) -> ABML:
    torch.manual_seed(2)
    defaults = {"outputs": 3, "inner_rate": 0.3, "deviation": 0.2, "eval_samples": 3}
    return ABML(Conv4(hidden=3, image_size=8), **(defaults | settings)).double()


def gaussians(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 2), "b": (4,)}
    return {n + end: torch.randn(s, generator=g, dtype=DOUBLE) for n, s in shapes.items() for end in ("", "_rho")}


def test_divergence_between_gaussians():
    """Catches swapped arguments, variances taken for deviations, and points that count."""
    q, p = gaussians(0), gaussians(1)

    def distribution(of, name):
        return Normal(of[name], of[name + "_rho"].exp())

    expected = sum(kl_divergence(distribution(q, n), distribution(p, n)).sum() for n in ("a", "b"))
    points = {"point": torch.ones(3, dtype=DOUBLE)}
    torch.testing.assert_close(layers.kl_divergence(q | points, p | {"point": -points["point"]}), expected)
    one = {"w": torch.tensor([1.0]), "w_rho": torch.tensor([2.0]).log()}
    standard = {"w": torch.zeros(1), "w_rho": torch.zeros(1)}
    # KL(N(1, 4) ‖ N(0, 1)) = (4 + 1 - 1)/2 - ln 2
    torch.testing.assert_close(layers.kl_divergence(one, standard), 2 - torch.tensor(2.0).log())


def test_hyperprior_is_the_density_of_means_and_precisions():
    """Catches a Gamma over variances or with scale for rate, and lost constants."""
    prior = gaussians(0)
    expected = sum(
        Normal(0.0, 1.0).log_prob(prior[n]).sum()
        + Gamma(2.5, torch.tensor(0.3, dtype=DOUBLE)).log_prob(prior[n + "_rho"].exp() ** -2).sum()
        for n in ("a", "b")
    )
    torch.testing.assert_close(layers.log_hyperprior(prior | {"point": torch.ones(2)}, 2.5, 0.3), expected)


def with_spread(module: nn.Module) -> nn.Module:
    """A Bayesian layer in float64 whose deviations all differ."""
    layer = layers.make_bayesian(nn.Sequential(module), 0.1)[0].double()
    with torch.no_grad():
        for rho in (layer.weight_rho, layer.bias_rho):
            rho.uniform_(-2.0, 0.5)
    return layer


def assert_moments(drawn: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """Draws (M, …) against the exact moments, within five standard errors of a Gaussian's."""
    count = len(drawn)
    assert ((drawn.mean(0) - mean).abs() < 5 * (variance / count).sqrt()).all()
    assert ((drawn.var(0) / variance - 1).abs() < 5 * (2 / count) ** 0.5).all()


def test_linear_layer_draws_outputs_of_the_exact_distribution():
    """Catches σ for σ², a bias without noise, and noise that examples or outputs share."""
    layer = with_spread(nn.Linear(3, 2))
    x = torch.tensor([0.5, -1.0, 2.0], dtype=DOUBLE)
    with torch.no_grad():
        drawn = layer(x.expand(40_000, 3))
        variance = (layer.weight_rho.exp() ** 2) @ x**2 + layer.bias_rho.exp() ** 2
        assert_moments(drawn, layer.weight @ x + layer.bias, variance)
        assert drawn.T.corrcoef()[0, 1].abs() < 0.03
        torch.testing.assert_close(layer.eval()(x), F.linear(x, layer.weight, layer.bias))


def test_flipout_has_the_moments_of_drawn_weights_and_decorrelates_the_examples():
    """Catches signs on the wrong channels, and a perturbation that all examples share, or all that is vmapped."""
    layer = with_spread(nn.Conv2d(2, 3, 3, stride=2, padding=1))
    image = torch.randn(2, 5, 5, dtype=DOUBLE)
    batch = image.expand(2, 2, 5, 5)
    count = 8000

    def shared(_: torch.Tensor) -> torch.Tensor:
        weight, bias = (
            m + r.exp() * torch.randn_like(m)
            for m, r in ((layer.weight, layer.weight_rho), (layer.bias, layer.bias_rho))
        )
        return F.conv2d(batch, weight, bias, 2, 1)

    with torch.no_grad():
        draws = torch.zeros(count)
        flipout = vmap(lambda _: layer(batch), randomness="different")(draws)
        direct = vmap(shared, randomness="different")(draws)
        mean = F.conv2d(image[None], layer.weight, layer.bias, 2, 1)[0]
        spread = F.conv2d(image[None] ** 2, layer.weight_rho.exp() ** 2, layer.bias_rho.exp() ** 2, 2, 1)[0]
    for drawn in (flipout, direct):
        assert_moments(drawn[:, 0], mean, spread)

    def between_examples(drawn: torch.Tensor) -> torch.Tensor:
        off = (drawn - mean).flatten(2)
        return (off[:, 0] * off[:, 1]).mean(0) / spread.flatten()

    assert between_examples(flipout).abs().max() < 0.1
    assert between_examples(direct).min() > 0.9


def test_drawn_weights_have_the_posterior_s_moments():
    """Catches evaluation that draws from another Gaussian than training does, and draws that repeat."""
    q = {n.replace("a", "head.weight").replace("b", "head.bias"): p for n, p in gaussians(0).items()}
    q["head.bias"], q["head.bias_rho"] = q["head.bias"][:3], q["head.bias_rho"][:3]
    generator = torch.Generator().manual_seed(0)
    drawn = [layers.draw(q, generator, ["head.weight", "head.bias"]) for _ in range(5000)]
    for name in ("head.weight", "head.bias"):
        assert_moments(torch.stack([d[name] for d in drawn]), q[name], (2 * q[name + "_rho"]).exp())


def regression(shots: int) -> tuple[Support, torch.Tensor]:
    """Observations of a noisy linear function of three variables, and the design with a column for the bias."""
    g = torch.Generator().manual_seed(4)
    x = torch.randn(shots, 3, generator=g, dtype=DOUBLE)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=DOUBLE) + 0.7 + 0.5 * torch.randn(shots, 1, generator=g)
    return Support(x, y, 0), torch.cat([x, torch.ones(shots, 1, dtype=DOUBLE)], 1)


def linear(steps: int) -> ABML:
    torch.manual_seed(0)
    settings = {"inner_rate": 0.05, "inner_rho_rate": 0.3, "deviation": 0.7, "noise": 0.5, "inner_kl_weight": 1.0}
    return ABML(MLP(3, hidden=()), 1, inner_steps=steps, inner_samples=2, eval_samples=4, **settings).double()


def weights(parameters: dict[str, torch.Tensor], end: str = "") -> torch.Tensor:
    return torch.cat([parameters["head.weight" + end].flatten(), parameters["head.bias" + end]]).detach()


@pytest.mark.parametrize("training", [True, False])
def test_inner_loop_finds_the_posterior_of_bayesian_linear_regression(training):
    """Catches a wrong weight of data against prior, and a deviation that does not follow its own gradient.

    The posterior is known: precision P = ZᵀZ/s² + I/σ₀²; the closest Gaussian without correlations has its mean and
    variances 1/P_ii. Averaging over the steps takes out their noise.
    """
    support, z = regression(12)
    learner = linear(700).train(training)
    start = dict(learner.learner.named_parameters())
    precision = z.T @ z / 0.5**2 + torch.eye(4, dtype=DOUBLE) / 0.7**2
    mean = torch.linalg.solve(precision, z.T @ support.y[:, 0] / 0.5**2 + weights(start) / 0.7**2)
    with torch.no_grad():
        path = [state.parameters for state in learner.adaptation(support)][200:]
    deviation = precision.diagonal() ** -0.5
    off = torch.stack([weights(p) for p in path]).mean(0) - mean
    assert (off.abs() < 0.15 * deviation).all(), off / deviation
    ratio = torch.stack([weights(p, "_rho") for p in path]).exp().mean(0) / deviation
    assert ((ratio - 1).abs() < 0.05).all(), ratio


def test_posterior_narrows_with_shots():
    """Catches deviations that do not learn from the support set."""
    learner = linear(300).eval()
    with torch.no_grad():
        few, many = (weights(learner.adapt(regression(shots)[0]).parameters, "_rho").exp() for shots in (2, 40))
    assert (many < 0.5 * few).all() and (few < 0.7).all()


def check_meta_gradient(learner: ABML, batch: Episodes) -> None:
    def objective() -> torch.Tensor:
        torch.manual_seed(5)  # the same noise every time
        return learner.map(learner.objective, batch)[0].mean()

    learner.zero_grad()
    objective().backward()
    learned = [(n, p) for n, p in learner.named_parameters() if p.requires_grad]
    assert_is_gradient(gradients_of(learner), learned, objective)


@pytest.mark.parametrize("batch_norm", ["transductive", "support", "per_query", "running", "none"])
def test_meta_gradient_equals_finite_differences(batch_norm):
    """Catches a dropped second-order term, in means or in deviations, and a prior taken for a constant."""
    settings = {"inner_steps": 2, "inner_kl_weight": 0.3, "kl_weight": 0.1, "hyperprior_weight": 0.01, "chunk": 2}
    check_meta_gradient(small(batch_norm=batch_norm, samples=2, inner_samples=2, **settings), episodes())


def test_meta_gradient_of_regression_reaches_the_noise():
    """Catches an observation noise that the objective takes for a constant."""
    torch.manual_seed(2)
    settings = {"inner_rate": 0.02, "inner_steps": 2, "deviation": 0.2, "noise": 0.6, "learned_noise": True}
    check_meta_gradient(ABML(MLP(1, hidden=(5,)), 1, **settings).double(), lines())


def test_objective_is_the_bound_of_support_and_queries():
    """Catches a meta-objective of the queries alone, and a mean of means where the sets are of unequal size."""
    batch = episodes(tasks=1)
    learner = small(inner_steps=0, deviation=1e-9, hyperprior_weight=0.0)
    task = batch[0]
    parameters = dict(learner.learner.named_parameters())
    outputs = [functional_call(learner.learner, parameters, (x,)) for x in (task.support.x, task.query_x)]
    targets = torch.cat([task.support.y, task.query_y])
    loss = learner.objective(task)[0]
    torch.testing.assert_close(loss, F.cross_entropy(torch.cat(outputs), targets), rtol=1e-6, atol=1e-6)


def test_objective_weighs_divergence_and_hyperprior_by_one_task():
    """Catches terms per batch or per example where the bound has them once."""
    task = episodes(tasks=1)[0]

    def loss(**weights: float) -> torch.Tensor:
        learner = small(inner_steps=2, **({"kl_weight": 0.0, "hyperprior_weight": 0.0} | weights))
        torch.manual_seed(5)
        return learner.objective(task)[0]

    learner = small(inner_steps=2)
    prior = {n: p for n, p in learner.learner.named_parameters() if ".norms." not in n}
    torch.manual_seed(5)
    divergence = layers.kl_divergence(learner.adapt(task.support).parameters, prior)
    assert divergence > 0.1
    examples = len(task.support.x) + len(task.query_x)
    torch.testing.assert_close(loss(kl_weight=0.5) - loss(), 0.5 * divergence / examples)
    hyperprior = layers.log_hyperprior(prior, 1.0, 0.01)
    torch.testing.assert_close(loss(hyperprior_weight=0.1) - loss(), -0.1 * hyperprior / examples)


@pytest.mark.parametrize("batch_norm", ["support", "per_query", "running", "none"])
def test_evaluation_draws_the_same_whatever_is_evaluated_with_it(batch_norm):
    """Catches noise from the global stream, or that follows a task's place in the batch or a query's in the set."""
    learner = small(inner_steps=2, batch_norm=batch_norm).eval()
    batch = episodes(tasks=4, queries=2)
    with torch.inference_mode():
        expected = learner.predictions(batch)
        before = torch.random.get_rng_state()
        for chunk in (1, 3, 4):
            learner.chunk = chunk
            torch.testing.assert_close(learner.predictions(batch), expected, rtol=1e-8, atol=1e-10)
        assert torch.equal(torch.random.get_rng_state(), before)
        state = learner.adapt(batch[3].support)
        part = learner.predict(state, batch.query_x[3, [4, 1]])
        torch.testing.assert_close(part, expected[3, [4, 1]], rtol=1e-8, atol=1e-10)


def test_prediction_is_the_mean_of_the_draws_probabilities():
    """Catches averaged logits, and draws that are all the same."""
    learner = small(inner_steps=1, eval_samples=4).eval()
    task = episodes()[0]
    with torch.no_grad():
        state = learner.adapt(task.support)
        draws = torch.stack(learner.query_outputs(state, task.query_x)).softmax(-1)
        assert (draws[1:] - draws[0]).abs().amax((1, 2)).min() > 1e-3
        torch.testing.assert_close(learner.predict(state, task.query_x).exp(), draws.mean(0))


def test_regression_is_predicted_by_a_mixture():
    """Catches a predictive distribution without the noise of an observation."""
    learner = ABML(MLP(1, hidden=(5,)), 1, inner_rate=0.01, noise=0.3, deviation=0.2, eval_samples=4).double().eval()
    batch = lines()
    with torch.no_grad():
        mixture = learner.predictions(batch)
    assert mixture.mean.shape == mixture.deviation.shape == (2, 4, 5, 1)
    torch.testing.assert_close(mixture.deviation, torch.full_like(mixture.mean, 0.3))
    assert (mixture.mean.std(1) > 1e-3).all()


def test_other_numbers_of_ways_have_deviations_too():
    """Catches a head whose deviations keep the trained number of rows."""
    learner = small(inner_steps=0).eval()
    for ways in (2, 5):
        x = torch.rand(ways, 1, 8, 8, dtype=DOUBLE)
        state = learner.adapt(Support(x, torch.arange(ways), ways))
        assert learner.predict(state, x).shape == (ways, ways)
    head = learner.learner.head
    torch.testing.assert_close(state.parameters["head.weight_rho"][4], head.weight_rho.mean(0))
    torch.testing.assert_close(state.parameters["head.weight"][4], head.weight.mean(0))


@pytest.mark.parametrize("settings", [{"deviation": 0.0}, {"noise": -1.0}, {"samples": 0}, {"eval_inner_steps": -1}])
def test_impossible_settings_are_refused(settings):
    """Catches settings that would fail, or train nothing, only much later."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        ABML(Conv4(hidden=2), **settings)
