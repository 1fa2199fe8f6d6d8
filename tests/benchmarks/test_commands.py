"""The benchmarks run where there is neither data nor time: they time the same work, and print their table last."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT

needs_learn2learn = pytest.mark.skipif(
    importlib.util.find_spec("learn2learn") is None, reason="learn2learn is not installed"
)


def run(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *flags], cwd=ROOT, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
@needs_learn2learn
@pytest.mark.parametrize(
    ("name", "agreements", "targets"),
    [
        ("episodes", 0, {200.0}),
        ("maml", 1, {1.7, 2.0, 3.0, 0.05}),
        ("protonet", 1, {6.0, 0.05}),
        ("learners", 4, set()),
        ("environments", 0, set()),
    ],
)
def test_the_table_is_printed_last_and_the_gradients_agree(
    name: str, agreements: int, targets: set[float], tmp_path: Path
) -> None:
    out = tmp_path / "metrics.json"
    data = [] if name == "environments" else ["--generated"]
    done = run(name, "--quick", *data, "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("gradients agree to") == agreements
    metrics = json.loads(out.read_text())
    rows = metrics["rows"]
    *_, header, rule = done.stdout.splitlines()[: -len(rows)]
    assert header.split() == ["what", "against", "baseline", "ours", "ratio", "target"]
    assert not set(rule) - {"-", " "}
    for line, row in zip(done.stdout.splitlines()[-len(rows) :], rows, strict=True):
        assert line.startswith(row["what"])
        assert row["against"] in line
        assert (row["met"] is None) == (row["target"] is None)
    assert {row["target"] for row in rows} - {None} == targets
    assert metrics["machine"]["threads"] >= 1


@pytest.mark.slow
@needs_learn2learn
def test_implicit_gradients_take_no_more_memory_for_more_steps(tmp_path: Path) -> None:
    out, plot = tmp_path / "metrics.json", tmp_path / "metrics.png"
    done = run("memory", "--quick", "--out", str(out), "--plot", str(plot))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {(row["what"], row["against"]): row for row in json.loads(out.read_text())["rows"]}
    implicit, through = (rows[f"{name}'s memory, 16 steps", "4 steps"] for name in ("iMAML", "MAML"))
    assert implicit["target"] == 0.1
    assert implicit["ratio"] < 0.2 < through["ratio"]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_missing_data_is_one_line_that_names_the_cure(tmp_path: Path) -> None:
    done = run("episodes", "--root", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: no images_background.zip under ")
    assert "--generated" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_matrix_of_recommendations_is_made_once_and_tried(tmp_path: Path) -> None:
    """Catches a learner that is tested on tasks of its own, a second training of what is there, or a lost table."""
    own = ["--only", "pixel,protonet-untrained,protonet-8-glyphs", "--tasks", "48", "--scale", "0.02"]
    for _ in range(2):
        done = run("recommendation", *own, "--probes", "1", "--out", str(tmp_path))
        assert done.returncode == 0, done.stderr[-2000:]
        lines = (tmp_path / "matrix.csv").read_text().splitlines()
        assert lines[0] == "task,domain,pixel,protonet-untrained,protonet-8-glyphs"
        assert len(lines) == 49
    assert "of the processor" not in done.stdout
    content = json.loads((tmp_path / "held-out-1-probes" / "regret.json").read_text())
    assert (content["known"], content["held_out"]) == (34, 14)
    assert {row["way"] for row in content["ways_to_decide"]} >= {"oracle", "matrix factorisation", "best on average"}
