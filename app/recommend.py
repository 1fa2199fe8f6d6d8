"""Which of the learners at hand to take for a task: ``python -m app.recommend --runs runs/* --support DIR``.

What several learners had on the same meta-test tasks is a matrix, learners by tasks. A model of it (collaborative
filtering) knows which learners do well on the same tasks, so a few of them, measured on the new task, tell what to
expect of all. They are measured on the support pictures alone, divided again and again into some to learn from and
others to be asked about. ``--held_out SHARE`` tells how good such recommendations are on tasks of the matrix itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from app.cli.builder import quiet_lightning
from app.cli.failures import one_line_errors
from app.cli.from_checkpoint import Trained, open_checkpoint
from app.compare import beside, labels, run_of, tested
from app.plots import results, style
from app.predict import build, read, support_files
from app.runs.accuracy_matrix import LEAST_TASKS, Matrix
from app.runs.directory import CONFIG, RECOMMENDATIONS, RESULTS, out_folder, slug
from app.runs.evaluation_record import Evaluation
from datamodules.core.base import shape_text
from datamodules.core.episodes import Support
from datamodules.core.errors import ConfigError
from datamodules.core.files import write_atomically
from datamodules.core.metric import Metric
from models.core.checkpoint_io import CHECKPOINTS
from models.core.metrics import interval
from models.core.shapes import fits
from models.task_embedding.collaborative_filtering import (
    Belief,
    ColumnModel,
    MatrixFactorization,
    choose,
    factorizations,
    latent_variable_models,
)
from models.task_embedding.recommendation import Trial, error_of_measuring, probe, try_out

SHARE = Metric("higher", share=True)
MODELS = {"pmf": "matrix factorisation", "gplvm": "GP latent variables"}
NEAREST_SHOWN = 3


def fitted(by: str, accuracy: Tensor, probes: int) -> tuple[ColumnModel, list[float]]:
    """A model of accuracies (N, T), of the settings by which held-out entries are told best; and all errors."""
    learners, tasks = accuracy.shape
    candidates = factorizations(learners, tasks) if by == "pmf" else latent_variable_models(learners)
    return choose(candidates, accuracy, probes)


def facts_of(model: ColumnModel, errors: Sequence[float]) -> dict[str, Any]:
    """What is written of a model."""
    settings = {n: getattr(model, n) for n in ("rank", "penalty", "latents") if hasattr(model, n)}
    return {**settings, "noise": math.sqrt(model.noise), "held_out_rmse": min(errors)}


# On the matrix's own tasks --------------------------------------------------------------------------------------------


def held_out(matrix: Matrix, share: float, probes: int, seed: int) -> dict[str, Any]:
    """How much accuracy recommendations cost on tasks that nothing was learned from, ready for JSON.

    Raises:
        ConfigError: so many tasks are held out that too few are left, or none.
    """
    tasks = matrix.accuracy.shape[1]
    count = round(share * tasks)
    if count < 2 or tasks - count < LEAST_TASKS:
        raise ConfigError(
            f"--held_out {share} of {tasks} tasks leaves {tasks - count} to learn from and {count} to try: two or more "
            f"are tried, and {LEAST_TASKS} or more learned from; give another share, or test on more --tasks"
        )
    order = torch.randperm(tasks, generator=torch.Generator().manual_seed(seed))
    new, known = matrix.accuracy[:, order[:count]], matrix.accuracy[:, order[count:]]
    found = {MODELS[by]: fitted(by, known, probes) for by in MODELS}
    models = {name: model for name, (model, _) in found.items()}
    trial = try_out(known, new, matrix.queries, models, probes, seed)
    best = matrix.names[int(known.nanmean(1).argmax())]
    content = {"known": tasks - count, "held_out": count, "best_on_average": best, "ways_to_decide": _regrets(trial)}
    content["models"] = {
        name: facts_of(*found[name])
        | {
            "rmse": _known(trial.errors[name].square().mean().sqrt().item()),
            "coverage": _known(trial.covered[name]),
            "probed": dict(zip(matrix.names, (trial.probed[name] / count).tolist(), strict=True)),
        }
        for name in models
    }
    return content


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _regrets(trial: Trial) -> list[dict[str, Any]]:
    """Of each way to decide its accuracy, its regret, and by how much that is below the best on average's."""
    rows = []
    for name, accuracy in trial.accuracy.items():
        numbers = {
            "accuracy": accuracy,
            "regret": trial.accuracy["oracle"] - accuracy,
            "gain": accuracy - trial.accuracy["best on average"],
        }
        told = {n: dict(zip(("mean", "ci95"), interval(values), strict=True)) for n, values in numbers.items()}
        rows.append({"way": name, **told})
    return rows


