"""Every run has a directory of its own, whatever starts beside it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.cli.builder import main
from app.runs import claim
from app.runs.directory import choose_run
from datamodules.core.errors import ConfigError
from models.core.checkpoint_io import load_checkpoint
from tests.support.processes import ROOT, start
from tests.support.toy import command

CLAIMS = """
import sys
from pathlib import Path
from app.runs.directory import choose_run
sys.stdin.readline()
folder, _ = choose_run(Path(sys.argv[1]), "same", None, "fit", take=True)
print(folder.name, flush=True)
sys.stdin.readline()
"""


def claiming(runs: Path, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CLAIMS, str(runs)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def go(process: subprocess.Popen) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def test_starts_at_the_same_moment_get_directories_of_their_own(tmp_path):
    """Catches runs of one name that share a folder: one's configuration beside the other's weights. And a claim that
    outlives its process, killed before it wrote anything; processes of one start that do not agree."""
    alone = [claiming(tmp_path) for _ in range(4)]
    together = [claiming(tmp_path, WORLD_SIZE="2", TORCHELASTIC_RUN_ID="job", MASTER_PORT="1") for _ in range(2)]
    for process in (*alone, *together):
        go(process)
    names = [process.stdout.readline().strip() for process in (*alone, *together)]
    assert set(names) == {"same", "same-2", "same-3", "same-4", "same-5"}
    assert names[4] == names[5]
    for process in (*alone, *together):
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert choose_run(tmp_path, "same", None, "fit", take=True)[0].name == "same"
    claim.release()
    assert not (tmp_path / "same").exists()


ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}
STEP = ALLOCATION | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
MACHINES = TORCHRUN | {"WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "node1"}
BY_HAND = {"MASTER_ADDR": "node1", "MASTER_PORT": "1", "NODE_RANK": "1"}


@pytest.mark.parametrize(
    ("env", "one"),
    [({}, False), (ALLOCATION, False), (STEP, True), (TORCHRUN, True), (MACHINES, True), (BY_HAND, True)],
)
def test_processes_agree_where_they_train_together(env, one):
    """Catches a loop of runs in one allocation of SLURM that share a folder, and processes of srun that do not."""
    assert (claim._token(env) == claim._token(env)) == one


@pytest.mark.parametrize(
    "env",
    [
        {"WORLD_SIZE": "abc", "TORCHELASTIC_RUN_ID": "x"},
        TORCHRUN | {"GROUP_WORLD_SIZE": "-1"},
        {"SLURM_STEP_NUM_TASKS": "x"},
        {"LOCAL_WORLD_SIZE": "zz"},
    ],
)
def test_an_environment_that_counts_no_processes_is_told(env, tmp_path, monkeypatch, capsys):
    """Catches an error of the program for a variable that was set by hand."""
    claim.Start.own.cache_clear()
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        main(command("ProtoNet", tmp_path, steps=2))
    name = next(name for name in reversed(env) if name != "TORCHELASTIC_RUN_ID")
    assert stopped.value.code == 2
    assert f"the environment has {name}={env[name]!r}, which is no number" in capsys.readouterr().err


def test_torchruns_of_two_machines_are_two_starts(monkeypatch):
    """Catches two runs that share a folder because their torchruns have the same defaults."""
    here, across = claim._token(TORCHRUN), claim._token(MACHINES)
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    assert claim._token(TORCHRUN) != here
    assert claim._token(MACHINES) == across
    assert claim._token(MACHINES | {"MASTER_ADDR": "node3"}) != across


def test_a_run_of_another_machine_is_taken_over_when_it_is_silent(tmp_path, monkeypatch):
    """Catches a run that cannot go on where its job was moved to, and one that is taken while it runs elsewhere."""
    assert claim.claim(tmp_path)
    file = tmp_path / claim.FILE
    file.write_text(json.dumps(vars(claim.Start("other", "elsewhere", os.getpid(), 0))))
    assert not claim.claim(tmp_path)
    before = time.time() - claim.SILENCE - 5
    os.utime(file, (before, before))
    assert claim.claim(tmp_path)
    assert claim.holder(tmp_path) == claim.Start.own()
    claim.release()
    assert claim.holder(tmp_path) is None


def test_a_claim_is_renewed(tmp_path):
    """Catches a run that another machine takes over while it trains."""
    code = "import sys, time; from pathlib import Path; from app.runs import claim; claim.SILENCE = 0.6"
    code += "; claim.claim(Path(sys.argv[1])); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    file, until = tmp_path / claim.FILE, time.time() + 60
    while not file.exists() and time.time() < until:
        time.sleep(0.05)
    first = file.stat().st_mtime
    while file.stat().st_mtime == first and time.time() < until:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert file.stat().st_mtime > first


def test_two_trainings_of_one_name_keep_apart(tmp_path):
    """Catches the first one's weights and results gone without a word."""
    both = [start(*command("ProtoNet", tmp_path, "--seed_everything", str(seed), steps=4)) for seed in (1, 2)]
    for process in both:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    runs = [tmp_path / "protonet", tmp_path / "protonet-2"]
    seeds = []
    for run in runs:
        seeds.append(json.loads((run / "results.json").read_text())["seed_everything"])
        assert f"seed_everything: {seeds[-1]}\n" in (run / "config.yaml").read_text()
        assert load_checkpoint(run / "checkpoints" / "last.ckpt")["config"] == (run / "config.yaml").read_text()
    assert sorted(seeds) == [1, 2]


