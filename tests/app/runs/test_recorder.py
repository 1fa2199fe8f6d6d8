"""What a test measured does not pass through drawing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from app.cli.builder import MetaboltCLI, main
from app.dashboard.callback import Dashboard
from app.plots import style
from app.runs.recorder import Recorder
from tests.support.toy import command


def broken(*_: object, **__: object) -> bytes:
    raise RuntimeError("no font")


def without_dashboard(self: MetaboltCLI, callbacks: list) -> list:
    callbacks.append(Recorder(self.run_dir))
    return []


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that drew all its figures."""
    runs = tmp_path_factory.mktemp("drawn")
    main(command("ProtoNet", runs, "--pictures", "true", steps=2))
    assert (runs / "protonet" / "results.png").is_file()
    return runs / "protonet"


@pytest.mark.parametrize("how", ["pictures off", "matplotlib raises", "drawing raises", "no dashboard"])
def test_results_are_the_same_without_figures(how: str, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches results, or the record of every task, that are written, measured or changed by what draws."""
    if how == "matplotlib raises":
        monkeypatch.setattr(style, "png", broken)
    if how == "drawing raises":
        monkeypatch.setattr(Dashboard, "_draw", broken)
    if how == "no dashboard":
        monkeypatch.setattr(MetaboltCLI, "dashboards", without_dashboard)
    main(command("ProtoNet", tmp_path, "--pictures", str(how != "pictures off").lower(), steps=2))
    run = tmp_path / "protonet"
    assert not (run / "results.png").exists()
    one, other = (json.loads((folder / "results.json").read_text())["metrics"] for folder in (drawn, run))
    assert "open_set_auroc" in one
    assert one == other
    assert (run / "test_tasks.csv").read_bytes() == (drawn / "test_tasks.csv").read_bytes()
    first, second = (np.load(folder / "test_tasks.npz") for folder in (drawn, run))
    assert first.files == second.files
    assert all(np.array_equal(first[name], second[name]) for name in first.files)
