"""Compare learners on the same tasks: ``python -m app.compare runs/a runs/b …``, from what their tests left behind.

Tasks differ more among themselves than learners do on one task, so differences are paired: an interval of the
difference on the same tasks is much narrower than those of the two metrics suggest.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor

from app.cli.failures import one_line_errors
from app.dashboard.reinforcement import optimum_of
from app.plots import reinforcement as figures_rl
from app.plots import results, sequences, style
from app.runs.directory import COMPARISONS, CONFIG, EVALUATIONS, RECOMMENDATIONS, out_folder, slug
from app.runs.evaluation_record import SETTINGS, Evaluation, refuse_other_tasks
from datamodules.core.base import shape_text
from datamodules.core.errors import ConfigError
from datamodules.core.files import write_atomically
from datamodules.core.metric import Metric
from models.core.metrics import POOLS, aggregate, as_results, interval, resampled


def difference(metric: Metric, first: Tensor, second: Tensor) -> tuple[float, float]:
    """First minus second and the half-width of its 95 % interval, paired by task; of pooled metrics by resamples.

    Args:
        metric: what they are; of one that is pooled, counts.
        first, second: of each task, (T, …).
    """
    first, second = first.double(), second.double()
    if metric.pooled is None:
        return interval(first - second)
    pooled = POOLS[metric.pooled]
    half = 1.96 * (resampled(first, pooled) - resampled(second, pooled)).std()
    return (pooled(first.sum(0)) - pooled(second.sum(0))).item(), half.item()


def labels(folders: Sequence[Path]) -> list[str]:
    """A short name for each folder: its run's, with what tells its evaluation from the others where that is needed."""
    places = [run_of(folder) for folder in folders]
    numbers = any(place.name.isdigit() for place in places)  # "1" says little, and reads as a number
    runs = [str(Path(place.parent.name, place.name)) if numbers else place.name for place in places]
    words = [folder.name.split("-") if folder.absolute().parent.name == EVALUATIONS else [] for folder in folders]
    while all(len(of) > 1 for of in words) and len({of[-1] for of in words}) == 1:
        words = [of[:-1] for of in words]  # what all were evaluated with
    own = [f"{run} {'-'.join(of)}".rstrip() for run, of in zip(runs, words, strict=True)]
    return next((names for names in (runs, own) if len(set(names)) == len(names)), [str(f) for f in folders])


def run_of(folder: Path) -> Path:
    """The run's folder of a test: itself, or the one that an evaluation was left in."""
    folder = folder.absolute()
    return folder.parent.parent if folder.parent.name == EVALUATIONS else folder


OF_A_SEED = ("seed_everything", "name", "runs", "wandb", "project", "pictures", "debug")


def over_seeds(evaluations: Sequence[Evaluation]) -> list[list[int]]:
    """Places of evaluations whose runs differ by the seed of their weights and nothing else, two or more in a group."""
    groups: dict[str, list[int]] = {}
    seeds = []
    for place, one in enumerate(evaluations):
        run = run_of(one.folder)
        try:
            # One that was resumed with other settings has several.
            files = [run / CONFIG, *sorted(run.glob("config.resume-*.yaml"))]
            configs = [yaml.safe_load(file.read_text()) for file in files]
            kept = [{k: v for k, v in config.items() if k not in OF_A_SEED} for config in configs]
            seeds.append([config.get("seed_everything") for config in configs])
        except (OSError, AttributeError, UnicodeDecodeError, yaml.YAMLError):
            seeds.append([])
            continue  # of a run that is not there any more
        of_folder = one.folder.name if one.folder.absolute().parent.name == EVALUATIONS else ""
        groups.setdefault(json.dumps([of_folder, kept], sort_keys=True, default=str), []).append(place)
    apart = [group for group in groups.values() if len({str(seeds[place]) for place in group}) == len(group)]
    return [group for group in apart if len(group) > 1]


