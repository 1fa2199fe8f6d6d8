"""Two processes: the tasks, the meta-gradient and the metrics of one."""

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
import torch

from app.cli.builder import MetaboltCLI, main
from tests.support.processes import ROOT, finished, start, wait_for_step
from tests.support.toy import LEARNERS, NOISELESS, command, headline, weights

TWO = ("--trainer.strategy", "ddp", "--trainer.devices", "2")
SGD = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "1.0")
# By single precision, how many threads sum a convolution alone moves a second-order gradient by 1e-4 of itself.
DOUBLE = ("--trainer.precision", "64-true")


def step(algorithm: str, runs: Path) -> list[str]:
    """One meta-update by SGD at rate 1, which makes the weights' change the meta-gradient itself."""
    tasks = ("--data.meta_batch_size", "5", "--data.test_tasks", "13")
    noiseless = NOISELESS.get(algorithm, ())
    return command(algorithm, runs, *SGD, *DOUBLE, *noiseless, *tasks, "--trainer.val_check_interval", "1", steps=1)


@pytest.fixture(scope="module")
def two(request, tmp_path_factory) -> Path:
    """The runs of the learners that are tested, by two processes that start once, as by torchrun or SLURM."""
    runs = tmp_path_factory.mktemp("two")
    chosen = [t.callspec.params["algorithm"] for t in request.session.items if "two" in getattr(t, "fixturenames", ())]
    commands = "".join(json.dumps([str(free_port()), [*step(a, runs), *TWO]]) + "\n" for a in chosen)
    path = str(ROOT)
    shared = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    ranks = []
    for rank in "01":
        log = (runs / f"rank{rank}.txt").open("w")
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "support" / "rank.py")],
                env={**shared, "LOCAL_RANK": rank, "NODE_RANK": "0"},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
            )
        )
    for process in ranks:
        process.stdin.write(commands)
        process.stdin.close()
    deadline = time.monotonic() + 1200
    while any(p.poll() is None for p in ranks) and not any(p.poll() for p in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    codes = [p.poll() for p in ranks]
    for process in ranks:
        process.kill()
        process.wait()
    assert codes == [0, 0], (runs / "rank0.txt").read_text()[-5000:] + (runs / "rank1.txt").read_text()[-5000:]
    return runs


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_two_processes_take_the_meta_step_of_one(algorithm, two, tmp_path):
    """Catches ranks with the same or other tasks, unequal shares weighed alike, and metrics of one rank's tasks."""
    name = algorithm.lower()
    zero = MetaboltCLI(step(algorithm, tmp_path)).model.state_dict()
    main(step(algorithm, tmp_path))
    runs = [tmp_path / name, two / name]
    one, both = (weights(run / "checkpoints" / "last.ckpt") for run in runs)
    learned = [k for k in one if "running" not in k]
    gradient = torch.cat([(one[k] - zero[k]).flatten() for k in learned])
    difference = torch.cat([(one[k] - both[k]).flatten() for k in learned])
    assert gradient.norm() > 1e-3
    assert difference.norm() <= 1e-7 * gradient.norm()
    for k in one:
        torch.testing.assert_close(one[k], both[k], rtol=1e-6, atol=1e-8)
    results = [json.loads((run / "results.json").read_text()) for run in runs]
    assert results[0]["tasks"] == results[1]["tasks"] == 13
    for metric in {headline(algorithm), "nll", "ece"} & results[0]["metrics"].keys():
        assert results[1]["metrics"][metric]["mean"] == pytest.approx(results[0]["metrics"][metric]["mean"], abs=1e-6)
        assert results[1]["metrics"][metric]["ci95"] == pytest.approx(results[0]["metrics"][metric]["ci95"], abs=1e-6)


def fds(pid: int) -> list[str]:
    """What a process has open; nothing once it has ended."""
    try:
        return os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return []


@pytest.mark.parametrize("victim", ["first", "second"])
def test_a_killed_process_ends_the_other(victim, tmp_path):
    """Catches a process that waits for ever for one that is gone, one that lives on alone, a setting blamed for it,
    and a run that cannot go on."""
    run = tmp_path / "protonet" / "checkpoints" / "last.ckpt"
    process = start(*command("ProtoNet", tmp_path, *TWO, steps=5000))
    wait_for_step(run, 4, process)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    second = int(found[-1])
    os.kill(process.pid if victim == "first" else second, signal.SIGKILL)
    output, _ = process.communicate(timeout=120)  # the pipe closes with the last of the two
    deadline = time.monotonic() + 60  # it may be on its way out
    while time.monotonic() < deadline and fds(second):
        time.sleep(0.1)
    assert not fds(second)
    if victim == "second":
        assert process.returncode == 2, output
    assert output.count("error: another process of this training ended") == 1 and "Traceback" not in output
    reached = torch.load(run, weights_only=True)["global_step"]
    finished(*command("ProtoNet", tmp_path, *TWO, "--ckpt_path", "last", steps=reached + 2))


def test_two_processes_stop_on_sigterm_and_resume_exactly(tmp_path):
    """Catches processes that disagree on where to stop, and a resume that depends on how many there were."""
    last = tmp_path / "cut" / "protonet" / "checkpoints" / "last.ckpt"
    process = start(*command("ProtoNet", tmp_path / "cut", *TWO, steps=5000))
    wait_for_step(last, 4, process)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    reached = torch.load(last, weights_only=True)["global_step"]
    for runs in ("cut", "whole"):  # where there is no checkpoint, from the beginning
        finished(*command("ProtoNet", tmp_path / runs, *TWO, "--ckpt_path", "last", steps=reached + 4))
    one, two = (weights(p) for p in (tmp_path / "whole" / "protonet" / "checkpoints" / "last.ckpt", last))
    assert all(torch.equal(one[k], two[k]) for k in one)
