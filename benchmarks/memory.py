"""Memory and time of a meta-step against the inner steps: iMAML, which is flat by its theory, and MAML.

    python -m benchmarks.memory --out memory.json --plot memory.png

Both adapt the same network (four strided convolutions of 64 filters) by gradient descent on random images of Omniglot's
size, 5-way 1-shot with one query per class, 8 tasks to the meta-step; iMAML adds 5 steps of conjugate gradients. Every
point is a process of its own. On a CPU memory is the peak of resident memory above what the process held after imports
and before its first step; on a GPU it is the most that was allocated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

import app  # noqa: F401  first, as in a run
from app.plots.style import ACCENT, INK, MAIN, STYLE, save
from benchmarks.common import MetaStep, Report, Row, Worker, alternate, arguments
from datamodules.core.episodes import Episodes
from models import IMAML, MAML, Conv4

STEPS, FEW = (1, 2, 4, 8, 16, 32, 64), 4
WAYS, TASKS, RATE = 5, 8, 0.01
ALGORITHMS = {"MAML": MAML, "iMAML": IMAML}
TARGET = 0.1  # the most that iMAML's memory may grow from few steps to the most
Curves = dict[str, dict[int, tuple[float, float]]]  # by algorithm and inner steps: MiB and seconds


def worker(content: dict[str, Any]) -> Callable[[], Any]:
    """A meta-step for ``Worker``."""
    torch.manual_seed(0)
    learner = ALGORITHMS[content["algorithm"]](Conv4(), WAYS, inner_rate=RATE, inner_steps=content["steps"])
    tasks, labels = content["tasks"], torch.arange(WAYS).expand(content["tasks"], -1)
    images = torch.rand(2, tasks, WAYS, 1, 28, 28)
    episodes = Episodes(images[0], labels, images[1], labels, torch.arange(tasks), WAYS, tasks)
    episodes = episodes.apply(lambda t: t.to(content["device"]))
    return MetaStep(learner.to(content["device"]), lambda: episodes)


def measure(report: Report, steps: int, folder: Path, args: Any) -> dict[str, tuple[float, float]]:
    """MiB and seconds of a meta-step of either."""
    content = {"steps": steps, "tasks": 2 if args.quick else TASKS, "device": args.device}
    workers = {name: Worker("benchmarks.memory:worker", content | {"algorithm": name}, folder) for name in ALGORITHMS}
    for one in workers.values():
        one.ready()
    times = alternate({n: w.step for n, w in workers.items()}, args.seconds, 1 if args.quick else 3)
    median = report.keep(f"{steps} steps", times)
    place = 1 if args.device == "cpu" else 2
    found = {name: (one.memory()[place], median[name]) for name, one in workers.items()}
    for one in workers.values():
        one.close()
    return found


def rows(curves: Curves) -> list[Row]:
    """Each number of steps by itself, then what the most cost over few."""
    found = []
    for what, place, unit in (("memory", 0, "MiB"), ("time", 1, "ms")):
        for steps, base in curves["MAML"].items():
            label = f"{what}, {steps} step{'s' * (steps > 1)}"
            found.append(Row(label, "MAML", base[place], curves["iMAML"][steps][place], unit))
    for what, place, unit in (("memory", 0, "MiB"), ("time", 1, "ms")):
        for name, curve in curves.items():
            most, target = max(curve), TARGET if (name, what) == ("iMAML", "memory") else None
            label = f"{name}'s {what}, {most} steps"
            found.append(Row(label, f"{FEW} steps", curve[FEW][place], curve[most][place], unit, target, overhead=True))
    return found


def draw(curves: Curves, device: str) -> Figure:
    """Both curves, memory on the left and time on the right."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.5), layout="constrained")
        kind = "peak resident memory" if device == "cpu" else "peak GPU memory"
        for axes, place, label in zip(figure.subplots(1, 2), (0, 1), (f"{kind} (MiB)", "time (s)"), strict=True):
            for (name, curve), colour in zip(curves.items(), (ACCENT, MAIN), strict=True):
                values = [point[place] for point in curve.values()]
                axes.plot(list(curve), values, color=colour, marker="o", ms=4)
                most = max(curve)
                axes.annotate(
                    name, (most, curve[most][place]), (-6, 6), textcoords="offset points", color=colour, ha="right"
                )
            axes.set_xticks([s for s in next(iter(curves.values())) if s >= max(curves["MAML"]) / 8])
            axes.set_xlim(0, None)
            axes.set_ylim(0, 1.12 * axes.get_ylim()[1])  # room for the names
            axes.set_xlabel("inner steps")
            axes.set_title(f"Meta-step: {label}", color=INK)
    return figure


def main() -> None:
    args = arguments("Memory and time against the inner steps: iMAML and MAML.", 6, data=False, plot=True)
    report = Report(f"iMAML and MAML, {WAYS}-way 1-shot, {2 if args.quick else TASKS} tasks", args.device)
    curves: Curves = {name: {} for name in ALGORITHMS}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        for steps in (FEW, 16) if args.quick else STEPS:
            for name, point in measure(report, steps, Path(folder), args).items():
                curves[name][steps] = point
    report.rows += rows(curves)
    if args.plot:
        save(draw(curves, args.device), Path(args.plot))
    report.show(args.out)


if __name__ == "__main__":
    main()
