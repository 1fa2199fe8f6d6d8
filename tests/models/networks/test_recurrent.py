"""The recurrent cells against torch's own, and restatements where torch has none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from models.networks.recurrent import GRUCell, LSTMCell


def pair(inputs=3, hidden=4) -> tuple[LSTMCell, nn.LSTM]:
    torch.manual_seed(1)
    ours, theirs = LSTMCell(inputs, hidden).double(), nn.LSTM(inputs, hidden).double()
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(ours.weight_ih)
        theirs.weight_hh_l0.copy_(ours.weight_hh)
        theirs.bias_ih_l0.copy_(ours.bias - 0.5)
        theirs.bias_hh_l0.fill_(0.5)
    return ours, theirs


def test_a_run_is_that_of_torchs_lstm():
    """Catches gates in another order or with another function, and a sequence that does not start from zeros."""
    ours, theirs = pair()
    x = torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(ours.run(x), theirs(x)[0], rtol=1e-12, atol=1e-12)


def test_a_step_is_that_of_torchs_cell_where_more_is_fed_back():
    """Catches a recurrent input of another size that does not reach the gates: as an input beside the others."""
    ours = LSTMCell(3, 4, recurrent=6).double()
    theirs = nn.LSTMCell(9, 4, bias=False).double()
    with torch.no_grad():
        theirs.weight_ih.copy_(torch.cat([ours.weight_ih, ours.weight_hh], 1))
        theirs.weight_hh.zero_()
        ours.bias.zero_()
    x, fed_back, memory = (torch.randn(5, n, dtype=torch.float64) for n in (3, 6, 4))
    expected = theirs(torch.cat([x, fed_back], 1), (torch.zeros(5, 4, dtype=torch.float64), memory))
    torch.testing.assert_close(ours(ours.project(x), fed_back, memory), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", [LSTMCell(64, 100), GRUCell(64, 100)], ids=["LSTM", "GRU"])
def test_starts_as_torchs(cell):
    """Catches another range of the first weights."""
    values = torch.cat([p.flatten() for p in cell.parameters()])
    assert 0.0999 < values.abs().max() <= 0.1
    assert abs(values.mean()) < 1e-3


def test_right_under_vmap_and_twice_differentiable():
    """Catches a kernel without a rule for either: gradients of gradients of several sequences at once."""
    ours, _ = pair()
    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(torch.vmap(ours.run)(x), torch.stack([ours.run(s) for s in x]))
    assert torch.autograd.gradgradcheck(torch.vmap(ours.run), (x,))


def gru(hidden: int = 4, **settings) -> GRUCell:
    torch.manual_seed(2)
    return GRUCell(3, hidden, **settings).double()


@pytest.mark.parametrize("start", [False, True])
def test_a_run_is_that_of_torchs_gru(start):
    """Catches gates in another order, a reset that is applied before the matrix, a state that is mixed the other way
    round, and sequences that do not start from the state given, or from zeros."""
    ours, theirs = gru(), nn.GRU(3, 4).double()
    theirs.load_state_dict({f"{name}_l0": value for name, value in ours.state_dict().items()})
    x, h = torch.randn(7, 5, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64) if start else None
    expected, _ = theirs(x, None if h is None else h[None])
    torch.testing.assert_close(ours.run(x, h), expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(7, 5, 4, dtype=torch.float64)
    (ours.run(x, h) * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, getattr(theirs, f"{name}_l0").grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"activation": "relu"}, {"weight_norm": True, "input_scale": 1.0}])
def test_a_run_is_its_steps(settings):
    """Catches an agent, which goes step by step, that is not the network that learns, which goes along the trial."""
    cell = gru(**settings)
    x, h = torch.randn(6, 5, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    states, now = [], h
    for step in x:
        now = cell(step, now)
        states.append(now)
    torch.testing.assert_close(cell.run(x, h), torch.stack(states), rtol=1e-13, atol=1e-13)


def test_relu_and_weight_normalisation_as_written_out():
    """Catches lengths of columns or of whole matrices, an activation of the gates too, or one matrix that is not."""
    cell = gru(activation="relu", weight_norm=True)
    parts = {name: value.numpy() for name, value in cell.state_dict().items()}
    with torch.no_grad():  # lengths other than those that the directions have
        for parameter in cell.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    matrices = {}
    for name in ("weight_ih", "weight_hh"):
        length, direction = (parts[f"parametrizations.{name}.original{k}"] for k in (0, 1))
        assert length.shape == (12, 1)
        matrices[name] = length * direction / np.sqrt((direction**2).sum(1, keepdims=True))
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    got = cell.run(x).detach().numpy()
    for n in range(5):
        h = np.zeros(4)
        for t in range(6):
            from_x = matrices["weight_ih"] @ x[t, n].numpy() + parts["bias_ih"]
            from_h = matrices["weight_hh"] @ h + parts["bias_hh"]
            reset, update = (1 / (1 + np.exp(-(from_x + from_h)[4 * k : 4 * k + 4])) for k in (0, 1))
            new = np.maximum(0, from_x[8:] + reset * from_h[8:])
            h = (1 - update) * new + update * h
            np.testing.assert_allclose(got[t, n], h, rtol=1e-10, atol=1e-12)


def test_weight_normalisation_changes_nothing_at_first():
    """Catches lengths that do not start as those of the weights: the paper normalises, and initialises as without."""
    torch.manual_seed(5)
    plain = GRUCell(3, 4)
    torch.manual_seed(5)
    normalised = GRUCell(3, 4, weight_norm=True)
    x = torch.randn(6, 5, 3)
    torch.testing.assert_close(plain.run(x), normalised.run(x))


def test_memory_is_how_long_units_keep_what_they_have():
    """Catches gates that forget so slowly instead of remembering, and times that are not spread over the trial: without
    weights, a unit keeps T' / (1 + T') of its state, T' uniform in 1 to T - 1."""
    cell = gru(hidden=2000, memory=100)
    with torch.no_grad():
        cell.weight_ih.zero_()
        cell.weight_hh.zero_()
        cell.bias_ih[4000:].zero_()
        cell.bias_hh[4000:].zero_()
    kept = cell(torch.zeros(3, dtype=torch.float64), torch.ones(2000, dtype=torch.float64)).detach().numpy()
    times = np.sort(kept / (1 - kept))
    np.testing.assert_allclose(times, np.linspace(1, 99, 2000), atol=5)
    with pytest.raises(ValueError, match="memory is 2"):
        gru(memory=2)


