"""What differs by kind of task, in one object for each: its headline metric, its metrics, its panels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from datamodules.core.metric import Metric


@dataclass(frozen=True)
class TaskKind:
    """A kind of task.

    Attributes:
        headline: the metric that progress shows, results lead with and, unless told otherwise, the best checkpoint has.
        metrics: what is measured of every task of this kind, by name.
        panels: what a dashboard shows of it, in order, by the names that ``app.dashboard.panels`` has.
    """

    headline: str
    metrics: Mapping[str, Metric]
    panels: tuple[str, ...]


TOLD = (1, 2, 3, 5, 10)  # instances of a returning class that have a metric of their own

KINDS: Mapping[str, TaskKind] = {
    "classification": TaskKind(
        "accuracy",
        {
            "accuracy": Metric("higher", "query accuracy", share=True),
            "nll": Metric("lower", "query NLL (nats)"),
            "bins": Metric("lower", "expected calibration error", pooled="ece"),
            "known_entropy": Metric(label="entropy, classes of the task (nats)"),
            "unknown_entropy": Metric(label="entropy, other classes (nats)"),
            "open_set_auroc": Metric("higher", "AUROC of other classes"),
        },
        (
            *("histogram", "reliability", "clusters", "proficiency", "adaptation", "training", "open_set"),
            *("episodes", "generated", "embedding", "task_embeddings", "confusion"),
        ),
    ),
    "regression": TaskKind(
        "mse",
        {
            "mse": Metric("lower", "query MSE"),
            "nll": Metric("lower", "query NLL (nats)"),
            "coverage": Metric(label="coverage of the 95 % interval", share=True),
            "levels": Metric("lower", "error of the coverage", pooled="coverage_error"),
            "width": Metric(label="width of the 95 % interval"),
        },
        ("histogram", "coverage", "clusters", "adaptation", "training", "task_embeddings", "fits"),
    ),
    "reinforcement": TaskKind(
        "return",
        {
            "return": Metric("higher", "return over the trial"),
            "first_episode": Metric("higher", "return of the first episode"),
            "last_episode": Metric("higher", "return of the last episode"),
            "returns": Metric("higher", curve=True),
            "regret": Metric("lower", "regret over the trial"),
            "of_optimum": Metric("higher", "return as a share of the best policy's", pooled="normalised_return"),
        },
        ("histogram", "trials", "training"),
    ),
    "stream": TaskKind(
        "accuracy",
        {
            "accuracy": Metric("higher", "accuracy over all experiences at the end", share=True),
            "learned": Metric("higher", "accuracy on the examples that were learned", share=True),
            "learning_accuracy": Metric("higher", "accuracy on an experience just after it", share=True),
            "backward_transfer": Metric("higher", "backward transfer", share=True),
            "forgetting": Metric("lower", "forgetting", share=True),
            "forward_transfer": Metric("higher", "forward transfer", share=True),
            "online": Metric("higher", "accuracy on an experience before it is learned", share=True),
            **{f"instance_{k}": Metric("higher", f"accuracy at instance {k} of a class", share=True) for k in TOLD},
            "instances": Metric("higher", curve=True),
            "accuracies": Metric("higher", curve=True),
            "learned_accuracies": Metric("higher", curve=True),
        },
        ("histogram", "streams", "training"),
    ),
}
"""By the name that a data module's ``kind`` and a learner's ``tasks`` have."""
