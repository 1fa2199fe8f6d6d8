"""What a task is, as a vector: autoencoders that read a support set."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.recurrent import GRUCell


class RecurrentAutoencoder(nn.Module):
    """Reads examples one after the other, and writes them again from the last state, the last one first.

    Args:
        features: size of an example.
        hidden: size of the task's vector.
    """

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.encoder, self.decoder = GRUCell(features, hidden), GRUCell(features, hidden)
        self.written = nn.Linear(hidden, features)

    def forward(self, examples: Tensor) -> tuple[Tensor, Tensor]:
        """The task's vector (hidden,), the mean state over the examples (n, features), and the reconstruction loss."""
        state = examples.new_zeros(self.written.in_features)
        states = []
        for example in examples.unbind(0):
            state = self.encoder(example, state)
            states.append(state)
        written, reconstructed = torch.zeros_like(examples[0]), []
        for _ in states:
            state = self.decoder(written, state)
            written = self.written(state)
            reconstructed.append(written)
        return torch.stack(states).mean(0), F.mse_loss(torch.stack(reconstructed[::-1]), examples)


class PoolingAutoencoder(nn.Module):
    """Encodes and reconstructs every example by itself; the task is the mean code.

    Args:
        features: size of an example.
        hidden: size of the task's vector.
    """

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, hidden), nn.ReLU())
        self.decoder = nn.Linear(hidden, features)

    def forward(self, examples: Tensor) -> tuple[Tensor, Tensor]:
        """The task's vector (hidden,) of examples (n, features), and the reconstruction loss."""
        codes = self.encoder(examples)
        return codes.mean(0), F.mse_loss(self.decoder(codes), examples)