@pytest.mark.parametrize("weight_norm", [False, True])
def test_input_scale_is_the_deviation_of_weights_of_inputs(weight_norm):
    """Catches a scale of variances, one that reaches the recurrent weights, lengths that undo it, and gates whose
    recurrent weights are orthogonal together but not each, and a scale of 0, whose rows have no direction."""
    with pytest.raises(ValueError, match="input_scale is 0 but must be above 0"):
        GRUCell(50, 40, weight_norm=weight_norm, input_scale=0)
    torch.manual_seed(3)
    cell = GRUCell(50, 40, weight_norm=weight_norm, memory=10, input_scale=0.5)
    assert cell.weight_ih.std().item() == pytest.approx(0.5, rel=0.03)
    for gate in cell.weight_hh.detach().chunk(3):
        torch.testing.assert_close(gate @ gate.T, torch.eye(40), rtol=0, atol=1e-5)
    gates = (cell.bias_ih + cell.bias_hh).detach().chunk(3)
    assert not gates[0].any() and not gates[2].any() and gates[1].min() > 0  # memory is not undone


def test_small_changes_add_up_under_autocast():
    """Catches a state or gates of 8 bits: one that moves by a thousandth of what is left at each step would stand still
    at 0.87. Learning has to see the states that acting went through."""
    cell = gru(1).float()
    with torch.no_grad():
        for weight in (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh):
            weight.zero_()
        cell.bias_ih[1] = np.log(999.0)  # update gate of .999
        cell.bias_ih[2] = 20.0  # tanh of it is 1
    h = torch.zeros(1, 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        states = cell.run(torch.zeros(4000, 1, cell.weight_ih.shape[1]))
        for _ in range(4000):
            h = cell(torch.zeros(1, cell.weight_ih.shape[1]), h)
    assert states.dtype == torch.float32 and torch.equal(states[-1], h)
    assert 0.97 < float(h) <= 1


def test_a_gru_is_right_under_vmap_and_twice_differentiable():
    """Catches a kernel without a rule for either: gradients of gradients of several trials at once."""
    cell = gru()
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(torch.vmap(cell.run)(x), torch.stack([cell.run(s) for s in x]))
    assert torch.autograd.gradgradcheck(torch.vmap(cell.run), (x[:, :2, :1].detach().requires_grad_(),))
