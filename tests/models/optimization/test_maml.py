"""MAML's meta-gradient against finite differences, a hand derivation and learn2learn."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from datamodules.core.episodes import Episodes, Support
from models import MAML, MLP, Conv4
from tests.support.gradients import assert_equals_finite_differences, episodes, meta_gradient


def small_maml(**settings) -> MAML:
    torch.manual_seed(2)
    backbone = Conv4(hidden=4, image_size=8)
    return MAML(backbone, outputs=3, inner_rate=0.3, **settings).double()


@pytest.mark.parametrize("batch_norm", ["transductive", "support", "none"])
@pytest.mark.parametrize("adapt_normalization", [False, True])
@pytest.mark.parametrize("inner_steps", [1, 5])
def test_meta_gradient_equals_finite_differences(inner_steps, adapt_normalization, batch_norm):
    """Catches a dropped second-order term, vmap's wrong gradient through affine batch norm, and detached statistics."""
    learner = small_maml(
        inner_steps=inner_steps, adapt_normalization=adapt_normalization, batch_norm=batch_norm, chunk=2
    )
    assert_equals_finite_differences(learner, episodes())


def test_first_order_differs_and_is_the_query_gradient_at_the_adapted_parameters():
    """Catches first order taken for second (or the reverse): FOMAML's gradient is ∇L_q at θ', not at θ."""
    batch = episodes(tasks=1)
    second, first = small_maml(), small_maml(first_order=True)
    g2, g1 = meta_gradient(second, batch), meta_gradient(first, batch)
    name = "learner.backbone.convs.1.weight"
    assert (g2[name] - g1[name]).norm() > 0.05 * g2[name].norm()

    adapted = {n: p.detach().clone() for n, p in first.learner.named_parameters()}
    leaves = {n: p.requires_grad_() for n, p in adapted.items()}
    loss = F.cross_entropy(torch.func.functional_call(first.learner, leaves, batch.support_x[0]), batch.support_y[0])
    inner = torch.autograd.grad(loss, list(leaves.values()))
    moved = {
        n: (p if ".norms." in n else p - 0.3 * d).detach().requires_grad_()
        for (n, p), d in zip(leaves.items(), inner, strict=True)
    }
    query = F.cross_entropy(torch.func.functional_call(first.learner, moved, batch.query_x[0]), batch.query_y[0])
    for (n, expected), got in zip(
        zip(moved, torch.autograd.grad(query, list(moved.values())), strict=True), g1.values(), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, msg=n)


