"""What the process needs before it starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from datamodules.core.runtime import declare_torchvision_operators, memory_within_reach
from tests.support.processes import ROOT


@pytest.mark.parametrize("first", ["app", "app.cli.builder", "models", "datamodules"])
def test_any_package_may_be_imported_first(first):
    """Catches torchmetrics imported before the guard: with a CPU-only torch beside torchvision's wheel it dies."""
    code = f"import {first}, torchmetrics, pytorch_lightning; print('fine')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr


def test_guard_twice_changes_nothing():
    """Catches a second definition of an operator, which torch refuses."""
    assert declare_torchvision_operators() == declare_torchvision_operators()


def test_memory_within_reach_is_what_is_free_and_ones_own(monkeypatch):
    """Catches a limit by which two processes together take more than the machine has, and one of them is killed."""
    told = {
        "/proc/meminfo": "MemTotal: 500 kB\nMemFree: 1 kB\nMemAvailable: 100 kB\nSwapTotal: 20 kB\nSwapFree: 10 kB\n",
        "/proc/self/status": "Name: python\nVmData: 7 kB\nVmStk: 3 kB\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda path: told[str(path)])
    assert memory_within_reach() == 117 * 1024
