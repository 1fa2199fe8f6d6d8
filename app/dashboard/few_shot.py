"""What the pictures of few-shot tasks are made of."""

from __future__ import annotations

from typing import Any

import torch

from app.dashboard.probe import Probe
from models.core.metrics import INTERVAL
from models.core.predictions import Mixture


def episode(probe: Probe, index: int) -> Any:
    stored, ready = probe.sample([index])
    probabilities = probe.predict(ready)[0].softmax(-1)
    parts = (stored.support_x[0], stored.support_y[0], stored.query_x[0], stored.query_y[0])
    return *parts, probabilities, probe.names(stored, 0)


def generated(probe: Probe, tasks: int) -> Any:
    stored, ready = probe.sample(range(tasks))
    adversary: Any = probe.learner.adversary
    fakes = [adversary(ready[i].support, stored.support_x.shape[1])[0] for i in range(tasks)]
    made = [(255 * x.float().cpu()).byte() for x in fakes]  # as bright as they are
    return list(zip(stored.support_x, made, strict=True))


def embeddings(probe: Probe) -> Any:
    stored, ready = probe.sample([0])
    embed: Any = probe.learner.embed
    query, support = (embed(x[0]).float().cpu() for x in (ready.query_x, ready.support_x))
    return query, stored.query_y[0], support, stored.support_y[0], probe.names(stored, 0)


def fits(probe: Probe, tasks: int) -> Any:
    """Arguments of ``adaptation.fits``, or of ``adaptation.predictive_fits`` where predictions are distributions."""
    stored, ready = probe.sample(range(tasks))
    low, high = getattr(probe.data, "x_range", (float(stored.query_x.min()), float(stored.query_x.max())))
    grid = torch.linspace(low, high, 200)[:, None]
    truth = probe.tasks.function(stored.task, grid)[..., 0] if hasattr(probe.tasks, "function") else None
    predictions, bands = probe.along(ready, grid.to(probe.learner.device)), ()
    if isinstance(predictions, Mixture):
        bands = (torch.stack([end[..., 0] for end in predictions.central(INTERVAL)], -2),)
        predictions = predictions.mean.mean(-3)
    return grid[:, 0], truth, stored.support_x[..., 0], stored.support_y[..., 0], predictions[..., 0], *bands


def first(fits: Any) -> Any:
    """The first task's, with the predictive interval of its last state where there are intervals."""
    grid, *parts = fits
    of_first = [None if part is None else part[0] for part in parts]
    return grid, *of_first[:4], *(bands[0, -1] for bands in parts[4:])
