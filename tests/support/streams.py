"""Small streams of random images, in float64."""

from __future__ import annotations

import torch

from datamodules.continual.streams import Streams


def image_streams(
    streams: int = 2,
    experiences: int = 3,
    shots: int = 2,
    queries: int = 2,
    classes: int = 5,
    remember: int = 0,
    size: int = 8,
    seed: int = 0,
) -> Streams:
    """Streams of classes drawn without replacement, labelled by their own numbers; each image is shown once."""
    g = torch.Generator().manual_seed(seed)
    y = torch.stack([torch.randperm(classes, generator=g)[:experiences] for _ in range(streams)])[..., None]
    of_each = experiences * (shots + queries) + remember
    rows = torch.arange(streams * of_each).view(streams, of_each)
    own = rows[:, : experiences * (shots + queries)].unflatten(1, (experiences, shots + queries))
    return Streams(
        inputs=torch.rand(streams * of_each, 1, size, size, generator=g, dtype=torch.float64),
        rows=own[..., :shots],
        y=y.expand(-1, -1, shots),
        query_rows=own[..., shots:],
        query_y=y.expand(-1, -1, queries),
        index=torch.arange(streams),
        key=torch.randint(2**62, (streams,), generator=g),
        digest=torch.arange(streams),
        classes=classes,
        points=(1, experiences),
        meta_batch=streams,
        remembered_rows=rows[:, experiences * (shots + queries) :] if remember else None,
        remembered_y=torch.randint(classes, (streams, remember), generator=g) if remember else None,
    )
