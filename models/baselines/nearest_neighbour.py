"""The nearest picture: what needs no features at all."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from datamodules.core.episodes import Support
from models.core.learner import MetaLearner, Paper


class Pictures(NamedTuple):
    """What a set of pictures is compared by.

    Attributes:
        values: (N, pixels); or (N, P, 2), the places of the ink as seen from its centre, pixels.
        ink: (N, P), which of the places are a picture's own; all for pixels.
    """

    values: Tensor
    ink: Tensor


class NearestNeighbour(MetaLearner):
    """Classifies a query by the support picture nearest to it, picture by picture and not by features.

    All that is learned is how much a distance counts: the scale of softmax(-scale · distance to a class's nearest),
    by the likelihood of the queries of meta-training tasks. Which class is the likeliest does not depend on it.

    Args:
        distance: "pixel", squared Euclidean; "hausdorff", the modified Hausdorff distance of the places of ink, pixels:
            the mean distance to the other's nearest ink, from the one or from the other, whichever is larger (eq. 6
            with 8), after both are centred on their ink (Lake, Salakhutdinov and Tenenbaum, Science 2015).
        threshold: what is ink, for "hausdorff"; inputs are in [0, 1] and 1 is ink.
        scale: to start from.
        **others: see MetaLearner.
    """

    paper = Paper(
        "Dubuisson and Jain",
        "A Modified Hausdorff Distance for Object Matching",
        "ICPR",
        1994,
        "https://doi.org/10.1109/ICPR.1994.576361",
    )
    tasks = frozenset({"classification"})

    def __init__(
        self,
        distance: Literal["pixel", "hausdorff"] = "pixel",
        threshold: float = 0.5,
        scale: float = 0.1,
        **others: Any,
    ) -> None:
        # How much ink a picture has decides the shapes: one task at a time.
        super().__init__(chunk=1, **others)
        if not scale > 0:
            raise ValueError(f"scale is {scale} but must be above 0")
        self.distance = distance
        self.threshold = threshold
        self.log_scale = nn.Parameter(torch.tensor(float(scale)).log())

    def pictures(self, x: Tensor) -> Pictures:
        """Of images (N, C, H, W)."""
        if self.distance == "pixel":
            return Pictures(x.flatten(1), torch.ones_like(x.flatten(1), dtype=torch.bool))
        ink = (x.mean(1) > self.threshold).flatten(1)
        first = ink.byte().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(ink.sum(1).max()))]
        own = ink.gather(1, first)
        places = torch.stack([first // x.shape[-1], first % x.shape[-1]], -1).to(x.dtype)
        centre = (places * own[..., None]).sum(1) / own.sum(1).clamp(min=1)[:, None]
        return Pictures(places - centre[:, None], own)

    def distances(self, queries: Pictures, support: Pictures) -> Tensor:
        """Of every query to every support picture, (Q, S)."""
        if self.distance == "pixel":
            q, s = queries.values, support.values
            return q.square().sum(1)[:, None] + s.square().sum(1) - 2 * q @ s.T
        return torch.stack([self.hausdorff(Pictures(*one), support) for one in zip(*queries, strict=True)])

    def hausdorff(self, query: Pictures, support: Pictures) -> Tensor:
        """Of one query, places (P, 2), to every support picture, (S,)."""
        apart = torch.cdist(query.values, support.values, compute_mode="donot_use_mm_for_euclid_dist")
        from_query = apart.masked_fill(~support.ink[:, None], torch.inf).amin(2)  # (S, P)
        from_support = apart.masked_fill(~query.ink[:, None], torch.inf).amin(1)
        sides = ((from_query, query.ink), (from_support, support.ink))
        means = [d.masked_fill(~ink, 0).sum(1) / ink.sum(-1) for d, ink in sides]
        # A picture without ink is no nearer to one than to another.
        return torch.maximum(*means).nan_to_num(1e3, 1e3, 1e3)

    def adapt(self, support: Support) -> tuple[Pictures, Support]:
        return self.pictures(support.x), support

    def predict(self, state: tuple[Pictures, Support], query_x: Tensor) -> Tensor:
        pictures, support = state
        distances = self.distances(self.pictures(query_x), pictures)
        of_class = [distances[:, support.y == k].amin(1) for k in range(support.ways)]
        return -self.log_scale.exp() * torch.stack(of_class, 1)
