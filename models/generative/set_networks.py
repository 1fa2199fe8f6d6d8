"""Networks of sets of points (x, y), which heed no order, and of functions that a code describes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal


def layers(*sizes: int) -> nn.Sequential:
    """Linear layers from the first size to the last, a ReLU between each two."""
    made: list[nn.Module] = []
    for before, after in pairwise(sizes):
        made += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*made[:-1])


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Scaled dot-product attention of queries (Q, d) to keys and values (S, d), by several heads: (Q, d)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(-3, -2) for t in (query, key, value))
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(-3, -2).flatten(-2)


class Attention(nn.Module):
    """Multi-head attention as a block: what is attended to is added to the projected query, and so is a layer of ReLU.

    Args:
        size: of queries, keys, values and outputs.
        heads: of the attention.
    """

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(size, size, bias=False) for _ in range(3))
        self.feed = nn.Linear(size, size)
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(2))

    def look_up(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """For queries (Q, size) in keys and values (S, size) that are projected already, (Q, size)."""
        q = self.query(query)
        x = self.norms[0](q + attend(q, key, value, self.heads))
        return self.norms[1](x + self.feed(x).relu())

    def forward(self, x: Tensor) -> Tensor:
        """Of points (N, size) to each other."""
        return self.look_up(x, self.key(x), self.value(x))


def point_layers(inputs: int, hidden: int, depth: int, heads: int = 0) -> nn.Sequential:
    """Codes (N, hidden) of points (N, inputs); with heads the last two of ``depth`` layers are self-attention."""
    if not heads:
        return layers(inputs, *[hidden] * depth)
    return nn.Sequential(layers(inputs, *[hidden] * (depth - 2)), nn.ReLU(), Attention(hidden, heads))


class PooledCode(nn.Module):
    """ρ(mean of φ(x, y)): a code of a set of points.

    Args:
        codes: numbers of the code.
        inputs: numbers of a point, x and y together.
        hidden: units of each layer.
        point_depth: layers of φ.
        set_depth: layers of ρ.
        heads: of the self-attention that the last layers of φ are; 0 for none.
    """

    def __init__(self, codes: int, inputs: int, hidden: int, point_depth: int, set_depth: int, heads: int = 0) -> None:
        super().__init__()
        self.point = point_layers(inputs, hidden, point_depth, heads)
        self.whole = layers(*[hidden] * set_depth, codes)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.whole(self.point(torch.cat([x, y], -1)).mean(-2))


class PooledLatent(PooledCode):
    """q(z | points) of a mean of codes, its deviation between 0.1 and 1 (Kim et al., ICLR 2019, and their code).

    It knows how points are distributed, not how many they are: the same points twice give the same distribution.

    Args:
        latents: dimensions of z.
        *sizes: see PooledCode.
    """

    def __init__(self, latents: int, *sizes: int) -> None:
        super().__init__(2 * latents, *sizes)

    def forward(self, x: Tensor, y: Tensor) -> Normal:
        made = super().forward(x, y)
        mean, raw = made.to(torch.promote_types(made.dtype, torch.float32)).chunk(2, -1)
        return Normal(mean, 0.1 + 0.9 * raw.sigmoid(), validate_args=False)


class BayesianLatent(nn.Module):
    """q(z | points) where each point is an observation of z, with a variance of its own (Volpp et al., ICLR 2021).

    The posterior under the prior N(0, I): precisions add (eq. 8), so that deviations fall as points are added.

    Args:
        latents: dimensions of z.
        inputs, hidden: see PooledCode.
        depth: layers of the network of a point.
    """

    def __init__(self, latents: int, inputs: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.point = layers(inputs, *[hidden] * depth, 2 * latents)

    def forward(self, x: Tensor, y: Tensor) -> Normal:
        made = self.point(torch.cat([x, y], -1))
        observed, raw = made.to(torch.promote_types(made.dtype, torch.float32)).chunk(2, -1)
        precision = F.softplus(raw)
        total = 1 + precision.sum(-2)
        return Normal((precision * observed).sum(-2) / total, total.rsqrt(), validate_args=False)


class Decoder(nn.Module):
    """(code, x) to the outputs of a function at x.

    Args:
        codes: numbers of a code.
        inputs: numbers of x.
        outputs: of the network.
        hidden: units of each hidden layer.
        depth: linear layers.
    """

    def __init__(self, codes: int, inputs: int, outputs: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.codes = codes
        self.first = nn.Linear(codes + inputs, hidden)
        self.rest = nn.Sequential(nn.ReLU(), layers(*[hidden] * (depth - 1), outputs))

    def forward(self, codes: Sequence[Tensor], x: Tensor) -> Tensor:
        """For codes that broadcast to (…, Q, n) each, side by side, and inputs (Q, inputs): (…, Q, outputs)."""
        # The first layer of (codes, x) as a sum: what queries or samples have in common is multiplied once.
        parts = self.first.weight.split([*(c.shape[-1] for c in codes), x.shape[-1]], 1)
        hidden = F.linear(x, parts[-1], self.first.bias)
        for code, weight in zip(codes, parts, strict=False):
            hidden = hidden + F.linear(code, weight)
        return self.rest(hidden)