def show_held_out(content: dict[str, Any], console: Console) -> None:
    table = Table(
        title=f"{content['held_out']:,} held-out tasks, {content['known']:,} learned from, {content['probes']} probes",
        title_justify="left",
    )
    table.add_column("chosen by", overflow="fold")
    for column in ("accuracy", "regret", "gain over the best on average"):
        table.add_column(column, justify="right")
    for row in content["ways_to_decide"]:
        gain = row["gain"]
        mark = " *" if abs(gain["mean"]) > gain["ci95"] else ""
        told = [SHARE.text(*row[n].values()) for n in ("accuracy", "regret")]
        own = row["way"] + (f" ({content['best_on_average']})" if row["way"] == "best on average" else "")
        table.add_row(Text(own), *told, SHARE.text(*gain.values(), signed=True) + mark)
    console.print(table)
    console.print("mean ± 95 % interval over tasks, differences paired by task; * it excludes zero", highlight=False)
    for name, facts in content["models"].items():
        if facts["rmse"] is None:  # every learner was measured
            continue
        told = f"{name}: error of unmeasured entries {100 * facts['rmse']:.2f} points (root mean square), "
        console.print(told + f"{100 * facts['coverage']:.1f} % of them in their 95 % intervals", highlight=False)


# On a user's task -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """A labelled task and how it is divided.

    Attributes:
        files: by class.
        shots: pictures of each class that are learned from in a division, (ways,).
        splits: of each division which pictures are learned from, (splits, pictures) bool.
    """

    files: dict[str, list[Path]]
    shots: list[int]
    splits: Tensor

    @classmethod
    def load(cls, root: Path, shots: int, splits: int, seed: int) -> Pictures:
        """From a folder with one folder for each class.

        Raises:
            ConfigError: what keeps it from being a task, or from being divided.
        """
        files, _ = support_files(root)
        for name, members in files.items():
            if len(members) < 2:
                raise ConfigError(
                    f"class {name!r} of {root} has one picture: a class needs two or more, to learn from some and to "
                    "be asked about the others"
                )
        rng = np.random.default_rng(seed)
        counts = [min(shots, len(members) - 1) for members in files.values()]
        rows = []
        for _ in range(splits):
            parts = [
                rng.permutation(len(members)) < count for members, count in zip(files.values(), counts, strict=True)
            ]
            rows.append(torch.from_numpy(np.concatenate(parts)))
        return cls(files, counts, torch.stack(rows))

    @property
    def labels(self) -> Tensor:
        """Of each picture its class, (pictures,)."""
        return torch.arange(len(self.files)).repeat_interleave(torch.tensor([len(m) for m in self.files.values()]))

    @torch.inference_mode()
    def measure(self, trained: Trained, device: str) -> tuple[float, float]:
        """A learner's accuracy, each class counting alike, and the variance of its error, by the number of pictures."""
        settings = trained.config["model"].get("init_args") or {}
        options = argparse.Namespace(
            ckpt_path=str(trained.path), out=None, debug=False, batch_norm=None, inner_steps=None, data=None
        )
        # In the mode that it was tested in: prediction would take another one for batch norm by the queries.
        keys = [f"--model.init_args.batch_norm={settings['batch_norm']}"] if "batch_norm" in settings else []
        learner, data = build(trained, options, keys)
        try:
            learner = learner.to(device).eval()
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device {device!r} cannot be used here: give --device cpu") from error
        x = read([file for members in self.files.values() for file in members], data).to(device)
        y = self.labels.to(device)
        fits(learner, x)
        right, asked = torch.zeros(len(x)), torch.zeros(len(x))
        for part in self.splits.to(device):
            state = learner.adapt(Support(x[part], y[part], len(self.files)))
            predicted = learner.predict(state, x[~part]).argmax(-1)
            right[~part.cpu()] += (predicted == y[~part]).cpu()
            asked[~part.cpu()] += 1
        of_classes = [
            (right[self.labels == k].sum() / asked[self.labels == k].sum()).item() for k in range(len(self.files))
        ]
        accuracy = torch.tensor(of_classes, dtype=torch.float64).mean()
        return accuracy.item(), error_of_measuring(accuracy, len(x)).item()


