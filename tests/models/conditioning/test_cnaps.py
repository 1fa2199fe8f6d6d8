"""CNAPs against the frozen backbone, restatements in numpy, and finite differences."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch

from datamodules.core.episodes import Support
from models import CNAPs, Conv4, Pretrained
from models.conditioning.adaptive import ImageSetEncoder
from models.networks.batch_norm import BatchNorm, normalize_by
from tests.support.gradients import assert_is_gradient, episodes, meta_gradient

DOUBLE = torch.float64


def frozen(**settings) -> CNAPs:
    """On a frozen network with running averages of its own."""
    torch.manual_seed(4)
    network = Conv4(hidden=4, image_size=8)
    for layer in network.modules():
        if isinstance(layer, BatchNorm):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    backbone = Pretrained(network, "none.ckpt")
    backbone.loaded = True
    return CNAPs(backbone, **{"code": 6, **settings}).double()


def strongly(learner: CNAPs) -> CNAPs:
    """With factors of the modulation that are no longer small."""
    for generator in learner.adaptation_network.generator.generators:
        generator.scale_factor.data.normal_()
        generator.shift_factor.data.normal_()
    return learner


def affine(layer: torch.nn.Linear, x: np.ndarray) -> np.ndarray:
    return layer.weight.detach().numpy() @ x + layer.bias.detach().numpy()


def elu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, np.expm1(x))


def rows(learner: CNAPs, z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The generated head by loops over classes."""
    weights, biases = [], []
    for k in range(y.max() + 1):
        mean = z[y == k].mean(0)
        for generator, found in ((learner.weight_generator, weights), (learner.bias_generator, biases)):
            first, _, second, _, third = generator.layers
            h = affine(third, elu(affine(second, elu(affine(first, mean)))))
            found.append(h + mean if found is weights else h[0])
    return np.array(weights), np.array(biases)


@pytest.mark.parametrize("identity", [True, False])
def test_head_is_generated_from_class_means_of_frozen_features(identity):
    """Catches a generator that modulates at factors of 0, a backbone that is not left as it is, a row from another
    class's mean or from sums over shots, and a residual that is missing; with and without the adaptation network."""
    learner = frozen(conditioned=identity)
    if identity:
        for generator in learner.adaptation_network.generator.generators:
            generator.scale_factor.data.zero_()
            generator.shift_factor.data.zero_()
    g = torch.Generator().manual_seed(0)
    x, q = (torch.rand(n, 1, 8, 8, generator=g, dtype=DOUBLE) for n in (6, 4))
    y = np.array([2, 0, 0, 1, 2, 2])
    with torch.no_grad():
        with normalize_by("batch"):  # a frozen backbone heeds none
            z, zq = (learner.backbone.backbone(v).numpy() for v in (x, q))
        weights, biases = rows(learner, z, y)
        for train in (True, False):
            learner.train(train)
            got = learner.predict(learner.adapt(Support(x, torch.from_numpy(y), 3)), q)
            np.testing.assert_allclose(got, zq @ weights.T + biases, rtol=1e-9)
    assert not learner.transductive


def test_modulation_by_hand():
    """Catches scale and shift exchanged or of another layer, γ without 1 +, a processor without its identities, and a
    modulation that the support's or the queries' features do not get."""
    learner = strongly(frozen())
    task = episodes(tasks=1)[0]
    generator = learner.adaptation_network.generator
    with torch.no_grad():
        code = learner.embed_task(task.support).numpy()
        found = {}
        for name, one in zip(generator.points, generator.generators, strict=True):
            start = np.maximum(affine(one.shared, code), 0)
            for what, processor in (("scale", one.scale), ("shift", one.shift)):
                h = start
                for k, layer in enumerate(processor.layers):
                    h = np.maximum(h, 0) if k else h
                    h = h + affine(layer, h)
                factor = getattr(one, f"{what}_factor").numpy()
                found[f"{name}.{what}"] = (what == "scale") + factor * h
        got = learner.modulation(task.support.x, task.support)
        assert got.keys() == found.keys() == {f"backbone.films.{k}.{w}" for k in range(4) for w in ("scale", "shift")}
        for name, value in found.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-9)

        def network(x: torch.Tensor) -> np.ndarray:
            net = learner.backbone.backbone
            for k, (conv, norm) in enumerate(zip(net.convs, net.norms, strict=True)):
                h = (conv(x) - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
                scale, shift = (torch.from_numpy(found[f"backbone.films.{k}.{w}"]) for w in ("scale", "shift"))
                x = torch.relu(scale[:, None, None] * h + shift[:, None, None])
            return x.mean((2, 3)).numpy()

        weights, biases = rows(learner, network(task.support.x), task.support.y.numpy())
        got = learner.predict(learner.adapt(task.support), task.query_x)
    np.testing.assert_allclose(got, network(task.query_x) @ weights.T + biases, rtol=1e-8)


def test_code_is_of_the_support_set_alone():
    """Catches running averages in the set encoder, a code that depends on order or doubled images, on labels or on the
    mode, a mean over other axes, and pooling of what is one pixel wide."""
    torch.manual_seed(0)
    encoder = ImageSetEncoder(1, 6).double()
    x = torch.rand(5, 1, 8, 8, dtype=DOUBLE)
    with torch.no_grad():
        code = encoder(x)
        for train, source in ((True, "running"), (False, "running"), (False, "none")):
            with normalize_by(source):
                torch.testing.assert_close(encoder.train(train)(x), code)
        torch.testing.assert_close(encoder(torch.cat([x, x]).flip(0)), code)
        h = x
        for k, conv in enumerate(encoder.convs):
            h = conv(h)
            h = torch.relu((h - h.mean((0, 2, 3), True)) / (h.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt())
            h = h.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2)) if k < 3 else h
        torch.testing.assert_close(code, h[:, :, 0, 0].mean(0))
        learner, task = frozen(), episodes(tasks=1)[0]
        other = dataclasses.replace(task.support, y=task.support.y.flip(0))
        assert torch.equal(learner.embed_task(task.support), learner.embed_task(other))


def test_meta_gradient_equals_finite_differences_and_spares_the_backbone():
    """Catches a set encoder or generator that the gradient does not pass through, frozen weights that it reaches, and
    a penalty of other parameters than the factors; mapped over tasks too."""
    learner = strongly(frozen(penalty=0.2, chunk=2)).train()
    batch = episodes(tasks=2, queries=1)
    gradient = meta_gradient(learner, batch)
    assert not any(g.any() for n, g in gradient.items() if n.startswith("backbone."))
    trained = {n: p for n, p in learner.named_parameters() if p.requires_grad}
    assert not [n for n in trained if n.startswith("backbone.")]
    looked_at = [(n, p) for n, p in trained.items() if not {".1.", ".2."} & set(re.findall(r"generators(\.\d\.)", n))]
    assert_is_gradient(gradient, looked_at, lambda: learner.map(learner.objective, batch)[0].mean())
    plain = frozen(penalty=0.0)
    plain.load_state_dict(learner.state_dict())
    with torch.no_grad():
        loss, free = (model.train().objective(batch[0])[0] for model in (learner, plain))
        squares = sum(float(p.square().sum()) for n, p in trained.items() if n.endswith("factor"))
    assert float(loss - free) == pytest.approx(0.2 * squares, rel=1e-9)
