"""BiGAN of sets: the game against its restatement, and what it learns against a posterior in closed form."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from benchmarks.set_codes import bigan, measure, posterior_mean, sets, train
from datamodules.core.episodes import Support
from models import BiGAN, Conv4
from models.core.two_players import of_inputs_alone
from models.networks.batch_norm import normalize_by
from tests.support.gradients import episodes

DOUBLE = torch.float64


def small(penalty: float = 0.0) -> BiGAN:
    torch.manual_seed(0)
    backbone = Conv4(hidden=4, image_size=8)
    settings = {"codes": 3, "noise": 2, "hidden": 5, "widths": (3, 4), "stochastic": False, "batch_norm": "none"}
    return BiGAN(backbone, penalty=penalty, **settings).double()


def test_each_player_gets_the_gradient_of_its_own_loss():
    """Catches a discriminator's loss that trains E or G, theirs that trains the discriminator, a loss whose sign or
    pair is the other's, and fakes that are compared with other codes than they were made of."""
    learner, task = small(), episodes(tasks=1, shots=2, queries=3)[0]
    players = {
        name: [p for n, p in learner.named_parameters() if n.startswith("discriminator") == (name == "d")]
        for name in ("d", "eg")
    }
    loss, _, kept = learner.objective(task)
    got = {name: torch.autograd.grad(loss, of, retain_graph=True) for name, of in players.items()}
    # The same draws, in the same order.
    drawn = {}

    def record(sets: Support, codes: torch.Tensor) -> torch.Tensor:
        drawn.setdefault("pairs", []).append((sets.x, codes))
        return type(learner.discriminator).forward(learner.discriminator, sets, codes)

    learner.discriminator.forward = record
    learner.objective(task)
    del learner.discriminator.forward
    (_, code), (made, prior) = ((x.detach(), c.detach()) for x, c in drawn["pairs"][:2])
    x, y = torch.cat([task.support.x, task.query_x]), torch.cat([task.support.y, task.query_y])
    with normalize_by("none"):
        pooled = torch.stack([learner.backbone(x)[y == k].mean(0) for k in range(3)])
    q = learner.encode(pooled)
    noise = (code - q.mean.detach()) / (q.log_variance.detach() / 2).exp()
    fresh_code = q.mean + (q.log_variance / 2).exp() * noise
    torch.testing.assert_close(fresh_code, code)
    of_real = learner.discriminator(Support(x, y, 3), code).sigmoid()
    of_fake = learner.discriminator(Support(made, y, 3), prior).sigmoid()
    d_loss = -(of_real.log().mean() + (1 - of_fake).log().mean())
    for a, b in zip(got["d"], torch.autograd.grad(d_loss, players["d"]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    of_real = learner.discriminator(Support(x, y, 3), fresh_code).sigmoid()
    encoder = [p for n, p in learner.named_parameters() if n.startswith(("backbone", "encoder"))]
    of_encoder = dict(zip((id(p) for p in players["eg"]), got["eg"], strict=True))
    for p, b in zip(encoder, torch.autograd.grad(-(1 - of_real).log().mean(), encoder), strict=True):
        torch.testing.assert_close(of_encoder[id(p)], b, rtol=1e-8, atol=1e-12)
    g_loss = -((1 - of_real).log().mean() + of_fake.log().mean())
    assert kept["metrics"]["discriminator_loss"].item() == pytest.approx(d_loss.item(), rel=1e-10)
    assert kept["metrics"]["generator_loss"].item() == pytest.approx(g_loss.item(), rel=1e-10)
    assert loss.item() == pytest.approx((d_loss + g_loss).item(), rel=1e-10)


def test_the_generators_gradient_equals_finite_differences():
    """Catches a generator that no gradient reaches, or that of the discriminator's loss: its own loss alone."""
    learner, task = small(), episodes(tasks=1)[0]
    loss, *_ = learner.objective(task)
    parameter = learner.generator.linear.weight
    (gradient,) = torch.autograd.grad(loss, [parameter])
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    values, start = [], parameter.detach().clone()
    for sign in (1, -1):
        with torch.no_grad():
            parameter.copy_(start + sign * 1e-6 * direction)
            values.append(learner.objective(task)[2]["metrics"]["generator_loss"].item())
            parameter.copy_(start)
    assert (gradient * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_a_loss_of_inputs_alone_leaves_what_it_is_made_of():
    """Catches a gradient that reaches a constant, misses one of several inputs, or changes the value."""
    weight = torch.tensor([2.0, -1.0], dtype=DOUBLE, requires_grad=True)
    a, b = (torch.tensor(v, dtype=DOUBLE, requires_grad=True) for v in ([0.3, 0.7], [1.5, -0.2]))

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (weight * a * b.exp()).sum()

    value = of_inputs_alone(loss, 2 * a, b)
    assert value.item() == pytest.approx(loss(2 * a, b).item(), rel=1e-12)
    got = torch.autograd.grad(value, [a, b, weight], allow_unused=True)
    expected = torch.autograd.grad(loss(2 * a, b), [a, b])
    for one, other in zip(got[:2], expected, strict=True):
        torch.testing.assert_close(one, other)
    assert got[2] is None


def test_the_penalty_is_half_the_squared_gradient_of_real_pairs():
    """Catches a penalty on generated pairs, on sets or codes alone, or one that is summed over sets; and one that
    trains the encoder: the gradient of each pair by automatic differentiation of its own logit."""
    learner, task = small(penalty=0.7), episodes(tasks=1, shots=2, queries=3)[0]
    x, y = torch.cat([task.support.x, task.query_x]), torch.cat([task.support.y, task.query_y])
    code = torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    expected = 0.0
    for k in range(3):
        own, c = x[y == k].requires_grad_(), code[k : k + 1].clone().requires_grad_()
        logit = learner.discriminator(Support(own, torch.zeros(len(own), dtype=torch.int64), 1), c)
        expected += sum(g.square().sum().item() for g in torch.autograd.grad(logit.sum(), [own, c])) / 6
    penalty = learner.steepness(Support(x, y, 3), code)
    assert penalty.item() == pytest.approx(expected, rel=1e-9)
    without = small()
    (loss, *_), (alone, *_) = learner.objective(task), without.objective(task)
    assert loss.item() > alone.item()
    for name, p in learner.named_parameters():
        if not name.startswith("discriminator"):
            other = dict(without.named_parameters())[name]
            a, b = (torch.autograd.grad(v, w, retain_graph=True)[0] for v, w in ((loss, p), (alone, other)))
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


def test_a_query_belongs_to_the_class_of_the_least_divergence():
    """Catches the divergence the other way around, or codes of single examples in place of sets."""
    learner, task = small().eval(), episodes(tasks=1, shots=2)[0]
    with torch.no_grad(), normalize_by("none"):
        logits = learner.predict(learner.adapt(task.support), task.query_x)
        z, query = learner.embed(task.support.x), learner.encode(learner.embed(task.query_x))
        p = Normal(query.mean, (query.log_variance / 2).exp())
        for k in range(3):
            q = learner.encode(z[task.support.y == k].mean(0)[None])
            d = kl_divergence(Normal(q.mean, (q.log_variance / 2).exp()), p).sum(-1)
            torch.testing.assert_close(logits[:, k], -d, rtol=1e-9, atol=1e-10)


def test_the_closed_form_of_the_family():
    """Catches a posterior mean that forgets the prior, or the number of examples: the sets' own codes are regressed."""
    new = sets(20_000, torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(0)
    c = torch.randn(20_000, 1, generator=g)
    exact = posterior_mean(new.x)
    # E[c | x] is the regression of c: slope 1, and what is left is of the posterior's variance.
    slope = (exact * c).mean() / exact.square().mean()
    assert slope.item() == pytest.approx(1, abs=0.01)
    assert (c - exact).square().mean().item() == pytest.approx(0.0292, rel=0.05)


def test_the_encoder_learns_the_posterior_mean_and_inverts_the_generator():
    """Catches a game that teaches nothing, or another relation between codes and sets: without training, or with a code
    that says nothing, both errors are near 1; the exact ones are 0 and 0.03, and after 1,000 steps two seeds have 0.11
    and 0.13, and 0.04."""
    torch.manual_seed(0)
    learner = bigan()
    before = measure(learner)
    train(learner, 1000, 5e-3)
    after = measure(learner)
    assert before["posterior_error"] > 0.7 and before["cycle_error"] > 0.7
    assert after["posterior_error"] < 0.3
    assert after["cycle_error"] < 0.12
    assert 0.08 < after["deviation"] < 0.4  # 0.171 exactly; without the penalty it shrinks towards 0


def test_the_task_embedding_is_of_the_whole_set():
    """Catches an embedding of one class, or of a set that order changes."""
    learner, s = small().eval(), episodes(tasks=1)[0].support
    with torch.no_grad(), normalize_by("none"):
        expected = learner.encode(learner.backbone(s.x).mean(0)[None]).mean[0]
        torch.testing.assert_close(learner.embed_task(s), expected, rtol=1e-9, atol=1e-12)
        flipped = learner.embed_task(Support(s.x.flip(0), s.y.flip(0), 3))
    torch.testing.assert_close(flipped, expected, rtol=1e-9, atol=1e-12)
    assert expected.shape == (learner.embedding_size,)
