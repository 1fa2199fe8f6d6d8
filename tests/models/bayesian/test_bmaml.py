"""SVGD against distributions and loops; BMAML against MAML, finite differences and torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, Gamma, MixtureSameFamily, Normal
from torch.func import functional_call

import models.bayesian.svgd
from datamodules.core.episodes import Episodes, Support
from datamodules.core.errors import ConfigError
from models import ANIL, BMAML, MAML, MLP, Conv4
from models.bayesian.svgd import flat, rbf_kernel, split_into_particles, svgd_direction, unflat
from models.core.shapes import fits
from models.networks.batch_norm import recording
from tests.support.gradients import assert_is_gradient, episodes, gradients_of


def small(adapt="head", particles=4, **settings) -> BMAML:
    torch.manual_seed(2)
    settings = {"particles": particles, "inner_rate": 1.0, "follow_steps": 2, **settings}
    learner = BMAML(Conv4(hidden=4, image_size=8), outputs=3, adapt=adapt, **settings).double()
    with torch.no_grad():  # away from the symmetric start
        for p in learner.parameters():
            p += 0.1 * torch.randn_like(p)
    return learner


def regressor(**settings) -> BMAML:
    torch.manual_seed(2)
    return BMAML(MLP(hidden=(6,)), outputs=1, adapt="all", noise=0.5, inner_rate=0.1, **settings).double()


def curves(tasks=2, dtype=torch.float64) -> Episodes:
    x = torch.linspace(-2, 2, 9, dtype=dtype)[:, None] + torch.arange(tasks, dtype=dtype)[:, None, None] / 7
    y = torch.sin(2 * x)
    return Episodes(x[:, ::2], y[:, ::2], x[:, 1::2], y[:, 1::2], torch.arange(tasks), 0, tasks)


def one_particle(learner: BMAML, m: int, into: MAML | ANIL) -> MAML | ANIL:
    """A learner of one network, with the weights and running averages of a particle."""
    for (n, target), (_, source) in zip(
        into.learner.state_dict(keep_vars=True).items(), learner.learner.state_dict(keep_vars=True).items(), strict=True
    ):
        stacked = learner.whole or n.startswith("head.")
        target.data.copy_((source[m] if stacked else source).detach())
    return into


def meta_gradient(learner, batch: Episodes) -> dict[str, torch.Tensor]:
    learner.zero_grad()
    learner.map(learner.objective, batch)[0].mean().backward()
    return {n: p.grad.clone() for n, p in learner.named_parameters() if p.grad is not None}


def gaussian_run(repulsive: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and covariance of 60 particles after SVGD towards a correlated Gaussian, and the precision aimed at."""
    mean = torch.tensor([1.0, -2.0], dtype=torch.float64)
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
    precision = torch.linalg.inv(covariance)
    particles = torch.randn(60, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.3
    for _ in range(1500):
        gradient = -(particles - mean) @ precision
        if repulsive:
            direction = svgd_direction(particles, gradient)
        else:
            direction = rbf_kernel(particles)[0] @ gradient / len(particles)
        particles = particles + 0.5 * direction
    return particles.mean(0) - mean, torch.cov(particles.T), covariance


def test_svgd_recovers_a_correlated_gaussian_and_without_repulsion_collapses():
    """Catches a kernel gradient of wrong sign or size, and particles that are only an ensemble of modes."""
    bias, covariance, expected = gaussian_run(repulsive=True)
    assert bias.norm() < 1e-2
    assert (covariance - expected).norm() < 0.15 * expected.norm()
    bias, covariance, _ = gaussian_run(repulsive=False)
    assert bias.norm() < 1e-2
    assert covariance.norm() < 1e-4


def test_kernel_and_direction_equal_a_loop_over_pairs():
    """Catches a transposed kernel, a gradient by the wrong argument, and a median that counts the diagonal."""
    particles, gradient = torch.randn(2, 5, 3, dtype=torch.float64)
    distances = sorted(sum((a - b) ** 2).item() for i, a in enumerate(particles) for b in particles[:i])
    h = distances[(len(distances) - 1) // 2] / math.log(5)
    kernel, bandwidth = rbf_kernel(particles)
    assert bandwidth.item() == pytest.approx(h, rel=1e-10)
    for m, moved in enumerate(svgd_direction(particles, gradient)):
        expected = torch.zeros(3, dtype=torch.float64)
        for j in range(5):
            source = particles[j].clone().requires_grad_()
            k = torch.exp(-(source - particles[m]).pow(2).sum() / h)
            assert k.item() == pytest.approx(kernel[j, m].item(), rel=1e-10)
            expected += (k * gradient[j] + torch.autograd.grad(k, source)[0]).detach() / 5
        torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-12)


def test_one_step_of_two_particles_by_hand():
    """Catches a lost 1/M or factor 2: at 0 and 2, h = 4 / log 2, so k = 1/2 and ∇k = ∓ log 2 / 2."""
    particles, gradient = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [3.0]])
    repulsion = math.log(2) / 2
    expected = torch.tensor([[(1 + 1.5 - repulsion) / 2], [(0.5 + 3 + repulsion) / 2]])
    torch.testing.assert_close(svgd_direction(particles, gradient), expected)


