"""What task embeddings are worth: every embedding with every conditioning, beside controls and oracles.

    python -m benchmarks.conditioning --root folder/of/omniglot

Each cell is a learner that is trained briefly, as long as every other one of its data, and tested on the same tasks:
with the tasks' own embeddings, with other tasks' and with a constant one. Two embeddings are controls that are trained:
a constant, which is the unconditioned learner of the same size, and the oracle, which is told the group of the task.
What is there is not done again: stopped at any moment and started again, it goes on. Without --root there are functions
alone: tasks of the embedded characters are of no groups that training and test share.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from app import evaluate
from app.cli.failures import one_line_errors
from app.evaluate import loss_by
from app.runs.directory import EVALUATIONS, RESULTS, slug
from app.runs.evaluation_record import Evaluation, refuse_other_tasks
from benchmarks.console import wide_console
from benchmarks.small_runs import trained
from datamodules.core.errors import ConfigError
from datamodules.core.files import write_atomically
from models.core.checkpoint_io import CHECKPOINTS
from models.core.metrics import interval
from models.core.task_kinds import KINDS

TABLE = "conditioning.csv"
CONSTANT, ORACLE = "ConstantEmbedding", "TaskLabel"
CONTROLS = ("shuffled", "constant")
SIZE = 32  # of embeddings that have none of their own
SEED = 0
Part = dict[str, Any]


def part(name: str, **settings: Any) -> Part:
    """A class of models with its settings, as a configuration has it."""
    return {"class_path": f"models.{name}", "init_args": settings}


CONDITIONINGS = {  # each with the learner of gradient steps that it conditions
    "Attenuation": (part("Attenuation"), "MAML"),
    "LowRank": (part("LowRank"), "MAML"),
    "EmbeddingRows": (part("EmbeddingRows"), "MAML"),
    "Experts": (part("Experts"), "MAML"),
    "Modulation film": (part("Modulation", form="film"), "MAML"),
    "Modulation sigmoid": (part("Modulation", form="sigmoid"), "MAML"),
    "Modulation softmax": (part("Modulation", form="softmax"), "MAML"),
    "Rates": (part("Rates"), "MAML, learned rates"),
    "UpdateRule": (part("UpdateRule"), "ALFA"),
}


@dataclass(frozen=True, eq=False)
class Problem:
    """Data, and what is trained on them.

    Attributes:
        name: of the data in the table.
        kind: of the tasks.
        data: the data module.
        updates: meta-updates of every cell.
        pretrained: the learner whose embedding ``TrainedEmbedding`` is, and its meta-updates.
        embeddings: by name, each with its size, which ALFA is told; 0 where ALFA reads as much without it.
        learners: by name, what is conditioned.
    """

    name: str
    kind: str
    data: Part
    updates: int
    pretrained: tuple[Part, int]
    embeddings: Mapping[str, tuple[Part, int]]
    learners: Mapping[str, Part]


def functions() -> Problem:
    """Five families of functions, which the oracle is told."""
    size = [40, 40]
    steps = {"inner_rate": 0.01, "inner_steps": 2}
    mlp = part("MLP", in_features=1, hidden=size)
    cavia = part(
        "CAVIA", backbone=part("MLP", in_features=6, hidden=size), outputs=1, context_size=5, inner_rate=0.1, clamp=10.0
    )
    maml = {"backbone": mlp, "outputs": 1, **steps, "inner_clip": 10.0}
    return Problem(
        "five families, 10-shot",
        "regression",
        {"class_path": "datamodules.FiveFamily", "init_args": {"shots": 10, "meta_batch_size": 25}},
        1500,
        (cavia, 3000),
        {
            CONSTANT: (part(CONSTANT, size=SIZE), SIZE),
            "SetEncoder": (part("SetEncoder", backbone=part("MLP", in_features=2, hidden=size), size=SIZE), SIZE),
            "RecurrentEncoder": (part("RecurrentEncoder", inputs=2, hidden=SIZE // 2, layers=1), SIZE),
            "GradientMeans": (part("GradientMeans"), 0),
            "TrainedEmbedding": (part("TrainedEmbedding", learner=cavia), 5),
            ORACLE: (part(ORACLE, groups=5), 5),
        },
        {
            "MAML": part("MAML", **maml),
            "MAML, learned rates": part("MAML", **maml, learned_rates=True),
            "ALFA": part("ALFA", backbone=mlp, outputs=1, **steps),
        },
    )


def characters(root: str) -> Problem:
    """Five characters of one of Omniglot's 50 alphabets, which the oracle is told; test on characters never seen."""
    conv4 = part("Conv4", in_channels=1, image_size=28, hidden=16, flatten=True)
    steps = {"inner_rate": 0.1, "inner_steps": 2}
    # A prototypical network: without modulation its embedding is the mean of the prototypes.
    prototypes = part("TADAM", backbone=conv4, conditioned=False)
    settings = {"protocol": "maml", "within_alphabets": True, "rotations": "none", "root": root}
    shape = {"ways": 5, "shots": 1, "queries": 5, "meta_batch_size": 8}
    return Problem(
        "Omniglot within alphabets, 5-way 1-shot",
        "classification",
        {"class_path": "datamodules.Omniglot", "init_args": settings | shape},
        500,
        (prototypes, 500),
        {
            CONSTANT: (part(CONSTANT, size=SIZE), SIZE),
            "SetEncoder": (part("SetEncoder", backbone=conv4, size=SIZE), SIZE),
            "GradientMeans": (part("GradientMeans"), 0),
            "PrototypeMean": (part("PrototypeMean"), 64),
            "TrainedEmbedding": (part("TrainedEmbedding", learner=prototypes), 64),
            ORACLE: (part(ORACLE, groups=50), 50),
        },
        {
            "MAML": part("MAML", backbone=conv4, outputs=5, **steps),
            "MAML, learned rates": part("MAML", backbone=conv4, outputs=5, **steps, learned_rates=True),
            "ALFA": part("ALFA", backbone=conv4, outputs=5, **steps),
            "ProtoNet": part("ProtoNet", backbone=conv4, batch_norm="transductive"),
        },
    )


