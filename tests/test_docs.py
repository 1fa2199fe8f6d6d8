"""The pages say what is there, and their examples run as they stand."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tables
from tests.support.processes import ROOT

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
ADDING = (ROOT / "docs" / "adding.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OF_LEARNERS = sorted((ROOT / "docs" / "algorithms").glob("*.md"))
FAMILIES = {folder.name for folder in (ROOT / "configs").iterdir()}
HEADINGS = ("Command", "What it logs", "Deviations", "Results", "Curve")


def test_the_tree_is_the_one_in_the_architecture():
    """Catches a room that the page does not have, or one that it has and that is gone."""
    tree = ARCHITECTURE.split("```")[3]
    found, top = set(), ""
    for line in tree.splitlines():
        if match := re.match(r"( *)([a-z_]+)/(?: |$)", line):
            top = match[2] if not match[1] else top
            found.add(match[2] if not match[1] else f"{top}/{match[2]}")
    rooms = {"app", "models", "datamodules"}
    rooms |= {
        f"{d.parent.name}/{d.name}"
        for top in ("app", "models", "datamodules")
        for d in (ROOT / top).iterdir()
        if (d / "__init__.py").is_file()
    }
    assert {r for r in found if r.split("/")[0] in ("app", "models", "datamodules")} == rooms


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_files_that_a_page_names_are_there(page):
    """Catches a path that was moved."""
    text = page.read_text()
    named = set(
        re.findall(r"`((?:app|models|datamodules|tests|configs|benchmarks|docs)/[\w/.-]+\.(?:py|yaml|md))`", text)
    )
    linked = set(re.findall(r"\]\(([\w./-]+\.(?:md|svg|png))\)", text))
    assert not [name for name in named if not (ROOT / name).is_file()]
    assert not [name for name in linked if not (page.parent / name).is_file()]


@pytest.mark.parametrize("number", range(4))
def test_examples_of_what_is_added_run(number, tmp_path: Path):
    """Catches an example that was right once: its file, and the command below it with a few steps."""
    block = re.findall(r"```python\n(# (\w+\.py)\n.*?)```", ADDING, re.S)[number]
    (tmp_path / block[1]).write_text(block[0])
    command = re.findall(r"^`(python train.py .*)`$", ADDING, re.M)[number]
    words = [sys.executable, str(ROOT / "train.py"), *shlex.split(command)[2:]]
    small = ["--trainer.max_steps", "4", "--data.test_tasks", "20", "--trainer.accelerator", "cpu", "--wandb", "off"]
    small += ["--trainer.val_check_interval", "2"]
    small += ["--data.root", str(ROOT / "data")] if "Glyphs" in command else []
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*words, *small], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "±" in done.stdout


@pytest.mark.parametrize("page", tables.pages(), ids=lambda p: p.stem)
def test_what_is_made_is_current(page):
    """Catches a result or a learner that is not in the page, and a number in it that no run measured: make docs."""
    assert tables.renewed(page) == page.read_text()


def test_curves_are_current():
    """Catches a figure of another run's curve: make docs."""
    shown = tables.shown_curves()
    assert {path.name for path in tables.CURVES.glob("*.svg")} == {path.name for path in shown}
    assert not [path for path, result in shown.items() if tables.digest(result) not in path.read_text()]


def test_every_learner_has_a_page():
    """Catches a learner without a page, and a page without a learner."""
    assert {page.stem for page in OF_LEARNERS} == {tables.page_of(learner) for learner in tables.LEARNERS}


@pytest.mark.parametrize("page", OF_LEARNERS, ids=lambda p: p.stem)
def test_pages_of_learners_are_alike(page):
    """Catches a page without one of its headings, without its deviations, or with a command that is no more."""
    text = page.read_text()
    assert tuple(re.findall(r"^## (.*)$", text, re.M)) == HEADINGS
    assert "| deviation | paper | reference code | ours |" in text
    commands = re.findall(r"^python train\.py --config (configs/\S+\.yaml)", text, re.M)
    assert commands and not [c for c in commands if not (ROOT / c).is_file()]
    named = re.findall(r"`((?:[a-z_]+/){2}[\w-]+)`", text)
    assert not [n for n in named if n.split("/")[0] in FAMILIES and not (ROOT / "configs" / f"{n}.yaml").is_file()]
