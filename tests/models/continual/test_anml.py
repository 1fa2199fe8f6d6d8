"""ANML."""

import pytest
import torch
import torch.nn.functional as F

from datamodules.core.episodes import Support
from models import ANML, ConvNet
from models.continual.learner import Stream
from models.core.chance import Chance
from tests.support.gradients import assert_equals_finite_differences, meta_gradient
from tests.support.streams import image_streams


def learner(**settings) -> ANML:
    torch.manual_seed(0)
    kind = {"image_size": 8, "strides": (1, 1), "pooled": 1, "instance_norm": True}
    settings = {"classes": 4, "inner_rate": 0.2, "eval_rates": [0.01]} | settings
    model = ANML(ConvNet(hidden=2, **kind), ConvNet(hidden=3, **kind), **settings).double().train()
    with torch.no_grad():  # norms that scale and shift
        for name, p in model.named_parameters():
            if "norms" in name:
                p.add_(0.3 * torch.randn_like(p))
    return model


def streams(**settings):
    return image_streams(**{"experiences": 1, "shots": 3, "queries": 1, "classes": 4, "remember": 3} | settings)


@pytest.mark.parametrize("redraw", [True, False])
def test_meta_gradient_is_that_of_both_networks(redraw):
    """Catches second derivatives that are left out, or that mapping over streams breaks, as it does torch's own affine
    instance norm's: against finite differences, of every parameter."""
    assert_equals_finite_differences(learner(redraw=redraw), streams())


@pytest.mark.parametrize("first_order", [False, True])
def test_is_a_step_of_the_prediction_network_for_each_image(first_order):
    """Catches a modulator that adapts along, layers that do not, a batch of images a step, instance norm by a batch,
    and a loss that leaves out what was learned or remembered: restated with autograd and torch's instance norm."""
    model, some = learner(first_order=first_order), streams(streams=1)
    ours = meta_gradient(model, some)
    names = [n for n, _ in model.learner.named_parameters()]
    assert some.remembered_rows is not None and some.remembered_y is not None
    x, q, r = (some.inputs[rows[0]] for rows in (some.rows, some.query_rows, some.remembered_rows))
    stream = Stream(x, some.y[0], q, some.query_y[0], r, some.remembered_y[0], 4, Chance.of(some.key[0]))

    def convolved(parameters, prefix: str, x: torch.Tensor) -> torch.Tensor:
        for k in range(2):
            w, b = (parameters[f"{prefix}convs.{k}.{p}"] for p in ("weight", "bias"))
            scale, shift = (parameters[f"{prefix}norms.{k}.{p}"] for p in ("weight", "bias"))
            x = F.relu(F.instance_norm(F.conv2d(x, w, b, padding=1), weight=scale, bias=shift))
            x = F.max_pool2d(x, 2) if k == 0 else x
        return x.flatten(1)

    own = dict(model.named_parameters())

    def logits(parameters, x: torch.Tensor) -> torch.Tensor:
        gates = torch.sigmoid(F.linear(convolved(own, "modulator.", x), own["gate.weight"], own["gate.bias"]))
        features = convolved(parameters, "backbone.", x) * gates
        return F.linear(features, parameters["head.weight"], parameters["head.bias"])

    head = model.redrawn(stream)
    parameters = dict(model.learner.named_parameters()) | {"head.weight": head[:, :-1]}
    for image, label in zip(x[0], some.y[0, 0], strict=True):
        loss = F.cross_entropy(logits(parameters, image[None]), label[None])
        gradient = torch.autograd.grad(loss, [parameters[n] for n in names], create_graph=not first_order)
        parameters = {n: parameters[n] - 0.2 * g for n, g in zip(names, gradient, strict=True)}
    asked = torch.cat([x[0], q[0], r])
    targets = torch.cat([some.y[0, 0], some.query_y[0, 0], some.remembered_y[0]])
    model.zero_grad()
    F.cross_entropy(logits(parameters, asked), targets).backward()
    for name, p in model.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(ours[name], expected, rtol=1e-8, atol=1e-11, msg=name)
    assert torch.equal(model.targets(some)[0], targets)


def test_gates_close_features():
    """Catches gates of other features, or of other images: with all closed a new head sees its bias alone."""
    model, some = learner().eval(), streams()
    with torch.no_grad():
        model.gate.weight.zero_()
        model.gate.bias.fill_(-1e3)
        assert (model.encode(some.inputs)[:, :-1] == 0).all()
        model.gate.bias[0] = 1e3
        encoded = model.encode(some.inputs)
        torch.testing.assert_close(encoded[:, 0], model.learner.backbone(some.inputs)[:, 0])
        assert (encoded[:, 1:-1] == 0).all() and encoded[:, 0].std() > 0


def test_the_prediction_network_may_adapt_on_a_stream():
    """Catches convolutions that stay, a modulator that does not, and another head than that of the frozen one."""
    model, some = learner(eval_adapts="network", eval_rates=[0.1], eval_optimizer="sgd").eval(), streams()
    frozen = learner(eval_optimizer="sgd").eval()
    stream_of = torch.tensor(3)
    with torch.no_grad():
        encoded = model.encode(some.inputs)
        start = model.begin(4, Chance.of(stream_of))
        same = frozen.predict(frozen.begin(4, Chance.of(stream_of)), frozen.encode(some.inputs))
        torch.testing.assert_close(model.predict(start, encoded), same)
        after = model.update(start, Support(encoded[:1], torch.tensor([2]), 4))
        assert start.parameters.keys() == dict(model.learner.named_parameters()).keys()
        assert all(not torch.equal(p, start.parameters[n]) for n, p in after.parameters.items() if "convs.1.w" in n)
        assert model.predict(after, encoded)[0, 2] > same[0, 2]
