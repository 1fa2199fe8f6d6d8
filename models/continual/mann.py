"""Memory-augmented neural networks with least recently used access."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Support
from datamodules.core.errors import at_least
from models.continual.learner import ContinualLearner, Stream
from models.core.chance import Chance
from models.core.learner import Paper
from models.networks.backbones import Backbone
from models.networks.recurrent import LSTMCell


class MemoryState(NamedTuple):
    """What a stream has left so far.

    Attributes:
        output, cell: of the controller, (hidden,) each.
        memory: (slots, width).
        usage: w^u, (slots,).
        read: w^r of each head, (heads, slots).
        label: of the last example, one of ``ways`` or none, (ways,).
    """

    output: Tensor
    cell: Tensor
    memory: Tensor
    usage: Tensor
    read: Tensor
    label: Tensor


class MANN(ContinualLearner):
    """An LSTM controller with an external memory, which is given each example's label one step late.

    The controller sees x_t and y_{t-1}. By its output h_t each head has a key and a write gate, reads the memory by
    cosine similarity (eqs. 2 to 4) and writes its key to where it read last or to the least used slot (eqs. 5 to 8).
    Labels are another stream's others, so they must be bound to what was seen, in the memory: the loss is the
    cross-entropy of every example of a stream before its label is told.

    Args:
        backbone: of what the controller sees; pixels themselves by ``models.Pixels``.
        ways: classes of a stream; None for the data's.
        slots, width: of the memory.
        heads: that read, each with a key that it also writes.
        hidden: of the controller.
        decay: γ of the usage.
        **others: see MetaLearner.
    """

    paper = Paper(
        "Santoro, Bartunov, Botvinick, Wierstra and Lillicrap",
        "Meta-Learning with Memory-Augmented Neural Networks",
        "ICML",
        2016,
        "https://proceedings.mlr.press/v48/santoro16.html",
    )

    def __init__(
        self,
        backbone: Backbone,
        ways: int | None = None,
        slots: int = 128,
        width: int = 40,
        heads: int = 4,
        hidden: int = 200,
        decay: float = 0.99,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        ways = 5 if ways is None else ways
        at_least(1, ways=ways, width=width, heads=heads, hidden=hidden)
        at_least(heads, slots=slots)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay} but must be between 0 and 1")
        self.ways, self.slots, self.width, self.heads, self.decay = ways, slots, width, heads, decay
        self.backbone = backbone
        self.controller = LSTMCell(backbone.out_features + ways, hidden, hidden + heads * width)
        self.keys = nn.Linear(hidden, heads * width)
        self.gates = nn.Linear(hidden, heads)
        self.answer = nn.Linear(hidden + heads * width, ways)

    def check(self, data: EpisodicDataModule) -> str | None:
        shape = data.task_shape()
        if shape.get("ways", self.ways) != self.ways:
            return f"ways is {self.ways} but the data's streams have {shape['ways']}: give --model.init_args.ways"
        return None

    def encode(self, inputs: Tensor) -> Tensor:
        return self.backbone(inputs)

    def begin(self, classes: int, chance: Chance) -> MemoryState:
        like = self.keys.weight
        return MemoryState(
            like.new_zeros(self.controller.weight_ih.shape[0] // 4),
            like.new_zeros(self.controller.weight_ih.shape[0] // 4),
            like.new_full((self.slots, self.width), 1e-6),
            like.new_zeros(self.slots),
            like.new_zeros(self.heads, self.slots),
            like.new_zeros(self.ways),
        )

    def step(self, state: MemoryState, x: Tensor) -> tuple[MemoryState, Tensor]:
        """See one example (features,): the state after it, but for its label, and logits (ways,)."""
        read = (state.read @ state.memory).flatten()  # r_{t-1}, what was read last, is fed back
        projected = self.controller.project(torch.cat([x, state.label]))
        output, cell = self.controller(projected, torch.cat([state.output, read]), state.cell)
        keys = self.keys(output).unflatten(0, (self.heads, self.width)).tanh()
        gates = self.gates(output).sigmoid()[:, None]
        # Eq. 6: the n least used slots, n being the number of heads, as slots of which each head writes to one.
        least = state.usage.topk(self.heads, largest=False).indices
        unused = _rows(least, self.slots).to(keys)
        write = gates * state.read + (1 - gates) * unused  # eq. 7
        kept = state.memory * (1 - unused[:1].T)  # the least used slot is erased before it is written
        memory = kept + write.T @ keys  # eq. 8
        similar = F.normalize(keys, dim=-1) @ F.normalize(memory, dim=-1).T  # eq. 2
        weights = similar.softmax(-1)  # eq. 3
        usage = self.decay * state.usage + weights.sum(0) + write.sum(0)  # eq. 5
        logits = self.answer(torch.cat([output, (weights @ memory).flatten()]))
        return MemoryState(output, cell, memory, usage, weights, state.label), logits

    def update(self, state: MemoryState, experience: Support) -> MemoryState:
        for x, y in zip(experience.x, experience.y, strict=True):
            state, _ = self.step(state, x)
            state = state._replace(label=_rows(y[None], self.ways)[0].to(state.label))
        return state

    def predict(self, state: MemoryState, query_x: Tensor) -> Tensor:
        return torch.func.vmap(lambda x: self.step(state, x)[1])(query_x)

    def objective(self, task: Stream) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = self.encode(task.x.flatten(0, 1))
        y = task.y.flatten()
        state, logits = self.begin(task.classes, task.chance), []
        for number in range(len(x)):
            state, of_step = self.step(state, x[number])
            state = state._replace(label=_rows(y[number][None], self.ways)[0].to(x))
            logits.append(of_step)
        prediction = torch.stack(logits)
        return self.loss(prediction, y), prediction

    def targets(self, batch: Any) -> Tensor:
        return batch.y.flatten(1)


def _rows(numbers: Tensor, size: int) -> Tensor:
    """One-hot rows (N, size) of numbers (N,), bool."""
    # By comparison: torch's one_hot looks at values, which nested transformations do not let it.
    return numbers[:, None] == torch.arange(size, device=numbers.device)
