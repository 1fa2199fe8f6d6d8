"""The LSTM meta-learner: a recurrent cell whose memory is the base learner's parameters makes the inner steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from datamodules.core.episodes import Support
from datamodules.core.errors import at_least
from models.core.base_learner import BaseLearner, Parameters
from models.core.gradient_learner import GradientLearner
from models.core.inner_loop import Adapted, adapted, call, flat, inner_path, last, split_parameters, unflat
from models.core.learner import Paper
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNorm, BatchNormMode
from models.networks.recurrent import LSTMCell


class Memory(NamedTuple):
    """What the cells keep of N parameters, beside these: output and memory of the first, (hidden, N) each, and the
    gates of the second, (N,) each."""

    output: Tensor
    memory: Tensor
    forget: Tensor
    let_in: Tensor


class MetaLSTM(GradientLearner):
    """Learns the optimizer, an LSTM, along with the initialisation that it starts from (Ravi and Larochelle, 2017).

    The update of an LSTM's memory, c' = f ∘ c + i ∘ c̃, is gradient descent where c is θ and c̃ is -∇L(θ) (eq. 3). Two
    cells, whose weights all parameters share, each with a state of its own, give forget gate f and input gate i from
    loss, gradient, parameter and the gates before. Loss and gradients are constants to the meta-gradient, which passes
    through the gates and the sum alone: of first order by design.

    Args:
        backbone: the base learner without its head; 32 filters in the paper.
        outputs: rows of the head: ways, or the dimension of y.
        hidden: size of the first cell.
        inner_steps: T, each on the whole support set; 8 in code for five shots.
        eval_inner_steps: in evaluation; None takes as many as in training.
        precision: p of the logarithms that loss and gradients are read by.
        norm_eps: added to batch norm's variances.
        batch_norm: by default queries are normalised by their support set, whose statistics alone the reference code's
            averages hold, which begin anew in each episode and weigh the newest batch 0.95.
        **others: see MetaLearner.
    """

    paper = Paper(
        "Ravi and Larochelle",
        "Optimization as a Model for Few-Shot Learning",
        "ICLR",
        2017,
        "https://openreview.net/forum?id=rJY0-Kcll",
    )
    tasks = frozenset({"classification", "regression"})

    def __init__(
        self,
        backbone: Backbone,
        outputs: int = 5,
        hidden: int = 20,
        inner_steps: int = 8,
        eval_inner_steps: int | None = None,
        precision: float = 10.0,
        norm_eps: float = 1e-3,
        batch_norm: BatchNormMode = "support",
        **others: Any,
    ) -> None:
        super().__init__(outputs, inner_steps, eval_inner_steps, batch_norm, **others)
        at_least(1, hidden=hidden)
        if not (precision > 0 and norm_eps > 0):
            raise ValueError(f"precision is {precision} and norm_eps {norm_eps} but both must be above 0")
        self.learner = BaseLearner(backbone, outputs)
        self.precision = precision
        self.first, self.second = CoordinatewiseLSTM(hidden), UpdateCell(hidden)
        for layer in self.learner.modules():
            if isinstance(layer, BatchNorm) and not layer.fixed:
                layer.eps = norm_eps

    def path(self, support: Support) -> Iterator[Parameters]:
        """The base learner's parameters before the first step and after each one."""
        start = self.learner.resize_head(split_parameters(self.learner, adapt_normalization=True)[0], support.ways)

        def support_loss(parameters: Parameters, step: int) -> Tensor:
            outputs = call(self.learner, parameters, support.x, self.statistics_source, step)
            return self.support_loss(outputs, support)

        def update(
            step: int, parameters: Parameters, gradients: Parameters, loss: Tensor, kept: Memory
        ) -> tuple[Parameters, Memory]:
            gradient = flat(gradients)
            of_loss, of_gradient = (preprocess(v.to(gradient.dtype), self.precision) for v in (loss, gradient))
            output, memory = self.first(of_loss, of_gradient, kept.output, kept.memory)
            new, forget, let_in = self.second(output, flat(parameters), gradient, kept.forget, kept.let_in)
            return unflat(new, parameters), Memory(output, memory, forget, let_in)

        gates = torch.zeros_like(flat(start))
        output = gates.repeat(self.first.hidden, 1)
        kept = Memory(output, output, gates, gates)
        for parameters, _ in inner_path(support_loss, start, update, self.steps, kept, first_order=True):
            yield parameters

    def adaptation(self, support: Support) -> Iterator[Adapted]:
        for step, parameters in enumerate(self.path(support)):
            yield adapted(self.learner, parameters, support, self.batch_norm, step)

    def adapt(self, support: Support) -> Adapted:
        # Without what batch norm needs of the support set under the parameters along the way.
        return adapted(self.learner, last(self.path(support)), support, self.batch_norm, self.steps)


class CoordinatewiseLSTM(LSTMCell):
    """An LSTM cell for very many coordinates: they are columns, and one product makes all of their gates.

    Args:
        hidden: size of output and memory.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__(4, hidden)
        self.hidden = hidden

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, of_all: Tensor, of_each: Tensor, output: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One step: output and memory, (hidden, N) each, from inputs (2,) of all coordinates and (2, N) of each."""
        constant = torch.addmv(self.bias, self.weight_ih[:, :2], of_all)
        weight = torch.cat([self.weight_ih[:, 2:], self.weight_hh], 1)
        gates = torch.addmm(constant[:, None], weight, torch.cat([of_each, output]))
        let_in, keep, new, let_out = gates.chunk(4)
        memory = keep.sigmoid() * memory + let_in.sigmoid() * new.tanh()
        return let_out.sigmoid() * memory.tanh(), memory


class UpdateCell(nn.Module):
    """The cell whose memory is the parameters: gates by equations 4 and 5, new parameters by equation 2.

    It starts as gradient descent: forget gates near 1, input gates of 0.007 to 0.018.

    Args:
        hidden: size of the first cell's output.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        # Of output, parameter and gate before; a row for each gate, forget and input.
        self.weight = nn.Parameter(torch.empty(2, hidden + 2).uniform_(-0.01, 0.01))
        self.forget_bias = nn.Parameter(torch.empty(()).uniform_(4.0, 6.0))
        self.input_bias = nn.Parameter(torch.empty(()).uniform_(-5.0, -4.0))

    def forward(
        self, output: Tensor, parameters: Tensor, gradient: Tensor, forget: Tensor, let_in: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """New parameters, forget gates and input gates, (N,) each, from the first cell's output (hidden, N)."""
        seen, of_gate = self.weight[:, :-1], self.weight[:, -1]
        of_forget, of_input = seen @ torch.cat([output, parameters[None]])
        # What is fed back are the gates, as the equations have it; the reference code feeds back their logits.
        forget = torch.sigmoid(of_forget + of_gate[0] * forget + self.forget_bias)
        let_in = torch.sigmoid(of_input + of_gate[1] * let_in + self.input_bias)
        return forget * parameters - let_in * gradient, forget, let_in


def preprocess(values: Tensor, precision: float) -> Tensor:
    """Logarithm and sign of values (…), (2, …): two numbers near 1 for values of any size (Andrychowicz et al., 2016).

    (log|v| / p, sign(v)) where |v| is at least e^-p, and (-1, e^p v) below.
    """
    least = torch.exp(values.new_tensor(-precision))
    large = values.abs() >= least
    logarithm = torch.where(large, values.abs().clamp(min=least).log() / precision, -1.0)
    return torch.stack([logarithm, torch.where(large, values.sign(), values / least)])
