"""Learners on streams of turned or permuted digits, one by one: python -m benchmarks.streams

Every learner's settings are chosen by its accuracy at the end of meta-validation streams, then it is measured on
meta-test streams, of other images and other transforms. Each measurement is a line of a CSV file as soon as it is
there: started again, what is done is not done again. What is published is of MNIST (Gupta et al. 2020, table 1), by
settings chosen on the test data, and stands beside it for comparison. RA, LA and BTI are retained accuracy, learning
accuracy, and backward transfer and interference; the published BTI is averaged over the last experience too, whose term
is 0, and would be J / (J - 1) times as much here.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.console import wide_console
from datamodules import Digits, TransformedStreams
from models import AGEM, EWC, GEM, MLP, ContinualLearner, ExperienceReplay, LaMAML, OnlineSGD
from models.continual.learner import stream_metrics

Settings = dict[str, Any]
MEASURED = ("accuracy", "learning_accuracy", "backward_transfer")
COLUMNS = ("data", "learner", "settings", "split", *MEASURED, "ci95", "streams", "seconds", "seed", "processor")


def grid(**values: tuple[Any, ...]) -> list[Settings]:
    """All combinations, the last name's values changing first."""
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


# What is published comes first in each list, where anything is.
LEARNERS: Mapping[str, tuple[Callable[..., ContinualLearner], Settings, list[Settings]]] = {
    "online": (OnlineSGD, {}, grid(glances=(1, 5), rate=(0.03, 0.1, 0.01, 0.003))),
    "EWC": (EWC, {"glances": 5}, grid(penalty=(10.0, 100.0, 1.0), rate=(0.03, 0.01))),
    "A-GEM": (AGEM, {"glances": 5}, grid(rate=(0.03, 0.01, 0.1))),
    "GEM": (GEM, {"glances": 5}, grid(margin=(0.5, 0.0), rate=(0.03, 0.01, 0.1))),
    "replay": (ExperienceReplay, {"glances": 5}, grid(rate=(0.03, 0.1, 0.01))),
    "C-MAML": (LaMAML, {"form": "cmaml"}, grid(rate=(0.1, 0.03, 0.3), initial_rate=(0.1, 0.03))),
    "Sync": (LaMAML, {"form": "sync", "rate_of_rates": 0.1}, grid(initial_rate=(0.15, 0.05), rate=(0.3, 0.1, 0.03))),
    "La-MAML": (LaMAML, {"form": "async"}, grid(initial_rate=(0.15, 0.05), rate_of_rates=(0.3, 0.1))),
}
# Retained accuracy and, in brackets, backward transfer and interference, per cent.
PUBLISHED = {
    "rotation": {
        "online": "53.38 (-5.44)",
        "EWC": "57.96",
        "GEM": "67.38",
        "C-MAML": "77.33 (-7.88)",
        "Sync": "74.07",
        "La-MAML": "77.42 (-8.64)",
    },
    "permutation": {
        "online": "55.42 (-13.76)",
        "EWC": "62.32",
        "GEM": "55.42",
        "C-MAML": "74.54 (-10.36)",
        "Sync": "70.54",
        "La-MAML": "74.34 (-7.60)",
    },
}


