"""Embeddings of a split's images, each computed once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class EmbedOnce:
    """Embeds every image of a split once, however many tasks show it.

    For evaluation only, where an embedding depends on nothing but its image and the weights stay as they are.

    Args:
        embed: images (N, *input) to embeddings (N, features).
        at_once: images embedded together.
    """

    def __init__(self, embed: Callable[[Tensor], Tensor], at_once: int = 1024) -> None:
        self.embed, self.at_once = embed, at_once
        self.slot = torch.empty(0, dtype=torch.long)  # of each row of the split in values, -1 where not embedded yet
        self.values: Tensor | None = None

    def __call__(self, x: Tensor, rows: Tensor) -> Tensor:
        """Embeddings (T, n, features) of images (T, n, *input), the rows (T, n) of the split."""
        flat, images = rows.flatten(), x.flatten(0, 1)
        top = int(flat.max()) + 1
        self.slot = self.slot.to(flat.device)
        if top > len(self.slot):
            self.slot = torch.cat([self.slot, self.slot.new_full((top - len(self.slot),), -1)])
        place = torch.full_like(self.slot, -1)
        place[flat] = torch.arange(len(flat), device=flat.device)
        new = torch.nonzero((place >= 0) & (self.slot < 0)).flatten()
        if len(new):
            embedded = torch.cat([self.embed(part) for part in images[place[new]].split(self.at_once)])
            start = 0 if self.values is None else len(self.values)
            self.slot[new] = torch.arange(start, start + len(new), device=flat.device)
            self.values = embedded if self.values is None else torch.cat([self.values, embedded])
        assert self.values is not None
        return self.values[self.slot[flat]].unflatten(0, rows.shape)
