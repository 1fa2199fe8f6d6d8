"""TADAM against prototypical networks, a restatement in numpy, and finite differences."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import datamodules
from datamodules.core.episodes import Support
from datamodules.core.errors import ConfigError
from models import MLP, TADAM, Conv2, Conv4, ProtoNet, ResNet
from models.networks.batch_norm import BatchNorm, normalize_by
from tests.support.gradients import assert_equals_finite_differences, episodes, meta_gradient
from tests.support.toy import ToyImages, train_for

BACKBONES = {
    "Conv4": lambda: Conv4(hidden=4, image_size=8),
    "ResNet": lambda: ResNet(1, (4, 6), 2, 8),
    "MLP": lambda: MLP(64, hidden=(5, 4), batch_norm=True),
}


def small(backbone: str = "Conv4", factor: float = 0.0, **settings) -> TADAM:
    """With every γ0 and β0 around this factor."""
    torch.manual_seed(0)
    learner = TADAM(BACKBONES[backbone](), **settings).double()
    if learner.conditioned:
        for p in (learner.ten.scale_factor, learner.ten.shift_factor):
            p.data.copy_(factor * (1 + torch.rand_like(p)))
    return learner


def with_classes(batch, classes: int):
    """Episodes whose classes are told, the highest ids first."""
    ids = torch.arange(classes - 1, classes - 1 - batch.ways * len(batch), -1).view(len(batch), batch.ways)
    return dataclasses.replace(batch, task={"classes": ids})


@pytest.mark.parametrize("backbone", ["Conv4", "ResNet"])
@pytest.mark.parametrize("mode", ["running", "transductive", "support", "per_query", "none"])
def test_without_factors_it_is_a_prototypical_network(backbone, mode):
    """Catches γ = γ0 h instead of γ0 h + 1, factors that do not start from 0, a scale that is not applied, and a mode
    of batch norm that the second pass does not heed; in evaluation and in training."""
    learner = small(backbone, scale=3.0, batch_norm=mode)
    plain = ProtoNet(learner.backbone, scale=3.0, batch_norm=mode).double()
    assert not learner.ten.scale_factor.any() and not learner.ten.shift_factor.any()
    batch = episodes(tasks=1)
    for train in (False, True):
        got, expected = (
            model.train(train).predict(model.adapt(batch[0].support), batch[0].query_x) for model in (learner, plain)
        )
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(learner.objective(batch[0])[1], plain.objective(batch[0])[1], rtol=1e-9, atol=1e-12)
    gradient, of_plain = meta_gradient(learner, batch), meta_gradient(plain, batch)
    assert all(torch.allclose(gradient[n], of_plain[n], rtol=1e-7, atol=1e-10) for n in of_plain)
    assert gradient["ten.scale_factor"].abs().min() > 0 and gradient["ten.shift_factor"].abs().min() > 0


def residual(network: nn.Module, x: np.ndarray) -> np.ndarray:
    for k, layer in enumerate(network.layers):
        weight, bias = (p.detach().numpy() for p in (layer.weight, layer.bias))
        active = x / (1 + np.exp(-x))
        x = weight @ active + bias + active if k else weight @ x + bias
    return x


def test_both_passes_by_hand():
    """Catches a centre over examples instead of classes, of modulated features or of the queries, a residual network
    without its identities, factors of another layer, scale and shift exchanged, and prototypes of the first pass."""
    torch.manual_seed(1)
    learner = TADAM(MLP(5, hidden=(6, 4))).double().eval()
    learner.scale.data.fill_(0.7)
    learner.ten.scale_factor.data.copy_(torch.tensor([0.9, -0.6], dtype=torch.float64))
    learner.ten.shift_factor.data.copy_(torch.tensor([-0.8, 0.5], dtype=torch.float64))
    x, q = torch.randn(5, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    y = np.array([1, 0, 2, 1, 1])

    def network(x: np.ndarray, scales, shifts) -> np.ndarray:
        for layer, scale, shift in zip(learner.backbone.layers, scales, shifts, strict=True):
            h = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
            x = np.maximum(scale * h + shift, 0)
        return x

    def prototypes(z: np.ndarray) -> np.ndarray:
        return np.stack([z[y == k].mean(0) for k in range(3)])

    centre = prototypes(network(x.numpy(), (1, 1), (0, 0))).mean(0)
    scales = [1 + f * residual(n, centre) for f, n in zip((0.9, -0.6), learner.ten.scales, strict=True)]
    shifts = [f * residual(n, centre) for f, n in zip((-0.8, 0.5), learner.ten.shifts, strict=True)]
    c, z = prototypes(network(x.numpy(), scales, shifts)), network(q.numpy(), scales, shifts)
    expected = -0.7 * ((z[:, None] - c) ** 2).sum(-1)
    support = Support(x, torch.from_numpy(y), 3)
    with torch.no_grad():
        np.testing.assert_allclose(learner.embed_task(support), centre, rtol=1e-9)
        np.testing.assert_allclose(learner.predict(learner.adapt(support), q), expected, rtol=1e-8)
    assert learner.embedding_size == len(centre)


@pytest.mark.parametrize(
    "settings", [{}, {"backbone": "MLP", "batch_norm": "support"}, {"backbone": "MLP", "chunk": 2}]
)
def test_meta_gradient_equals_finite_differences(settings):
    """Catches a centre or factors that the gradient does not pass through, a penalty or an auxiliary loss that is left
    out of it; mapped over tasks too."""
    learner = small(factor=0.5, classes=6, penalty=0.3, layers=2, **settings).train()
    assert_equals_finite_differences(learner, with_classes(episodes(tasks=2, queries=1), 6))


def test_objective_is_query_loss_penalty_and_loss_over_all_classes():
    """Catches a penalty that is not ½λΣ, labels of the task for ids of classes, an auxiliary loss of support or queries
    alone or of modulated features."""
    learner = small(factor=0.5, classes=12, batch_norm="none").train()
    plain = small(factor=0.5, batch_norm="none", penalty=0.0).train()
    plain.load_state_dict(learner.state_dict(), strict=False)
    task = with_classes(episodes(tasks=1), 12)[0]
    with torch.no_grad():
        loss, prediction, kept = learner.objective(task)
        only_query, same, _ = plain.objective(task)
    torch.testing.assert_close(prediction, same)
    factors = sum(float((p**2).sum().detach()) for p in (learner.ten.scale_factor, learner.ten.shift_factor))
    x = torch.cat([task.support.x, task.query_x])
    ids = 11 - torch.cat([task.support.y, task.query_y])
    with torch.no_grad(), normalize_by("none"):
        log_p = learner.classifier(learner.backbone(x)).log_softmax(-1)
    auxiliary = -float(log_p[torch.arange(len(x)), ids].mean())
    assert float(kept["metrics"]["auxiliary_loss"]) == pytest.approx(auxiliary, rel=1e-9)
    assert float(loss - only_query) == pytest.approx(0.01 / 2 * factors + auxiliary, rel=1e-9)


def test_share_of_co_training_falls_as_published():
    """Catches 0.9^(20 t / T) without steps, a probability that starts below 1 or falls per meta-update, and a coin that
    is not of that probability, or is another one when it is thrown again."""
    learner = small(classes=5, co_training_steps=2000)
    expected = {0: 1.0, 99: 1.0, 100: 0.9, 250: 0.81, 1999: 0.9**19, 2000: 0.9**20}
    assert {t: learner.co_training_probability(t) for t in expected} == pytest.approx(expected)
    thrown = [learner.co_trains(t) for t in range(2000)]
    assert thrown == [learner.co_trains(t) for t in range(2000)]
    p = np.array([0.9 ** (t // 100) for t in range(2000)])
    assert abs(sum(thrown) - p.sum()) < 4 * np.sqrt((p * (1 - p)).sum())
    assert all(thrown[:100])


def test_coin_decides_what_moves():
    """Catches an auxiliary loss in every step, or none: the head moves by a coin that lands so, and by no other."""
    learner = small(classes=12, co_training_steps=20, optimizer=lambda p: torch.optim.SGD(p, 0.1))
    batch = with_classes(episodes(tasks=3), 12)
    for step in range(6):
        learner.__dict__["_trainer"] = type("Trainer", (), {"global_step": step, "datamodule": ToyImages(seed=3)})()
        moves = meta_gradient(learner, batch)["classifier.weight"].abs().max() > 0
        assert moves == learner.co_trains(step)
    assert len({learner.co_trains(step) for step in range(6)}) == 2


def test_unconditioned_twin_embeds_images_once_and_the_other_does_not():
    """Catches test images embedded once for all tasks where features depend on the task: predictions of both ways."""
    data = ToyImages(ways=3, queries=2, meta_batch_size=4)
    batch = data.on_device(data.distribution("test").sample(range(4)))
    for conditioned in (True, False):
        torch.manual_seed(0)
        learner = TADAM(Conv4(hidden=4, image_size=16), conditioned=conditioned).eval()
        assert learner.embeds_once(batch) != conditioned
        if conditioned:
            learner.ten.scale_factor.data.fill_(2.0)
            with torch.no_grad():
                a, b = (learner.adapt(batch[i].support).summary.modulation for i in (0, 1))
            assert max((a[n] - b[n]).abs().max() for n in a) > 1e-3
        with torch.no_grad():
            one_by_one = [learner.predict(learner.adapt(t.support), t.query_x) for t in batch]
            torch.testing.assert_close(learner.predictions(batch), torch.stack(one_by_one), rtol=1e-4, atol=1e-5)


def test_running_averages_are_of_the_modulated_pass():
    """Catches averages of the first pass, by which evaluation would not normalise as meta-training did."""
    data = ToyImages(ways=3, queries=2, meta_batch_size=1)
    torch.manual_seed(0)
    learner = TADAM(Conv4(hidden=4, image_size=16), classes=12, optimizer=lambda p: torch.optim.SGD(p, 0.0)).double()
    learner.ten.shift_factor.data.fill_(1.0)
    (norm,) = [m for n, m in learner.named_modules() if n == "backbone.norms.1"]
    assert isinstance(norm, BatchNorm)
    task = data.on_device(data.distribution("train").sample([0]))[0]
    x = torch.cat([task.support.x, task.query_x]).double()
    with torch.no_grad(), normalize_by("batch"):
        modulation = learner.modulation(x, dataclasses.replace(task.support, x=task.support.x.double()))
        first = learner.backbone.norms[0](learner.backbone.convs[0](x))
        scale, shift = (modulation[f"films.0.{n}"][:, None, None] for n in ("scale", "shift"))
        entering = learner.backbone.convs[1](torch.relu(scale * first + shift))
    train_for(learner, data, 1, precision="64-true")
    torch.testing.assert_close(norm.running_mean, 0.1 * entering.mean((0, 2, 3)), rtol=1e-6, atol=1e-9)


def test_what_cannot_be_learned_from_is_refused():
    """Catches a head of another number of classes than the data have, and a network that cannot be modulated."""
    data = ToyImages(ways=3, queries=2, meta_batch_size=4)
    with pytest.raises(ConfigError, match=r"has 12 classes: --model\.init_args\.classes 12"):
        train_for(small(classes=9).float(), data, 1)
    with pytest.raises(ConfigError, match="does not tell its classes"):
        train_for(small(classes=9).float(), datamodules.Sinusoid(), 1)
    with pytest.raises(ValueError, match="Conv2 has no place where a task can modulate it"):
        TADAM(Conv2())
    assert not hasattr(TADAM(Conv2(), conditioned=False), "ten")
