"""What the pictures of few-shot tasks are made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map

from app.dashboard.view import Figures, View
from app.plots import adaptation, calibration, embeddings
from app.plots import episodes as plots
from app.runs.probe import Probe
from models.core.metrics import INTERVAL
from models.core.predictions import Mixture


def reliability(view: View) -> Figures:
    """How far confidence is accuracy."""
    if "bins" in view.table:
        bins = view.table["bins"].double().sum(0)
        yield "reliability", partial(calibration.reliability, bins)
        view.panels.append(("Calibration", lambda axes: calibration.draw_reliability(axes, bins)))


def coverage(view: View) -> Figures:
    """How far intervals hold what they say."""
    if "levels" in view.table:
        levels = view.table["levels"].double().sum(0)
        yield "reliability", partial(calibration.coverage, levels)
        view.panels.append(("Calibration", lambda axes: calibration.draw_coverage(axes, levels)))


def adaptation_curve(view: View) -> Figures:
    """The headline metric along the inner loop."""
    probe = view.probe
    curve = view.guard("adaptation", lambda: probe.adaptation(min(view.curve_tasks, probe.available)))
    if curve is not None:
        parts = (curve, probe.metric, probe.metric.label or probe.metric_name)
        yield "adaptation", partial(adaptation.adaptation, *parts, f"Adaptation, {view.at}")
        view.panels.append(("Adaptation", lambda axes: adaptation.draw_adaptation(axes, *parts)))


def episodes(view: View) -> Figures:
    """A task with its predictions, and after the test the worst one."""
    probe, values = view.probe, view.values
    if not probe.pictures:
        return
    yield "episode", lambda: plots.episode(*_episode(probe, 0), title=f"Task 0, {view.at}")
    if view.final and values is not None:
        worst = int(view.table["index"][values.argmin()])
        yield "worst_episode", lambda: plots.episode(*_episode(probe, worst), title=f"Task {worst}, the worst")


def episode_panel(view: View) -> Callable[[Any], None] | None:
    """What draws task 0 below all panels; None where tasks are not pictures."""
    if "episodes" not in view.probe.kind.panels or not view.probe.pictures:
        return None
    return lambda axes: plots.draw_episode(axes, *_episode(view.probe, 0), most_rows=5)


def generated(view: View) -> Figures:
    """Images that the learner makes for tasks."""
    if view.probe.pictures:
        yield "generated", lambda: _generated(view, 6)


def embedding(view: View) -> Figures:
    """A task's embeddings on the plane."""
    yield "embedding", lambda: _embedding(view)


def fits(view: View) -> Figures:
    """Functions of one variable along the inner loop."""
    if not view.probe.function:
        return
    parts = view.guard("fits", lambda: fitted(view.probe, 4))
    if parts is not None:
        distributions = len(parts) > 5
        several = adaptation.predictive_fits if distributions else adaptation.fits
        yield "fits", partial(several, *parts, title=f"Regression tasks, {view.at}")
        title = "Task 0: true function dashed, inner steps from light to dark"
        title += ", 95 % predictive interval" if distributions else ""
        view.panels.append((title, lambda axes: adaptation.draw_fit(axes, *_first(parts))))


def _episode(probe: Probe, index: int) -> Any:
    stored, ready = probe.sample([index])
    probabilities = probe.predict(ready)[0].softmax(-1)
    parts = (stored.support_x[0], stored.support_y[0], stored.query_x[0], stored.query_y[0])
    return *parts, probabilities, probe.names(stored, 0)


def _generated(view: View, tasks: int) -> Any:
    probe = view.probe
    stored, ready = probe.sample(range(tasks))
    made = [probe.learner.generated_images(ready[i].support, stored.support_x.shape[1]) for i in range(tasks)]
    images = [(255 * x.float().cpu()).byte() for x in made if x is not None]
    if not images:
        return None
    return plots.generated(list(zip(stored.support_x, images, strict=True)), f"Images generated for tasks, {view.at}")


def _embedding(view: View) -> Any:
    probe = view.probe
    stored, ready = probe.sample([0])
    query, support = (probe.learner.embeddings(x[0]) for x in (ready.query_x, ready.support_x))
    if query is None or support is None:
        return None
    parts = (query.float().cpu(), stored.query_y[0], support.float().cpu(), stored.support_y[0])
    return embeddings.embedding(*parts, probe.names(stored, 0), title=f"Embedding of task 0, {view.at}")


def fitted(probe: Probe, tasks: int) -> Any:
    """Arguments of ``adaptation.fits``, or of ``adaptation.predictive_fits`` where predictions are distributions."""
    groups = [probe.sample(indices) for indices in probe.tasks.alike(range(tasks))]
    x = torch.cat([stored.query_x.flatten() for stored, _ in groups])
    low, high = probe.tasks.x_range or (float(x.min()), float(x.max()))
    grid = torch.linspace(low, high, 200)[:, None]
    truths = [probe.tasks.function(stored.task, grid) for stored, _ in groups]
    truth = None if truths[0] is None else torch.cat(truths)[..., 0]
    of_groups = [probe.along(ready, grid.to(probe.learner.device)) for _, ready in groups]
    predictions, bands = tree_map(lambda *parts: torch.cat(parts), *of_groups), ()
    if isinstance(predictions, Mixture):
        bands = (torch.stack([end[..., 0] for end in predictions.central(INTERVAL)], -2),)
        predictions = predictions.mean.mean(-3)
    support = ([one[:, 0] for stored, _ in groups for one in getattr(stored, n)] for n in ("support_x", "support_y"))
    return grid[:, 0], truth, *support, predictions[..., 0], *bands


def _first(fits: Any) -> Any:
    """The first task's, with the predictive interval of its last state where there are intervals."""
    grid, *parts = fits
    of_first = [None if part is None else part[0] for part in parts]
    return grid, *of_first[:4], *(bands[0, -1] for bands in parts[4:])
