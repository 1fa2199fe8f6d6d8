"""What every neural process keeps: order, independence of queries, gradients, densities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm

from datamodules import GaussianProcesses
from datamodules.core.episodes import Episodes, Support
from datamodules.core.errors import ConfigError
from models import ANP, CNP, NP, TNP, MetaLearner
from models.core.metrics import density_metrics
from models.core.predictions import Mixture
from models.core.shapes import fits_task
from tests.support.gradients import assert_is_gradient, gradients_of

SMALL = {"hidden": 8, "encoder_layers": 3}
LATENT = {**SMALL, "latents": 5, "samples": 3, "eval_samples": 6}
LEARNERS = {
    "CNP": lambda **more: CNP(**SMALL, encoders=2, **more),
    "NP": lambda **more: NP(**LATENT, **more),
    "NP, latent alone": lambda **more: NP(**LATENT, deterministic=False, bound="elbo", **more),
    "NP, Bayesian": lambda **more: NP(**LATENT, aggregation="bayesian", **more),
    "ANP": lambda **more: ANP(**LATENT, heads=2, **more),
    "TNP": lambda **more: TNP(size=8, depth=3, heads=2, feedforward=12, **more),
}
EVERY = pytest.mark.parametrize("name", LEARNERS)


def made(name: str, **more) -> MetaLearner:
    torch.manual_seed(0)
    return LEARNERS[name](**more).double()


def batch(tasks: int = 3, shots: int = 5, queries: int = 4, inputs: int = 1, outputs: int = 1) -> Episodes:
    g = torch.Generator().manual_seed(1)
    sizes = ((shots, inputs), (shots, outputs), (queries, inputs), (queries, outputs))
    tensors = [torch.randn(tasks, *size, generator=g, dtype=torch.float64) for size in sizes]
    return Episodes(*tensors, index=torch.arange(tasks), meta_batch=tasks)


@EVERY
def test_order_of_the_support_set_does_not_matter(name):
    """Catches positions, a sequence, and attention whose keys and values are of other points."""
    learner, support = made(name).eval(), batch()[0].support
    x, order = torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None], torch.tensor([3, 0, 4, 1, 2])
    other = Support(support.x[order], support.y[order], 0)
    for one, two in zip(*(learner.predict(learner.adapt(s), x) for s in (support, other)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    if learner.embedding_size:
        one, two = learner.embed_task(support), learner.embed_task(other)
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
        assert one.shape == (learner.embedding_size,) and one.std() > 0
    # Which y stands beside which x does matter.
    mixed = learner.predict(learner.adapt(Support(support.x, support.y[order], 0)), x)
    assert (mixed.mean - learner.predict(learner.adapt(support), x).mean).abs().max() > 1e-6


@EVERY
def test_queries_are_independent_of_one_another(name):
    """Catches queries that attend to one another or to themselves, or that become part of the support set."""
    learner, task = made(name).eval(), batch(queries=6)[0]
    state = learner.adapt(task.support)
    before = learner.predict(state, task.query_x)
    moved = task.query_x.clone()
    moved[2] += 0.5
    after = learner.predict(state, moved)
    others = [0, 1, 3, 4, 5]
    for one, two in zip(before, after, strict=True):
        torch.testing.assert_close(one[:, others], two[:, others], rtol=1e-12, atol=1e-14)
        assert (one[:, 2] - two[:, 2]).abs().max() > 1e-6
    alone = [learner.predict(state, x[None]) for x in task.query_x]
    torch.testing.assert_close(torch.cat([p.mean for p in alone], 1), before.mean, rtol=1e-10, atol=1e-12)


@EVERY
def test_tasks_that_are_mapped_over_are_as_each_alone(name):
    """Catches what vmap makes of attention, norms and samples: another task's support set, or noise by its place."""
    learner, episodes = made(name).eval(), batch()
    together = learner.predictions(episodes)
    for i, task in enumerate(episodes):
        alone = learner.predict(learner.adapt(task.support), task.query_x)
        torch.testing.assert_close(alone.mean, together.mean[i], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(alone.deviation, together.deviation[i], rtol=1e-10, atol=1e-12)


@EVERY
def test_gradients_are_those_of_finite_differences(name):
    """Catches a divergence, a sample or a code that passes no gradient, and what vmap makes of the norms' gradient."""
    learner, episodes = made(name), batch()

    def objective() -> torch.Tensor:
        torch.manual_seed(7)  # the same samples
        return learner.map(learner.objective, episodes)[0].mean()

    objective().backward()
    assert_is_gradient(gradients_of(learner), learner.named_parameters(), objective)


@EVERY
def test_inputs_and_outputs_of_several_numbers(name):
    """Catches outputs that share a mean or a deviation, and densities that leave an output out."""
    learner, episodes = made(name, inputs=2, outputs=3).eval(), batch(inputs=2, outputs=3)
    prediction = Mixture(*(part.detach() for part in learner.predictions(episodes)))
    parts = 1 if name in ("CNP", "TNP") else 6
    assert prediction.mean.shape == prediction.deviation.shape == (3, parts, 4, 3)
    measured = learner.per_task(prediction, episodes.query_y)
    for i in range(3):
        log_p = norm.logpdf(episodes.query_y[i], *(part[i] for part in prediction)).sum(-1)  # (M, Q)
        marginal, joint = logsumexp(log_p, 0, b=1 / parts).mean(), logsumexp(log_p.sum(1), 0, b=1 / parts) / 4
        assert float(measured["marginal"][i]) == pytest.approx(marginal, rel=1e-9)
        assert float(measured["joint"][i]) == pytest.approx(joint, rel=1e-9)
    assert float(measured["marginal"].mean()) != pytest.approx(-float(measured["nll"].mean()))  # of one number each
    learner.train()
    assert torch.isfinite(learner.map(learner.objective, episodes)[0]).all()


def test_marginal_and_joint_differ_where_parts_are_functions():
    """Catches one density under both names. Two functions, each certain: of three queries on one of them the joint
    density is half of that function's, and the marginal one, by query, is half of it each time."""
    values = torch.tensor([[0.0, 0.0, 0.0], [5.0, 5.0, 5.0]], dtype=torch.float64)
    prediction = Mixture(values[..., None], torch.full((2, 3, 1), 0.1, dtype=torch.float64))
    measured = density_metrics(prediction, torch.zeros(3, 1, dtype=torch.float64))
    at_its_mean = norm.logpdf(0, 0, 0.1)
    assert float(measured["marginal"]) == pytest.approx(at_its_mean - np.log(2))
    assert float(measured["joint"]) == pytest.approx(at_its_mean - np.log(2) / 3)


@pytest.mark.parametrize("name", ["CNP", "TNP"])
def test_densities_are_one_where_queries_are_independent(name):
    """Catches a joint density of more or less than the product."""
    learner, episodes = made(name).eval(), batch()
    measured = learner.per_task(learner.predictions(episodes), episodes.query_y)
    torch.testing.assert_close(measured["marginal"], measured["joint"], rtol=1e-12, atol=0)
    torch.testing.assert_close(measured["marginal"], -measured["nll"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["NP", "ANP"])
def test_the_joint_density_is_not_the_marginal_where_samples_are_functions(name):
    """Catches samples that are mixed query by query, for which both would be equal."""
    learner, episodes = made(name).eval(), batch()
    measured = learner.per_task(learner.predictions(episodes), episodes.query_y)
    assert ((measured["marginal"] - measured["joint"]).abs() > 1e-9).all()


@pytest.mark.parametrize(("name", "reconstruct"), [("CNP", True), ("CNP", False), ("TNP", True), ("TNP", False)])
def test_the_objective_is_the_mean_log_density_of_a_point(name, reconstruct):
    """Catches an objective of other points than it says, and predictions of points in another order."""
    learner, task = made(name, reconstruct=reconstruct), batch(outputs=1)[0]
    loss, prediction = learner.objective(task)
    x, y = task.query_x, task.query_y
    if reconstruct:
        x, y = torch.cat([x, task.support.x]), torch.cat([y, task.support.y])
    expected = learner.predict(learner.adapt(task.support), x)
    log_p = norm.logpdf(y, expected.mean[0].detach(), expected.deviation[0].detach())
    assert loss.item() == pytest.approx(-log_p.mean(), rel=1e-10)
    torch.testing.assert_close(prediction.mean, expected.mean[:, :4])


@EVERY
def test_other_inputs_are_refused_in_one_line(name):
    """Catches a matrix product that fails in the middle of the first step, without the setting's name."""
    fits_task(made(name).float(), batch().apply(lambda t: t.float()))
    with pytest.raises(ConfigError, match=r"model.init_args.inputs 2"):
        fits_task(made(name), batch(inputs=2))
    with pytest.raises(ConfigError, match=r"model.init_args.outputs 2"):
        fits_task(made(name), batch(outputs=2))


@EVERY
def test_learns_that_functions_are_smooth(name):
    """Catches a gradient that teaches nothing: after some steps it beats the best guess that does not look at the
    support set, a normal distribution of all values, which has 5 standard errors less."""
    torch.manual_seed(0)
    learner = LEARNERS[name]()
    data = GaussianProcesses(meta_batch_size=16, shots=20, queries=10, lengthscale=(1.0, 2.0), scale=(1.0, 1.0))
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
    for step in range(120):
        episodes = data.distribution("train").sample(range(16 * step, 16 * step + 16))
        optimizer.zero_grad()
        learner.map(learner.objective, episodes)[0].mean().backward()
        optimizer.step()
    learner.eval()
    with torch.no_grad():
        episodes = data.distribution("val").sample(range(64))
        marginal = learner.per_task(learner.predictions(episodes), episodes.query_y)["marginal"]
    values = marginal.numpy() - norm.logpdf(episodes.query_y[..., 0], 0, np.sqrt(1 + 0.02**2)).mean(1)
    assert values.mean() > 5 * values.std() / np.sqrt(len(values))
