"""Which learner to take for a new task after measuring a few: ways to decide, and what each costs in accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.task_embedding.collaborative_filtering import Belief, ColumnModel

NEAREST = 5  # known tasks whose learners are averaged; as many start the search of PMF-AutoML


def error_of_measuring(accuracy: Tensor, queries: int) -> Tensor:
    """The variance of a share of so many queries, of the same shape; one of each outcome is added (Laplace's rule)."""
    share = (accuracy * queries + 1) / (queries + 2)
    return share * (1 - share) / queries


def probe(
    belief: Belief,
    probes: int,
    measure: Callable[[int], tuple[float, float]],
    candidates: Sequence[int],
    typical: float,
) -> tuple[dict[int, tuple[float, float]], Belief]:
    """Measure learners one after the other, each by what is believed once those before are known.

    Args:
        belief: before any is measured.
        probes: how many are measured, where there are as many.
        measure: of a learner its accuracy and the variance of the error of that.
        candidates: learners that can be measured.
        typical: variance of the error that a measurement is expected to have.

    Returns:
        what was measured, in that order, and what is believed then.
    """
    found: dict[int, tuple[float, float]] = {}
    now = belief
    while len(found) < min(probes, len(candidates)):
        row = now.next_probe([n for n in candidates if n not in found], typical)
        found[row] = measure(row)
        values, variances = torch.tensor(list(found.values()), dtype=torch.float64).unbind(1)
        now = belief.given(list(found), values, variances)
    return found, now


def halves(accuracy: Tensor, queries: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Accuracies on a random half of the queries and on the other half, from those on all, of the same shape.

    Which queries were right is not known; but in a random half their number is hypergeometric. So a learner can be
    chosen by one half and judged by the other: were both the same, what was measured best by luck would count as best.
    """
    rng, first = np.random.default_rng(seed), queries // 2
    right = (accuracy * queries).round().nan_to_num().long().numpy()
    drawn = torch.from_numpy(rng.hypergeometric(right, queries - right, first))
    parts = drawn / first, (torch.from_numpy(right) - drawn) / (queries - first)
    return tuple(part.double().where(~accuracy.isnan(), torch.nan) for part in parts)  # pyright: ignore


@dataclass
class Trial:
    """Decisions on tasks that nothing was learned from.

    Attributes:
        accuracy: by the name of a way to decide, what the chosen learner has on the judging half of each task, (T,).
        errors: by model, entries that were neither measured nor known less what was expected of them.
        covered: by model, the share of those in the 95 % interval; nan where there are none.
        probed: by model, how often each learner was measured, (N,).
    """

    accuracy: dict[str, Tensor]
    errors: dict[str, Tensor]
    covered: dict[str, float]
    probed: dict[str, Tensor]


def nearest_tasks(known: Tensor, rows: Sequence[int], values: Tensor, count: int = NEAREST) -> Tensor:
    """Places of the known tasks, columns of (N, T), whose entries of these rows are nearest to the values, in L1."""
    away = (known[list(rows)] - values[:, None]).abs().nanmean(0).nan_to_num(torch.inf)
    return away.argsort(stable=True)[:count]


def try_out(
    known: Tensor, new: Tensor, queries: int, models: dict[str, ColumnModel], probes: int, seed: int = 0
) -> Trial:
    """Decide for each new task, by models and otherwise.

    Args:
        known: accuracies (N, T) of the tasks that are learned from.
        new: those of others, (N, S): a half of the queries is measured by probes, the other judges.
        queries: of a task.
        models: by name, fitted to ``known``.
        probes: learners that are measured for a decision.
        seed: of the halves and of random learners.
    """
    generator = torch.Generator().manual_seed(seed)
    known, new = known.double(), new.double()
    seen, judged = halves(new, queries, seed)
    measuring = error_of_measuring(known, queries).nanmean().item()
    of_half = error_of_measuring(seen, queries // 2)
    on_average = known.nanmean(1)
    first, *_ = models
    names = ["oracle", "every learner measured", *models, f"best of the probes of {first}"]
    names += [f"best of {probes} random learners", f"{NEAREST} nearest tasks", "best on average", "random learner"]
    accuracy: dict[str, list[Tensor]] = {name: [] for name in names}
    errors: dict[str, list[Tensor]] = {name: [] for name in models}
    inside: dict[str, list[Tensor]] = {name: [] for name in models}
    probed = {name: torch.zeros(len(known)) for name in models}
    priors = {name: model.belief(measuring) for name, model in models.items()}
    for task in range(new.shape[1]):
        half, judge, there = seen[:, task], judged[:, task], (~new[:, task].isnan()).nonzero()[:, 0]

        def take(name: str, scores: Tensor, judge: Tensor = judge, there: Tensor = there) -> None:
            accuracy[name].append(judge[there[scores[there].nan_to_num(-torch.inf).argmax()]])

        def measure(row: int, half: Tensor = half, task: int = task) -> tuple[float, float]:
            return half[row].item(), of_half[row, task].item()

        take("oracle", judge)
        take("every learner measured", half)
        for name, prior in priors.items():
            found, belief = probe(prior, probes, measure, there.tolist(), measuring * 2)
            take(name, belief.mean)
            probed[name][list(found)] += 1
            rest = torch.tensor([n for n in there.tolist() if n not in found], dtype=torch.long)
            error = new[rest, task] - belief.mean[rest]
            errors[name].append(error)
            inside[name].append(error.abs() <= 1.96 * belief.deviation(measuring)[rest])
            if name == first:
                rows, values = list(found), half[list(found)]
                own = torch.full_like(half, -torch.inf)
                own[rows] = values
                take(names[len(models) + 2], own)
                take(f"{NEAREST} nearest tasks", known[:, nearest_tasks(known, rows, values)].nanmean(1))
        some = there[torch.randperm(len(there), generator=generator)[:probes]]
        own = torch.full_like(half, -torch.inf)
        own[some] = half[some]
        take(f"best of {probes} random learners", own)
        take("best on average", on_average)
        accuracy["random learner"].append(judge[there].mean())
    return Trial(
        {name: torch.stack(values) for name, values in accuracy.items()},
        {name: torch.cat(of) for name, of in errors.items()},
        {name: torch.cat(of).double().mean().item() for name, of in inside.items()},
        probed,
    )
