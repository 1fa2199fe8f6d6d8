"""Imports point one way: app → models → datamodules, and inside each from what is particular to what is shared."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.processes import ROOT

FILES = sorted(p.relative_to(ROOT) for top in ("app", "models", "datamodules") for p in (ROOT / top).rglob("*.py"))
# Rooms from the ground up: each may import those before it. What is not named has a rank of its own kind: a package's
# face and the commands of app above all, the families of models and the kinds of data above what they share.
GROUND_UP = {
    "datamodules": ("datamodules.core", "datamodules.*", "datamodules"),
    "models": ("models.networks", "models.core", "models.*", "models"),
    "app": ("app.runs", "app.plots", "app.dashboard", "app.cli", "app"),
}
TOPS = tuple(GROUND_UP)


def room(module: str) -> str:
    """The room of a module: ``models.metric`` of ``models.metric.protonet``; a file of a package's own is its face."""
    parts = module.split(".")
    return ".".join(parts[:2]) if (ROOT / Path(*parts[:2])).is_dir() and len(parts) > 1 else parts[0]


def rank(module: str) -> tuple[int, int]:
    top, rooms = module.split(".")[0], GROUND_UP[module.split(".")[0]]
    mine = room(module)
    return TOPS.index(top), rooms.index(mine) if mine in rooms else rooms.index(f"{top}.*")


def name(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: Path) -> set[str]:
    """Modules of the project that a file imports anywhere in it, also for types alone."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {m if is_module(m) else str(node.module) for m in inner}
    return {module for module in found if module.split(".")[0] in TOPS}


def is_module(module: str) -> bool:
    path = ROOT / Path(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_from_the_particular_to_the_shared(file):
    """Catches an import that makes the shared depend on the particular."""
    upwards = {m for m in imported(file) if rank(m) > rank(name(file))}
    assert not upwards, f"{file} imports {', '.join(sorted(upwards))}, which may import it"


def test_no_two_modules_import_each_other():
    """Catches a circle of imports, between modules or between rooms, in whatever order Python takes it."""
    graph = {name(f): imported(f) - {name(f)} for f in FILES}
    rooms = {
        r: {room(m) for n, targets in graph.items() if room(n) == r for m in targets} - {r} for r in map(room, graph)
    }
    for of in (graph, rooms):
        try:
            TopologicalSorter(of).prepare()
        except CycleError as error:
            pytest.fail(" → ".join(error.args[1]))