def test_meta_gradient_on_a_quadratic_has_the_closed_form():
    """Catches a wrong inner step or Jacobian: for linear regression, (I - αA_s)ᵀ … in closed form through 3 steps."""
    torch.manual_seed(0)
    backbone = MLP(in_features=2, hidden=())
    learner = MAML(backbone, outputs=1, inner_rate=0.1, inner_steps=3).double()
    sx, qx = torch.randn(6, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    sy, qy = torch.randn(6, 1, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    batch = Episodes(sx[None], sy[None], qx[None], qy[None], torch.arange(1), 0, 1)
    gradient = meta_gradient(learner, batch)

    def normal(x):  # mean squared error is θᵀAθ/2 - bᵀθ + c with a column of ones for the bias
        z = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
        return z, 2 * z.T @ z / len(x)

    zs, a_s = normal(sx)
    zq, a_q = normal(qx)
    theta = torch.cat([learner.learner.head.weight[0], learner.learner.head.bias]).detach()
    shrink = torch.eye(3, dtype=torch.float64) - 0.1 * a_s
    adapted = theta.clone()
    for _ in range(3):
        adapted = adapted - 0.1 * (a_s @ adapted - 2 * zs.T @ sy[:, 0] / len(sx))
    expected = torch.linalg.matrix_power(shrink, 3).T @ (a_q @ adapted - 2 * zq.T @ qy[:, 0] / len(qx))
    got = torch.cat([gradient["learner.head.weight"][0], gradient["learner.head.bias"]])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="learn2learn does not build there")
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_meta_gradient_equals_learn2learns(inner_steps, first_order):
    """Catches any difference from the field's reference on the same weights and tasks, real image size.

    Several steps in float64: in float32 rounding alone crosses kinks of ReLU, where any two orders of summation part.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import learn2learn as l2l

    torch.manual_seed(0)
    learner = MAML(
        Conv4(), outputs=5, inner_rate=0.4, inner_steps=inner_steps, first_order=first_order, adapt_normalization=True
    )
    dtype = torch.float32 if inner_steps == 1 else torch.float64
    learner = learner.to(dtype)
    batch = episodes(tasks=4, ways=5, shots=1, queries=3, size=28, dtype=dtype)
    ours = meta_gradient(learner, batch)

    class Plain(nn.Module):  # the network again, of PyTorch's own layers
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(c, 64, 3, 2, 1) for c in (1, 64, 64, 64))
            self.norms = nn.ModuleList(nn.BatchNorm2d(64, track_running_stats=False) for _ in range(4))
            self.head = nn.Linear(64, 5)

        def forward(self, x):
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = torch.relu(norm(conv(x)))
            return self.head(x.mean((2, 3)))

    model = Plain().to(dtype)
    model.load_state_dict({n.removeprefix("backbone."): p for n, p in learner.learner.named_parameters()})
    maml = l2l.algorithms.MAML(model, lr=0.4, first_order=first_order)
    for t in range(4):
        clone = maml.clone()
        for _ in range(inner_steps):
            clone.adapt(F.cross_entropy(clone(batch.support_x[t]), batch.support_y[t]))
        (F.cross_entropy(clone(batch.query_x[t]), batch.query_y[t]) / 4).backward()
    theirs = torch.cat([p.grad.flatten() for p in model.parameters()])
    named = {n.removeprefix("learner.").removeprefix("backbone."): g for n, g in ours.items()}
    mine = torch.cat([named[n].flatten() for n, _ in model.named_parameters()])
    assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("chunk", [1, 2, 3, None])
def test_chunks_do_not_change_the_meta_gradient(chunk):
    """Catches tasks that leak into one another in vmap, and a last chunk of another size."""
    batch = episodes(tasks=5)
    expected = meta_gradient(small_maml(chunk=5, inner_steps=2), batch)
    got = meta_gradient(small_maml(chunk=chunk, inner_steps=2), batch)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-12)


def test_evaluation_takes_its_own_number_of_steps_and_needs_no_graph():
    """Catches training steps used in evaluation, and an inner loop that dies under no_grad or inference_mode."""
    learner = small_maml(inner_steps=1, eval_inner_steps=4).eval()
    batch = episodes(tasks=1)
    task = batch[0]
    with torch.inference_mode():
        states = list(learner.adaptation(task.support))
        assert len(states) == 5
        prediction = learner.predict(states[-1], task.query_x)
    assert not prediction.requires_grad
    reference = small_maml(inner_steps=4).train()
    torch.testing.assert_close(prediction, reference.predict(reference.adapt(task.support), task.query_x).detach())


def test_other_numbers_of_ways():
    """Catches a head that cannot serve a user's own number of classes."""
    learner = small_maml()
    for ways in (2, 3, 5):
        x = torch.rand(ways, 1, 8, 8, dtype=torch.float64)
        state = learner.adapt(Support(x, torch.arange(ways), ways))
        assert learner.predict(state, x).shape == (ways, ways)
    extended = learner.adapt(Support(x, torch.arange(5), 5)).parameters["head.weight"]
    assert extended.shape[0] == 5
    start = next(iter(learner.adaptation(Support(x, torch.arange(5), 5)))).parameters["head.weight"]
    torch.testing.assert_close(start[3], learner.learner.head.weight.mean(0))


@pytest.mark.parametrize("settings", [{"outputs": 0}, {"inner_steps": -1}, {"chunk": 0}])
def test_impossible_settings_are_refused(settings):
    """Catches settings that would fail, or train nothing, only much later."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        MAML(**{"backbone": Conv4(hidden=2), **settings})


def test_inner_gradients_are_limited_entry_by_entry():
    """Catches a limit of the norm, of the step instead of the gradient, and of one side alone."""
    torch.manual_seed(0)
    learner = MAML(MLP(1, ()), outputs=1, inner_rate=0.5, inner_steps=1, inner_clip=2.0).double()
    x = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    y = torch.tensor([[40.0], [-7.0]], dtype=torch.float64)
    weight, bias = (
        p.detach().clone().requires_grad_() for p in (learner.learner.head.weight, learner.learner.head.bias)
    )
    F.mse_loss(x @ weight.T + bias, y).backward()
    assert weight.grad.abs() > 2 and bias.grad.abs() > 2
    adapted = learner.adapt(Support(x, y, 0)).parameters
    torch.testing.assert_close(adapted["head.weight"], weight - 0.5 * weight.grad.clamp(-2, 2))
    torch.testing.assert_close(adapted["head.bias"], bias - 0.5 * bias.grad.clamp(-2, 2))
