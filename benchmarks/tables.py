"""Tables of the docs out of ``docs/results/``: ``python -m benchmarks.tables`` (``make docs``)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from datamodules.core.base import shape_text
from datamodules.core.files import write_atomically
from models.core.task_kinds import KINDS

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs" / "results", ROOT / "docs" / "reproduction.md"
BEGIN, END = "<!-- results: made by make docs -->", "<!-- end of results -->"
HEAD = ("learner", "task", "published", "metric", "ours", "tasks", "meta-updates", "time", "configuration")


def row(result: dict[str, Any]) -> list[str]:
    """The cells of a result."""
    declared = {name: metric for kind in KINDS.values() for name, metric in kind.metrics.items()}
    name, numbers = next(iter(result["metrics"].items()))
    shape = shape_text({k: v for k, v in result.items() if k in ("ways", "shots", "episodes") and v})
    flags = f" {' '.join(result['flags'])}" if result["flags"] else ""
    return [
        result["algorithm"],
        f"{result['data']}, {shape}",
        (result["published"] or "–") + (f" ({result['note']})" if result["note"] else ""),
        declared[name].label or name,
        f"**{declared[name].text(numbers['mean'], numbers['ci95'] or float('nan'))}**",
        f"{result['tasks']:,}",
        f"{result['meta_updates']:,}",
        f"{result['training']['processor_seconds'] / 60:.0f} min of {result['processor']}",
        f"`{result['configuration'].removeprefix('configs/').removesuffix('.yaml')}`{flags}",
    ]


def table(folder: Path = RESULTS) -> str:
    """All results, by their names."""
    rows = [row(json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def page(text: str, folder: Path = RESULTS) -> str:
    """The page with its table made anew.

    Raises:
        ValueError: it has no place for one.
    """
    made, times = re.subn(
        f"{BEGIN}\n.*?{END}", lambda _: f"{BEGIN}\n{table(folder)}{END}", text, count=1, flags=re.DOTALL
    )
    if not times:
        raise ValueError(f"there is no {BEGIN} … {END} in the page: put it where the table belongs")
    return made


def main() -> int:
    """``python -m benchmarks.tables``."""
    write_atomically(PAGE, page(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
