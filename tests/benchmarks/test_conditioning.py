"""The table of conditionings: its numbers by the files of the tests, and what is not done twice."""

from __future__ import annotations

import csv
import importlib
import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from app.runs.directory import RESULTS, TASKS_NPZ
from app.runs.evaluation_record import Evaluation
from benchmarks import conditioning, small_runs
from datamodules.core.metric import Metric

PROBLEMS = (conditioning.functions(), conditioning.characters("data"))
CELLS = [cell for problem in PROBLEMS for cell in conditioning.cells(problem)]


def built(settings: Any) -> Any:
    """The object that a configuration names; what is not of models stays as it is written."""
    if not isinstance(settings, dict) or not settings.get("class_path", "").startswith("models."):
        return settings
    module, name = settings["class_path"].rsplit(".", 1)
    own = {key: built(value) for key, value in settings["init_args"].items() if key != "optimizer"}
    return getattr(importlib.import_module(module), name)(**own)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_cell_can_be_built(cell, tmp_path: Path):
    """Catches a combination that is refused an hour after the start, as an embedding of another size than is told."""
    learner = built(cell.config(tmp_path / "last.ckpt")["model"])
    size = cell.problem.embeddings[cell.embedding][1]
    assert not size or learner.embedding_size == size
    assert cell.problem.kind in learner.tasks


def test_every_cell_has_a_run_its_controls_and_its_oracle():
    """Catches two cells that share a folder, one whose name is cut off, and one with nothing to be compared with."""
    assert len({cell.name for cell in CELLS}) == len(CELLS) and max(len(cell.name) for cell in CELLS) < 80
    rows = {(c.problem.kind, c.learner, c.conditioning) for c in CELLS}
    for embedding in (conditioning.CONSTANT, conditioning.ORACLE):
        assert {(c.problem.kind, c.learner, c.conditioning) for c in CELLS if c.embedding == embedding} == rows


def numbers(text: str) -> tuple[float, float]:
    mean, half = re.fullmatch(r"([+-]?[\d.]+) ± ([\d.]+)", text).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return float(mean), float(half)


def paired(better: np.ndarray, worse: np.ndarray) -> tuple[float, float]:
    apart = worse.astype(np.float64) - better  # of squared errors
    return apart.mean(), 1.96 * apart.std(ddof=1) / len(apart) ** 0.5


def test_the_table_is_of_the_tests_and_made_once(tmp_path: Path, capsys):
    """Catches a difference of unpaired tasks or of the wrong sign, a cell beside another conditioning's control, a
    verdict by one control alone, and a training or a test that is done again."""
    only = "regression-maml-constant*-film,regression-maml-constant*-experts,"
    only += "regression-maml-tasklabel-*film,regression-maml-tasklabel-experts"
    words = ["--out", str(tmp_path), "--scale", "0.04", "--tasks", "60", "--only", only]
    conditioning.main([*words, "--results", str(tmp_path / "docs")])
    text = (tmp_path / "conditioning.csv").read_text()
    assert (tmp_path / "docs" / "conditioning.csv").read_text() == text
    table = list(csv.DictReader(text.splitlines()))
    found = {(row["embedding"], row["conditioning"]): row for row in table}
    assert len(table) == len(found) == 4

    def mse(embedding: str, of: str, control: str = "") -> np.ndarray:
        run = tmp_path / "runs" / f"regression-maml-{embedding}-{of}".lower().replace(" ", "-")
        with np.load(run / "evaluations" / f"last-{control}tasks-60" / TASKS_NPZ) as content:
            assert content["index"].tolist() == list(range(60))
            return content["mse"]

    for of in ("Modulation film", "Experts"):
        row, constant = found["TaskLabel", of], found["ConstantEmbedding", of]
        own, unconditioned = mse("TaskLabel", of), mse("ConstantEmbedding", of)
        gain = paired(own, unconditioned)
        losses = [paired(own, mse("TaskLabel", of, f"{control}-")) for control in ("shuffled", "constant")]
        assert numbers(row["own"])[0] == pytest.approx(own.mean(), abs=1e-4)
        assert numbers(row["loss with another task's"]) == pytest.approx(losses[0], abs=1e-4)
        assert numbers(row["loss with a constant"]) == pytest.approx(losses[1], abs=1e-4)
        assert numbers(row["gain over unconditioned"]) == pytest.approx(gain, abs=1e-4)
        assert numbers(constant["oracle's gain over it"]) == pytest.approx(gain, abs=1e-4)
        assert row["oracle's gain over it"] == constant["gain over unconditioned"] == constant["verdict"] == "–"
        assert row["verdict"] == ("matters" if all(loss > half for loss, half in losses) else "decorative")
        assert row["meta-updates"] == "60" and row["tasks"] == "60"

    # A test that was cut short is done again, and nothing else.
    (lost,) = (tmp_path / "runs").glob("*tasklabel-experts/evaluations/last-shuffled-*")
    (lost / RESULTS).unlink()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz") if path.parent != lost}
    capsys.readouterr()
    with mock.patch.object(small_runs, "train", side_effect=AssertionError("trained again")):
        conditioning.main(words)
    assert capsys.readouterr().out.count("of the processor") == 1
    assert (lost / RESULTS).is_file() and kept == {path: path.stat().st_mtime_ns for path in kept}
    assert (tmp_path / "conditioning.csv").read_text() == text
    with pytest.raises(SystemExit):
        conditioning.main([*words, "--scale", "1"])
    assert "give the same, or another --out" in capsys.readouterr().err


@pytest.mark.parametrize(("better", "worse"), [("higher", -1.0), ("lower", 1.0)])
def test_an_embedding_matters_where_every_control_is_worse(better, worse):
    """Catches a verdict by one control, one that takes an error for an accuracy, and one on a learner that diverged."""
    tasks = np.linspace(0, 1, 50, dtype=np.float32)

    def one(shift: float, scale: float = 1.0) -> Evaluation:
        values = torch.from_numpy(scale * tasks + shift)
        return Evaluation(Path(), {}, {"m": values}, {"m": Metric(better)}, {})

    own, lower, same = one(0), one(worse), one(0)
    assert conditioning.verdict(own, [lower, lower], "m") == "matters"
    assert (
        conditioning.verdict(own, [lower, same], "m") == conditioning.verdict(own, [same, lower], "m") == "decorative"
    )
    assert conditioning.verdict(own, [one(-worse)] * 2, "m") == "decorative"
    assert conditioning.verdict(one(float("nan")), [lower, lower], "m") == "diverged"
    assert conditioning.verdict(own, [], "m") == "–"
