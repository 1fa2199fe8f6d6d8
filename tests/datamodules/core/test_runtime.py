"""What the process needs before it starts."""

from __future__ import annotations

import subprocess
import sys

import pytest

from datamodules.core.runtime import declare_torchvision_operators
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
