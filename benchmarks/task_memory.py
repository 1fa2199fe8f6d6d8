"""Retrieval of past tasks against replay at random, on alphabets that return: python -m benchmarks.task_memory

A prototypical network is trained on Omniglot's training alphabets for a few minutes and frozen. On its features each
learner's rate is chosen on meta-validation streams, by the accuracy just after an experience; then all go along the
same meta-test streams, and are compared stream by stream. Each measurement is a line of a CSV file as soon as it is
there: started again, what is done is not done again. With ``--search`` the exact search through keys on disk is timed.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.console import wide_console
from datamodules import Omniglot, ReturningStreams
from models import Conv4, NearestClassMean, Pretrained, ProtoNet, TaskMemory, UnitLength
from models.continual.learner import ContinualLearner
from models.continual.memory_file import MemoryFile

Settings = dict[str, Any]
MEASURED = ("learning_accuracy", "return_accuracy", "accuracy", "precision", "usage")
COLUMNS = ("about", "learner", "settings", "split", *MEASURED, "of_streams", "seconds")
RATES = (1.0, 3.0, 10.0)
RIVAL = "random replay"


def learners(keep: int, retrieve: int) -> dict[str, Settings]:
    """By name; the rival and those it is compared with first, then the ablations."""
    found: dict[str, Settings] = {
        RIVAL: {"by": "random"},
        "by embedding": {"by": "embedding"},
        "by feature": {"by": "feature"},
        "no memory": {"keep": 0},
        "all of the memory": {"retrieve": "all"},
    }
    for writes in ("oldest", "least_used", "surprise"):
        found[f"by embedding, {writes}"] = {"writes": writes}
    for size in (keep // 4, 4 * keep):
        found[f"by embedding, keep {size}"] = {"keep": size}
        found[f"random replay, keep {size}"] = {"keep": size, "by": "random"}
    for number in (retrieve // 4, retrieve * 5 // 2):
        found[f"by embedding, retrieve {number}"] = {"retrieve": number}
        found[f"random replay, retrieve {number}"] = {"retrieve": number, "by": "random"}
    return {name: {"keep": keep, "retrieve": retrieve} | settings for name, settings in found.items()}


def backbone(args: argparse.Namespace) -> Path:
    """The checkpoint of a prototypical network on the training alphabets, trained unless it is there."""
    path = args.out.with_name(f"{args.out.stem}-backbone-{args.steps}-{args.hidden}-{args.seed}.ckpt")
    if not path.exists():
        import pytorch_lightning as pl  # after datamodules, which prepare torchvision

        torch.manual_seed(args.seed)
        learner = ProtoNet(Conv4(hidden=args.hidden, downsample="pool"))
        data = Omniglot(
            protocol="alphabets",
            ways=5,
            train_ways=20,
            train_queries=5,
            meta_batch_size=1,
            root=args.root,
            seed=args.seed,
        )
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        off = dict.fromkeys((*quiet, "use_distributed_sampler"), False)
        trainer = pl.Trainer(max_steps=args.steps, max_epochs=-1, limit_val_batches=0, accelerator="cpu", **off)
        trainer.fit(learner, datamodule=data)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        torch.save({"state_dict": learner.state_dict()}, part)
        part.replace(path)
    return path


class Record:
    """Measurements in a CSV file, each by what it is of."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, []
        if path.exists():
            with open(path, newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if all(row[c] for c in COLUMNS)]

    def found(self, key: dict[str, str]) -> dict[str, str] | None:
        return next((row for row in self.rows if all(row[k] == v for k, v in key.items())), None)

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
    record: Record, data: ReturningStreams, name: str, settings: Settings, split: str, streams: int, args: Any
) -> dict[str, str]:
    """Metrics of a learner over the first streams of a split, out of the record or new in it."""
    about = {**data.task_shape(), "groups": data.groups[split], "streams": streams, "seed": data.seed}
    about |= {"steps": args.steps, "hidden": args.hidden}
    key = {
        "about": json.dumps(about),
        "learner": name,
        "settings": json.dumps(settings, sort_keys=True),
        "split": split,
    }
    if (row := record.found(key)) is not None:
        return row
    features = UnitLength(Pretrained(Conv4(hidden=args.hidden, downsample="pool"), str(backbone(args))))
    features.backbone.load()
    means = name == "nearest class mean"
    learner: ContinualLearner = NearestClassMean(features) if means else TaskMemory(features, steps=100, **settings)
    learner.eval()
    begin, parts = time.process_time(), []
    for first in range(0, streams, args.batch):
        drawn: Any = data.on_device(data.distribution(split).sample(range(first, min(streams, first + args.batch))))  # pyright: ignore
        with torch.inference_mode():
            parts.append(learner.metrics_of_streams(learner.with_facts(learner.followed(drawn), drawn)))
    nothing = torch.full((streams,), torch.nan)
    values = {n: torch.cat([p[n] for p in parts]) if n in parts[0] else nothing for n in MEASURED}
    compared = {n: [round(v, 5) for v in values[n].tolist()] for n in MEASURED[:3]}
    row = {
        **key,
        **{n: f"{values[n].mean().item():.4f}" for n in MEASURED},
        "of_streams": json.dumps(compared),
        "seconds": f"{time.process_time() - begin:.1f}",
    }
    record.add(row)
    return row


