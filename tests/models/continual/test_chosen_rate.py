"""The rate of steps on a stream, which meta-validation chooses."""

import csv
import json
from pathlib import Path

import pytest
import torch

import models
from app.cli.builder import main
from app.evaluate import main as evaluate
from datamodules.core.errors import ConfigError
from models.core.checkpoint_io import load_checkpoint
from tests.support.toy import command


def run(tmp_path: Path, *flags: str) -> Path:
    main([*command("OML", tmp_path, steps=6), *flags])
    return tmp_path / "oml"


def chosen(path: Path) -> float:
    return float(load_checkpoint(path)["state_dict"]["chosen_rate"])


def metric(folder: Path, name: str) -> float:
    return json.loads((folder / "results.json").read_text())["metrics"][name]["mean"]


@pytest.mark.parametrize("rates", [(1e-6, 0.03), (0.03, 1e9)])
def test_validation_chooses_the_rate_and_the_test_has_it(rates, tmp_path):
    """Catches a choice by the last rate, by the largest, or by the test, and one that a checkpoint does not keep.

    Of a rate at which nothing is learned, or all is lost, and a good one, the good one is taken; then the metrics are
    those of a run that was given it alone.
    """
    folder = run(tmp_path, "--model.eval_rates", str(list(rates)))
    assert chosen(folder / "checkpoints" / "best.ckpt") == pytest.approx(0.03)
    assert metric(folder, "eval_rate") == pytest.approx(0.03)
    alone = run(tmp_path / "alone", "--model.eval_rates", "[0.03]")
    assert metric(folder, "accuracy") == metric(alone, "accuracy")
    with_values = []
    for f in (folder, alone):
        rows = csv.DictReader((f / "metrics.csv").open())
        with_values.append([row["val/accuracy"] for row in rows if row["val/accuracy"]])
    assert with_values[0] == with_values[1] != []


def test_a_rate_that_is_given_is_taken(tmp_path, capsys):
    """Catches an evaluation that ignores the rate it is given, or takes one of several by itself."""
    folder = run(tmp_path, "--model.eval_rates", "[0.000001, 0.03]")
    best = ["--ckpt_path", str(folder / "checkpoints" / "best.ckpt")]
    for flags, rate in ((["--model.init_args.eval_rates", "[0.01]"], 0.01), ([], 0.03)):
        evaluate([*best, "--out", str(tmp_path / "out"), *flags])
        assert metric(tmp_path / "out", "eval_rate") == pytest.approx(rate)
    with pytest.raises(SystemExit):
        evaluate([*best, "--out", str(tmp_path / "out"), "--model.init_args.eval_rates", "[0.1, 0.2]"])
    assert "meta-validation chose 0.03: give one" in capsys.readouterr().err


def test_no_rate_is_taken_that_nothing_chose():
    """Catches a first or a middle rate of several where there was no validation."""
    several = models.OML(models.MLP(4, (3,)), 2, eval_rates=[0.1, 0.2])
    with pytest.raises(ConfigError, match="no meta-validation chose one"):
        several.eval_rate  # noqa: B018
    with several.at_rate(0.5):
        assert several.eval_rate == 0.5
    assert models.OML(models.MLP(4, (3,)), 2, eval_rates=[0.1]).eval_rate == 0.1
    several.chosen_rate.fill_(torch.tensor(0.1).bfloat16())
    assert several.eval_rate == 0.1
    with pytest.raises(ValueError, match="eval_rates"):
        models.OML(models.MLP(4, (3,)), 2, eval_rates=[0.0])
