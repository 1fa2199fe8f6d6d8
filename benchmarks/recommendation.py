"""A matrix of accuracies, learners by tasks of several domains, and what recommendations cost on held-out tasks.

    python -m benchmarks.recommendation --root folder/of/omniglot

Some two dozen learners are trained for a minute or less each, on one domain of characters or on all of them, and tested
on the same tasks of all domains, so that no learner is the best on every task. What is there is not done again: stopped
at any moment and started again, it goes on. It ends with ``python -m app.recommend --held_out`` on what it made.
Without --root the domains are of the embedded characters alone.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from app import evaluate, recommend
from app.compare import labels
from app.runs.accuracy_matrix import Matrix
from app.runs.directory import EVALUATIONS, RESULTS
from benchmarks.console import wide_console
from benchmarks.small_runs import trained
from datamodules.core.files import write_atomically

ON_ALL = "all-domains"  # the evaluation's folder
SHAPE = {"ways": 5, "shots": 1, "queries": 15}


def domains(root: str | None) -> dict[str, dict[str, Any]]:
    """What the tasks of each domain show, by name: strokes that are bright, or dark on bright ground."""
    glyphs = {"class_path": "datamodules.Glyphs"}
    sources = {"glyphs": glyphs}
    if root is not None:  # characters of one alphabet, alphabets that training never saw
        sources["omniglot"] = {
            "class_path": "datamodules.Omniglot",
            "init_args": {"protocol": "alphabets", "root": root},
        }
    return {
        f"{name}{' inverted' if invert else ''}": {"source": source, "invert": invert}
        for name, source in sources.items()
        for invert in (False, True)
    }


def network(hidden: int = 32) -> list[str]:
    flags = {"": "models.Conv4", ".hidden": hidden, ".downsample": "pool"}
    return [str(word) for name, value in flags.items() for word in (f"--model.backbone{name}", value)]


def family(names: Sequence[str]) -> dict[str, tuple[Sequence[str], int, list[str]]]:
    """Learners by name: the domains that each is trained on, meta-updates, and flags.

    Args:
        names: of all domains.
    """
    wide = ["--data.train_ways", "10", "--data.train_queries", "5", "--data.meta_batch_size", "1"]
    narrow = ["--data.meta_batch_size", "4", "--data.train_queries", "5"]
    head = ["--model.outputs", "5"]

    def protonet(hidden: int = 32) -> list[str]:
        return ["--model", "models.ProtoNet", *network(hidden), *wide]

    maml = ["--model", "models.MAML", *network(), *head, "--model.inner_rate", "0.1", "--model.inner_steps", "3"]
    maml += [*narrow, "--model.eval_inner_steps", "5"]
    anil = [
        "--model",
        "models.ANIL",
        *network(),
        *head,
        "--model.inner_rate",
        "0.1",
        "--model.inner_steps",
        "3",
        *narrow,
    ]
    found: dict[str, tuple[Sequence[str], int, list[str]]] = {
        "pixel": (names, 20, ["--model", "models.NearestNeighbour", *narrow]),
        "hausdorff": (names, 20, ["--model", "models.NearestNeighbour", "--model.distance", "hausdorff", *narrow]),
        "protonet-untrained": (names, 1, protonet()),
        "protonet-brief": (names, 60, protonet()),
        "protonet": (names, 1500, protonet()),
        "protonet-8": (names, 1500, protonet(8)),
        "protonet-64": (names, 1000, protonet(64)),
        "maml": (names, 400, maml),
        "fomaml": (names, 600, [*maml, "--model.first_order", "true"]),
        "anil": (names, 700, anil),
        "metasgd": (names, 500, ["--model", "models.MetaSGD", *network(), *head, *narrow]),
        "matching": (names, 1000, ["--model", "models.MatchingNet", *network(), *wide]),
    }
    for name in names:
        own = name.replace(" ", "-")
        found[f"protonet-{own}"] = ([name], 1200, protonet())
        found[f"protonet-8-{own}"] = ([name], 800, protonet(8))
        found[f"maml-{own}"] = ([name], 300, maml)
    return found


def mixture(chosen: dict[str, dict[str, Any]], **settings: Any) -> dict[str, Any]:
    return {"class_path": "datamodules.ImageMixture", "init_args": {"domains": chosen, **SHAPE, **settings}}


def make(args: argparse.Namespace, console: Console) -> list[Path]:
    """Train and test what is not there yet; the folders of the tests."""
    runs, known = args.out / "runs", domains(args.root)
    everything = args.out / f"{ON_ALL}.yaml"
    write_atomically(everything, yaml.safe_dump(mixture(known, test_tasks=args.tasks)))
    found = []
    members = family(list(known))
    if args.only:
        members = {name: members[name] for name in args.only.split(",")}
    for number, (name, (trained_on, steps, flags)) in enumerate(members.items()):
        folder = runs / name / EVALUATIONS / ON_ALL
        found.append(folder)
        if (folder / RESULTS).is_file():
            continue
        begin, steps = time.process_time(), max(1, round(steps * args.scale))
        data = mixture({d: known[d] for d in trained_on}, test_tasks=2, val_tasks=2, eval_batch_size=2)
        content = yaml.safe_dump({"data": data})
        checkpoint = trained(runs, name, steps, number, ["--config", content, *flags])
        more = ["--open_set_tasks", "0", "--pictures", "false", "--trainer.accelerator", "cpu"]
        more += ["--trainer.enable_progress_bar", "false"]
        evaluate.main(["--ckpt_path", str(checkpoint), "--data", str(everything), "--out", str(folder), *more])
        console.print(
            f"{name}: {time.process_time() - begin:.0f} s of the processor, {number + 1} of {len(members)}",
            highlight=False,
        )
    return found


def as_csv(matrix: Matrix) -> str:
    """A line for each task: its number, its domain, and every learner's accuracy."""
    text, facts = io.StringIO(), matrix.evaluations[0].facts
    writer = csv.writer(text)
    writer.writerow(["task", "domain", *matrix.names])
    for index, domain, row in zip(facts["index"].tolist(), facts["domain"].tolist(), matrix.accuracy.T, strict=True):
        writer.writerow([index, domain, *(f"{value:.4f}" for value in row.tolist())])
    return text.getvalue()


