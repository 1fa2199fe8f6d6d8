"""Metrics per task first, then aggregated: mean, 95 % interval over tasks, worst decile, calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torchmetrics
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from datamodules.core.metric import Metric
from models.core.predictions import Mixture, Prediction

ECE_BINS = 15
LEVELS = 20  # of predictive intervals: 5 %, 10 %, … 100 %
INTERVAL = 0.95  # the probability of the predictive interval whose coverage and width are told


def as_results(declared: Mapping[str, Metric]) -> dict[str, Metric]:
    """What is declared, by the names that results have: counts by that of what is pooled from them, without curves."""
    return {metric.pooled or name: metric for name, metric in declared.items() if not metric.curve}


def classification_metrics(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """What is kept of one task.

    Args:
        logits: (…, Q, ways), of log-probabilities up to a constant.
        target: (…, Q) int64.

    Returns:
        accuracy, in [0, 1], nll, nats, both (…,), and ``bins`` (…, 3, 15): for each of 15 equal bins of confidence the
        number of queries, the correct ones and the sum of their confidences (Guo et al., ICML 2017).
    """
    log_p = logits.float().log_softmax(-1)
    confidence, label = log_p.exp().max(-1)
    correct = (label == target).float().where(~confidence.isnan(), torch.nan)  # no label is predicted
    nll = -log_p.gather(-1, target[..., None]).squeeze(-1).mean(-1)
    # Bins are open on the left, as torchmetrics and Guo et al. have them.
    bin_of = (confidence * ECE_BINS).ceil().long().clamp(1, ECE_BINS) - 1
    member = torch.nn.functional.one_hot(bin_of, ECE_BINS).float()
    bins = torch.stack([torch.ones_like(correct), correct, confidence], -2) @ member
    return {"accuracy": correct.mean(-1), "nll": nll, "bins": bins}


def regression_metrics(prediction: Prediction, target: Tensor, width: bool = True) -> dict[str, Tensor]:
    """What is kept of one task; of a distribution more than of a value.

    Args:
        prediction: values (…, Q, out), or their distribution.
        target: (…, Q, out).
        width: measure the predictive interval's width, which takes longer than all the rest.

    Returns:
        mse, of the value or of the distribution's mean, (…,). Of a distribution also, over queries and outputs: nll,
        the mean negative log-density, nats; coverage, the share of targets in the central 95 % interval; its mean
        width, all (…,); and ``levels`` (…, 20): how many targets are in the central 5 % interval, how many more in the
        10 % interval, and so on.
    """
    if not isinstance(prediction, Mixture):
        return {"mse": _squared_error(prediction, target)}
    # Densities and tails need the precision that a prediction under autocast does not have.
    prediction = Mixture(*(t.to(torch.promote_types(t.dtype, torch.float32)) for t in prediction))
    # The central interval of probability p holds what the distribution function puts within p / 2 of one half.
    central = (2 * prediction.cdf(target) - 1).abs().nan_to_num(1.0)  # a learner that diverged covers nothing
    level_of = (central * LEVELS).ceil().long().clamp(1, LEVELS) - 1
    metrics = {
        "mse": _squared_error(prediction.mean.mean(-3), target),
        "nll": -prediction.log_prob(target).flatten(-2).mean(-1),
        "coverage": (central <= INTERVAL).float().flatten(-2).mean(-1),
        "levels": torch.nn.functional.one_hot(level_of.flatten(-2), LEVELS).float().sum(-2),
    }
    if width:
        low, high = prediction.central(INTERVAL)
        metrics["width"] = (high - low).flatten(-2).mean(-1)
    return metrics


DENSITIES: Mapping[str, Metric] = {
    "marginal": Metric("higher", "log-density of a query (nats)"),
    "joint": Metric("higher", "joint log-density of the queries, of each (nats)"),
}
"""What ``density_metrics`` measures: two that do not compare, since neighbouring queries tell of each other."""


def density_metrics(prediction: Mixture, target: Tensor) -> dict[str, Tensor]:
    """How likely a task's targets were, where the parts of a mixture are functions, which all queries share.

    Args:
        prediction: values' distribution.
        target: (…, Q, out).

    Returns:
        marginal, the mean over queries of the log-density of each by itself; joint, the log-density of all queries
        together over their number; nats, both (…,). Of one part they are the same.
    """
    of_parts = prediction.log_densities(target)
    parts, queries = of_parts.shape[-2:]
    marginal = of_parts.logsumexp(-2).mean(-1) - math.log(parts)
    joint = (of_parts.sum(-1).logsumexp(-1) - math.log(parts)) / queries
    return {"marginal": marginal, "joint": joint}


def _squared_error(value: Tensor, target: Tensor) -> Tensor:
    return (value.float() - target).square().flatten(-2).mean(-1)


def interval(values: Tensor) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval, 1.96 standard errors, of per-task values (T,)."""
    values = values.double()
    if len(values) < 2:
        return values.mean().item(), float("nan")
    return values.mean().item(), (1.96 * values.std() / len(values) ** 0.5).item()


