"""What a test leaves behind: results.json, a table in the terminal, a metric."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from datamodules.core.base import EpisodicDataModule, shape_text
from datamodules.core.files import write_atomically
from datamodules.core.metric import Metric
from models.core.learner import MetaLearner
from models.networks.batch_norm import BatchNorm

PACKAGES = ("torch", "pytorch-lightning", "torchmetrics", "learn2learn", "wandb", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The processor's model, with the number of threads that compute on it."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {torch.get_num_threads()} threads"


def results(
    learner: MetaLearner, data: EpisodicDataModule, metrics: Mapping[str, float], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that a test measured and what it was measured on, ready for JSON.

    Args:
        learner: that was tested.
        data: what it was tested on.
        metrics: over tasks, and the number of ``tasks``; with intervals and worst deciles beside them.
        facts: added as they are: seed, checkpoint, command.
    """
    metrics = dict(metrics)
    tasks = int(metrics.pop("tasks"))
    return {
        "algorithm": type(learner).__name__,
        "data": type(data).__name__,
        **data.task_shape(),
        "tasks": tasks,
        "metrics": {n: _metric(metrics, n) for n in metrics if not n.endswith(("_ci95", "_worst_decile", "_tasks"))},
        "transductive": learner.transductive,
        "batch_norm": learner.batch_norm if any(isinstance(m, BatchNorm) for m in learner.modules()) else None,
        **facts,
        "processor": processor(),
        "device": "cpu" if learner.device.type == "cpu" else torch.cuda.get_device_name(learner.device),
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _metric(metrics: dict[str, float], name: str) -> dict[str, float | None]:
    keys = {"mean": name, "ci95": f"{name}_ci95", "worst_decile": f"{name}_worst_decile"}
    values = {short: metrics[key] for short, key in keys.items() if key in metrics}
    of_fewer = {"tasks": int(metrics[f"{name}_tasks"])} if f"{name}_tasks" in metrics else {}
    return {k: None if math.isnan(v) else v for k, v in values.items()} | of_fewer


def write_results(content: dict[str, Any], path: Path) -> None:
    """Write results.json atomically."""
    write_atomically(path, json.dumps(content, indent=2, default=str) + "\n")


def print_results(
    content: dict[str, Any],
    declared: Mapping[str, Metric],
    folder: Path | None,
    hints: list[str],
    console: Console | None = None,
    split: str = "meta-test",
) -> None:
    """The closing table: metrics with their intervals, where the run is (None: nowhere), how to look at it."""
    console = console or Console()
    shape = shape_text(content)
    what = f"{content['algorithm']} on {content['data']}{', ' if shape else ''}{shape}"
    # Above the table, not its title: that would be broken to the table's width.
    console.print(f"{what}: {content['tasks']:,} {split} tasks", style="italic", highlight=False, soft_wrap=True)
    table = Table()
    for column in ("metric", "mean ± 95 % interval", "worst decile"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, metric in content["metrics"].items():
        mean, half = (float("nan") if (v := metric.get(k)) is None else v for k in ("mean", "ci95"))
        worst, told = metric.get("worst_decile"), declared[name]
        fewer = f", {metric['tasks']:,} tasks" if metric.get("tasks", content["tasks"]) != content["tasks"] else ""
        table.add_row(
            name + fewer,
            told.text(mean, half),
            "" if worst is None else (f"{100 * worst:.2f} %" if told.share else f"{worst:.4f}"),
        )
    console.print(table)
    console.print(f"batch norm: {content['batch_norm'] or 'the network has none'}", highlight=False)
    if folder is not None:
        console.print(f"run folder: {folder}", highlight=False, soft_wrap=True)
    for hint in hints:
        console.print(hint, highlight=False, soft_wrap=True)
