"""Trainings in this process and in others: started, killed, resumed, compared."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch

from app.cli.builder import MetaboltCLI, main
from models.core.checkpoint_io import load_checkpoint
from tests.support.toy import command, weights

ROOT = Path(__file__).resolve().parents[2]


def start(*flags: str, cwd: Path = ROOT) -> subprocess.Popen:
    path = str(ROOT)
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "train.py", *flags],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(*flags: str) -> str:
    process = start(*flags)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for_step(checkpoint: Path, step: int, process: subprocess.Popen, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        if checkpoint.is_file() and load_checkpoint(checkpoint)["global_step"] >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was never saved")


def same_weights(a: Path, b: Path) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def kills(tmp_path: Path, algorithm: str, times: int, steps: int) -> None:
    """Kills a training at random moments; this process goes on with it, and has trained the whole of it."""
    rng = random.Random(algorithm)
    name = algorithm.lower()
    torch.set_num_threads(1)  # as the other process: sums in another order are other bits
    main(command(algorithm, tmp_path / "whole", steps=steps))
    reference = tmp_path / "whole" / name / "checkpoints" / "last.ckpt"
    for k in range(times):
        runs = tmp_path / f"killed{k}"
        last = runs / name / "checkpoints" / "last.ckpt"
        process = start(*command(algorithm, runs, steps=steps))
        wait_for_step(last, rng.randrange(2, steps - 10), process)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.communicate()
        assert load_checkpoint(last)["global_step"] < steps, "it ended before it was killed: the test tests nothing"
        main(command(algorithm, runs, "--ckpt_path", "last", steps=steps))
        assert same_weights(reference, last), f"kill {k}"
        best = [load_checkpoint(r / name / "checkpoints" / "best.ckpt") for r in (tmp_path / "whole", runs)]
        assert best[0]["global_step"] == best[1]["global_step"]


def build(*flags: str) -> MetaboltCLI:
    return MetaboltCLI([*flags, "--wandb", "off"])
