"""The weight generator's posterior, draws and their weights against restatements; its gradient, finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal

from datamodules.core.episodes import Support, Task
from models import MLP, Conv4, WeightGenerator
from tests.support.gradients import assert_equals_finite_differences, episodes

DOUBLE = torch.float64


def small(**settings) -> WeightGenerator:
    torch.manual_seed(2)
    defaults = {"latents": 3, "hidden": 6, "samples": 3, "eval_samples": 4, "kl_weight": 0.4}
    return WeightGenerator(Conv4(hidden=4, image_size=8), **(defaults | settings)).double()


def on_features(**settings) -> WeightGenerator:
    """A learner whose backbone leaves its input, (N, 5), as it is."""
    torch.manual_seed(3)
    defaults = {"latents": 2, "hidden": 6, "samples": 3, "eval_samples": 4, "kl_weight": 0.4}
    learner = WeightGenerator(MLP(5, hidden=()), **(defaults | settings)).double()
    with torch.no_grad():  # classifiers that differ much
        for parameter in learner.parameters():
            parameter.mul_(2)
    return learner


def feature_task(shots=(2, 1, 2), queries=4) -> Task:
    g = torch.Generator().manual_seed(4)
    y = torch.arange(3).repeat_interleave(torch.tensor(shots))
    x = torch.randn(len(y), 5, generator=g, dtype=DOUBLE)
    query_x = torch.randn(queries, 5, generator=g, dtype=DOUBLE)
    return Task(Support(x, y, 3), query_x, torch.arange(queries) % 3)


def through(learner: WeightGenerator, part: str, h: np.ndarray) -> np.ndarray:
    """A multilayer perceptron of the learner's, in numpy."""
    w = {n: p.detach().numpy() for n, p in learner.named_parameters() if n.startswith(part + ".")}
    layers = sorted({int(n.split(".")[1]) for n in w})
    for i in layers:
        h = w[f"{part}.{i}.weight"] @ h + w[f"{part}.{i}.bias"]
        h = h if i == layers[-1] else np.maximum(h, 0)
    return h


def posterior(learner: WeightGenerator, support: Support) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of every class's noise, by loops."""
    x, y = support.x.numpy(), support.y.numpy()
    codes = [np.mean([through(learner, "examples", x[i]) for i in np.flatnonzero(y == n)], 0) for n in range(3)]
    made = [through(learner, "posterior", np.concatenate([code, np.mean(codes, 0)])) for code in codes]
    mean, log_deviation = np.split(np.array(made), 2, 1)
    return mean, np.exp(log_deviation)