@dataclass(frozen=True)
class Cell:
    """One training and its tests.

    Attributes:
        problem: what is learned from.
        learner, embedding, conditioning: their names.
    """

    problem: Problem
    learner: str
    embedding: str
    conditioning: str

    @property
    def name(self) -> str:
        """Of its run."""
        return slug([self.problem.kind, self.learner, self.embedding, self.conditioning]).lower()

    @property
    def controls(self) -> tuple[str, ...]:
        """What else it is tested with; a constant embedding has no other."""
        return () if self.embedding == CONSTANT else CONTROLS

    def config(self, ckpt_path: Path) -> dict[str, Any]:
        """Of its training.

        Args:
            ckpt_path: of the learner whose embedding is ``TrainedEmbedding``.
        """
        embedding, size = self.problem.embeddings[self.embedding]
        learner = self.problem.learners[self.learner]
        if self.embedding == "TrainedEmbedding":
            embedding = with_settings(embedding, ckpt_path=str(ckpt_path))
        if self.learner == "ALFA":
            learner = with_settings(learner, code_size=size)
        parts = {"embedding": embedding, "conditioning": CONDITIONINGS[self.conditioning][0], "learner": learner}
        return configuration(part("Conditioned", **parts), self.problem)


def with_settings(of: Part, **settings: Any) -> Part:
    return {**of, "init_args": of["init_args"] | settings}


def configuration(model: Part, problem: Problem) -> dict[str, Any]:
    """Of a training that validates and tests as little as it can: tests of their own follow."""
    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.002}}
    return {
        "model": with_settings(model, optimizer=adam),
        "data": with_settings(problem.data, val_tasks=2, test_tasks=2, eval_batch_size=50),
        "trainer": {"gradient_clip_val": 2.0},
    }


def cells(problem: Problem) -> list[Cell]:
    """All that make sense, those of a learner and a conditioning together."""
    found = []
    for learner in problem.learners:
        for conditioning, (_, of) in CONDITIONINGS.items():
            metric = learner == "ProtoNet" and of == "MAML"  # it has no rates and no update rule
            if learner != of and not metric:
                continue
            for embedding, (_, size) in problem.embeddings.items():
                if embedding == "GradientMeans" and metric:  # it has no support loss
                    continue
                if size or learner != "ALFA":
                    found.append(Cell(problem, learner, embedding, conditioning))
    return found


# Trainings and tests --------------------------------------------------------------------------------------------------


def folders(runs: Path, cell: Cell, tasks: int) -> dict[str, Path]:
    """Where the tests of a cell are, "own" and by its controls."""
    at = runs / cell.name / EVALUATIONS
    words = ["tasks", str(tasks)]
    return {"own": at / slug(["last", *words])} | {c: at / slug(["last", c, *words]) for c in cell.controls}


def make(chosen: Sequence[Cell], args: argparse.Namespace, console: Console) -> None:
    """Train and test what is not there yet."""
    runs = args.out / "runs"
    for number, cell in enumerate(chosen):
        if all((folder / RESULTS).is_file() for folder in folders(runs, cell, args.tasks).values()):
            continue
        begin, problem = time.process_time(), cell.problem
        first = slug([problem.kind, "trained-embedding"])
        if cell.embedding == "TrainedEmbedding":
            train(runs, first, configuration(problem.pretrained[0], problem), problem.pretrained[1], args)
        checkpoint = train(
            runs, cell.name, cell.config((runs / first / CHECKPOINTS / "last.ckpt").absolute()), problem.updates, args
        )
        controls = ["--controls"] if cell.controls else []
        evaluate.main(["--ckpt_path", str(checkpoint), "--tasks", str(args.tasks), *controls])
        seconds = time.process_time() - begin
        console.print(f"{cell.name}: {seconds:.0f} s of the processor, {number + 1} of {len(chosen)}", highlight=False)