class Record:
    """Measurements in a CSV file, each by what it is of."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, []
        if path.exists():
            with open(path, newline="") as file:
                self.rows = list(csv.DictReader(file))

    def found(self, of: Mapping[str, str]) -> dict[str, str] | None:
        """The row of these, if it is there."""
        return next((row for row in self.rows if all(row[k] == v for k, v in of.items())), None)

    def add(self, row: dict[str, str]) -> None:
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append(row)


def measure(
    record: Record, data: TransformedStreams, name: str, settings: Settings, split: str, streams: int, batch: int
) -> dict[str, str]:
    """Metrics of a learner over the first streams of a split, out of the record or new in it."""
    source: Any = data.source
    about = {"transform": data.transform, "size": source.size, **data.task_shape()}
    key = {
        "data": json.dumps(about),
        "learner": name,
        "settings": json.dumps(settings, sort_keys=True),
        "split": split,
        "streams": str(streams),
        "seed": str(data.seed),
    }
    if (row := record.found(key)) is not None:
        return row
    make, fixed, _ = LEARNERS[name]
    of_memory = {"experiences": data.experiences} if make in (GEM, AGEM) else {}
    learner = make(MLP(source.size**2, (100, 100)), **fixed, **of_memory, **settings).eval()
    begin, parts = time.process_time(), []
    for first in range(0, streams, batch):
        drawn: Any = data.distribution(split).sample(range(first, min(streams, first + batch)))
        with torch.inference_mode():
            parts.append(stream_metrics(learner.followed(data.on_device(drawn))))
    values = {n: torch.cat([p[n] for p in parts]).double() for n in MEASURED}
    half = 1.96 * values["accuracy"].std() / streams**0.5
    row = {
        **key,
        **{n: f"{v.mean().item():.4f}" for n, v in values.items()},
        "ci95": f"{half.item():.4f}",
        "seconds": f"{time.process_time() - begin:.0f}",
        "processor": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    record.add(row)
    return row


def compared(
    record: Record, data: TransformedStreams, args: argparse.Namespace
) -> Iterator[tuple[str, Settings, dict[str, str]]]:
    """Of each learner its name, its settings, which meta-validation chose, and its row of the meta-test."""
    for name in filter(None, args.learners.split(",")):
        tried = LEARNERS[name][2][: args.settings]
        rows = [measure(record, data, name, one, "val", args.val_streams, args.batch) for one in tried]
        best = max(range(len(rows)), key=lambda k: float(rows[k]["accuracy"]))
        yield name, tried[best], measure(record, data, name, tried[best], "test", args.streams, args.batch)


def cells(name: str, settings: Settings, row: Mapping[str, str], transform: str) -> tuple[str, ...]:
    """What a table shows of a learner."""
    ra, la, bti = (100 * float(row[n]) for n in MEASURED)
    chosen = ", ".join(f"{k} {v:g}" for k, v in settings.items())
    measured = (f"{ra:.2f} ± {100 * float(row['ci95']):.2f}", f"{la:.2f}", f"{bti:.2f}")
    return name, chosen, *measured, PUBLISHED[transform].get(name, "–")


def show(rows: list[tuple[str, Settings, dict[str, str]]], data: TransformedStreams, console: Console) -> None:
    table = Table(title=f"Digits, {data.transform}: accuracy at the end, just after, and transfer, %")
    for column in ("learner", "chosen", "RA", "LA", "BTI", "published RA (BTI), MNIST"):
        table.add_column(column)
    for one in rows:
        table.add_row(*cells(*one, data.transform))
    console.print(table)


def write(rows: list[tuple[str, Settings, dict[str, str]]], data: TransformedStreams, path: Path) -> None:
    """The table as a page of docs/ takes it."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("learner", "chosen", "RA", "LA", "BTI", "published RA (BTI), MNIST", "seed", "processor"))
        for name, settings, row in rows:
            writer.writerow((*cells(name, settings, row, data.transform), row["seed"], row["processor"]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transform", default="rotation", choices=tuple(PUBLISHED))
    parser.add_argument("--learners", default=",".join(LEARNERS), help="separated by commas")
    parser.add_argument("--experiences", type=int, default=20)
    parser.add_argument("--shots", type=int, default=500, help="examples of an experience")
    parser.add_argument("--queries", type=int, default=150, help="further ones that it is tested by")
    parser.add_argument("--size", type=int, default=28, help="height and width of an image, pixels")
    parser.add_argument("--streams", type=int, default=10, help="of the meta-test")
    parser.add_argument("--val_streams", type=int, default=5, help="of meta-validation, which settings are chosen by")
    parser.add_argument("--settings", type=int, default=None, help="that are tried of each learner, at most")
    parser.add_argument("--batch", type=int, default=10, help="streams that are gone along together")
    parser.add_argument("--seed", type=int, default=0, help="of the streams")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/streams.csv"), help="where measurements are kept")
    parser.add_argument("--table", type=Path, help="also write the table to this CSV file")
    return parser.parse_args()


def main() -> None:
    args, console = arguments(), wide_console()
    torch.set_num_threads(args.threads)
    data = TransformedStreams(
        Digits(args.size), args.transform, args.experiences, args.shots, args.queries, seed=args.seed
    )
    rows = []
    for row in compared(Record(args.out), data, args):
        rows.append(row)
        console.print(f"{row[0]}: {row[2]['accuracy']} after {row[2]['seconds']} s")
    show(rows, data, console)
    if args.table:
        write(rows, data, args.table)


if __name__ == "__main__":
    main()
