"""A learned optimizer beside gradient descent and Adam of tuned rates, and beside the best steps where they are known.

    python -m benchmarks.learned_optimizers --checkpoint runs/learned_optimizer-quadratics/checkpoints/best.ckpt

All start from the same weights, on the same meta-test tasks, and take gradients of the whole support set. The rates of
gradient descent and Adam are chosen for each number of steps on meta-training tasks, over a grid of factors of 1.5. Of
quadratics the best constant rate 2 / (L + μ) and Chebyshev's steps follow from the largest and smallest curvature of
each task, which no optimizer but these two is told. Speed-up is the steps that Adam at its rate needs to be as low,
over the steps of the optimizer.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import models
from app.cli.from_checkpoint import find_class, open_checkpoint
from benchmarks.console import wide_console
from datamodules import Quadratics
from datamodules.core.episodes import Episodes, Task
from models import LearnedOptimizer
from models.core.base_learner import Parameters
from models.core.inner_loop import call, inner_path
from models.core.metrics import interval

Curve = Callable[[Episodes, int], Tensor]
"""The query loss of each task after 0, 1, … steps, (tasks, steps + 1)."""
RATES = tuple(10 ** (k / 6 - 3) for k in range(22))  # from 0.001 to 3.2


def by_rule(learner: LearnedOptimizer, rule: Callable[..., tuple[Parameters, Any]]) -> Curve:
    """Of an update rule, from where the learned optimizer starts; what it keeps are two moments, zeros at first."""

    def one(task: Task, steps: int) -> Tensor:
        begin, losses = learner.start(task.support.ways).parameters, []
        zeros = {name: torch.zeros_like(p) for name, p in begin.items()}

        def loss(parameters: Parameters, step: int) -> Tensor:
            outputs = call(learner.learner, parameters, task.support.x, learner.statistics_source, step)
            return learner.support_loss(outputs, task.support)

        for step, (at, _) in enumerate(inner_path(loss, begin, rule, steps, (zeros, zeros))):
            losses.append(learner.after(at, step, task)[0])
        return torch.stack(losses)

    return lambda tasks, steps: learner.map(lambda task: one(task, steps), tasks)


def descent(rate: float) -> Callable[..., tuple[Parameters, Any]]:
    def rule(step: int, at: Parameters, g: Parameters, _: Tensor, kept: Any) -> tuple[Parameters, Any]:
        return {n: p - rate * g[n] for n, p in at.items()}, kept

    return rule


def adam(rate: float, first: float = 0.9, second: float = 0.999) -> Callable[..., tuple[Parameters, Any]]:
    def rule(step: int, at: Parameters, g: Parameters, _: Tensor, kept: Any) -> tuple[Parameters, Any]:
        mean = {n: first * m + (1 - first) * g[n] for n, m in kept[0].items()}
        square = {n: second * v + (1 - second) * g[n] ** 2 for n, v in kept[1].items()}
        unbias = (1 - first ** (step + 1), 1 - second ** (step + 1))
        new = {n: p - rate * mean[n] / unbias[0] / ((square[n] / unbias[1]).sqrt() + 1e-8) for n, p in at.items()}
        return new, (mean, square)

    return rule


def learned(learner: LearnedOptimizer) -> Curve:
    def one(task: Task, steps: int) -> Tensor:
        path = learner.path(learner.weights(), task.support, learner.start(task.support.ways), 0, steps)
        return torch.stack([learner.after(at.parameters, step, task)[0] for step, at in enumerate(path)])

    return lambda tasks, steps: learner.map(lambda task: one(task, steps), tasks)


def of_quadratics(learner: LearnedOptimizer, chebyshev: bool) -> Curve:
    """The best constant step by the extreme curvatures L and μ, or Chebyshev's semi-iteration, in double precision."""

    def points(w: Tensor, y: Tensor, x: Tensor, steps: int) -> Iterator[Tensor]:
        hessian = 2 * w.mT @ w / w.shape[1]
        target = 2 * w.mT @ y / w.shape[1]
        curvature = torch.linalg.eigvalsh(hessian)
        centre, radius = ((curvature[:, -1] + s * curvature[:, 0])[:, None, None] / 2 for s in (1, -1))
        yield x
        rho, move = radius / centre, (target - hessian @ x) / centre
        for _ in range(steps):
            x = x + move
            yield x
            residual = target - hessian @ x
            if chebyshev:  # Saad, Iterative Methods for Sparse Linear Systems, algorithm 12.1
                new = 1 / (2 * centre / radius - rho)
                rho, move = new, new * rho * move + 2 * new / radius * residual
            else:
                move = residual / centre

    def curve(tasks: Episodes, steps: int) -> Tensor:
        w, y = tasks.support_x.double(), tasks.support_y.double()
        (weight,) = learner.start(0).parameters.values()
        start = weight.double().mT.expand(len(w), -1, 1)
        return torch.stack([(w @ x - y).square().mean((1, 2)) for x in points(w, y, start, steps)], 1)

    return curve


