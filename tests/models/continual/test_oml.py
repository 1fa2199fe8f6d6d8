"""OML."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from models import MLP, OML, ConvNet
from models.continual.learner import Stream
from models.core.chance import Chance
from tests.support.gradients import assert_equals_finite_differences, meta_gradient
from tests.support.streams import image_streams


def learner(backbone=None, **settings) -> OML:
    torch.manual_seed(0)
    backbone = ConvNet(hidden=3, image_size=8, strides=(2, 2)) if backbone is None else backbone
    settings = {"classes": 5, "inner_rate": 0.3, "eval_rates": [0.01]} | settings
    return OML(backbone, **settings).double().train()


@pytest.mark.parametrize("redraw", [True, False])
def test_meta_gradient_is_that_of_the_whole_stream(redraw):
    """Catches second derivatives that are left out, of the features or of the head, and chance that differs from call
    to call: against finite differences."""
    assert_equals_finite_differences(learner(redraw=redraw), image_streams(remember=3))


def one_after_another(model: OML, stream: Stream, second_order: bool) -> torch.Tensor:
    """The loss at the end, of Algorithm 2 restated with autograd and a step of its own for each image."""
    weight, bias = model.learner.head.weight, model.learner.head.bias
    if model.redraw:
        weight = model.redrawn(stream)[:, :-1]
    for x, y in zip(stream.x.flatten(0, 1), stream.y.flatten(), strict=True):
        loss = F.cross_entropy(F.linear(model.learner.backbone(x[None]), weight, bias), y[None])
        of_weight, of_bias = torch.autograd.grad(loss, (weight, bias), create_graph=second_order)
        weight, bias = weight - model.inner_rate * of_weight, bias - model.inner_rate * of_bias
    asked, labels = model.queries(stream)
    return F.cross_entropy(F.linear(model.learner.backbone(asked), weight, bias), labels)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("redraw", [True, False])
def test_is_a_step_for_each_image_as_autograd_takes_it(first_order, redraw):
    """Catches an order of its own, a step that leaves out the bias, queries that are learned, what is remembered left
    out, and a first-order gradient that is none."""
    model, streams = learner(first_order=first_order, redraw=redraw), image_streams(remember=3, streams=2)
    ours = meta_gradient(model, streams)
    loss, _ = model.map(model.objective, streams)
    expected = []
    s = streams
    assert s.remembered_rows is not None and s.remembered_y is not None
    for i in range(len(s)):
        x, q, r = (s.inputs[rows[i]] for rows in (s.rows, s.query_rows, s.remembered_rows))
        stream = Stream(x, s.y[i], q, s.query_y[i], r, s.remembered_y[i], s.classes, Chance.of(s.key[i]))
        expected.append(one_after_another(model, stream, not first_order))
    torch.testing.assert_close(loss, torch.stack(expected), rtol=1e-10, atol=1e-12)
    model.zero_grad()
    torch.stack(expected).mean().backward()
    for name, p in model.named_parameters():
        own = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(ours[name], own, rtol=1e-9, atol=1e-12, msg=name)


def test_only_rows_of_the_streams_classes_are_drawn_anew():
    """Catches rows of classes that are remembered drawn along, other rows for one class, and the same for two streams.

    A class that a stream teaches in two experiences has one row.
    """
    model = learner(MLP(64, (6,)), classes=7)
    y = torch.tensor([[4, 4], [1, 1], [4, 4]])
    empty = torch.zeros(0)

    def rows(key: int) -> torch.Tensor:
        stream = Stream(empty, y, empty, empty, empty, empty, 7, Chance.of(torch.tensor(key)))
        return model.redrawn(stream).detach()

    head, changed = model.head.detach(), rows(3)
    same = (changed == head).all(1)
    assert same.tolist() == [True, False, True, True, False, True, True]
    assert (changed[:, -1] == head[:, -1]).all()
    assert torch.equal(changed, rows(3)) and not torch.equal(changed[1], rows(4)[1])
    assert not torch.allclose(changed[1], changed[4])


def test_of_the_learner_only_the_head_adapts_on_a_stream():
    """Catches features that a stream of evaluation changes: predictions are linear in those of the backbone."""
    model, streams = learner(eval_rates=[0.1]).eval(), image_streams()
    with torch.no_grad():
        before = {n: p.clone() for n, p in model.state_dict().items()}
        found = model.followed(streams)
        assert found["matrix"].shape == (2, 2, 3)
        assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
        z = functional_call(model.learner.backbone, {}, (streams.inputs,))
        torch.testing.assert_close(model.encode(streams.inputs), torch.cat([z, torch.ones(len(z), 1)], 1))