def calibration_error(bins: Tensor) -> Tensor:
    """Expected calibration error of binned queries, (…, 3, 15) to (…,)."""
    count, correct, confidence = bins.unbind(-2)
    return (correct - confidence).abs().sum(-1) / count.sum(-1)


def coverage_error(levels: Tensor) -> Tensor:
    """Mean absolute difference between the nominal and the measured coverage of intervals, (…, 20) to (…,).

    Over the levels below 100 %, which every interval of that probability covers.
    """
    measured = levels.cumsum(-1) / levels.sum(-1, keepdim=True)
    nominal = torch.arange(1, LEVELS + 1).to(measured) / LEVELS
    return (measured - nominal)[..., :-1].abs().mean(-1)


def mutual_information(table: Tensor) -> Tensor:
    """Normalised mutual information of two labellings, of their table of counts (…, A, B), in [0, 1], (…,).

    Twice what they tell of each other over what there is to tell of both; 0 where both have one label.
    """
    p = table / table.sum((-1, -2), keepdim=True)
    rows, columns, both = (torch.special.entr(q).sum((-1, -2)) for q in (p.sum(-1, True), p.sum(-2, True), p))
    return 2 * (rows + columns - both) / (rows + columns).clamp(min=torch.finfo(p.dtype).tiny)


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "ece": calibration_error,
    "coverage_error": coverage_error,
    "nmi": mutual_information,
    "normalised_return": lambda sums: sums[..., 0] / sums[..., 1],
}
"""By the name of a metric that is pooled over tasks, what makes it of the sum of their counts."""
FINGERPRINT = "fingerprint"
"""Among the facts of a task, the number to know it again by."""
EMBEDDING = "embedding"
"""Among what is kept of a task, the learner's vector of it."""


