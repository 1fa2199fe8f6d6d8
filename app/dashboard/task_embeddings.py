"""Where a learner's embeddings put tasks: on the plane, beside their neighbours, and far from what it was chosen by."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from app.dashboard.view import Figures, View
from app.plots import task_embeddings as plots
from app.plots.style import ACCENT, MAIN
from app.runs.probe import Probe
from app.runs.task_space import TaskSpace

ROWS, NEIGHBOURS = 6, 5  # tasks that are shown with their neighbours, and how many of these


def task_embeddings(view: View) -> Figures:
    """Of learners that have a vector of a task."""
    probe = view.probe
    if not probe.learner.embedding_size:
        return
    space = view.guard("task embeddings", lambda: TaskSpace.of(probe, range(_tasks(view)), twice=True))
    if space is None or not space.embeddings.isfinite().all() or float(space.embeddings.var(0).sum()) == 0:
        return
    apart = probe.learner.embedding_distances(space.embeddings, space.embeddings)
    colours = functools.partial(_colours, view, space)
    at = f"Embeddings of {len(space.embeddings)} tasks, {view.at}"
    yield "task_embeddings", lambda: plots.planes(space.embeddings, apart, *colours(), space.signal, title=at)
    if probe.pictures or probe.function:
        yield "nearest_tasks", lambda: _nearest(probe, space, apart, f"Tasks and those nearest to them, {view.at}")
    if view.final and view.values is not None:
        yield "task_distance", lambda: _distance(view, space)
        view.panels.append(
            ("Task embeddings", lambda axes: plots.draw_plane(axes, space.embeddings.numpy(), *colours()))
        )


def _tasks(view: View) -> int:
    return min(view.embedding_tasks, view.probe.available)


def _colours(view: View, space: TaskSpace) -> tuple[Any, Any, str]:
    """What colours tasks: their groups, or a number that is known of them, or how well they went."""
    if space.groups is not None:
        return space.groups, None, ""
    if space.fact is not None:
        return None, space.fact[1], space.fact[0]
    values = _values(view, space)
    return None, values, view.probe.metric.label or view.probe.metric_name


def _values(view: View, space: TaskSpace) -> Tensor | None:
    """The headline metric of the tasks of a space, (T,); None where it is not there of all."""
    if view.values is None:
        return None
    found = {int(i): float(v) for i, v in zip(view.table["index"], view.values, strict=True)}
    of_tasks = [found.get(int(i)) for i in space.stored.index]
    return None if None in of_tasks else torch.tensor(of_tasks)


def _nearest(probe: Probe, space: TaskSpace, apart: Tensor, title: str) -> Any:
    order = apart.clone().fill_diagonal_(torch.inf).argsort(1)
    if space.groups is None:
        first = range(min(ROWS, len(apart)))
    else:  # of as many groups
        first = list({group: i for i, group in reversed(list(enumerate(space.groups[0])))}.values())[::-1][:ROWS]
    rows = [[i, *order[i, :NEIGHBOURS].tolist()] for i in first]
    return plots.nearest(rows, functools.partial(_picture, probe, space), apart, space.groups, title)


def _picture(probe: Probe, space: TaskSpace, axes: Axes, task: int) -> None:
    """A task: images of its classes, or its function."""
    stored = space.stored
    if probe.pictures:
        firsts = {int(y): i for i, y in reversed(list(enumerate(stored.support_y[task].tolist())))}
        axes.imshow(plots.mosaic(stored.support_x[task][[firsts[y] for y in sorted(firsts)]]), interpolation="nearest")
        return
    low, high = probe.tasks.x_range or (float(stored.query_x.min()), float(stored.query_x.max()))
    grid = torch.linspace(low, high, 100)[:, None]
    truth = probe.tasks.function({name: value[task : task + 1] for name, value in stored.task.items()}, grid)
    if truth is not None:
        axes.plot(grid[:, 0], truth[0, :, 0], color=MAIN, lw=1.2)
    margin = 0.05 * float(stored.query_y.max() - stored.query_y.min())  # one scale, by which amplitudes are compared
    axes.set_ylim(float(stored.query_y.min()) - margin, float(stored.query_y.max()) + margin)
    axes.scatter(stored.support_x[task, :, 0], stored.support_y[task, :, 0], s=8, color=ACCENT, lw=0, zorder=3)


def _distance(view: View, space: TaskSpace) -> Any:
    values = _values(view, space)
    if values is None:
        return None
    learner = view.probe.learner
    known = Probe(learner, view.probe.data, "val")
    centre = TaskSpace.of(known, range(min(view.embedding_tasks, known.available))).embeddings.mean(0)
    far = learner.embedding_distances(space.embeddings, centre[None])[:, 0]
    metric, name = view.probe.metric, view.probe.metric_name
    return plots.distance(far, np.asarray(values), metric, metric.label or name, "Meta-test tasks")