def test_bandwidth_is_a_constant_to_the_gradient():
    """Catches a meta-gradient through the median, which is not part of the method."""
    particles = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 5, dtype=torch.float64)
    kernel, h = rbf_kernel(particles)
    assert not h.requires_grad
    (got,) = torch.autograd.grad((weight * kernel).sum(), particles)
    free = torch.cdist(particles, particles).square()
    (fixed,) = torch.autograd.grad((weight * torch.exp(-free / h)).sum(), particles)
    torch.testing.assert_close(got, fixed, rtol=1e-8, atol=1e-10)


def test_particles_start_from_the_backbones_own_scale_and_apart():
    """Catches particles that start together, which no step separates, or with weights of another size."""
    backbone = Conv4(hidden=8, image_size=8)
    before = {n: p.detach().clone() for n, p in backbone.named_parameters()}
    split_into_particles(backbone, 3)
    for n, p in backbone.named_parameters():
        assert p.requires_grad
        for particle in p:
            assert torch.equal(particle.flatten().sort().values, before[n].flatten().sort().values)
    weight = backbone.convs[1].weight
    assert not torch.equal(weight[0], weight[1]) and not torch.equal(weight[1], weight[2])
    assert backbone.norms[0].running_mean.shape == (3, 8)
    rows = flat(dict(backbone.named_parameters()))
    back = unflat(rows, dict(backbone.named_parameters()))
    assert all(torch.equal(back[n], p) for n, p in backbone.named_parameters())


class Replayed:
    """The kernel with the bandwidths of a recorded run, by pairwise differences."""

    def __init__(self) -> None:
        self.bandwidths: list[torch.Tensor] = []
        self.at: int | None = None

    def __call__(self, particles):
        if self.at is None:
            self.bandwidths.append(rbf_kernel(particles)[1])
            h = self.bandwidths[-1]
        else:
            h, self.at = self.bandwidths[self.at], self.at + 1
        return torch.exp(-(particles[:, None] - particles).square().sum(-1) / h), h


@pytest.mark.parametrize("case", ["head", "all", "regression"])
def test_chasers_meta_gradient_equals_finite_differences_with_the_leader_held(case, monkeypatch):
    """Catches a dropped second-order term through SVGD's steps, and a leader that is not a constant."""
    rate = 1.0 if case == "head" else 0.1
    learner = regressor(particles=3, follow_steps=2) if case == "regression" else small(case, 3, inner_rate=rate)
    task = (curves() if case == "regression" else episodes())[0]
    replayed, leaders, chaser_loss = Replayed(), [], learner.chaser_loss
    monkeypatch.setattr(models.bayesian.svgd, "rbf_kernel", replayed)

    def held(follower, leader):
        leaders.append(leader)
        return chaser_loss(follower, leaders[0])

    learner.chaser_loss = held
    learner.objective(task)[0].backward()
    gradient = gradients_of(learner)
    assert len(replayed.bandwidths) == 3

    def objective() -> torch.Tensor:
        replayed.at = 0
        return learner.objective(task)[0]

    assert_is_gradient(gradient, learner.named_parameters(), objective)
    for name in gradient:
        assert ".convs." in name or gradient[name].norm() > 1e-8, name  # biases before batch norm have none