def difference(row: dict[str, str], rival: dict[str, str], name: str) -> str:
    """Of a metric to the rival's on the same streams, with its 95 % interval, per cent."""
    one, other = (np.array(json.loads(r["of_streams"])[name]) for r in (row, rival))
    apart = 100 * (one - other)
    half = 1.96 * apart.std(ddof=1) / len(apart) ** 0.5 if len(apart) > 1 else float("nan")
    return f"{apart.mean():+.2f} ± {half:.2f}"


def show(rows: dict[str, tuple[Settings, dict[str, str]]], console: Console) -> None:
    title = f"Alphabets that return, %: just after an experience, just after a return, at the end; against {RIVAL}"
    table = Table(title=title)
    for column in ("learner", "rate", "LA", "at returns", "end", "precision", "usage", "LA, paired", "end, paired"):
        table.add_column(column)
    rival = rows[RIVAL][1]
    for name, (settings, row) in rows.items():
        cells = [f"{100 * float(row[n]):.2f}" for n in MEASURED]
        paired = [difference(row, rival, n) if row is not rival else "" for n in ("learning_accuracy", "accuracy")]
        table.add_row(name, f"{settings.get('rate', '')}", *cells, *paired)
    console.print(table)


def time_search(args: argparse.Namespace, console: Console) -> None:
    """Seconds of an exact search through so many keys of 64 numbers on disk."""
    for size in (10_000, 100_000, 1_000_000):
        if size > args.keys:
            break
        file = MemoryFile(None, size, 65, 64)
        file.clear()
        file.held[:] = True  # as if all places were taken: of zeros, which are as many numbers
        to, times = torch.randn(1, 64), []
        for _ in range(3):
            begin = time.perf_counter()
            file.nearest(to, "embedding", 20)
            times.append(time.perf_counter() - begin)
        console.print(f"{size:>9,} keys, {file._bytes / 2**20:,.0f} MiB: {1000 * min(times):.1f} ms")
        file.close()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="of Omniglot")
    parser.add_argument("--steps", type=int, default=300, help="of the backbone's training")
    parser.add_argument("--hidden", type=int, default=32, help="channels of the backbone")
    parser.add_argument("--groups", type=int, default=10, help="alphabets of a stream")
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--experiences", type=int, default=40)
    parser.add_argument("--keep", type=int, default=100)
    parser.add_argument("--retrieve", type=int, default=20)
    parser.add_argument("--streams", type=int, default=60, help="of the meta-test")
    parser.add_argument("--val_streams", type=int, default=10, help="of meta-validation, which the rate is chosen by")
    parser.add_argument("--learners", type=int, default=None, help="the first so many, of the table's order")
    parser.add_argument("--batch", type=int, default=10, help="streams that are gone along together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--search", action="store_true", help="time the search on disk")
    parser.add_argument("--keys", type=int, default=1_000_000, help="of the search, at most")
    parser.add_argument("--out", type=Path, default=Path("runs/task_memory.csv"), help="where measurements are kept")
    return parser.parse_args()


def main() -> None:
    args, console = arguments(), wide_console()
    torch.set_num_threads(args.threads)
    if args.search:
        return time_search(args, console)
    data = ReturningStreams(
        Omniglot(protocol="alphabets"),
        groups=args.groups,
        val_groups=min(4, args.groups),
        ways=args.ways,
        experiences=args.experiences,
        val_experiences=min(20, args.experiences),
        root=args.root,
        seed=args.seed,
    )
    data.prepare_data()
    record, rows = Record(args.out), {}
    some = {**learners(args.keep, args.retrieve), "nearest class mean": {}}
    for name, settings in list(some.items())[: args.learners]:
        tried = [settings | {"rate": rate} for rate in RATES] if settings else [settings]
        of_rates = [measure(record, data, name, one, "val", args.val_streams, args) for one in tried]
        best = max(range(len(tried)), key=lambda k: float(of_rates[k]["learning_accuracy"]))
        rows[name] = tried[best], measure(record, data, name, tried[best], "test", args.streams, args)
        console.print(f"{name}: {rows[name][1]['learning_accuracy']} after {rows[name][1]['seconds']} s")
    show(rows, console)


if __name__ == "__main__":
    main()
