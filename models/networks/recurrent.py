"""Recurrent cells of primitives: right under ``vmap``, and differentiable twice where fused kernels are not."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.core.errors import at_least


class LSTMCell(nn.Module):
    """Long short-term memory without peepholes: gates in the order and with the initialisation of ``nn.LSTM``.

    Args:
        inputs: size of an input.
        hidden: size of the output and of the cell's memory.
        recurrent: size of what is fed back, where it is more than the output; None for the output alone.
    """

    def __init__(self, inputs: int, hidden: int, recurrent: int | None = None) -> None:
        super().__init__()
        at_least(1, inputs=inputs, hidden=hidden, recurrent=recurrent)
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden, inputs))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden, recurrent or hidden))
        self.bias = nn.Parameter(torch.empty(4 * hidden))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(hidden**-0.5), hidden**-0.5)

    def project(self, x: Tensor) -> Tensor:
        """What inputs (…, inputs) add to the gates, (…, 4 hidden), for all steps at once."""
        return F.linear(x, self.weight_ih, self.bias)

    def forward(self, projected: Tensor, fed_back: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """One step: output and memory, (…, hidden) each."""
        gates = projected + F.linear(fed_back, self.weight_hh)
        let_in, keep, new, let_out = gates.chunk(4, -1)
        memory = keep.sigmoid() * memory + let_in.sigmoid() * new.tanh()
        return let_out.sigmoid() * memory.tanh(), memory

    def run(self, x: Tensor) -> Tensor:
        """Outputs (S, hidden) along a sequence (S, inputs), from zeros."""
        projected, outputs = self.project(x), []
        output = memory = projected.new_zeros(self.weight_hh.shape[0] // 4)
        for step in projected:
            output, memory = self(step, output, memory)
            outputs.append(output)
        return torch.stack(outputs)


class GRUCell(nn.Module):
    """One step of a gated recurrent unit, with the parameters of ``nn.GRU``.

    Args:
        inputs, hidden: sizes.
        activation: of what is new.
        weight_norm: weights are directions and lengths, a length for each row (Salimans and Kingma, NeurIPS 2016).
        memory: steps T that units are to remember things for at first: update gates start from biases of
            log(U(1, T - 1)) (Tallec and Ollivier, ICLR 2018). None leaves them as ``nn.GRU`` has them.
        input_scale: deviation of the weights of inputs at first, with orthogonal recurrent weights and biases of 0. For
            inputs most of which are 0 at a time, as one-hot ones: by ``nn.GRU``'s weights, of deviation
            (3 hidden)^-0.5, gates hardly tell one from another. None leaves them so.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor
    bias_hh: Tensor

    def __init__(
        self,
        inputs: int,
        hidden: int,
        activation: Literal["tanh", "relu"] = "tanh",
        weight_norm: bool = False,
        memory: int | None = None,
        input_scale: float | None = None,
    ) -> None:
        super().__init__()
        at_least(1, inputs=inputs, hidden=hidden)
        at_least(3, memory=memory)
        if input_scale is not None and input_scale <= 0:
            raise ValueError(f"input_scale is {input_scale} but must be above 0")
        like = nn.GRU(inputs, hidden)
        self.weight_ih, self.weight_hh = like.weight_ih_l0, like.weight_hh_l0
        self.bias_ih, self.bias_hh = like.bias_ih_l0, like.bias_hh_l0
        self.activation = getattr(torch, activation)
        if input_scale is not None:
            nn.init.normal_(self.weight_ih, std=input_scale)
            for gate in self.weight_hh.detach().chunk(3):
                nn.init.orthogonal_(gate)
            for bias in (self.bias_ih, self.bias_hh):
                nn.init.zeros_(bias)
        if memory is not None:
            with torch.no_grad():
                self.bias_hh[hidden : 2 * hidden] = 0
                self.bias_ih[hidden : 2 * hidden].uniform_(1, memory - 1).log_()
        if weight_norm:
            for name in ("weight_ih", "weight_hh"):
                nn.utils.parametrizations.weight_norm(self, name)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """The next state (…, hidden) from an input (…, inputs) and the state (…, hidden)."""
        return self._step(self._project(x), h, self.weight_hh)

    def run(self, x: Tensor, h: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
        """States (steps, N, hidden) along sequences (steps, N, inputs), from a state (N, hidden) or from zeros.

        A state stays as it is at steps of ``counts`` (steps, N) 0; None takes all.
        """
        projected, weight_hh, states = self._project(x), self.weight_hh, []
        h = x.new_zeros(x.shape[1], weight_hh.shape[1]) if h is None else h
        for t, step in enumerate(projected):
            following = self._step(step, h, weight_hh)
            h = following if counts is None else torch.where(counts[t, :, None] > 0, following, h)
            states.append(h)
        return torch.stack(states)

    def _project(self, x: Tensor) -> Tensor:
        # In the precision of x whatever autocast makes of it, and so are gates and states: in 8 bits a gate above 0.998
        # is 1, and small changes of a state are lost.
        return F.linear(x, self.weight_ih, self.bias_ih).to(x.dtype)

    def _step(self, projected: Tensor, h: Tensor, weight_hh: Tensor) -> Tensor:
        reset_x, update_x, new_x = projected.chunk(3, -1)
        reset_h, update_h, new_h = F.linear(h, weight_hh, self.bias_hh).chunk(3, -1)
        update = torch.sigmoid(update_x + update_h)
        new = self.activation(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
        return new + update * (h - new)


class Readout(nn.Module):
    """Features of a recurrent network's state, (…, size), of which outputs are linear.

    Args:
        hidden, inputs: sizes of state and input.
        units: of a rectified layer that sees the input beside the state, from standard normal weights for the input:
            then what is read from the state depends on the input from the start. None for the state itself.
    """

    def __init__(self, hidden: int, inputs: int, units: int | None) -> None:
        super().__init__()
        at_least(1, units=units)
        self.size = units or hidden
        self.layer = None if units is None else nn.Linear(hidden + inputs, units)
        if self.layer is not None:
            nn.init.normal_(self.layer.weight.detach()[:, hidden:])

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        """From states (…, hidden) and inputs (…, inputs)."""
        return state if self.layer is None else torch.relu(self.layer(torch.cat([state, x], -1)))