def checkpoint_of(evaluation: Evaluation) -> Trained:
    """The checkpoint that was tested, with the configuration of that test.

    Raises:
        ConfigError: it is not there, or not the one that was tested.
    """
    folder = evaluation.folder
    try:
        told = json.loads((folder / RESULTS).read_text())
        named = told.get("checkpoint")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{folder / RESULTS} cannot be read ({type(error).__name__}): test again") from error
    if named is None:
        raise ConfigError(f"{folder} was tested without a checkpoint, which a recommendation needs: leave it out")
    # A run may have been moved, or be seen from another folder, since.
    places = [run_of(folder) / CHECKPOINTS / Path(named).name, Path(named)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ConfigError(f"the checkpoint {named} that {folder} is a test of is gone: bring it back, or leave it out")
    trained = open_checkpoint(path)
    if "checkpoint_sha256" not in told:
        return trained
    if told["checkpoint_sha256"] != trained.identity:
        raise ConfigError(f"{path} is not the checkpoint any more that {folder} is a test of: evaluate it again")
    try:
        config = yaml.safe_load((folder / CONFIG).read_text())
        return Trained(
            path, trained.identity, trained.content, trained.config | {n: config[n] for n in ("model", "data")}
        )
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"{folder / CONFIG} cannot be read ({type(error).__name__}): evaluate again") from error


def recommend(matrix: Matrix, model: ColumnModel, pictures: Pictures, probes: int, device: str) -> dict[str, Any]:
    """Measure some learners on the pictures and tell what to expect of all, ready for JSON."""
    console, measuring = Console(), matrix.measuring(matrix.accuracy)
    prior = model.belief(measuring)
    count = len(pictures.labels)
    typical = error_of_measuring(matrix.accuracy.nanmean(), count).item()
    checkpoints = [checkpoint_of(one) for one in matrix.evaluations]  # first: one that is gone is told before the work
    expected: dict[int, tuple[float, float]] = {}

    def measure(row: int) -> tuple[float, float]:
        name = matrix.names[row]
        try:
            accuracy, variance = pictures.measure(checkpoints[row], device)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        console.print(Text(f"measured {name}: {100 * accuracy:.1f} %"), soft_wrap=True)
        expected[row] = prior.mean[row].item(), prior.deviation()[row].item()
        return accuracy, variance

    found, belief = probe(prior, probes, measure, range(len(matrix.names)), typical)
    deviation = belief.deviation()
    best_with = _chance_of_best(belief)
    learners = [
        {
            "learner": name,
            "algorithm": matrix.evaluations[n].about["algorithm"],
            "folder": str(matrix.evaluations[n].folder),
            "checkpoint": str(checkpoints[n].path),
            "expected": belief.mean[n].clamp(0, 1).item(),
            "low": (belief.mean[n] - 1.96 * deviation[n]).clamp(0, 1).item(),
            "high": (belief.mean[n] + 1.96 * deviation[n]).clamp(0, 1).item(),
            "best_with": best_with[n].item(),
            "measured": found[n][0] if n in found else None,
            "on_average": matrix.accuracy[n].nanmean().item(),
        }
        for n, name in enumerate(matrix.names)
    ]
    learners.sort(key=lambda row: -row["expected"])
    probed = [
        {
            "learner": matrix.names[n],
            "measured": accuracy,
            "expected_before": expected[n][0],
            "ci95_before": 1.96 * expected[n][1],
        }
        for n, (accuracy, _) in found.items()
    ]
    return {
        "classes": {name: len(members) for name, members in pictures.files.items()},
        "shots": pictures.shots,
        "splits": len(pictures.splits),
        "learners": learners,
        "probed": probed,
        "nearest": _nearest(matrix, model, belief, measuring),
    }


