"""The queue of long trainings: killed at any moment, it ends with the same results."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from benchmarks import tables
from benchmarks.campaign import load, main
from datamodules.core.errors import ConfigError
from tests.support.processes import ROOT

# Regressions that take seconds.
SHORT = ["--trainer.max_steps", "300", "--trainer.val_check_interval", "100", "--checkpoint_every", "20"]
SHORT += ["--data.init_args.test_tasks", "20", "--data.init_args.val_tasks", "10", "--pictures", "false"]
TWO = [{"config": f"optimization/{a}/sinusoid-10shot", "flags": SHORT} for a in ("maml", "meta_sgd")]


def listed(folder: Path, entries: list) -> Path:
    (folder / "list.yaml").write_text(yaml.safe_dump(entries))
    return folder / "list.yaml"


def queue(folder: Path, entries: Path) -> list[str]:
    return ["--list", str(entries), "--runs", str(folder / "runs"), "--results", str(folder / "results")]


def rows(folder: Path) -> dict[str, dict]:
    """What is measured, without what no two runs share."""
    found = {p.stem: json.loads(p.read_text()) for p in sorted((folder / "results").glob("*.json"))}
    return {name: {k: v for k, v in row.items() if k not in ("training", "finished")} for name, row in found.items()}


def started(folder: Path, entries: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.campaign", *queue(folder, entries)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_what_is_done_is_skipped_and_what_changed_is_not(tmp_path, capfd):
    """Catches a result that is measured again, or kept for other flags; a row without its command, seed, time or
    curve; and a failed training that keeps the others from theirs."""
    short = [{**TWO[0], "flags": [*SHORT, "--trainer.max_steps", "4", "--trainer.val_check_interval", "2"]}]
    entries = listed(tmp_path, [{"config": TWO[1]["config"], "flags": ["--model.init_args.nothing", "1"]}, *short])
    assert main(queue(tmp_path, entries)) == 1
    ((name, row),) = rows(tmp_path).items()
    assert name == "maml-sinusoid-10shot"
    assert row["command"].startswith("python train.py --config configs/optimization/maml/sinusoid-10shot.yaml")
    assert row["meta_updates"] == 4 and row["seed"] == 0 and row["metrics"]["mse"]["ci95"] > 0
    assert row["curve"]["metric"] == "mse" and [step for step, *_ in row["curve"]["points"]] == [2, 4]
    assert all(mean > half > 0 for _, mean, half in row["curve"]["points"])
    whole = json.loads((tmp_path / "results" / f"{name}.json").read_text())
    assert whole["training"]["processor_seconds"] > 0 and whole["processor"]
    entries = listed(tmp_path, short)
    before = (tmp_path / "results" / f"{name}.json").stat().st_mtime_ns
    assert main(queue(tmp_path, entries)) == 0
    assert (tmp_path / "results" / f"{name}.json").stat().st_mtime_ns == before
    entries = listed(tmp_path, [{**short[0], "flags": [*short[0]["flags"], "--trainer.max_steps", "6"]}])
    assert main(queue(tmp_path, entries)) == 0
    assert rows(tmp_path)[name]["meta_updates"] == 6


def test_a_result_leads_with_the_metric_that_is_published(tmp_path, capfd):
    """Catches a published density beside a measured squared error, in the table or on the curve."""
    few = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--pictures", "false"]
    few += ["--data.init_args.test_tasks", "20", "--data.init_args.val_tasks", "10"]
    entry = {"config": "generative/cnp/gp-rbf-short", "flags": few, "metric": "marginal", "published": "0.26"}
    assert main(queue(tmp_path, listed(tmp_path, [entry]))) == 0
    (result,) = rows(tmp_path).values()
    assert next(iter(result["metrics"])) == "marginal" == result["curve"]["metric"] and "mse" in result["metrics"]
    whole = json.loads(next((tmp_path / "results").glob("*.json")).read_text())
    _, task, published, metric, ours, *_ = tables.row(whole)
    assert (task, published, metric) == ("GaussianProcesses", "0.26", "log-density of a query (nats)")
    assert f"{result['metrics']['marginal']['mean']:.4f}" in ours
    assert tables.curve_figure(whole).axes[0].get_ylabel() == metric


@pytest.mark.slow
def test_killed_five_times_it_ends_with_the_same_rows(tmp_path):
    """Catches a training that begins anew, is skipped half done, or goes on behind the next one's back."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    entries = listed(tmp_path, TWO)
    assert main(queue(tmp_path / "whole", entries)) == 0
    rng = random.Random(0)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        process = started(tmp_path / "killed", entries)
        time.sleep(4 + 4 * rng.random())
        process.send_signal(number)
        process.communicate(timeout=180)
        time.sleep(2)  # what it had started is told, too
    assert main(queue(tmp_path / "killed", entries)) == 0
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed") != {}


@pytest.mark.slow
def test_it_waits_while_something_is_measured(tmp_path):
    """Catches a measurement that shares its core with a training."""
    entries = listed(tmp_path, TWO[:1])
    process = started(tmp_path, entries)
    while not list((tmp_path / "runs").rglob("last.ckpt")):
        time.sleep(0.2)
    (tmp_path / "runs" / "measuring").touch()
    time.sleep(20)
    children = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True).stdout
    assert not children.strip() and not rows(tmp_path)
    (tmp_path / "runs" / "measuring").unlink()
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ("a text", "is no list of trainings"),
        ([{"config": "optimization/nothing"}], "there is no"),
        ([{"config": "optimization/maml/sinusoid-10shot"}] * 2, "two trainings named"),
        ([{"flags": []}], "is no list of trainings"),
    ],
)
def test_a_wrong_list_is_one_line(entries, what, tmp_path):
    """Catches a queue that finds its mistake after days."""
    with pytest.raises(ConfigError, match=what):
        load(listed(tmp_path, entries))


@pytest.mark.parametrize("name", ["campaign", "short"])
def test_the_list_can_be_trained(name):
    """Catches a configuration of a queue that was moved, or two that share a folder."""
    entries = load(ROOT / "benchmarks" / f"{name}.yaml")
    assert len(entries) > 20
    assert all(entry.steps > 0 or entry.settings["stage"] == "test" for entry in entries)
