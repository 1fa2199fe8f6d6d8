"""Strategies for bandits and tabular processes, tuned, beside the metrics that RL² (Duan et al., 2016) has of them.

    python -m benchmarks.strategies --cells 10x5,10x10,100x5 --mdp 10

What a strategy has to tune is chosen by its return on meta-validation tasks, never on the meta-test tasks that the
table is of. Published results are of 1,000 tasks, which they were tuned on, and have two to four digits.

Rows "as released" have settings of the code that the published results come from: of equal arms the first is pulled,
and strategies for processes believe that rewards have mean 0, where they are drawn with mean 1, and, where they do not
sample, that an observation weighs ten thousand times as much as that belief. What is published as optimistic Thompson
sampling takes the likeliest of several samples. The other rows are strategies that know how tasks are drawn.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from benchmarks.console import wide_console
from datamodules import Bandits, TabularMDPs
from datamodules.reinforcement.environments import EnvironmentDataModule
from models import BanditStrategy, MDPStrategy, ReinforcementLearner
from models.core.metrics import interval
from models.reinforcement.trials import run_trial

# Duan et al. (2016), tables 1 and 2: total reward of a trial, by pulls and arms, and by episodes.
COLUMNS = ("random", "gittins", "thompson", "likeliest-thompson", "ucb1", "epsilon-greedy", "greedy")
BANDITS = {
    (10, 5): (5.0, 6.6, 5.7, 6.5, 6.7, 6.6, 6.6),
    (10, 10): (5.0, 6.6, 5.5, 6.2, 6.7, 6.6, 6.6),
    (10, 50): (5.1, 6.5, 5.2, 5.5, 6.6, 6.5, 6.5),
    (100, 5): (49.9, 78.3, 74.7, 77.9, 78.0, 75.4, 74.8),
    (100, 10): (49.9, 82.8, 76.7, 81.4, 82.4, 77.4, 77.1),
    (100, 50): (49.8, 85.2, 64.5, 67.7, 84.3, 78.3, 78.0),
    (500, 5): (249.8, 405.8, 402.0, 406.7, 405.8, 388.2, 380.6),
    (500, 10): (249.0, 437.8, 429.5, 438.9, 437.1, 408.0, 395.0),
    (500, 50): (249.6, 463.7, 427.2, 437.6, 457.6, 413.6, 402.8),
}
EPISODES = (10, 25, 50, 75, 100)
PROCESSES = {
    "random": (100.1, 250.2, 499.7, 749.9, 999.4),
    "greedy": (134.8, 368.8, 769.3, 1172.9, 1578.5),
    "epsilon-greedy": (132.8, 377.3, 823.3, 1293.9, 1778.2),
    "psrl": (138.1, 408.8, 904.4, 1417.1, 1939.5),
    "optimistic-psrl": (144.1, 425.2, 930.7, 1449.2, 1973.9),
    "ucrl2": (146.6, 424.1, 918.9, 1427.6, 1942.1),
    "beb": (150.2, 427.8, 917.8, 1422.6, 1935.1),
}
TENTHS = tuple(round(0.1 * k, 1) for k in range(11))
LOGARITHMIC = tuple(10 ** (-4 + 0.2 * k) for k in range(21))  # from 0.0001 to 1
RELEASED = "as released"


@dataclass
class Row:
    """A strategy on one kind of tasks.

    Attributes:
        tasks, strategy: what is measured.
        settings: of the learner, beside those that are tuned.
        parameter, values: what is tuned, and over what.
        published: total reward; None where there is no such metric.
        note: what tells it from other rows of its strategy.
        chosen, mean, ci95: the tuned value, and what is measured: total reward and the half-width of its 95 % interval.
    """

    tasks: str
    strategy: str
    settings: dict[str, Any] = field(default_factory=dict)
    parameter: str | None = None
    values: Sequence[float] = ()
    published: float | None = None
    note: str = ""
    chosen: float | None = None
    mean: float = math.nan
    ci95: float = math.nan

    @property
    def deviation(self) -> float | None:
        """From the published result, per cent."""
        return None if self.published is None else 100 * (self.mean / self.published - 1)


def bandit_rows(pulls: int, arms: int) -> Iterator[Row]:
    """Of one cell of the table."""
    tasks = f"{pulls} pulls, {arms} arms"
    published = dict(zip(COLUMNS, BANDITS.get((pulls, arms), (None,) * len(COLUMNS)), strict=True))
    first = {"first_of_equals": True}
    epsilons = (0.0, 0.01, 0.02, 0.05, *TENTHS[1:])
    yield Row(tasks, "random", published=published["random"])
    yield Row(tasks, "greedy", published=published["greedy"])
    yield Row(tasks, "greedy", first, published=published["greedy"], note=RELEASED)
    yield Row(tasks, "epsilon-greedy", {}, "epsilon", epsilons, published["epsilon-greedy"])
    yield Row(tasks, "epsilon-greedy", first, "epsilon", TENTHS, published["epsilon-greedy"], RELEASED)
    yield Row(tasks, "ucb1", {}, "scale", TENTHS, published["ucb1"])
    yield Row(tasks, "thompson", published=published["thompson"])
    yield Row(tasks, "optimistic-thompson")
    samples = (1, 2, 3, 5, 7, 10, 15, 20)
    yield Row(tasks, "likeliest-thompson", {}, "samples", samples, published["likeliest-thompson"])
    discounts = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
    yield Row(tasks, "gittins", {}, "discount", discounts, published["gittins"])


def process_rows(episodes: int) -> Iterator[Row]:
    """Of one column of the table."""
    tasks = f"{episodes} episodes"
    column = EPISODES.index(episodes) if episodes in EPISODES else None
    published = {name: None if column is None else metrics[column] for name, metrics in PROCESSES.items()}
    samples, bonuses = (1, 2, 3, 5, 7, 10, 15, 20), tuple(1000 * value for value in LOGARITHMIC)
    yield Row(tasks, "value-iteration")
    yield Row(tasks, "random", published=published["random"])
    for note, prior in ((RELEASED, {"prior_mean": 0.0}), ("", {})):
        weightless = prior | ({"prior_weight": 1e-4} if note else {})

        def shown(strategy: str, note: str = note) -> float | None:
            return published[strategy] if note else None

        yield Row(tasks, "greedy", weightless, None, (), shown("greedy"), note)
        yield Row(tasks, "epsilon-greedy", weightless, "epsilon", TENTHS[1:6], shown("epsilon-greedy"), note)
        yield Row(tasks, "psrl", prior, None, (), shown("psrl"), note)
        yield Row(tasks, "optimistic-psrl", prior, "samples", samples, shown("optimistic-psrl"), note)
        yield Row(tasks, "beb", prior, "scale", bonuses, shown("beb"), note)
    yield Row(tasks, "ucrl2", {}, "scale", LOGARITHMIC, published["ucrl2"])


def totals(learner: ReinforcementLearner, data: EnvironmentDataModule, split: str, tasks: int, batch: int) -> Tensor:
    """Total rewards of the trials in so many tasks of a split, (tasks,)."""
    parts = []
    for first in range(0, tasks, batch):
        environments: Any = data.distribution(split).sample(range(first, min(tasks, first + batch)))
        with torch.inference_mode():
            parts.append(run_trial(environments, learner.agent()).reward.double().sum(0))
    return torch.cat(parts)


def measure(row: Row, data: EnvironmentDataModule, args: argparse.Namespace, advance: Any) -> None:
    """Tune on meta-validation tasks, then measure on meta-test tasks."""

    def learner(**settings: Any) -> ReinforcementLearner:
        environment, settings = data.environment, row.settings | settings
        if isinstance(data, Bandits):
            return BanditStrategy(environment.actions, row.strategy, **settings)  # pyright: ignore
        return MDPStrategy(environment.observation_size, environment.actions, row.strategy, **settings)  # pyright: ignore

    found = []
    for value in row.values:
        assert row.parameter is not None
        found.append(totals(learner(**{row.parameter: value}), data, "val", args.val_tasks, args.batch).mean().item())
        advance()
    if row.parameter is not None:
        row.chosen = row.values[max(range(len(found)), key=found.__getitem__)]
    chosen = {} if row.parameter is None else {row.parameter: row.chosen}
    row.mean, row.ci95 = interval(totals(learner(**chosen), data, "test", args.tasks, args.batch))
    advance()


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table(title="Total reward of a trial: mean ± 95 % interval over meta-test tasks", title_justify="left")
    for column in ("tasks", "strategy", "tuned"):
        table.add_column(column)
    for column in ("measured", "published", "deviation"):
        table.add_column(column, justify="right")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        tuned = "" if row.chosen is None else f"{row.parameter} {row.chosen:.4g}"
        published = "" if row.published is None else f"{row.published:,.1f}"
        deviation = "" if row.deviation is None else f"{row.deviation:+.2f} %"
        name, digits = f"{row.strategy} {row.note}".rstrip(), 3 if row.mean < 20 else 2
        measured = f"{row.mean:,.{digits}f} ± {row.ci95:.{digits}f}"
        last = following is None or following.tasks != row.tasks
        table.add_row(row.tasks, name, tuned, measured, published, deviation, end_section=last)
    console.print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--tasks", type=int, default=1000, help="meta-test tasks")
    parser.add_argument("--val_tasks", type=int, default=1000, help="meta-validation tasks that settings are chosen by")
    parser.add_argument("--cells", default="10x5,10x10,100x5", help="bandits, pulls x arms; none of them: --cells ''")
    parser.add_argument("--mdp", default="10", help="episodes of trials in tabular processes; none: --mdp ''")
    parser.add_argument("--strategies", default="", help="only these, separated by commas")
    parser.add_argument("--seed", type=int, default=0, help="of the tasks")
    parser.add_argument("--batch", type=int, default=1000, help="tasks that are gone through together")
    parser.add_argument("--threads", type=int, default=1, help="what is small is slower by more")
    parser.add_argument("--out", help="also write the metrics to this JSON file")
    return parser.parse_args()


def main() -> None:
    args, console = arguments(), wide_console()
    torch.set_num_threads(args.threads)
    work: list[tuple[EnvironmentDataModule, Row]] = []
    for cell in filter(None, args.cells.split(",")):
        pulls, arms = map(int, cell.split("x"))
        data = Bandits(arms, pulls, seed=args.seed)
        work += [(data, row) for row in bandit_rows(pulls, arms)]
    for episodes in map(int, filter(None, args.mdp.split(","))):
        data = TabularMDPs(episodes=episodes, seed=args.seed)
        work += [(data, row) for row in process_rows(episodes)]
    only = set(filter(None, args.strategies.split(",")))
    work = [(data, row) for data, row in work if not only or row.strategy in only]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=sum(len(row.values) + 1 for _, row in work))
        for data, row in work:
            progress.update(bar, description=f"{row.tasks}: {row.strategy}")
            measure(row, data, args, lambda: progress.advance(bar))
    rows = [row for _, row in work]
    show(rows, console)
    console.print(f"{args.tasks:,} meta-test tasks of seed {args.seed}, settings by {args.val_tasks:,} others")
    if args.out:
        content = [asdict(row) | {"deviation": row.deviation} for row in rows]
        Path(args.out).write_text(json.dumps({"settings": vars(args), "rows": content}, indent=1) + "\n")


if __name__ == "__main__":
    main()