def _chance_of_best(belief: Belief, samples: int = 4000) -> Tensor:
    """The probability of each learner to be the best one, (N,)."""
    values, vectors = torch.linalg.eigh(belief.covariance)
    noise = torch.randn(samples, len(values), dtype=values.dtype, generator=torch.Generator().manual_seed(0))
    drawn = belief.mean + (noise * values.clamp(min=0).sqrt()) @ vectors.T
    return torch.bincount(drawn.argmax(1), minlength=len(values)) / samples


def _nearest(matrix: Matrix, model: ColumnModel, belief: Belief, measuring: float) -> list[dict[str, Any]]:
    """Known tasks by the mean difference of what is expected of all learners there and here."""
    prior, columns = model.belief(measuring), []
    for column in matrix.accuracy.unbind(1):
        rows = (~column.isnan()).nonzero()[:, 0].tolist()
        columns.append(prior.given(rows, column[rows], measuring).mean)
    of_tasks = torch.stack(columns, 1)
    away = (of_tasks - belief.mean[:, None]).square().mean(0).sqrt()
    names = matrix.task_names()
    return [
        {
            "task": names[t],
            "difference": away[t].item(),
            "best": matrix.names[int(matrix.accuracy[:, t].nan_to_num(-1).argmax())],
        }
        for t in away.argsort()[:NEAREST_SHOWN].tolist()
    ]


