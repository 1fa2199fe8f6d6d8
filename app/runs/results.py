"""What a test leaves behind: results.json, a table in the terminal, a figure."""

from __future__ import annotations

import json
import math
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from rich.console import Console
from rich.table import Table

from app.runs.progress import headline_text
from datamodules.core.files import write_atomically
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


def results(learner: MetaLearner, data: LightningDataModule, facts: dict[str, Any]) -> dict[str, Any]:
    """Everything that a test measured and what it was measured on, ready for JSON.

    Args:
        learner: after its test; its per-task figures are aggregated here.
        data: what it was tested on.
        facts: added as they are: seed, checkpoint, command.
    """
    figures = learner.task_figures("test").everything()
    tasks = int(figures.pop("tasks"))
    shape = {n: getattr(data, n) for n in ("ways", "shots", "queries", "episodes") if hasattr(data, n)}
    return {
        "algorithm": type(learner).__name__,
        "data": type(data).__name__,
        **shape,
        "tasks": tasks,
        "figures": {n: _figure(figures, n) for n in figures if not n.endswith(("_ci95", "_worst_decile", "_tasks"))},
        "transductive": learner.transductive,
        "batch_norm": learner.batch_norm if any(isinstance(m, BatchNorm) for m in learner.modules()) else None,
        **facts,
        "device": "cpu" if learner.device.type == "cpu" else torch.cuda.get_device_name(learner.device),
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _figure(figures: dict[str, float], name: str) -> dict[str, float | None]:
    keys = {"mean": name, "ci95": f"{name}_ci95", "worst_decile": f"{name}_worst_decile"}
    values = {short: figures[key] for short, key in keys.items() if key in figures}
    of_fewer = {"tasks": int(figures[f"{name}_tasks"])} if f"{name}_tasks" in figures else {}
    return {k: None if math.isnan(v) else v for k, v in values.items()} | of_fewer


def write_results(content: dict[str, Any], path: Path) -> None:
    """Write results.json atomically."""
    write_atomically(path, json.dumps(content, indent=2, default=str) + "\n")


def print_results(content: dict[str, Any], folder: Path, hints: list[str], console: Console | None = None) -> None:
    """The closing table: figures with their intervals, where the run is, how to look at it."""
    console = console or Console()
    what = f"{content['algorithm']} on {content['data']}"
    if "shots" in content:
        what += ", " + (f"{content['ways']}-way " if content.get("ways") else "") + f"{content['shots']}-shot"
    if "episodes" in content:
        what += f", {content['episodes']} episodes"
    table = Table(title=f"{what}: {content['tasks']:,} meta-test tasks", title_justify="left")
    for column in ("figure", "mean ± 95 % interval", "worst decile"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for name, figure in content["figures"].items():
        mean, half = (float("nan") if (v := figure.get(k)) is None else v for k in ("mean", "ci95"))
        worst = figure.get("worst_decile")
        fewer = f", first {figure['tasks']:,}" if figure.get("tasks", content["tasks"]) != content["tasks"] else ""
        table.add_row(
            name + fewer,
            headline_text(name, mean, half),
            "" if worst is None else (f"{100 * worst:.2f} %" if name == "accuracy" else f"{worst:.4f}"),
        )
    console.print(table)
    console.print(f"batch norm: {content['batch_norm'] or 'the network has none'}", highlight=False)
    console.print(f"run folder: {folder}", highlight=False, soft_wrap=True)
    for hint in hints:
        console.print(hint, highlight=False, soft_wrap=True)