def test_a_run_that_is_trained_is_not_gone_on_with(tmp_path, monkeypatch, capsys):
    """Catches two processes that write the checkpoints of one run."""
    main(command("ProtoNet", tmp_path, steps=2))
    own = claim.Start.own()
    other = claim.Start("other", own.host, os.getppid(), claim._born(os.getppid()))
    (tmp_path / "protonet" / claim.FILE).write_text(json.dumps(vars(other)))
    with pytest.raises(SystemExit):
        main(command("ProtoNet", tmp_path, "--ckpt_path", "last", steps=4))
    assert f"is trained by process {os.getppid()} of {own.host} just now" in capsys.readouterr().err
    ended = claim.Start("other", own.host, os.getppid(), 1)  # its number belongs to another process by now
    (tmp_path / "protonet" / claim.FILE).write_text(json.dumps(vars(ended)))
    main(command("ProtoNet", tmp_path, "--ckpt_path", "last", steps=4))


def test_what_cannot_run_leaves_no_directory(tmp_path):
    """Catches an empty run for every mistyped command."""
    with pytest.raises(SystemExit):
        main(command("ProtoNet", tmp_path, "--trainer.max_steps", "-1"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../x", "a/../../x", "/tmp/x", "a//b"])
def test_names_that_lead_elsewhere_are_refused(name, tmp_path):
    """Catches a training into the folder of all runs, or outside of it."""
    with pytest.raises(ConfigError, match="is no name of a folder"):
        choose_run(tmp_path / "runs", name, None, "fit")


def test_names_may_have_parts(tmp_path, capsys):
    """Catches an earlier run of a nested name that is overwritten, and its command that cannot be copied."""
    for _ in range(2):
        main(command("ProtoNet", tmp_path / "my runs", "--name", "exp/seed0", steps=2))
    assert (tmp_path / "my runs" / "exp" / "seed0-2" / "results.json").is_file()
    assert "my runs/exp/seed0-2/config.yaml' --stage test" in capsys.readouterr().out.replace("\n", "")


def test_a_run_without_a_best_checkpoint_is_tested_by_its_last(tmp_path):
    """Catches the results of a training replaced by those of weights that were never trained."""
    never = ("--trainer.limit_val_batches", "0")
    main(command("ProtoNet", tmp_path, *never, steps=8))
    run = tmp_path / "protonet"
    before = json.loads((run / "results.json").read_text())["metrics"]
    main(["--config", str(run / "config.yaml"), "--stage", "test"])
    assert json.loads((run / "results.json").read_text())["metrics"] == before


def test_results_of_a_training_are_not_replaced_by_those_of_none(tmp_path, capsys):
    """Catches a test of untrained weights where the checkpoints were moved away."""
    main(command("ProtoNet", tmp_path, steps=2))
    run = tmp_path / "protonet"
    before = (run / "results.json").read_bytes()
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(SystemExit):
        main(["--config", str(run / "config.yaml"), "--stage", "test"])
    assert "no checkpoint to test again" in capsys.readouterr().err
    assert (run / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flag", "value", "cure"),
    [("default_root_dir", "elsewhere", "<runs>/<name>/"), ("overfit_batches", "2", "train_tasks")],
)
def test_settings_that_a_run_would_not_heed_are_refused(flag, value, cure, tmp_path, capsys):
    """Catches a setting that is taken and ignored."""
    with pytest.raises(SystemExit):
        main(command("ProtoNet", tmp_path, f"--trainer.{flag}", value, steps=2))
    assert cure in capsys.readouterr().err


def test_no_logger_means_none_and_ones_own_is_heard(tmp_path):
    """Catches metrics written against the user's word, and a logger of theirs that hears nothing."""
    main(command("ProtoNet", tmp_path, "--trainer.logger", "false", "--name", "silent", steps=2))
    assert not (tmp_path / "silent" / "metrics.csv").exists()
    csv = (
        "--trainer.logger",
        "pytorch_lightning.loggers.CSVLogger",
        "--trainer.logger.save_dir",
        str(tmp_path / "own"),
    )
    main(command("ProtoNet", tmp_path, *csv, "--name", "heard", steps=6))
    assert list((tmp_path / "own").rglob("metrics.csv"))
    assert (tmp_path / "heard" / "metrics.csv").is_file()


def test_a_progress_bar_of_ones_own_takes_the_place_of_ours(tmp_path):
    """Catches two bars, which Lightning refuses."""
    bar = (
        "--trainer.callbacks",
        "pytorch_lightning.callbacks.TQDMProgressBar",
        "--trainer.enable_progress_bar",
        "true",
    )
    main(command("ProtoNet", tmp_path, *bar, steps=2))
    assert (tmp_path / "protonet" / "results.json").is_file()
