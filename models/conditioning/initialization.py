"""A task embedding sets the parameters that adaptation starts from."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from datamodules.core.errors import ConfigError, at_least
from models.core.base_learner import Parameters, entry
from models.core.conditioning import Conditioning, initialisation


class Attenuation(Conditioning):
    """Scales each tensor of the initialisation by a number between 0 and 1: θ'_l = γ_l θ_l.

    As in L2F (Baik, Hong and Lee, CVPR 2020): γ is a sigmoid of two linear layers of the task embedding, as wide as
    there are tensors.
    """

    def attach(self, learner: nn.Module, embedding_size: int) -> None:
        self.names = list(initialisation(learner))
        tensors = len(self.names)
        self.generator = nn.Sequential(nn.Linear(embedding_size, tensors), nn.ReLU(), nn.Linear(tensors, tensors))

    def forward(self, embedding: Tensor, parameters: Parameters) -> Parameters:
        gamma = torch.sigmoid(self.generator(embedding))
        return {n: g * parameters[n] for n, g in zip(self.names, gamma, strict=True)}


class LowRank(Conditioning):
    """Adds to each tensor of the initialisation what a low-rank hypernetwork generates from the task embedding.

    A matrix W (o, i), or a convolution's (o, i · k · k), becomes W + A diag(C e) B with A (o, r) and B (r, i); a bias b
    becomes b + C e. A hypernetwork (Ha, Dai and Le, ICLR 2017) of a matrix's every entry would have d times as many
    parameters as the learner. It starts from no change: A and the biases' C are 0.

    Args:
        rank: r.
    """

    def __init__(self, rank: int = 4) -> None:
        super().__init__()
        at_least(1, rank=rank)
        self.rank = rank

    def attach(self, learner: nn.Module, embedding_size: int) -> None:
        start = initialisation(learner)
        self.names = list(start)
        left, right, code = {}, {}, {}
        for name, p in start.items():
            if p.dim() == 1:
                code[entry(name)] = nn.Parameter(torch.zeros(len(p), embedding_size))
                continue
            inputs = p[0].numel()
            left[entry(name)] = nn.Parameter(torch.zeros(len(p), self.rank))
            right[entry(name)] = nn.Parameter(torch.randn(self.rank, inputs) * inputs**-0.5)
            code[entry(name)] = nn.Parameter(torch.randn(self.rank, embedding_size) * embedding_size**-0.5)
        self.left, self.right, self.code = (nn.ParameterDict(d) for d in (left, right, code))

    def forward(self, embedding: Tensor, parameters: Parameters) -> Parameters:
        values = {}
        for name in self.names:
            change = self.code[entry(name)] @ embedding
            if entry(name) in self.left:
                change = (self.left[entry(name)] * change) @ self.right[entry(name)]
            values[name] = parameters[name] + change.view_as(parameters[name])
        return values


class EmbeddingRows(Conditioning):
    """Writes the task embedding itself into the initial weights: each row of a layer starts with the embedding added.

    W'_i = W_i + s_i e for every row i, e repeated or cut to the row's length, with a learned scale s_i for each row,
    0 at first. Nothing is generated: what the embedding says has to be in its own coordinates.

    Args:
        layers: "first", "last" or "all" of the layers that have weights.
    """

    def __init__(self, layers: Literal["first", "last", "all"] = "first") -> None:
        super().__init__()
        self.layers = layers

    def attach(self, learner: nn.Module, embedding_size: int) -> None:
        weights = {n: p for n, p in initialisation(learner).items() if p.dim() > 1}
        if not weights:
            raise ConfigError(
                f"{type(learner).__name__}'s network has no weights with rows: choose another conditioning"
            )
        chosen = {"first": slice(0, 1), "last": slice(-1, None), "all": slice(None)}[self.layers]
        self.names = list(weights)[chosen]
        self.scales = nn.ParameterDict({entry(n): nn.Parameter(torch.zeros(len(weights[n]))) for n in self.names})

    def forward(self, embedding: Tensor, parameters: Parameters) -> Parameters:
        values = {}
        for name in self.names:
            weight = parameters[name]
            length = weight[0].numel()
            row = embedding.repeat(-(-length // len(embedding)))[:length]
            values[name] = weight + torch.outer(self.scales[entry(name)], row).view_as(weight)
        return values


class Experts(Conditioning):
    """Mixes K initialisations by attention: θ' = Σ_k a_k θ_k, a = softmax(W e + b).

    The first is the learner's own; the others start from its entries in other orders, which have the same distribution.

    Args:
        count: K.
        attention: "softmax" of a learned map of the embedding; or "label": the embedding is itself the weights, as that
            of ``models.TaskLabel`` is, so that each group of tasks has an initialisation of its own (Multi-MAML, the
            oracle of Vuorio et al., NeurIPS 2019).
    """

    def __init__(self, count: int = 4, attention: Literal["softmax", "label"] = "softmax") -> None:
        super().__init__()
        at_least(2, count=count)
        self.count, self.attention = count, attention

    def attach(self, learner: nn.Module, embedding_size: int) -> None:
        start = initialisation(learner)
        self.names = list(start)
        if self.attention == "label" and embedding_size != self.count:
            raise ConfigError(f"count is {self.count} but the embedding has {embedding_size} weights: give as many")
        others = {entry(n): torch.stack([self._other(p) for _ in range(self.count - 1)]) for n, p in start.items()}
        self.others = nn.ParameterDict({n: nn.Parameter(p) for n, p in others.items()})
        self.scores = nn.Linear(embedding_size, self.count) if self.attention == "softmax" else None

    @staticmethod
    def _other(parameter: Tensor) -> Tensor:
        flat = parameter.detach().flatten()
        return flat[torch.randperm(len(flat))].view_as(parameter)

    def weights(self, embedding: Tensor) -> Tensor:
        """How much of each initialisation a task starts from, (K,)."""
        return embedding if self.scores is None else self.scores(embedding).softmax(-1)

    def forward(self, embedding: Tensor, parameters: Parameters) -> Parameters:
        first, others = self.weights(embedding).split([1, self.count - 1])
        return {
            n: first.squeeze() * parameters[n] + torch.tensordot(others, self.others[entry(n)], 1) for n in self.names
        }