def probabilities(learner: WeightGenerator, z: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(samples, N, ways) by loops over draws and classes."""
    out = np.zeros((len(z), len(x), z.shape[1]))
    for s in range(len(z)):
        for n in range(z.shape[1]):
            made = through(learner, "generator", z[s, n])
            out[s, :, n] = x @ made[:-1] + made[-1]
    out = np.exp(out - out.max(-1, keepdims=True))
    return out / out.sum(-1, keepdims=True)


def test_posterior_is_of_class_means_and_the_task():
    """Catches a mean over the wrong examples, a class that does not know of the others, and deviations as variances."""
    learner, task = on_features(), feature_task()
    q = learner.encode(task.support.x, task.support)
    mean, deviation = posterior(learner, task.support)
    np.testing.assert_allclose(q.mean.detach(), mean, rtol=1e-10)
    np.testing.assert_allclose(q.stddev.detach(), deviation, rtol=1e-10)


def test_objective_is_query_loss_and_divergence():
    """Catches KL with its arguments swapped, of one class alone, or not once for all queries together; and a mean of
    the draws' losses in place of the loss of their mean."""
    learner, task = on_features().train(), feature_task()
    torch.manual_seed(0)
    loss, prediction, kept = learner.objective(task)
    mean, deviation = posterior(learner, task.support)
    kl = np.sum((deviation**2 + mean**2 - 1) / 2 - np.log(deviation))
    assert kept["metrics"]["kl"].item() == pytest.approx(kl, rel=1e-10)
    torch.manual_seed(0)
    z = mean + deviation * torch.randn(3, 3, 2, dtype=DOUBLE).numpy()
    p = probabilities(learner, z, task.query_x.numpy()).mean(0)
    np.testing.assert_allclose(prediction.detach().exp(), p, rtol=1e-9)
    surprise = -np.log(p[np.arange(4), task.query_y.numpy()]).mean()
    assert loss.item() == pytest.approx(surprise + 0.4 * kl / 4, rel=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_divergence_and_draws_agree(training):
    """Catches noise of another variance than 1 in meta-training or in evaluation, or that classes or draws share."""
    learner, task = on_features(samples=20_000, eval_samples=20_000).train(training), feature_task()
    with torch.no_grad():
        q = learner.encode(task.support.x, task.support)
        z = q.mean + q.stddev * learner.noise(task.support.x, task.support, q.mean)
        ratio = (q.log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum((1, 2))
        kl = learner.objective(task)[2]["metrics"]["kl"]
        assert abs(ratio.mean() - kl) < 5 * ratio.std() / math.sqrt(len(z))
        assert ((z.mean(0) - q.mean).abs() < 5 * q.stddev / math.sqrt(len(z))).all()
        correlations = z.flatten(1).T.corrcoef() - torch.eye(6, dtype=DOUBLE)
        assert correlations.abs().max() < 0.04


@pytest.mark.parametrize("weighting", ["uniform", "likelihood", "importance"])
@pytest.mark.parametrize("conditional", [True, False])
def test_draws_weigh_what_the_support_set_says(weighting, conditional):
    """Catches likelihoods that are averaged over examples, of the wrong labels, or of a bias-less classifier, and a
    ratio p/q upside down or left out."""
    learner, task = on_features(weighting=weighting, conditional=conditional).eval(), feature_task()
    support = task.support
    mean, deviation = posterior(learner, support) if conditional else (np.zeros((3, 2)), np.ones((3, 2)))
    noise = learner.noise(support.x, support, torch.zeros(3, 2, dtype=DOUBLE)).numpy()
    z = mean + deviation * noise
    weight = np.ones(4)
    if weighting != "uniform":
        weight *= probabilities(learner, z, support.x.numpy())[:, np.arange(5), support.y.numpy()].prod(1)
    if weighting == "importance":
        q = np.exp(-(((z - mean) / deviation) ** 2) / 2) / deviation
        weight *= (np.exp(-(z**2) / 2) / q).prod((1, 2))
    weight /= weight.sum()
    with torch.no_grad():
        state = learner.adapt(support)
        np.testing.assert_allclose(state.log_weight.exp(), weight, rtol=1e-8)
        expected = (weight[:, None, None] * probabilities(learner, z, task.query_x.numpy())).sum(0)
        np.testing.assert_allclose(learner.predict(state, task.query_x).exp(), expected, rtol=1e-8)
    if weighting != "uniform":
        assert weight.max() > 1.1 * weight.min()


def test_importance_sampling_from_the_posterior_and_from_the_prior_agree():
    """Catches weights that are not those of the exact posterior: two ways to draw, one predictive distribution."""
    task, samples = feature_task(), 40_000
    by_posterior = on_features(weighting="importance", eval_samples=samples).eval()
    with torch.no_grad():  # wider than the prior, as a proposal has to be
        by_posterior.posterior[2].weight.mul_(0.3)
        by_posterior.posterior[2].bias[2:] = 0.4
    by_prior = on_features(weighting="likelihood", conditional=False, eval_samples=samples).eval()
    by_prior.generator.load_state_dict(by_posterior.generator.state_dict())
    predictions = []
    with torch.no_grad():
        for learner in (by_posterior, by_prior):
            state = learner.adapt(task.support)
            predictions.append(learner.predict(state, task.query_x).exp())
            alike = torch.full((samples,), -math.log(samples), dtype=DOUBLE)
            unweighted = learner.predict(state._replace(log_weight=alike), task.query_x).exp()
            assert (unweighted - predictions[-1]).abs().max() > 0.1
    torch.testing.assert_close(*predictions, rtol=0, atol=0.02)


def test_noise_alone_knows_nothing_of_the_task():
    """Catches an ablation that still conditions: without weights its prediction is that of no knowledge."""
    learner, task = on_features(conditional=False, eval_samples=20_000).eval(), feature_task()
    with torch.no_grad():
        p = learner.predict(learner.adapt(task.support), task.query_x).exp()
    torch.testing.assert_close(p, torch.full_like(p, 1 / 3), rtol=0, atol=0.02)
    assert not [n for n, _ in learner.named_parameters() if not n.startswith("generator.")]


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_norm": "running"},
        {"batch_norm": "transductive", "weighting": "likelihood"},
        {"batch_norm": "support", "weighting": "importance"},
        {"batch_norm": "per_query", "weighting": "likelihood", "conditional": False},
        {"batch_norm": "none", "stochastic": False},
    ],
)
def test_meta_gradient_equals_finite_differences(settings, monkeypatch):
    """Catches noise, weights of the draws, or support features outside of the graph."""
    learner = small(chunk=2, **settings).train()
    mapped = learner.map

    def seeded(*args):
        torch.manual_seed(5)
        return mapped(*args)

    monkeypatch.setattr(learner, "map", seeded)
    assert_equals_finite_differences(learner, episodes(tasks=2))


@pytest.mark.parametrize("weighting", ["uniform", "importance"])
def test_evaluation_is_a_function_of_the_support_set(weighting):
    """Catches noise from the global stream, or that follows a task's place in the batch, an example's place in the
    support set, or a label."""
    learner, batch = small(weighting=weighting, batch_norm="support").eval(), episodes(tasks=4)
    with torch.inference_mode():
        expected = learner.predictions(batch)
        before = torch.random.get_rng_state()
        for chunk in (1, 3):
            learner.chunk = chunk
            torch.testing.assert_close(learner.predictions(batch), expected, rtol=1e-8, atol=1e-10)
        assert torch.equal(torch.random.get_rng_state(), before)
        x, y, asked = batch.support_x[1], batch.support_y[1], batch.query_x[1]
        order = torch.randperm(len(y))
        got = learner.predict(learner.adapt(Support(x[order], y[order], 3)), asked)
        torch.testing.assert_close(got, expected[1], rtol=1e-8, atol=1e-10)
        names = torch.tensor([2, 0, 1])
        got = learner.predict(learner.adapt(Support(x, names[y], 3)), asked)
        torch.testing.assert_close(got[:, names], expected[1], rtol=1e-8, atol=1e-10)
        drawn = learner.adapt(batch[1].support).weights
        assert (drawn[0] - drawn[1]).abs().min(0).values.max() > 1e-4
        assert F.mse_loss(drawn[:, 0], drawn[:, 1]) > 1e-6