def aggregate(values: Mapping[str, Tensor], declared: Mapping[str, Metric]) -> dict[str, float]:
    """Metrics over tasks, from what is kept of each task (T, …).

    For each name its mean, ``…_ci95`` and ``…_worst_decile``; what is pooled, as ``ece``, with its interval.

    Raises:
        ValueError: a name that is not declared.
    """
    result: dict[str, float] = {}
    for name, of_tasks in values.items():
        metric, of_tasks = declaration(name, declared), of_tasks.double()
        if metric.curve:
            continue
        if metric.pooled is not None:
            pool = POOLS[metric.pooled]
            result[metric.pooled] = pool(of_tasks.sum(0)).item()
            result[f"{metric.pooled}_ci95"] = (1.96 * resampled(of_tasks, pool).std()).item()
            continue
        result[name], result[f"{name}_ci95"] = interval(of_tasks)
        if metric.better != "neither":
            worst = of_tasks.sort(descending=metric.better == "lower").values
            result[f"{name}_worst_decile"] = worst[: max(1, len(worst) // 10)].mean().item()
    return result


def declaration(name: str, declared: Mapping[str, Metric]) -> Metric:
    """What is declared under a name.

    Raises:
        ValueError: nothing.
    """
    if name not in declared:
        raise ValueError(
            f"metric {name!r} is not declared: add it to own_metrics of the learner or data that measures it"
        )
    return declared[name]


class TaskMetrics(torchmetrics.Metric):
    """Collects the metrics of every task; ``compute`` aggregates them over unique tasks of all processes.

    Args:
        declared: by name, what may be measured.

    Attributes:
        all_tasks: the table over all processes, once ``compute`` has run.
        subset: metrics of some tasks alone, (N,), which the first process measured and has.
    """

    index: list[Tensor]
    full_state_update = False

    def __init__(self, declared: Mapping[str, Metric]) -> None:
        super().__init__()
        self.declared = dict(declared)
        self.names: list[str] = []
        self.facts: list[str] = []
        self.kept: list[str] = []
        self.all_tasks: dict[str, Tensor] = {}
        self.subset: dict[str, Tensor] = {}
        self.add_state("index", default=[], dist_reduce_fx="cat")

    def update(
        self,
        index: Tensor,
        metrics: dict[str, Tensor],
        facts: dict[str, Tensor] | None = None,
        kept: dict[str, Tensor] | None = None,
    ) -> None:
        """Add tasks: their numbers (T,), their metrics, and more to be kept of them, each (T, …).

        Args:
            index, metrics: as above.
            facts: of the tasks, whoever learns them, by which they are known again.
            kept: of the learner, and no metric, as its embedding of each task.

        Raises:
            ValueError: a metric that is not declared.
        """
        for name in metrics:
            declaration(name, self.declared)
        for names, values in ((self.names, metrics), (self.facts, facts or {}), (self.kept, kept or {})):
            for name, value in values.items():
                if name not in names:
                    names.append(name)
                    self.add_state(f"task_{name}", default=[], dist_reduce_fx="cat")
                half = value.is_floating_point() and value.element_size() < 4  # NumPy knows no bfloat16
                getattr(self, f"task_{name}").append(value.detach().float() if half else value.detach())
        self.index.append(index)

    def reset(self) -> None:
        super().reset()
        self.subset = {}

    def table(self) -> dict[str, Tensor]:
        """What is kept of each task in the order of their numbers, each task once: name to (T, …), on the CPU."""
        index, first = _first_of_each(dim_zero_cat(self.index))
        names = [*self.names, *self.facts, *self.kept]
        return {"index": index.cpu()} | {n: dim_zero_cat(getattr(self, f"task_{n}"))[first].cpu() for n in names}

    def compute(self) -> dict[str, float]:
        """Metrics over tasks, as ``aggregate`` has them, and the number of ``tasks``."""
        # Here the states of all processes are together; the table of each alone is not whole.
        self.all_tasks = self.table()
        of_tasks = {name: self.all_tasks[name] for name in self.names}
        return {"tasks": float(len(self.all_tasks["index"])), **aggregate(of_tasks, self.declared)}

    def everything(self) -> dict[str, float]:
        """``compute``, and the metrics of a ``subset``, each with its number of tasks, ``…_tasks``."""
        sizes = {f"{name}_tasks": float(len(values)) for name, values in self.subset.items()}
        return self.compute() | aggregate(self.subset, self.declared) | sizes


def _first_of_each(index: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct numbers, sorted, and where each stands first."""
    order = torch.argsort(index, stable=True)
    ordered = index[order]
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return ordered[new], order[new]


def resampled(counts: Tensor, pooled: Callable[[Tensor], Tensor], resamples: int = 200) -> Tensor:
    """A pooled metric of so many resamples of the tasks, drawn with replacement; not a number of less than two tasks.

    As many tasks are always resampled alike: what two learners have on the same resample is paired.

    Args:
        counts: of each task, (T, …).
        pooled: the metric of counts summed over tasks.
        resamples: their number.
    """
    tasks = len(counts)
    if tasks < 2:
        return torch.full((resamples,), torch.nan, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    flat = counts.flatten(1)
    sums = torch.stack(
        [
            torch.bincount(torch.randint(tasks, (tasks,), generator=generator), minlength=tasks).double() @ flat
            for _ in range(resamples)
        ]
    )
    return pooled(sums.view(resamples, *counts.shape[1:]))