def show(content: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{len(content['classes'])} classes, {sum(content['classes'].values())} pictures")
    table.title_justify = "left"
    table.add_column("learner", overflow="fold")
    for column in ("expected accuracy", "95 % interval", "chance of best", "measured"):
        table.add_column(column, justify="right")
    for row in content["learners"]:
        table.add_row(
            Text(row["learner"]),
            SHARE.short(row["expected"]),
            f"{100 * row['low']:.1f} to {100 * row['high']:.1f} %",
            f"{100 * row['best_with']:.0f} %",
            "" if row["measured"] is None else SHARE.short(row["measured"]),
        )
    console.print(table)
    lines = [
        f"{row['learner']}: measured {100 * row['measured']:.1f} %, expected before "
        f"{100 * row['expected_before']:.1f} ± {100 * row['ci95_before']:.1f} %"
        for row in content["probed"]
    ]
    lines += [
        f"a known task nearby, {100 * row['difference']:.1f} points away: {row['task']}; best there: {row['best']}"
        for row in content["nearest"]
    ]
    for line in (*lines, *content["notes"]):
        console.print(Text(line), soft_wrap=True)
    best = content["learners"][0]
    console.print(Text(f"recommended: {best['learner']} ({best['checkpoint']})", style="bold"), soft_wrap=True)


def notes(matrix: Matrix, pictures: Pictures) -> list[str]:
    """What makes this task unlike the known ones."""
    about, ways, shots = matrix.about, len(pictures.files), sorted(set(pictures.shots))
    if [ways, *shots] == [about["ways"], about["shots"]]:
        return []
    of_each = " or ".join(map(str, shots))
    return [
        f"known tasks have {about['ways']} classes and {about['shots']} support pictures of each, this one {ways} and "
        f"{of_each}: what is expected reaches beyond them"
    ]


# The command ----------------------------------------------------------------------------------------------------------


def write(out: Path, name: str, content: dict[str, Any], rows: Sequence[tuple[str, float, float]], label: str) -> str:
    """JSON and the figure; their names.

    Raises:
        OSError: they cannot be written.
    """
    write_atomically(out / f"{name}.json", json.dumps(content, indent=2) + "\n")
    over = f"{content['data']}, {content['tasks']:,} known tasks"
    style.save(results.ranking(rows, label, over), out / f"{name}.png")
    return f"{name}.json, .png"


def refuse_options(options: argparse.Namespace) -> None:
    """See whether the options say one thing, before any work.

    Raises:
        ConfigError: they do not, or what is wrong with the folder of pictures.
    """
    if (options.support is None) == (options.held_out is None):
        raise ConfigError("give --support, a folder of pictures, or --held_out, a share of the tasks: one of the two")
    if options.held_out is not None and not 0 < options.held_out < 1:
        raise ConfigError(f"--held_out is {options.held_out} but must be a share, between 0 and 1")
    for name in ("probes", "splits", "shots"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ConfigError(f"--{name} is {value} but must be at least 1")
    if options.support is not None:
        Pictures.load(options.support, 1, 1, 0)


def run(options: argparse.Namespace, command: str) -> None:
    """What the options say.

    Raises:
        ConfigError: what the user can mend.
    """
    refuse_options(options)
    folders, console = tested(options.runs, "a recommendation"), Console()
    matrix = Matrix.load(folders, labels(folders))
    about, shape = matrix.about, shape_text(matrix.about)
    told = f"{len(matrix.names)} learners on {about['data']}{', ' if shape else ''}{shape}"
    console.print(f"{told}: the same {about['tasks']:,} meta-test tasks", highlight=False, soft_wrap=True)
    probes = min(options.probes, len(matrix.names))
    content = {**about, "learner_names": matrix.names, "probes": probes, "seed_of_splits": options.seed}
    content |= {"command": command, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    factors = None
    if options.support is None:
        content |= held_out(matrix, options.held_out, probes, options.seed)
        show_held_out(content, console)
        name, label, place = "regret", "regret on held-out tasks", "held-out"
        rows = [(row["way"], row["regret"]["mean"], row["regret"]["ci95"]) for row in content["ways_to_decide"]]
    else:
        pictures = Pictures.load(options.support, options.shots or about["shots"], options.splits, options.seed)
        model, errors = fitted(options.by, matrix.accuracy, probes)
        content |= recommend(matrix, model, pictures, probes, options.device)
        content |= {"model": {"by": options.by, **facts_of(model, errors)}, "notes": notes(matrix, pictures)}
        content |= {"support_folder": os.fsencode(options.support.resolve()).decode("utf-8", "backslashreplace")}
        show(content, console)
        name, label, place = "recommendation", "expected accuracy", slug([options.support.resolve().name]) or "task"
        rows = [(row["learner"], row["expected"], row["high"] - row["expected"]) for row in content["learners"]]
        if isinstance(model, MatrixFactorization):
            factors = matrix.factors_npz(model)
    out = options.out or beside(folders) / RECOMMENDATIONS / place
    try:
        written = write(out, name, content, rows, label)
        if factors is not None:
            write_atomically(out / "task_factors.npz", factors)
            written += ", task_factors.npz"
    except OSError as error:
        raise ConfigError(f"cannot write into {out} ({error.strerror}): give another --out") from error
    console.print(f"written: {out}/{written}", highlight=False, soft_wrap=True)


def main(args: Sequence[str] | None = None) -> None:
    """``python -m app.recommend``."""
    args = sys.argv[1:] if args is None else list(args)
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    quiet_lightning()
    parser = argparse.ArgumentParser(
        "python -m app.recommend",
        description="Recommend one of several tested learners for a task, by what they did on other tasks.",
        allow_abbrev=False,
    )
    parser.add_argument("--runs", nargs="+", type=Path, required=True, help="Folders of runs, or of evaluations.")
    parser.add_argument("--support", type=Path, help="The task: a folder with one folder of pictures for each class.")
    parser.add_argument("--held_out", type=float, help="In place of a task: this share of the known ones is tried.")
    parser.add_argument("--probes", type=int, default=4, help="Learners that are measured on a task.")
    parser.add_argument("--by", choices=MODELS, default="pmf", help="The model of the matrix.")
    parser.add_argument("--shots", type=int, help="Pictures of a class to learn from; by default as in known tasks.")
    parser.add_argument("--splits", type=int, default=20, help="Divisions of the pictures that are averaged.")
    parser.add_argument("--seed", type=int, default=0, help="Of the divisions, and of the tasks that are held out.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps.")
    parser.add_argument("--out", type=out_folder, help="Folder for what is written; by default one beside the runs.")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error, too.")
    options = parser.parse_args(args)
    with one_line_errors(options.debug):
        run(options, shlex.join(["python", "-m", "app.recommend", *args]))


if __name__ == "__main__":
    main()
