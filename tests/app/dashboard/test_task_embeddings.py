"""Figures of task embeddings are of the learner's own embeddings of the split's tasks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from app.dashboard.panels import PANELS
from app.dashboard.task_embeddings import task_embeddings
from app.dashboard.view import View
from app.plots import task_embeddings as plots
from app.runs.probe import Probe
from app.runs.task_space import TaskSpace
from datamodules import FourFamily, Sinusoid
from datamodules.core.episodes import Support
from models import MLP, Conv4, MetaLearner, ProtoNet
from models.core.task_kinds import KINDS
from tests.support.toy import ToyImages


class Means(ProtoNet):
    """Embeds a task by the mean of its examples' inputs and targets, moved by ``shift``."""

    tasks = frozenset({"classification", "regression"})
    size = 2

    @property
    def embedding_size(self) -> int:
        return self.size

    def embed_task(self, support: Support) -> torch.Tensor:
        return torch.stack([support.x.mean(), support.x.square().mean() + support.y.double().mean()])


def probe(data, learner: MetaLearner | None = None) -> Probe:
    return Probe((learner or Means(Conv4(hidden=2, image_size=16))).eval(), data, "test")


def view(of: Probe, final: bool = True, **table) -> View:
    return View(of, table, "meta-test", final, Path(), lambda _, make: make())


def test_space_is_of_the_tasks_that_were_asked_for():
    """Catches tasks mixed up by batches, and second support sets that are the first, or of other classes."""
    data = ToyImages(ways=3, shots=2, queries=4, eval_batch_size=5)
    asked = [7, 3, 12, 4, 5, 9, 0]
    space = TaskSpace.of(probe(data), asked, twice=True)
    assert space.stored.index.tolist() == asked
    batch = data.on_device(data.distribution("test").sample(asked))
    own = Means(Conv4(hidden=2, image_size=16))
    for i, task in enumerate(batch[k] for k in range(len(asked))):
        torch.testing.assert_close(space.embeddings[i], own.embed_task(task.support).double())
        of_class = [task.query_x[task.query_y == k][:2] for k in range(3)]
        other = Support(torch.cat(of_class), torch.tensor([0, 0, 1, 1, 2, 2]), 3)
        torch.testing.assert_close(space.again[i], own.embed_task(other).double())
    few = ToyImages(ways=3, shots=2, queries=1)
    assert TaskSpace.of(probe(few), [0, 1], twice=True).again is None


def test_signal_is_the_ratio_of_variances():
    """Catches a variance between tasks that has the support sets' in it, or a sum of squares for a variance: 20,000
    tasks whose means differ with variance 3 and support sets with 2 in each of two dimensions."""
    g = torch.Generator().manual_seed(0)
    means = 3**0.5 * torch.randn(20_000, 2, generator=g, dtype=torch.float64)
    first, again = (means + 2**0.5 * torch.randn(20_000, 2, generator=g, dtype=torch.float64) for _ in "ab")
    stored = FourFamily().distribution("test").sample([0])
    assert TaskSpace(stored, first, again).signal == pytest.approx(1.5, rel=0.05)
    assert TaskSpace(stored, first, first[torch.randperm(20_000, generator=g)]).signal == pytest.approx(0, abs=0.05)
    assert TaskSpace(stored, first).signal is None


@pytest.mark.parametrize(("data", "fact"), [(Sinusoid, "amplitude"), (FourFamily, None)])
def test_functions_are_coloured_by_family_or_amplitude(data, fact, monkeypatch):
    """Catches a colour by the phase, families that are numbers, and functions without figures."""
    seen = {}
    monkeypatch.setattr(
        plots,
        "planes",
        lambda points, apart, groups, values, label, signal, title: seen.update(
            groups=groups, values=values, label=label, signal=signal
        ),
    )
    of = probe(data(), Means(MLP(in_features=1)))
    figures = dict(task_embeddings(view(of, final=False)))
    assert list(figures) == ["task_embeddings", "nearest_tasks"]
    figures["task_embeddings"]()
    task = of.tasks.sample(range(200)).task
    if fact:
        assert seen["label"] == fact and torch.equal(seen["values"], task[fact])
    else:
        assert seen["groups"] == (task["family"].tolist(), of.tasks.task_groups[1])
    assert seen["signal"] is not None
    drawn = figures["nearest_tasks"]().axes
    assert len(drawn) == (4 if fact is None else 6) * 6
    assert len({axes.get_ylim() for axes in drawn}) == 1  # or all amplitudes look alike


def test_the_nearest_tasks_are_sorted_and_leave_the_task_itself_out(monkeypatch):
    """Catches a task that is its own nearest neighbour."""
    seen = {}
    monkeypatch.setattr(plots, "nearest", lambda rows, draw, apart, groups, title: seen.update(rows=rows, apart=apart))
    dict(task_embeddings(view(probe(ToyImages(ways=3, queries=2, test_tasks=40)))))["nearest_tasks"]()
    for task, *others in seen["rows"]:
        far = seen["apart"][task]
        assert task not in others
        assert far[others].tolist() == sorted(far[others].tolist())
        assert far[others[-1]] <= np.sort(far)[len(others)]


def test_distances_are_to_the_mean_of_validation_tasks(monkeypatch):
    """Catches distances to the mean of the test tasks themselves, and metrics of tasks in another order."""
    data, seen = ToyImages(ways=3, queries=2, test_tasks=12, val_tasks=9), {}
    monkeypatch.setattr(plots, "distance", lambda far, values, *rest: seen.update(far=far, values=values))
    index = torch.arange(12).flip(0)  # as processes may leave them
    of = probe(data)
    figures = dict(task_embeddings(view(of, index=index, accuracy=index / 12)))
    figures["task_distance"]()
    val = TaskSpace.of(Probe(of.learner, data, "val"), range(9)).embeddings.mean(0)
    test = TaskSpace.of(of, range(12)).embeddings
    torch.testing.assert_close(seen["far"], (test - val).norm(dim=1))
    np.testing.assert_allclose(seen["values"], np.arange(12) / 12, rtol=1e-6)


def test_learners_without_embeddings_have_no_figure():
    """Catches a figure that asks a learner for what it does not have."""
    plain = ProtoNet(Conv4(hidden=2, image_size=16))
    assert not list(task_embeddings(view(probe(ToyImages(ways=3, queries=2), plain))))


def test_kinds_of_task_show_them():
    """Catches panels that no kind of task shows; that they are drawn in a run is for the contract."""
    assert PANELS["task_embeddings"] is task_embeddings
    assert all("task_embeddings" in KINDS[kind].panels for kind in ("classification", "regression"))
