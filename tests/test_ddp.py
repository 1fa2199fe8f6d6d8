"""Two processes: the tasks, the meta-gradient and the figures of one."""

from __future__ import annotations

import json

import pytest
import torch
from test_resume import finished, start, wait_for_step
from toy import ALGORITHMS, NOISELESS, command, weights

from app.cli import MetaboltCLI, main

TWO = ("--trainer.strategy", "ddp", "--trainer.devices", "2")
SGD = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "1.0")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_processes_take_the_meta_step_of_one(algorithm, tmp_path):
    """Catches ranks with the same or other tasks, unequal shares weighed alike, and figures of one rank's tasks only.

    One SGD step at rate 1 makes the weights' change the meta-gradient itself.
    """
    name = algorithm.lower()
    flags = (*SGD, *NOISELESS.get(algorithm, ()), "--data.meta_batch_size", "5", "--data.test_tasks", "13")
    zero = MetaboltCLI(command(algorithm, tmp_path, *flags)).model.state_dict()
    flags = (*flags, "--trainer.val_check_interval", "1")
    main(command(algorithm, tmp_path / "one", *flags, steps=1))
    finished(*command(algorithm, tmp_path / "two", *flags, *TWO, steps=1))
    one, two = (weights(tmp_path / r / name / "checkpoints" / "last.ckpt") for r in ("one", "two"))
    learned = [k for k in one if "running" not in k]
    gradient = torch.cat([(one[k] - zero[k]).flatten() for k in learned])
    difference = torch.cat([(one[k] - two[k]).flatten() for k in learned])
    assert gradient.norm() > 1e-3
    assert difference.norm() <= 1e-5 * gradient.norm()
    for k in one:
        torch.testing.assert_close(one[k], two[k], rtol=1e-4, atol=1e-5)
    results = [json.loads((tmp_path / r / name / "results.json").read_text()) for r in ("one", "two")]
    assert results[0]["tasks"] == results[1]["tasks"] == 13
    for figure in ("accuracy", "nll", "ece"):
        assert results[1]["figures"][figure]["mean"] == pytest.approx(results[0]["figures"][figure]["mean"], abs=1e-3)
        assert results[1]["figures"][figure]["ci95"] == pytest.approx(results[0]["figures"][figure]["ci95"], abs=1e-3)


def test_two_processes_stop_on_sigterm_and_resume_exactly(tmp_path):
    """Catches processes that disagree on where to stop, and a resume that depends on how many there were."""
    finished(*command("ProtoNet", tmp_path / "whole", *TWO, steps=40))
    last = tmp_path / "cut" / "protonet" / "checkpoints" / "last.ckpt"
    process = start(*command("ProtoNet", tmp_path / "cut", *TWO, steps=5000))
    wait_for_step(last, 4, process)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    reached = torch.load(last, weights_only=True)["global_step"]
    finished(*command("ProtoNet", tmp_path / "cut", *TWO, "--ckpt_path", "last", steps=max(40, reached + 1)))
    if reached < 40:
        one, two = (weights(p) for p in (tmp_path / "whole" / "protonet" / "checkpoints" / "last.ckpt", last))
        assert all(torch.equal(one[k], two[k]) for k in one)
