"""The pages say what is there, and their examples run as they stand."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tables import page
from tests.support.processes import ROOT

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
ADDING = (ROOT / "docs" / "adding.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_a_page_names_are_there(page):
    """Catches a path that was moved."""
    text = page.read_text()
    named = set(
        re.findall(r"`((?:app|models|datamodules|tests|configs|benchmarks|docs)/[\w/.-]+\.(?:py|yaml|md))`", text)
    )
    named |= {f"docs/{n}" if page.parent.name == "docs" else n for n in re.findall(r"\]\(([\w/]+\.md)\)", text)}
    assert not [name for name in named if not (ROOT / name).is_file()]


@pytest.mark.parametrize("number", [0, 1])
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


def test_the_table_of_results_is_current():
    """Catches a result that is not in the page, and a number in the page that no run measured: make docs."""
    text = (ROOT / "docs" / "reproduction.md").read_text()
    assert page(text) == text
