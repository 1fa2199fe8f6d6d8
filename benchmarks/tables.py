"""What the docs show of learners and results, out of declarations and ``docs/results/``: ``make docs``.

A page says where each piece belongs by a line ``<!-- PIECE: made by make docs -->``, and where it ends by
``<!-- end -->``. Results are the rows that trainings leave (``benchmarks.campaign``, one JSON file each), and the
tables of single measurements (CSV, one line each; what follows the column "seed" is kept and not shown).
"""

from __future__ import annotations

import csv
import hashlib
import inspect
import io
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.ticker import PercentFormatter

import models
from app.plots.style import MAIN, STYLE, single, styled
from datamodules.core.base import shape_text
from datamodules.core.files import write_atomically
from datamodules.core.metric import Metric
from models.core.learner import MetaLearner

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS, CURVES = DOCS / "results", DOCS / "images" / "curves"
SHORT = "short"  # folder of results of minutes
INDEX, REPRODUCTION, ALGORITHMS = DOCS / "algorithms.md", DOCS / "reproduction.md", DOCS / "algorithms"
CONDITIONING = DOCS / "conditioning.md"
PIECE = re.compile(r"<!-- ([\w -]+): made by make docs -->\n(.*?)<!-- end -->", re.DOTALL)
LEARNERS = (*models.ALGORITHMS, *models.STRATEGIES)


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    """In Markdown."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


# Learners -------------------------------------------------------------------------------------------------------------


def page_of(learner: type[MetaLearner]) -> str:
    """The name of a learner's page: its file's."""
    return learner.__module__.rsplit(".", 1)[-1]


def learners_of(page: Path) -> list[type[MetaLearner]]:
    return [learner for learner in LEARNERS if page_of(learner) == page.stem]


def source(learner: type[MetaLearner]) -> str:
    """The paper, as a reference."""
    paper = learner.paper
    return f"[{paper.authors}, {paper.title}]({paper.url}), {paper.venue} {paper.year}"


def batch_norm(learner: type[MetaLearner]) -> str:
    """The mode that it normalises by unless told otherwise; none where it takes no backbone."""
    defaults: dict[str, Any] = {}
    for base in reversed(learner.__mro__):
        if "__init__" in vars(base):
            defaults |= {p.name: p.default for p in inspect.signature(base.__init__).parameters.values()}
    return str(defaults["batch_norm"]) if "backbone" in defaults else "–"


def index() -> str:
    """All learners, by their declarations."""
    rows = [
        [
            f"[`models.{learner.__name__}`](algorithms/{page_of(learner)}.md)",
            source(learner),
            ", ".join(sorted(learner.tasks)),
            batch_norm(learner),
        ]
        for learner in LEARNERS
    ]
    return table(("learner", "paper", "tasks", "batch norm by default"), rows)


def declared(learner: type[MetaLearner]) -> str:
    """What a learner's page leads with."""
    return f"`models.{learner.__name__}`: {source(learner)}. Tasks: {', '.join(sorted(learner.tasks))}.\n"


def metrics(learners: list[type[MetaLearner]]) -> str:
    """What is measured of every task."""
    found: dict[str, Metric] = {}
    for learner in learners:
        found |= learner.declared_metrics()
    rows = [[f"`{m.pooled or n}`", m.label or n.replace("_", " "), m.better] for n, m in found.items()]
    return table(("metric", "what it is", "better"), rows)


# Results --------------------------------------------------------------------------------------------------------------


def of_runs(folder: Path) -> list[dict[str, Any]]:
    """What trainings left in a folder of results, by their names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def metric_of(result: Mapping[str, Any], name: str) -> Metric:
    """What a number of a training's result is, as its learner declares it."""
    return next(c for c in LEARNERS if c.__name__ == result["algorithm"]).declared_metrics()[name]


def row(result: dict[str, Any]) -> list[str]:
    """The cells of a training's result."""
    headline, numbers = next(iter(result["metrics"].items()))
    metric = metric_of(result, headline)
    shape = shape_text({k: v for k, v in result.items() if k in ("ways", "shots", "episodes") and v})
    name = f", as {result['name']}" if result["flags"] else ""
    return [
        result.get("label") or result["algorithm"],
        ", ".join(filter(None, (result["data"], shape))),
        (result["published"] or "–") + (f" ({result['note']})" if result["note"] else ""),
        metric.label or headline,
        f"**{metric.text(numbers['mean'], numbers['ci95'] or float('nan'))}**",
        "–" if result["batch_norm"] is None else str(result["batch_norm"]),
        f"{result['tasks']:,}",
        f"{result['meta_updates']:,}",
        f"{result['training']['processor_seconds'] / 60:.0f} min of {result['processor']}",
        f"`{result['configuration'].removeprefix('configs/').removesuffix('.yaml')}`{name}",
    ]


HEAD = (
    *("learner", "task", "published", "metric", "ours", "batch norm"),
    *("tasks", "meta-updates", "time", "configuration"),
)


