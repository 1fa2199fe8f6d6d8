"""MetaGAN's game, generator and dataset encoder against restatements; gradients against finite differences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from datamodules.core.episodes import Episodes, Support, Task
from models import MAML, Conv4, MetaGAN, MetaGANRelation, RelationNet
from models.generative.adversary import GAN, Adversary, DatasetEncoder
from models.networks.batch_norm import normalize_by, recording
from tests.models.metric.test_relation_net import small as relation_net
from tests.support.gradients import assert_equals_finite_differences, episodes, meta_gradient

DOUBLE = torch.float64
KINDS = pytest.mark.parametrize("kind", [MetaGAN, MetaGANRelation])
SMALL = GAN(latents=3, noise=2, hidden=3, kl_weight=0.2)


def fixed(like: Tensor, rng: np.random.Generator | None = None) -> Tensor:
    """Noise that is the same at every draw of a size."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(7), dtype=like.dtype)


def small(kind: type = MetaGAN, gan: GAN = SMALL, **settings) -> MetaGAN | MetaGANRelation:
    """In double precision, in training, with draws that are always the same."""
    torch.manual_seed(5)
    if kind is MetaGAN:
        settings = {"outputs": 3, "inner_rate": 0.3, "inner_steps": 2, **settings}
        learner = MetaGAN(Conv4(hidden=4, image_size=8), gan=gan, **settings)
    else:
        backbone = Conv4(hidden=4, image_size=16, downsample="pool", halvings=2)
        learner = MetaGANRelation(backbone, filters=6, gan=gan, **settings)
    learner.adversary.draw = fixed
    return learner.double().train()


def batch(kind: type = MetaGAN, tasks: int = 2, unlabelled: int = 4) -> Episodes:
    size = 8 if kind is MetaGAN else 16
    g = torch.Generator().manual_seed(6)
    more = torch.rand(tasks, unlabelled, 1, size, size, generator=g, dtype=DOUBLE) if unlabelled else None
    return replace(episodes(tasks=tasks, size=size), unlabelled_x=more)


