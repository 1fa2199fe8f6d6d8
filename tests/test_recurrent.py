"""The LSTM cell against torch's own."""

from __future__ import annotations

import torch
from torch import nn

from models.recurrent import LSTMCell


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


def test_starts_as_torchs():
    """Catches another range of the first weights."""
    cell = LSTMCell(64, 100)
    values = torch.cat([p.flatten() for p in cell.parameters()])
    assert 0.0999 < values.abs().max() <= 0.1
    assert abs(values.mean()) < 1e-3


def test_right_under_vmap_and_twice_differentiable():
    """Catches a kernel without a rule for either: gradients of gradients of several sequences at once."""
    ours, _ = pair()
    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(torch.vmap(ours.run)(x), torch.stack([ours.run(s) for s in x]))
    assert torch.autograd.gradgradcheck(torch.vmap(ours.run), (x,))
