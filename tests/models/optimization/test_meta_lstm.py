"""The LSTM meta-learner against gradient descent, a cell-by-cell reference and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from models import MAML, Conv4, MetaLSTM
from models.optimization.meta_lstm import UpdateCell, preprocess
from tests.support.gradients import assert_is_gradient, episodes, gradients_of, meta_gradient

DOUBLE = torch.float64


def meta_lstm(**settings) -> MetaLSTM:
    torch.manual_seed(2)
    backbone = Conv4(hidden=4, image_size=8)
    return MetaLSTM(
        backbone, outputs=3, hidden=5, **{"inner_steps": 3, "batch_norm": "transductive"} | settings
    ).double()


@pytest.mark.parametrize("rate", [0.02, 0.3])
def test_with_constant_gates_it_is_gradient_descent(rate):
    """Catches an update of another sign or order, a gradient that is scaled, and batch norm's parameters left out: with
    weights 0, the forget gate 1 and the input gate α it is MAML's inner loop, which shares no line with it."""
    learner = meta_lstm(norm_eps=1e-5)
    with torch.no_grad():
        learner.second.weight.zero_()
        learner.second.forget_bias.fill_(60.0)
        learner.second.input_bias.fill_(math.log(rate / (1 - rate)))
    torch.manual_seed(2)
    descent = MAML(
        Conv4(hidden=4, image_size=8), 3, rate, inner_steps=3, first_order=True, adapt_normalization=True
    ).double()
    descent.learner.load_state_dict(learner.learner.state_dict())
    task = episodes()[0]
    for mine, theirs in zip(learner.adaptation(task.support), descent.adaptation(task.support), strict=True):
        assert mine.parameters.keys() == theirs.parameters.keys()
        for name, p in theirs.parameters.items():
            torch.testing.assert_close(mine.parameters[name], p, rtol=1e-10, atol=1e-13, msg=name)
    ours, maml = meta_gradient(learner, episodes()), meta_gradient(descent, episodes())
    for name, gradient in maml.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-8, atol=1e-12, msg=name)


def test_inputs_are_preprocessed_in_both_branches():
    """Catches a natural logarithm taken for another, p left out, and infinity at 0: closed form, on both sides of e^-p
    and at it."""
    values = torch.tensor(
        [2.0, -0.5, math.exp(-9.0), -math.exp(-10.0), math.exp(-11.0), -math.exp(-12.0), 0.0], dtype=DOUBLE
    )
    expected = [
        (math.log(2) / 10, 1.0),
        (math.log(0.5) / 10, -1.0),
        (-0.9, 1.0),
        (-1.0, -1.0),
        (-1.0, math.exp(-1.0)),
        (-1.0, -math.exp(-2.0)),
        (-1.0, 0.0),
    ]
    torch.testing.assert_close(preprocess(values, 10.0).T, torch.tensor(expected, dtype=DOUBLE), rtol=1e-9, atol=1e-12)


