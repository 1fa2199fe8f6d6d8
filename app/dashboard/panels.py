"""The panels of a dashboard by name; each kind of task says which of them it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from app.dashboard import confusion, few_shot, open_set, reinforcement, sequences, streams, task_embeddings
from app.dashboard.view import Figures, View
from app.plots import adaptation, results
from app.plots import confusion as confusion_plots


def histogram(view: View) -> Figures:
    """Test tasks by their headline metric."""
    values, metric = view.values, view.probe.metric
    if values is not None and view.final:
        name = metric.label or view.probe.metric_name
        yield "histogram", partial(results.histogram, values, metric, name)
        view.panels.append(("Meta-test tasks", lambda axes: results.draw_histogram(axes, values, metric, name)))


def clusters(view: View) -> Figures:
    """Which clusters of tasks a learner puts the known groups of tasks into."""
    groups = view.probe.tasks.task_groups
    if "families" in view.table and groups is not None:
        counts, names = view.table["families"].double().sum(0), groups[1]
        yield "clusters", partial(confusion_plots.clusters, counts, names)
        view.panels.append(("Clusters of tasks", lambda axes: confusion_plots.draw_clusters(axes, counts, names)))


def training(view: View) -> Figures:
    """Meta-validation along meta-training."""
    path, metric, name = view.run_dir / "metrics.csv", view.probe.metric, view.probe.metric_name
    if not view.final or not path.is_file():
        return
    points = view.guard("training", lambda: adaptation.read_curve(path, name))
    if points is not None and len(points) > 1:
        label = metric.label or name
        yield "training", partial(adaptation.training, points, metric, label)
        view.panels.append(("Meta-training", lambda axes: adaptation.draw_training(axes, points, metric, label)))


PANELS: Mapping[str, Callable[[View], Figures]] = {
    "histogram": histogram,
    "reliability": few_shot.reliability,
    "coverage": few_shot.coverage,
    "clusters": clusters,
    "task_embeddings": task_embeddings.task_embeddings,
    "trials": reinforcement.trials,
    "streams": streams.streams,
    "proficiency": sequences.proficiency,
    "adaptation": few_shot.adaptation_curve,
    "training": training,
    "open_set": open_set.open_set,
    "episodes": few_shot.episodes,
    "generated": few_shot.generated,
    "embedding": few_shot.embedding,
    "confusion": confusion.confusion,
    "fits": few_shot.fits,
}