def players(learner: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    named = dict(learner.named_parameters())
    generator = {n: p for n, p in named.items() if n.startswith("adversary.")}
    return {n: p for n, p in named.items() if n not in generator}, generator


def logits_of(learner: MetaGAN | MetaGANRelation, task: Task, x: Tensor) -> Tensor:
    if isinstance(learner, MetaGAN):
        return learner.logits(learner.adapt(task.support), x)
    scores = learner.together(task.support, torch.cat([task.support.x, x]), len(task.support.y))
    return torch.cat([scores, scores.new_zeros(len(x), 1)], 1)


def shares(logits: Tensor) -> Tensor:
    """Of the N + 1 classes, as the definition of the softmax has them."""
    return logits.exp() / logits.exp().sum(-1, keepdim=True)


def discriminator_loss(labelled: Tensor, y: Tensor, unlabelled: Tensor, fake: Tensor, weight: float = 1.0) -> Tensor:
    """L_D of logits (…, N + 1), restated by probabilities."""
    p = shares(labelled)
    given_real = p[:, :-1] / (1 - p[:, -1:])
    supervised = -given_real[torch.arange(len(y)), y].log().mean()
    real = -(1 - shares(torch.cat([labelled, unlabelled]))[:, -1]).log().mean()
    return supervised + weight * (real - shares(fake)[:, -1].log().mean())


# The game -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unlabelled", [0, 2])
def test_the_terms_are_those_of_n_plus_one_classes(unlabelled):
    """Catches labels scored among N + 1 classes, a real term of unlabelled images alone, an average of logarithms in
    the wrong place, and a generator that minimises log p(fake) in place of maximising log p(real)."""
    table = np.random.default_rng(0).normal(0, 2, (9, 4))
    p = np.exp(table) / np.exp(table).sum(1, keepdims=True)
    labelled, other, fake, y = [0, 1, 2, 3], [4, 5][:unlabelled], [6, 7, 8], [2, 0, 1, 1]
    values = torch.from_numpy(table)

    def logits(x: Tensor) -> Tensor:
        return values[x.long()]

    more = torch.tensor(other, dtype=DOUBLE) if other else None
    support = Support(torch.zeros(0), torch.zeros(0), 3, more)
    adversary = Adversary((1, 8, 8), replace(SMALL, weight=0.7))
    task = Task(support, torch.tensor(labelled, dtype=DOUBLE), torch.tensor(y))
    terms, prediction = adversary.discriminator_terms(logits, task, torch.tensor(fake, dtype=DOUBLE))
    conditional = [-np.log(p[i, k] / p[i, :3].sum()) for i, k in zip(labelled, y, strict=True)]
    expected = {
        "supervised_loss": np.mean(conditional),
        "real_loss": np.mean([-np.log(p[i, :3].sum()) for i in labelled + other]),
        "fake_loss": np.mean([-np.log(p[i, 3]) for i in fake]),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-10)
    total = expected["supervised_loss"] + 0.7 * (expected["real_loss"] + expected["fake_loss"])
    assert adversary.discriminator_loss(terms).item() == pytest.approx(total, rel=1e-10)
    np.testing.assert_allclose(prediction, table[labelled, :3])
    loss = adversary.generator_loss(lambda x: values[6:] + 0 * x[:, None], torch.zeros(3, dtype=DOUBLE))
    assert loss.item() == pytest.approx(np.mean([-np.log(p[i, :3].sum()) for i in fake]), rel=1e-10)


@KINDS
def test_each_player_gets_the_gradient_of_its_own_loss(kind):
    """Catches L_D that trains the generator, L_G that trains the discriminator, also through the inner loop or batch
    norm, and a step that is not that of the two losses apart."""
    learner, task = small(kind), batch(kind, tasks=1)[0]
    of_d, of_g = players(learner)
    loss, _, kept = learner.objective(task)
    got = torch.autograd.grad(loss, [*of_d.values(), *of_g.values()])
    fakes, divergence = learner.adversary(task.support, len(task.query_x))
    labelled, unlabelled, fake = (
        logits_of(learner, task, x) for x in (task.query_x, task.support.unlabelled, fakes.detach())
    )
    d_loss = discriminator_loss(labelled, task.query_y, unlabelled, fake)
    g_loss = -(1 - shares(logits_of(learner, task, fakes))[:, -1]).log().mean()
    expected = [
        *torch.autograd.grad(d_loss, list(of_d.values())),
        *torch.autograd.grad(g_loss + 0.2 * divergence, list(of_g.values())),
    ]
    for name, a, b in zip([*of_d, *of_g], got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert loss.item() == pytest.approx((d_loss + g_loss + 0.2 * divergence).item(), rel=1e-10)
    assert kept["metrics"]["generator_loss"].item() == pytest.approx(g_loss.item(), rel=1e-10)

    def logits(x: Tensor) -> Tensor:
        return logits_of(learner, task, x)

    terms, _ = learner.adversary.discriminator_terms(logits, task, fakes.detach())
    alone = learner.adversary.discriminator_loss(terms)
    assert all(g is None for g in torch.autograd.grad(alone, list(of_g.values()), allow_unused=True))
    alone = learner.adversary.generator_loss(logits, fakes)
    assert all(g is None for g in torch.autograd.grad(alone, list(of_d.values()), allow_unused=True))


@KINDS
@pytest.mark.parametrize("player", ["discriminator", "generator"])
def test_gradients_equal_finite_differences(kind, player, monkeypatch):
    """Catches inner steps that are cut off, fakes that the discriminator's gradient forgets, and a second order that
    mapping over tasks breaks: each player's own loss, with what the other one does held."""
    learner, data = small(kind), batch(kind, tasks=2 if player == "discriminator" else 1)
    of_d, of_g = players(learner)
    nothing = torch.zeros((), dtype=DOUBLE)
    if player == "discriminator":
        learner.chunk = 2
        learner.adversary.gan = replace(SMALL, kl_weight=0.0)
        monkeypatch.setattr(learner.adversary, "generator_loss", lambda logits, fakes: nothing)
    else:
        if kind is MetaGAN:
            state = learner.adapt(data[0].support)
            held = state._replace(parameters={n: p.detach() for n, p in state.parameters.items()})
            monkeypatch.setattr(learner, "adapt", lambda support: held)
        learner.chunk = 1
        monkeypatch.setattr(learner.adversary, "discriminator_loss", lambda terms: nothing)
    own = of_d if player == "discriminator" else of_g
    monkeypatch.setattr(learner, "named_parameters", lambda **_: own.items())
    assert_equals_finite_differences(learner, data)


def test_the_inner_loop_descends_the_whole_loss_of_the_discriminator():
    """Catches an inner loop without fakes or without unlabelled images, which learns no fake class for the task."""
    learner, task = small(inner_steps=1), batch(tasks=1)[0]
    support = task.support
    with torch.no_grad():
        fakes, _ = learner.adversary(support, len(support.x))
    assert len(fakes) == len(support.x)
    with normalize_by("batch"):
        labelled, unlabelled, fake = (learner.learner(x) for x in (support.x, support.unlabelled, fakes))
    loss = discriminator_loss(labelled, support.y, unlabelled, fake)
    moving = {n: p for n, p in learner.learner.named_parameters() if "norms" not in n}
    gradient = torch.autograd.grad(loss, list(moving.values()))
    state = learner.adapt(support)
    for (name, p), g in zip(moving.items(), gradient, strict=True):
        torch.testing.assert_close(state.parameters[name], p - 0.3 * g, rtol=1e-9, atol=1e-12)


def test_without_the_game_it_is_the_base_learner():
    """Catches a base learner that is another one than MAML, or than relation networks with cross-entropy: with weight 0
    loss, prediction and gradient are the same, with batch norm by batches."""
    data = batch(unlabelled=0)
    learner = small(gan=replace(SMALL, weight=0.0))
    maml = MAML(Conv4(hidden=4, image_size=8), outputs=3, inner_rate=0.3, inner_steps=2).double().train()
    maml.learner.load_state_dict({n: v for n, v in learner.learner.state_dict().items() if not n.startswith("fake")})
    data_r = batch(MetaGANRelation, unlabelled=0)
    learner_r = small(MetaGANRelation, replace(SMALL, weight=0.0))
    net = relation_net(criterion="cross_entropy").train()
    net.load_state_dict({n: v for n, v in learner_r.state_dict().items() if not n.startswith("adversary")})
    for ours, base, tasks in ((learner, maml, data), (learner_r, net, data_r)):
        torch.testing.assert_close(ours.objective(tasks[0])[1], base.objective(tasks[0])[1])
        a, b = meta_gradient(ours, tasks), meta_gradient(base, tasks)
        for name, gradient in b.items():
            torch.testing.assert_close(a[name], gradient, rtol=1e-8, atol=1e-12)


@KINDS
def test_a_prediction_is_given_that_the_image_is_real(kind):
    """Catches a fake class that is predicted, or whose share is left out without making up for it."""
    learner, task = small(kind).eval(), batch(kind, tasks=1)[0]
    with torch.no_grad():
        p = shares(logits_of(learner, task, task.query_x)) if kind is MetaGAN else None
        prediction = learner.predict(learner.adapt(task.support), task.query_x)
    assert prediction.shape == (6, 3)
    if p is not None:
        torch.testing.assert_close(prediction.softmax(-1), p[:, :3] / p[:, :3].sum(1, keepdim=True))


def test_a_relation_network_of_fakes_keeps_the_averages_of_real_images():
    """Catches running averages of fakes, or of unlabelled images, by which test images are normalised then."""
    learner, task = small(MetaGANRelation), batch(MetaGANRelation, tasks=1)[0]
    ours, base = {}, {}
    with recording(ours, differentiable=False):
        learner.objective(task)
    with recording(base, differentiable=False):
        RelationNet.objective(learner, task)
    assert ours.keys() == base.keys() and ours
    for place, values in base.items():
        torch.testing.assert_close(ours[place], values)


# The generator ------------------------------------------------------------------------------------------------------


def test_the_code_is_drawn_by_statistics_of_the_set():
    """Catches a mean without the variance, an unbiased one that is not defined for one image, deviations taken for
    variances, a KL with its arguments swapped, a code for each image, and noise that all images share."""
    adversary = small().adversary
    support = batch(tasks=1)[0].support
    encoder = adversary.encoder
    assert isinstance(encoder, DatasetEncoder)
    vectors = []
    for x in torch.cat([support.x, support.unlabelled]):
        for conv in encoder.convs:
            x = nn.functional.conv2d(x, conv.weight, conv.bias, stride=2, padding=1)
            x = torch.where(x > 0, x, 0.2 * x)
        x = encoder.instance.weight @ x.flatten() + encoder.instance.bias
        vectors.append(torch.where(x > 0, x, 0.2 * x).detach().numpy())
    pooled = np.concatenate([np.mean(vectors, 0), np.var(vectors, 0)])
    made = encoder.code.weight.detach().numpy() @ pooled + encoder.code.bias.detach().numpy()
    mean, variance = made[:3], np.exp(made[3:])
    adversary.generator = nn.Identity()
    z, divergence = adversary(support, 5)
    z = z.detach().numpy()
    np.testing.assert_allclose(z[:, :2], fixed(torch.zeros(5, 2, dtype=DOUBLE)))
    drawn = mean + np.sqrt(variance) * fixed(torch.zeros(3, dtype=DOUBLE)).numpy()
    np.testing.assert_allclose(z[:, 2:], np.tile(drawn, (5, 1)), rtol=1e-10)
    assert divergence.item() == pytest.approx(0.5 * (variance + mean**2 - 1 - np.log(variance)).sum(), rel=1e-10)


@pytest.mark.parametrize("conditional", [True, False])
def test_fakes_depend_on_the_task_if_conditional(conditional):
    """Catches a code that does not reach the images, an order of the set that does, and an ablation that is none."""
    adversary = small(gan=replace(SMALL, conditional=conditional)).adversary
    a, b = batch()[0].support, batch()[1].support
    of_a, of_b = adversary(a, 4)[0], adversary(b, 4)[0]
    assert torch.equal(of_a, of_b) != conditional
    order = torch.randperm(len(a.x), generator=torch.Generator().manual_seed(1))
    again, _ = adversary(Support(a.x[order], a.y[order], 3, a.unlabelled.flip(0)), 4)
    torch.testing.assert_close(again, of_a, rtol=1e-10, atol=1e-12)
    assert (adversary(a, 4)[1] > 0).item() == conditional


def test_draws_are_new_in_training_and_the_same_in_evaluation():
    """Catches an evaluation that differs from run to run or by the tasks that are mapped together, one that moves the
    random numbers of training, and a training that sees the same fakes at every step."""
    learner, data = small(), batch(tasks=3)
    del learner.adversary.draw
    a, b = (learner.adversary(data[0].support, 4)[0] for _ in range(2))
    assert not torch.allclose(a, b)
    assert not torch.allclose(a[0], a[1])
    learner.eval()
    state = torch.get_rng_state()
    learner.adversary.gan = replace(SMALL, stochastic=False)
    learner.adversary.train()
    again, _ = learner.adversary(data[0].support, 4)
    torch.testing.assert_close(again, learner.adversary.eval()(data[0].support, 4)[0], rtol=0, atol=0)
    with torch.no_grad():
        together, alone = [], []
        for _ in range(2):
            learner.chunk = 3
            together.append(learner.predictions(data))
            learner.chunk = 1
            alone.append(learner.predictions(data))
    assert torch.equal(together[0], together[1]) and torch.equal(alone[0], alone[1])
    torch.testing.assert_close(together[0], alone[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 84, 84), (1, 5, 5), (3, 20, 33)])
def test_fakes_have_the_shape_and_range_of_images(shape):
    """Catches sides that are no multiple of the maps that a generator starts from, and colours that are forgotten."""
    torch.manual_seed(0)
    adversary = Adversary(shape, GAN(hidden=2, fakes=3))
    support = Support(torch.rand(2, *shape), torch.arange(2), 2)
    fakes, _ = adversary(support, 9)
    assert fakes.shape == (3, *shape)
    assert fakes.min() >= 0 and fakes.max() <= 1


def test_inputs_that_are_no_images_are_refused():
    """Catches an error deep inside of the first step."""
    with pytest.raises(ValueError, match="images are generated"):
        Adversary((40,), GAN())
    with pytest.raises(ValueError, match="latents is 0"):
        GAN(latents=0)