def seed_means(evaluations: Sequence[Evaluation], names: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """Means of groups of runs over their seeds, and paired differences of each two groups.

    A mean's interval is over tasks, of each task's mean over seeds: what other tasks would give these runs. Its
    deviation is over seeds: what other seeds would give on these tasks.
    """
    groups = over_seeds(evaluations)
    common = [os.path.commonprefix([names[i] for i in group]) for group in groups]  # noqa: RUF071 (names, not paths)
    labels_of = [f"{c.rstrip('-_/ ') or names[g[0]]} ×{len(g)}" for c, g in zip(common, groups, strict=True)]
    means, of_tasks = [], []
    for label, group in zip(labels_of, groups, strict=True):
        several = [evaluations[i] for i in group]
        found = [aggregate(one.metrics, one.declared) for one in several]
        tables, told = {}, {}
        for metric in found[0]:
            if f"{metric}_ci95" not in found[0] or any(metric not in other for other in found):
                continue
            values = torch.tensor([other[metric] for other in found], dtype=torch.float64)
            told[metric] = _numbers(values.mean().item(), math.nan) | {"seed_deviation": values.std().item()}
            if metric in several[0].metrics and len({len(one.metrics[metric]) for one in several}) == 1:
                tables[metric] = torch.stack([one.metrics[metric].double() for one in several]).mean(0)
                told[metric] |= _numbers(*interval(tables[metric]))
        means.append({"learner": label, "runs": [names[i] for i in group], "metrics": told})
        of_tasks.append(tables)
    differences = []
    for i, j in itertools.combinations(range(len(groups)), 2):
        shared = [m for m in of_tasks[i] if m in of_tasks[j] and len(of_tasks[i][m]) == len(of_tasks[j][m])]
        told = {m: _numbers(*interval(of_tasks[i][m] - of_tasks[j][m])) for m in shared}
        differences.append({"learner": labels_of[i], "minus": labels_of[j], "metrics": told})
    return means, differences


def compare(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Metrics of each learner and paired differences of each two, ready for JSON; likewise of runs over their seeds.

    Raises:
        ConfigError: they were not tested on the same tasks.
    """
    refuse_other_tasks(evaluations)
    names = labels([e.folder for e in evaluations])
    counts_of = {told.pooled: name for one in evaluations for name, told in one.declared.items() if told.pooled}
    learners, differences = [], []
    for name, one in zip(names, evaluations, strict=True):
        found = aggregate(one.metrics, one.declared)
        told = {n: _numbers(found[n], found[f"{n}_ci95"]) for n in found if f"{n}_ci95" in found}
        learners.append(
            {"learner": name, "algorithm": one.about["algorithm"], "folder": str(one.folder), "metrics": told}
        )
    for (name, one), (other_name, other) in itertools.combinations(zip(names, evaluations, strict=True), 2):
        told = {}
        for metric in learners[0]["metrics"]:
            of = counts_of.get(metric, metric)
            if of in one.metrics and of in other.metrics and len(one.metrics[of]) == len(other.metrics[of]):
                told[metric] = _numbers(*difference(one.declared[of], one.metrics[of], other.metrics[of]))
        differences.append({"learner": name, "minus": other_name, "metrics": told})
    shared = {key: evaluations[0].about.get(key) for key in SETTINGS}
    of_seeds, seed_differences = seed_means(evaluations, names)
    content = {**shared, "learners": learners, "differences": differences}
    return content | {"over_seeds": of_seeds, "seed_differences": seed_differences}


def _numbers(mean: float, half: float) -> dict[str, float | None]:
    return {"mean": None if math.isnan(mean) else mean, "ci95": None if math.isnan(half) else half}


def _text(declared: Metric, numbers: dict[str, float | None], signed: bool = False) -> str:
    mean, half = (math.nan if (value := numbers[key]) is None else value for key in ("mean", "ci95"))
    return declared.text(mean, half, signed) + (" *" if signed and abs(mean) > half else "")


def show(content: dict[str, Any], declared: Mapping[str, Metric], console: Console | None = None) -> None:
    """The tables in the terminal."""
    console = console or Console()
    shape = shape_text(content)
    over = f"{content['data']}{', ' if shape else ''}{shape}: the same {content['tasks']:,} meta-test tasks"
    names = list(dict.fromkeys(name for learner in content["learners"] for name in learner["metrics"]))
    for key, title, heading in (
        ("learners", over, "mean ± 95 % interval"),
        ("differences", "Paired differences", "first - second ± 95 % interval"),
        ("over_seeds", "Over seeds", "mean ± 95 % interval over tasks (deviation over seeds)"),
        ("seed_differences", "Paired differences of means over seeds", "first - second ± 95 % interval"),
    ):
        if not content[key]:
            continue
        table = Table(title=title, title_justify="left")
        for column in ("metric", "learner" if key in ("learners", "over_seeds") else "learners"):
            table.add_column(column, overflow="fold")
        table.add_column(heading, justify="right")
        for name in names:
            rows = [row for row in content[key] if name in row["metrics"]]
            for row in rows:
                label = f"{row['learner']} - {row['minus']}" if "minus" in row else row["learner"]
                text = _text(declared[name], row["metrics"][name], signed="minus" in row)
                if (deviation := row["metrics"][name].get("seed_deviation")) is not None:
                    text += f" ({declared[name].text(deviation, 0.0).split(' ')[0]})"
                table.add_row(name if row is rows[0] else "", label, text, end_section=row is rows[-1])
        console.print(table)
    console.print("* the interval excludes zero; each is by itself, whatever the number of pairs", highlight=False)


def as_csv(content: dict[str, Any]) -> str:
    """A line for each metric of each learner, and of each two."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["learner", "minus", "metric", "mean", "ci95"])
    for row in (row for key in ("learners", "differences", "over_seeds", "seed_differences") for row in content[key]):
        for name, metric in row["metrics"].items():
            writer.writerow([row["learner"], row.get("minus", ""), name, metric["mean"], metric["ci95"]])
    return text.getvalue()


def returns(evaluations: Sequence[Evaluation]) -> tuple[list[tuple[str, Tensor]], Tensor | None] | None:
    """Of tests in environments, the name of each and its returns (T, E), and what the best policy gets, (T,), if known.

    None where no test was in environments.
    """
    named = zip(labels([e.folder for e in evaluations]), evaluations, strict=True)
    held = [(name, e.metrics) for name, e in named if "returns" in e.metrics]
    known = [optimum for _, table in held if (optimum := optimum_of(table)) is not None]
    return ([(name, table["returns"]) for name, table in held], known[0] if known else None) if held else None


def beside(folders: Sequence[Path]) -> Path:
    """The folder that runs are in, or the one run that all are of."""
    return Path(os.path.commonpath([run_of(folder) for folder in folders]))


def comparison_dir(folders: Sequence[Path]) -> Path:
    """Where a comparison is left."""
    return beside(folders) / COMPARISONS / slug(labels(folders))


def tested(folders: Sequence[Path], what: str) -> list[Path]:
    """The folders of tests among those that were given, as ``runs/*`` gives them.

    Args:
        folders: or files in them; what is said of several runs is left out.
        what: needs two or more.

    Raises:
        ConfigError: less than two, or one of them twice.
    """
    found = [folder.parent if folder.is_file() else folder for folder in folders]
    found = [folder for folder in found if folder.name not in (COMPARISONS, RECOMMENDATIONS)]
    if len({folder.resolve() for folder in found}) < max(2, len(found)):
        raise ConfigError(f"{what} needs two or more folders, each of them once")
    return found


def write_comparison(evaluations: Sequence[Evaluation], out: Path, command: str) -> None:
    """Compare, print, and write comparison.json, .csv and .png; of trials in environments returns.png, of a
    sequence of tasks proficiency.png, too.

    Raises:
        ConfigError: other tasks, or a folder that cannot be written.
    """
    content = compare(evaluations)
    content |= {"command": command, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    declared = {name: metric for one in evaluations for name, metric in as_results(one.declared).items()}
    show(content, declared)
    try:
        write_atomically(out / "comparison.json", json.dumps(content, indent=2) + "\n")
        write_atomically(out / "comparison.csv", as_csv(content))
        over = f"{content['data']}, the same {content['tasks']:,} meta-test tasks"
        figure = results.comparison(content["learners"], content["differences"], declared, over)
        style.save(figure, out / "comparison.png")
        written = "comparison.json, .csv, .png"
        if (along := returns(evaluations)) is not None:
            style.save(figures_rl.returns_of_several(*along, over), out / "returns.png")
            written += ", returns.png"
        names = zip(labels([e.folder for e in evaluations]), evaluations, strict=True)
        if sooner := [(name, one.metrics["examples"]) for name, one in names if "examples" in one.metrics]:
            style.save(sequences.proficiency(sooner, f"Examples to proficiency, {over}"), out / "proficiency.png")
            written += ", proficiency.png"
    except OSError as error:
        raise ConfigError(f"cannot write into {out} ({error.strerror}): give another --out") from error
    Console().print(f"written: {out}/{written}", highlight=False, soft_wrap=True)


def main(args: Sequence[str] | None = None) -> None:
    """``python -m app.compare``."""
    args = sys.argv[1:] if args is None else list(args)
    parser = argparse.ArgumentParser(
        "python -m app.compare", description="Compare finished tests on the same tasks, without any new computation."
    )
    parser.add_argument("folders", nargs="+", type=Path, help="Of runs, runs/<name>, or of evaluations.")
    parser.add_argument("--out", type=out_folder, help="Folder for what is written; by default one beside the runs.")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error, too.")
    options = parser.parse_args(args)
    with one_line_errors(options.debug):
        folders = tested(options.folders, "a comparison")
        evaluations = [Evaluation.load(folder) for folder in folders]
        write_comparison(
            evaluations, options.out or comparison_dir(folders), shlex.join(["python", "-m", "app.compare", *args])
        )


if __name__ == "__main__":
    main()