def train(runs: Path, name: str, content: dict[str, Any], updates: int, args: argparse.Namespace) -> Path:
    steps = max(1, round(updates * args.scale))
    return trained(runs, name, steps, SEED, ["--config", yaml.safe_dump(content)])


def keep_settings(args: argparse.Namespace) -> None:
    """See that what is in the folder was trained as long as what is to come.

    Raises:
        ConfigError: it was not.
    """
    path, settings = args.out / "settings.json", {"scale": args.scale}
    if path.is_file() and (known := json.loads(path.read_text())) != settings:
        raise ConfigError(f"{args.out} has trainings of --scale {known['scale']}: give the same, or another --out")
    write_atomically(path, json.dumps(settings))


# The table ------------------------------------------------------------------------------------------------------------

HEAD = (
    *("data", "learner", "embedding", "conditioning", "own", "loss with another task's", "loss with a constant"),
    *("gain over unconditioned", "oracle's gain over it", "verdict"),
)
KEPT = ("seed", "processor", "tasks", "meta-updates")


def rows(chosen: Sequence[Cell], runs: Path, tasks: int) -> list[list[str]]:
    """The cells of the table, as text; a loss or a gain is paired by task, and positive where it is one."""
    tests = {c: {k: Evaluation.load(f) for k, f in folders(runs, c, tasks).items()} for c in chosen}
    for kind in {cell.problem.kind for cell in chosen}:
        refuse_other_tasks([one for cell in chosen if cell.problem.kind == kind for one in tests[cell].values()])
    return [row(cell, tests, tasks) for cell in chosen]


def row(cell: Cell, tests: Mapping[Cell, Mapping[str, Evaluation]], tasks: int) -> list[str]:
    """The text of a cell, from the tests of all."""
    own, metric = tests[cell]["own"], KINDS[cell.problem.kind].headline
    declared = own.declared[metric]

    def over(better: Evaluation | None, worse: Evaluation | None) -> str:
        if better is None or worse is None or better is worse:
            return "–"
        return declared.text(*loss_by(worse, better, metric)[:2], signed=True)

    unconditioned, oracle = (tests.get(replace(cell, embedding=e), {}).get("own") for e in (CONSTANT, ORACLE))
    told = json.loads((own.folder / RESULTS).read_text())
    return [
        *(cell.problem.name, cell.learner, cell.embedding, cell.conditioning),
        declared.text(*interval(own.metrics[metric])),
        *(over(own, tests[cell].get(control)) for control in CONTROLS),
        *(over(own, unconditioned), over(oracle, own)),
        verdict(own, [tests[cell][control] for control in cell.controls], metric),
        *(str(SEED), told["processor"], f"{tasks:,}", f"{told['meta_steps']:,}"),
    ]


def verdict(own: Evaluation, controls: Sequence[Evaluation], metric: str) -> str:
    """Whether an embedding matters: it does if the learner loses by every control."""
    if not bool(own.metrics[metric].isfinite().all()):
        return "diverged"
    if not controls:
        return "–"
    return "matters" if all(loss_by(control, own, metric)[2] for control in controls) else "decorative"


def as_csv(found: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[*HEAD, *KEPT], *found])
    return text.getvalue()


def show(found: Sequence[Sequence[str]], console: Console) -> None:
    """A table for each data set."""
    for data in dict.fromkeys(row[0] for row in found):
        table = Table(title=data, title_justify="left")
        for place, name in enumerate(HEAD[1:]):
            table.add_column(name, justify="right" if 3 <= place < 8 else "left")
        for row in found:
            if row[0] == data:
                table.add_row(*row[1 : len(HEAD)])
        console.print(table)


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--root", help="folder of Omniglot's zip files; without, functions alone")
    parser.add_argument("--out", type=Path, default=Path("runs/conditioning"), help="folder of the runs and the table")
    parser.add_argument("--results", type=Path, help=f"where {TABLE} is copied to, as docs/results")
    parser.add_argument("--tasks", type=int, default=1000, help="of each test")
    parser.add_argument("--scale", type=float, default=1.0, help="of all numbers of meta-updates")
    parser.add_argument("--only", default="*", help="cells whose names match one of these patterns, as *-film,*-rates")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """``python -m benchmarks.conditioning``."""
    args, console = arguments(words), wide_console()
    torch.set_num_threads(args.threads)
    with one_line_errors(debug=False):
        problems = [functions(), *([characters(args.root)] if args.root else [])]
        every = [cell for problem in problems for cell in cells(problem)]
        chosen = [cell for cell in every if any(fnmatch(cell.name, pattern) for pattern in args.only.split(","))]
        if not chosen:
            raise ConfigError(f"--only {args.only} matches no cell: give a pattern of names as {every[0].name}")
        keep_settings(args)
        make(chosen, args, console)
        found = rows(chosen, args.out / "runs", args.tasks)
        for folder in (args.out, *([args.results] if args.results else [])):
            write_atomically(folder / TABLE, as_csv(found))
    show(found, console)


if __name__ == "__main__":
    main()