def of_table(path: Path) -> str:
    """A table of single measurements; columns from "seed" on are not shown."""
    if not path.is_file():
        return f"Not measured yet: `docs/results/{path.name}` is to hold it.\n"
    with open(path, newline="") as file:
        head, *rows = csv.reader(file)
    shown = head.index("seed")
    return table(tuple(head[:shown]), [cells[:shown] for cells in rows])


# Curves ---------------------------------------------------------------------------------------------------------------


def curve_of(results: list[dict[str, Any]], learners: list[type[MetaLearner]]) -> dict[str, Any] | None:
    """The result whose curve a page shows: of its learners the one with most meta-updates."""
    names = [learner.__name__ for learner in learners]
    with_curve = [r for r in results if r["algorithm"] in names and r.get("curve")]
    return max(with_curve, key=lambda r: (-names.index(r["algorithm"]), r["meta_updates"]), default=None)


@styled
def curve_figure(result: dict[str, Any]) -> Any:
    """The headline metric of meta-validation, with its interval, over meta-updates."""
    metric = metric_of(result, result["curve"]["metric"])
    steps, means, halves = (list(values) for values in zip(*result["curve"]["points"], strict=True))
    figure, axes = single(5.6, 2.6)
    axes.plot(steps, means, color=MAIN, marker=".")
    low, high = zip(*((m - h, m + h) for m, h in zip(means, halves, strict=True)), strict=True)
    axes.fill_between(steps, low, high, color=MAIN, alpha=0.18, linewidth=0)
    if metric.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("meta-updates")
    axes.set_ylabel(metric.label or result["curve"]["metric"])
    axes.set_title(f"meta-validation, {result['name']}")
    return figure


def digest(result: dict[str, Any]) -> str:
    """Of what a curve shows: a figure carries it, however it was drawn."""
    return hashlib.sha256(json.dumps(result["curve"]).encode()).hexdigest()


def svg(result: dict[str, Any]) -> bytes:
    """The curve as a file that is the same whenever it is made."""
    content = io.BytesIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "metabolt"}):
        curve_figure(result).savefig(content, format="svg", metadata={"Date": None, "Description": digest(result)})
    return content.getvalue()


# Pages ----------------------------------------------------------------------------------------------------------------


def pieces(page: Path, folder: Path) -> Callable[[str], str]:
    """What makes the pieces of a page, by their names."""
    learners = learners_of(page)
    names = {learner.__name__ for learner in learners}
    full, short = of_runs(folder), of_runs(folder / SHORT)

    def made(piece: str) -> str:
        if piece.startswith("table "):
            return of_table(folder / f"{piece.removeprefix('table ')}.csv")
        if piece in ("full lengths", "minutes"):
            return table(HEAD, [row(r) for r in (full if piece == "full lengths" else short)])
        if piece == "results":
            return table(HEAD, [row(r) for r in full + short if r["algorithm"] in names])
        if piece == "index":
            return index()
        if piece == "declared":
            return "\n".join(declared(learner) for learner in learners)
        if piece == "metrics":
            return metrics(learners)
        if piece == "curve":
            shown = curve_of(full + short, learners)
            if shown is None:
                untrained = all(learner in models.STRATEGIES for learner in learners)
                return "Nothing is trained.\n" if untrained else "No training with a curve is on record yet.\n"
            return f"![meta-validation over meta-updates](../images/curves/{page.stem}.svg)\n"
        raise ValueError(f"{page.name} asks for {piece!r}, which nothing makes: correct its marker")

    return made


def pages() -> list[Path]:
    """Those with pieces that are made."""
    return [INDEX, REPRODUCTION, CONDITIONING, *sorted(ALGORITHMS.glob("*.md"))]


def renewed(page: Path, folder: Path = RESULTS) -> str:
    """A page with all its pieces made anew.

    Raises:
        ValueError: it has none.
    """
    make = pieces(page, folder)
    text, times = PIECE.subn(
        lambda m: f"<!-- {m[1]}: made by make docs -->\n{make(m[1])}<!-- end -->", page.read_text()
    )
    if not times:
        raise ValueError(f"{page} has no <!-- … --> for what is made: put one where it belongs")
    return text


def shown_curves(folder: Path = RESULTS) -> dict[Path, dict[str, Any]]:
    """The figures of the learners' pages, and the results that they show the curves of."""
    results = of_runs(folder) + of_runs(folder / SHORT)
    shown = {page.stem: curve_of(results, learners_of(page)) for page in sorted(ALGORITHMS.glob("*.md"))}
    return {CURVES / f"{name}.svg": result for name, result in shown.items() if result is not None}


def main() -> int:
    """``python -m benchmarks.tables``."""
    for page in pages():
        write_atomically(page, renewed(page))
    CURVES.mkdir(parents=True, exist_ok=True)
    for path, result in shown_curves().items():
        write_atomically(path, svg(result))
    print(f"made {len(pages())} pages of docs/ and {len(shown_curves())} curves of {CURVES.relative_to(DOCS.parent)}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