def show(matrix: Matrix, names: Sequence[str], console: Console) -> None:
    """Mean accuracies by domain, and on how many tasks each learner is the best, ties shared."""
    domain, best = matrix.evaluations[0].facts["domain"], matrix.accuracy == matrix.accuracy.amax(0)
    shares = (best / best.sum(0)).mean(1)
    width = max(map(len, matrix.names))
    console.print(
        f"{'accuracy, %':{width}}  {'  '.join(f'{name:>17}' for name in names)}  {'best on':>8}", highlight=False
    )
    for n in matrix.accuracy.mean(1).argsort(descending=True).tolist():
        of = [100 * matrix.accuracy[n, domain == d].mean().item() for d in range(len(names))]
        cells = "  ".join(f"{value:17.1f}" for value in of)
        console.print(f"{matrix.names[n]:{width}}  {cells}  {100 * shares[n].item():6.1f} %", highlight=False)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--root", help="folder of Omniglot's zip files; without, glyphs alone")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/recommendation"), help="folder of the runs and the tables"
    )
    parser.add_argument("--tasks", type=int, default=600, help="of the matrix")
    parser.add_argument("--scale", type=float, default=1.0, help="of all numbers of meta-updates")
    parser.add_argument("--only", default="", help="these learners, separated by commas")
    parser.add_argument("--held_out", type=float, default=0.3, help="share of the tasks that nothing is learned from")
    parser.add_argument("--probes", default="2,4", help="learners measured on a held-out task, of each trial")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    return parser.parse_args()


def main() -> None:
    args, console = arguments(), wide_console()
    torch.set_num_threads(args.threads)
    folders = make(args, console)
    matrix = Matrix.load(folders, labels(folders))
    write_atomically(args.out / "matrix.csv", as_csv(matrix))
    show(matrix, list(domains(args.root)), console)
    for probes in args.probes.split(","):
        out = args.out / f"held-out-{probes}-probes"
        own = ["--held_out", str(args.held_out), "--probes", probes, "--out", str(out)]
        recommend.main(["--runs", *map(str, folders), *own])
    sys.stdout.flush()


if __name__ == "__main__":
    main()