def test_a_leader_that_is_not_detached_gives_another_gradient():
    """Catches a test above that could not tell: chased and chaser would meet half-way."""
    batch = episodes(tasks=1)
    expected = meta_gradient(small(), batch)["learner.head.weight"]
    learner = small()
    seen = learner.seen(batch[0].support.x)
    particles, fixed = learner.start(3)
    *_, follower = learner.path(particles, fixed, [(seen, batch[0].support.y, None)], 1.0, 2)
    features = learner.seen(batch[0].query_x)
    evidence = [(seen, batch[0].support.y, None), (features, batch[0].query_y, None)]
    *_, leader = learner.path(follower, fixed, evidence, 1.0, 1)
    for detached in (True, False):
        learner.zero_grad()
        loss = sum((follower[n] - (leader[n].detach() if detached else leader[n])).square().sum() for n in fixed_names)
        loss.backward(retain_graph=True)
        same = torch.allclose(learner.learner.head.weight.grad, expected, rtol=1e-8)
        assert same == detached


fixed_names = ("head.weight", "head.bias")


def test_log_posterior_equals_the_distributions():
    """Catches a wrong exponent, a lost Jacobian of the logarithm, or a prior counted per datum; up to a constant."""
    learner = regressor(particles=2)
    with torch.no_grad():
        learner.log_lambda.copy_(torch.tensor([0.3, -0.4]))
        learner.log_gamma.copy_(torch.tensor([1.3, 0.2]))
    task = curves()[0]
    particles, fixed = learner.start(0)
    got, expected = [], []
    for m in range(2):
        particle = {n: p[m].detach() for n, p in particles.items()}
        evidence = [(task.support.x, task.support.y, None), (task.query_x, task.query_y, None)]
        got.append(learner.log_posterior(particle, fixed, evidence))
        lam, gam = particle.pop("log_lambda").exp(), particle.pop("log_gamma").exp()
        x, y = (torch.cat([part[k] for part in evidence]) for k in range(2))
        outputs = functional_call(learner.learner, particle, (x,))
        total = Normal(outputs, gam**-0.5).log_prob(y).sum()
        total += sum(Normal(0, lam**-0.5).log_prob(w).sum() for w in particle.values())
        two, fifth = torch.tensor(2.0, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
        total += Gamma(two, two).log_prob(lam) + lam.log() + Gamma(two, fifth).log_prob(gam) + gam.log()
        expected.append(total)
    torch.testing.assert_close(got[0] - got[1], expected[0] - expected[1], rtol=1e-10, atol=1e-10)


def test_prediction_is_the_mean_of_probabilities():
    """Catches the mean of logits, which is as sure as its particles where they contradict each other."""
    learner = small(prior=False)
    outputs = torch.tensor([[[9.0, 0.0, 0.0]], [[0.0, 9.0, 0.0]]], dtype=torch.float64)
    got = learner.prediction(outputs, {}).exp()
    torch.testing.assert_close(got, (F.softmax(outputs[0], -1) + F.softmax(outputs[1], -1)) / 2)
    task = curves()[0]
    learner = regressor(particles=3)
    with torch.no_grad():
        learner.log_gamma.copy_(torch.tensor([0.0, 1.0, 2.0]))
        state = learner.adapt(task.support)
        density = learner.predict(state, task.query_x).log_prob(task.query_y)
    parts = []
    for m in range(3):
        particle = {n: p[m] for n, p in state.parameters.items() if "." in n}
        deviation = state.parameters["log_gamma"][m].exp() ** -0.5
        parts.append(Normal(functional_call(learner.learner, particle, (task.query_x,)), deviation))
    mixture = MixtureSameFamily(
        Categorical(torch.ones(3, dtype=torch.float64)),
        Normal(torch.stack([p.mean for p in parts], -1), torch.stack([p.stddev for p in parts], -1)),
    )
    torch.testing.assert_close(density, mixture.log_prob(task.query_y).detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("adapt", "other"), [("all", MAML), ("head", ANIL)])
@pytest.mark.parametrize("meta_loss", ["direct", "separate"])
def test_one_particle_without_a_prior_is_maml(adapt, other, meta_loss):
    """Catches another scale of the inner rate, and a meta-loss that is not the query loss."""
    learner = small(adapt, particles=1, prior=False, meta_loss=meta_loss)
    single = other(Conv4(hidden=4, image_size=8), outputs=3, inner_rate=1.0, inner_steps=2).double()
    one_particle(learner, 0, single)
    batch = episodes()
    expected, got = meta_gradient(single, batch), meta_gradient(learner, batch)
    assert expected.keys() == got.keys()
    for name, e in expected.items():
        torch.testing.assert_close(got[name].view_as(e), e, rtol=1e-7, atol=1e-10)


def test_one_noisy_particle_without_a_prior_takes_mamls_step_at_noise_of_half():
    """Catches a likelihood of another scale: at γ = 2 the gradient is that of the mean squared error."""
    learner = regressor(particles=1, prior=False)
    with torch.no_grad():
        learner.log_gamma.fill_(math.log(2))
    single = one_particle(learner, 0, MAML(MLP(hidden=(6,)), outputs=1, inner_rate=0.1).double())
    task = curves()[0]
    got, expected = learner.adapt(task.support).parameters, single.adapt(task.support).parameters
    for name, e in expected.items():
        torch.testing.assert_close(got[name][0], e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("adapt", ["head", "all"])
@pytest.mark.parametrize("svgd", [True, False])
def test_only_svgd_makes_particles_interact(adapt, svgd):
    """Catches an ensemble of MAMLs that is none, and SVGD that is only that."""
    learner, task = small(adapt, svgd=svgd, prior=False), episodes()[0]
    before = learner.adapt(task.support).parameters["head.weight"].detach()
    with torch.no_grad():
        learner.learner.head.weight[1] += 0.5
    after = learner.adapt(task.support).parameters["head.weight"].detach()
    assert torch.equal(before[0], after[0]) != svgd
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("adapt", ["head", "all"])
@pytest.mark.parametrize("batch_norm", ["transductive", "support", "per_query", "running", "none"])
def test_each_particle_is_normalised_as_a_network_of_its_own(batch_norm, adapt):
    """Catches statistics of one particle used for another, and averages that all share."""
    learner = small(adapt, batch_norm=batch_norm, svgd=False, prior=False)
    with torch.no_grad():
        for name, b in learner.learner.named_buffers():
            b.copy_(0.5 * torch.rand_like(b) + ("var" in name))
    learner.eval()
    task, log_p = episodes()[0], []
    for m in range(4):
        settings = {"inner_rate": 1.0, "inner_steps": 2, "batch_norm": batch_norm}
        single = (MAML if adapt == "all" else ANIL)(Conv4(hidden=4, image_size=8), outputs=3, **settings).double()
        one_particle(learner, m, single).eval()
        with torch.no_grad():
            log_p.append(single.predict(single.adapt(task.support), task.query_x).log_softmax(-1))
    with torch.no_grad():
        got = learner.predict(learner.adapt(task.support), task.query_x)
    torch.testing.assert_close(got.exp(), torch.stack(log_p).exp().mean(0), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("adapt", ["head", "all"])
def test_training_leaves_the_running_statistics_of_each_particle(adapt):
    """Catches averages that vmap loses, or that are those of the support set or of another particle."""
    learner, batch = small(adapt, batch_norm="running"), episodes()

    def recorded(task):
        statistics = {}
        with recording(statistics, differentiable=False):
            learner.objective(task)
        return statistics

    layer = learner.learner.backbone.norms[0]
    mean, var = learner.map(recorded, batch)[layer, 0]
    conv = learner.learner.backbone.convs[0]
    weight, bias = (p if adapt == "all" else p[None] for p in (conv.weight, conv.bias))
    particles, fixed = learner.start(3)
    for t in range(len(batch)):
        moved = weight
        if adapt == "all":
            path = learner.path(particles, fixed, [(batch[t].support.x, batch[t].support.y, None)], 1.0, 2)
            *_, end = path
            moved, bias = end["backbone.convs.0.weight"], end["backbone.convs.0.bias"]
        for m in range(len(moved)):
            z = F.conv2d(batch.query_x[t], moved[m], bias[m], 2, 1)
            got = (mean[t][m], var[t][m]) if adapt == "all" else (mean[t], var[t])
            torch.testing.assert_close(got[0], z.mean((0, 2, 3)).detach(), rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(got[1], z.var((0, 2, 3), correction=0).detach(), rtol=1e-6, atol=1e-9)
    layer.update_running(mean.mean(0), var.mean(0))
    torch.testing.assert_close(layer.running_mean, 0.1 * mean.mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("meta_loss", ["chaser", "direct", "separate"])
@pytest.mark.parametrize("adapt", ["head", "all"])
def test_tasks_mapped_together_are_as_alone(adapt, meta_loss):
    """Catches particles, or a median distance, that mix up the tasks that vmap has together."""
    batch = episodes()
    expected = meta_gradient(small(adapt, meta_loss=meta_loss, chunk=1), batch)
    got = meta_gradient(small(adapt, meta_loss=meta_loss, chunk=2), batch)
    for name, e in expected.items():
        torch.testing.assert_close(got[name], e, rtol=1e-7, atol=1e-10)


def test_the_chaser_trains_the_shared_features():
    """Catches a chaser loss whose gradient never reaches the backbone: by it alone, queries get better."""
    torch.manual_seed(0)
    learner = BMAML(MLP(4, (16,)), outputs=2, particles=3, inner_rate=3.0, follow_steps=2, leader_steps=2)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(400, 2, 8, 4, generator=rng) * torch.tensor([0.2, 3.0, 3.0, 3.0])  # the first input tells classes
    x[:, 0, :, 0] += 1.0
    x[:, 1, :, 0] -= 1.0
    support, query = x[:, :, :1].flatten(1, 2), x[:, :, 1:].flatten(1, 2)
    ys, yq = torch.arange(2).expand(400, -1), torch.arange(2).repeat_interleave(7).expand(400, -1)
    batch = Episodes(support, ys, query, yq, torch.arange(400), 2, 400)

    def query_loss() -> float:
        with torch.no_grad():
            return learner.loss(learner.predictions(batch).flatten(0, 1), yq.flatten()).item()

    before, optimizer = query_loss(), torch.optim.Adam(learner.learner.backbone.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        learner.map(learner.objective, batch)[0].mean().backward()
        optimizer.step()
    assert query_loss() < before - 0.02


@pytest.mark.parametrize("adapt", ["head", "all"])
def test_other_numbers_of_ways(adapt):
    """Catches rows cut or added along the particles instead of the classes."""
    learner = small(adapt).eval()
    for ways in (2, 5):
        x = torch.rand(ways, 1, 8, 8, dtype=torch.float64)
        prediction = learner.predict(learner.adapt(Support(x, torch.arange(ways), ways)), x)
        torch.testing.assert_close(prediction.exp().sum(-1), torch.ones(ways, dtype=torch.float64))
    start = learner.start(5)[0]["head.weight"]
    torch.testing.assert_close(start[:, 4], learner.learner.head.weight.mean(1))


@pytest.mark.parametrize("svgd", [True, False])
def test_precisions_move_at_their_own_rate(svgd):
    """Catches a factor on the weights' steps, or on none: at 0 the precisions stay, at 1/2 they go half as far."""
    moves = {}
    for rate in (0.0, 0.5, 1.0):
        learner = regressor(particles=3, precision_rate=rate, svgd=svgd)
        start, end = learner.start(0)[0], learner.adapt(curves()[0].support).parameters
        moves[rate] = {n: end[n] - p for n, p in start.items()}
    for name, full in moves[1.0].items():
        factors = {0.0: 0.0, 0.5: 0.5} if name in ("log_lambda", "log_gamma") else {0.0: 1.0, 0.5: 1.0}
        assert full.abs().min() > 0
        for rate, factor in factors.items():
            torch.testing.assert_close(moves[rate][name], factor * full, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("adapt", ["head", "all"])
def test_particles_take_the_inputs_that_one_network_takes(adapt):
    """Catches an evaluation that refuses the right images, or takes others, for stacked weights."""
    learner = small(adapt)
    fits(learner, torch.rand(6, 1, 8, 8))
    with pytest.raises(ConfigError, match="inputs are 3×8×8 but the network takes 1×8×8"):
        fits(learner, torch.rand(6, 3, 8, 8))


@pytest.mark.parametrize("settings", [{"particles": 0}, {"leader_steps": 0}, {"follow_steps": -1}, {"noise": 0.0}])
def test_impossible_settings_are_refused(settings):
    """Catches settings that would fail, or train nothing, only much later."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        BMAML(**{"backbone": Conv4(hidden=2), **settings})