def test_it_is_the_two_cells_of_each_coordinate():
    """Catches states mixed up between coordinates, logits fed back for gates, gradients that are differentiated, and
    gates of another cell: a reference of ``nn.LSTMCell`` and the equations, coordinates in rows, and its autograd."""
    learner = meta_lstm()
    with torch.no_grad():
        learner.second.weight.uniform_(-1, 1)
        learner.second.forget_bias.fill_(2.0)
        learner.second.input_bias.fill_(-1.0)
    batch = episodes(tasks=1)
    task, names = batch[0], [n for n, _ in learner.learner.named_parameters()]
    gradient = meta_gradient(learner, batch)

    lstm = nn.LSTMCell(4, 5).double()
    lstm.load_state_dict(
        {
            "weight_ih": learner.first.weight_ih,
            "weight_hh": learner.first.weight_hh,
            "bias_ih": learner.first.bias,
            "bias_hh": torch.zeros_like(learner.first.bias),
        }
    )
    weight = learner.second.weight.detach().clone().requires_grad_()
    biases = [learner.second.forget_bias, learner.second.input_bias]
    biases = [b.detach().clone().requires_grad_() for b in biases]
    start = {n: p.detach().clone().requires_grad_() for n, p in learner.learner.named_parameters()}
    theta = torch.cat([p.flatten() for p in start.values()])[:, None]
    state, f, i = None, torch.zeros_like(theta), torch.zeros_like(theta)

    def shaped(theta):
        sizes = [start[n].numel() for n in names]
        return {n: t.view_as(start[n]) for n, t in zip(names, theta[:, 0].split(sizes), strict=True)}

    def logs(v):  # of numbers that are all above e^-10, or zero
        small = v.abs() < math.exp(-10)
        return torch.where(small, -1.0, v.abs().log() / 10), torch.where(small, v * math.exp(10), v.sign())

    for _ in range(3):
        at = {n: p.detach().requires_grad_() for n, p in shaped(theta).items()}
        loss = F.cross_entropy(functional_call(learner.learner, at, (task.support.x,)), task.support.y)
        g = torch.cat([d.flatten() for d in torch.autograd.grad(loss, list(at.values()))])[:, None]
        inputs = torch.cat([*(v.expand_as(g) for v in logs(loss.detach())), *logs(g)], 1)
        state = lstm(inputs, state)
        f = torch.sigmoid(torch.cat([state[0], theta, f], 1) @ weight[0][:, None] + biases[0])
        i = torch.sigmoid(torch.cat([state[0], theta, i], 1) @ weight[1][:, None] + biases[1])
        theta = f * theta - i * g
    *_, reached = learner.adaptation(task.support)
    for n, p in shaped(theta).items():
        torch.testing.assert_close(reached.parameters[n], p, rtol=1e-8, atol=1e-11, msg=n)
    F.cross_entropy(functional_call(learner.learner, shaped(theta), (task.query_x,)), task.query_y).backward()
    own = {f"learner.{n}": p for n, p in start.items()} | {
        "first.weight_ih": lstm.weight_ih,
        "first.weight_hh": lstm.weight_hh,
        "first.bias": lstm.bias_ih,
        "second.weight": weight,
        "second.forget_bias": biases[0],
        "second.input_bias": biases[1],
    }
    assert own.keys() == gradient.keys()
    for n, p in own.items():
        torch.testing.assert_close(gradient[n], p.grad, rtol=1e-7, atol=1e-10, msg=n)


def test_the_gates_gradients_equal_finite_differences():
    """Catches a gate whose derivative is cut: of both gates' biases and weights, through the gates fed back over three
    steps, with loss and gradients held fixed."""
    torch.manual_seed(0)
    cell = UpdateCell(4).double()
    with torch.no_grad():
        cell.weight.uniform_(-1, 1)
    outputs, gradients = torch.randn(3, 4, 6, dtype=DOUBLE), torch.randn(3, 6, dtype=DOUBLE)
    weights = torch.randn(3, 6, dtype=DOUBLE)

    def total():
        theta, forget, let_in = torch.ones(6, dtype=DOUBLE), torch.zeros(6, dtype=DOUBLE), torch.zeros(6, dtype=DOUBLE)
        for output, gradient in zip(outputs, gradients, strict=True):
            theta, forget, let_in = cell(output, theta, gradient, forget, let_in)
        return (weights[0] * theta + weights[1] * forget + weights[2] * let_in).sum()

    total().backward()
    assert_is_gradient(gradients_of(cell), cell.named_parameters(), total, steps=(1e-5,))


def test_queries_are_normalised_by_their_support_set():
    """Catches another batch norm than the published one, whose averages begin anew in each episode and weigh the newest
    support batch 0.95: the reference's layers, run over the support set at each step's parameters, predict the same but
    for that remainder and the last step."""
    learner = meta_lstm(batch_norm="support").eval()
    with torch.no_grad():
        learner.second.input_bias.fill_(-6.0)  # small steps, by which the averages of earlier ones are near
    task = episodes(shots=4)[0]
    states = list(learner.adaptation(task.support))

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(c, 4, 3, 2, 1) for c in (1, 4, 4, 4))
            self.norms = nn.ModuleList(nn.BatchNorm2d(4, eps=1e-3, momentum=0.95) for _ in range(4))
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = torch.relu(norm(conv(x)))
            return self.head(x.mean((2, 3)))

    plain = Plain().double().train()
    for state in states:
        of_state = {n.removeprefix("backbone."): p for n, p in state.parameters.items()}
        plain.load_state_dict(of_state, strict=False)
        plain(task.support.x)
    biased = len(task.support.y) * 2  # torch's averages hold n / (n - 1) times the variance of the batch
    assert biased > 0
    expected = plain.eval()(task.query_x)
    got = learner.predict(states[-1], task.query_x)
    other = learner.predict(states[-1]._replace(statistics=None), task.query_x)
    assert (got - expected).norm() < 0.25 * (other - expected).norm()


@pytest.mark.parametrize("settings", [{"hidden": 0}, {"precision": 0.0}, {"norm_eps": 0.0}])
def test_impossible_settings_are_refused(settings):
    """Catches settings that would fail, or give infinities, only much later."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        MetaLSTM(Conv4(hidden=2), **settings)