def tuned(rule: Callable[[float], Any], learner: LearnedOptimizer, tasks: Episodes, steps: list[int]) -> list[float]:
    """The best rate for each number of steps."""
    curves = torch.stack([by_rule(learner, rule(rate))(tasks, max(steps)).mean(0) for rate in RATES])
    at = curves[:, steps].nan_to_num(torch.inf)
    return [RATES[int(place)] for place in at.argmin(0)]


def first_below(curve: Tensor, level: float) -> int | None:
    """The first step at which a curve (steps + 1,) is as low; None where it never is."""
    found = (curve <= level).nonzero()
    return int(found[0]) if len(found) else None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="of a learned optimizer")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 100, 200], help="what losses are shown after")
    parser.add_argument("--tasks", type=int, default=1000, help="meta-test tasks")
    parser.add_argument("--train_tasks", type=int, default=5000, help="meta-training tasks that rates are chosen by")
    parser.add_argument("--longest", type=int, default=1000, help="steps that Adam is given to be as low")
    parser.add_argument("--out", help="also write the metrics to this JSON file")
    return parser.parse_args()


def main() -> None:
    args, console = arguments(), wide_console()
    learner = models.load(args.checkpoint)
    if not isinstance(learner, LearnedOptimizer):
        raise SystemExit(f"error: {args.checkpoint} is of {type(learner).__name__}: give one of a LearnedOptimizer")
    rows, config = [], open_checkpoint(Path(args.checkpoint)).config["data"]
    found: Any = find_class(config["class_path"])
    data = found(**config.get("init_args", {}))
    test, train = (
        data.on_device(data.distribution(split).sample(range(count)))
        for split, count in (("test", args.tasks), ("train", args.train_tasks))
    )
    with torch.inference_mode():
        rates = {name: tuned(rule, learner, train, args.steps) for name, rule in (("SGD", descent), ("Adam", adam))}
        slow = {rate: by_rule(learner, adam(rate))(test, args.longest).mean(0) for rate in set(rates["Adam"])}

        def row(name: str, curve: Curve, steps: list[int], note: str = "") -> None:
            losses = curve(test, max(steps)).double()
            for step in steps:
                mean, half = interval(losses[:, step])
                adam_rate = rates["Adam"][args.steps.index(step)]
                # What diverged on a single task has no mean, and is as slow as can be.
                needs = first_below(slow[adam_rate], mean) if math.isfinite(mean) else 0
                speed = None if needs is None else needs / step
                rows.append([name, note, step, mean, half, losses[:, step].nan_to_num(math.inf).median().item(), speed])

        for name, rule in (("SGD", descent), ("Adam", adam)):
            for step, rate in zip(args.steps, rates[name], strict=True):
                row(name, by_rule(learner, rule(rate)), [step], f"rate {rate:.3g}")
        row("learned", learned(learner), args.steps, f"horizon {learner.inner_steps}")
        if isinstance(data, Quadratics):
            row("2 / (L + μ)", of_quadratics(learner, chebyshev=False), args.steps, "knows L and μ")
            row("Chebyshev", of_quadratics(learner, chebyshev=True), args.steps, "knows L and μ")
    title = f"Query loss on {args.tasks:,} meta-test tasks: mean ± 95 % interval, median; speed-up over Adam"
    table = Table(title=title, title_justify="left")
    for column in ("optimizer", "", "steps", "mean", "median", "speed-up"):
        table.add_column(column, justify="left" if column in ("optimizer", "") else "right")
    for name, note, step, mean, half, median, speed in rows:
        shown = f"> {args.longest / step:.1f}" if speed is None else f"{speed:.2f}"
        table.add_row(name, note, str(step), f"{mean:.4g} ± {half:.2g}", f"{median:.4g}", shown)
    console.print(table)
    if args.out:
        names = ("optimizer", "note", "steps", "loss", "ci95", "median", "speed_up_over_adam")
        content = {"settings": vars(args), "rows": [dict(zip(names, r, strict=True)) for r in rows]}
        Path(args.out).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
