"""Killed at any moment, a run goes on to the weights of the uninterrupted one, bit for bit."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import signal
import warnings
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch

from app.cli.builder import main
from app.runs.claim import release
from app.runs.directory import choose_run
from app.runs.resume import follow_configuration
from datamodules.core.errors import ConfigError
from datamodules.core.files import write_atomically
from models import Conv4, ProtoNet
from models.core import checkpoint_io
from models.core.checkpoint_io import AtomicCheckpointIO, load_checkpoint
from tests.support.processes import kills, same_weights, start, wait_for_step
from tests.support.toy import ToyImages, command, weights

SLOWED = ("--trainer.log_every_n_steps", "5")


@pytest.mark.parametrize("algorithm", ["MAML", "ProtoNet"])
def test_sigterm_saves_the_step_that_it_interrupts(algorithm, tmp_path):
    """Catches a SIGTERM that loses work, and a checkpoint of a half-done accumulation: 3 batches make a meta-update."""
    torch.set_num_threads(1)  # as the other process: sums in another order are other bits
    accumulate = ("--trainer.accumulate_grad_batches", "3")
    name = algorithm.lower()
    last = tmp_path / "cut" / name / "checkpoints" / "last.ckpt"
    process = start(*command(algorithm, tmp_path / "cut", *accumulate, "--checkpoint_every", "1", steps=4000))
    wait_for_step(last, 3, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "--ckpt_path last" in output
    reached = load_checkpoint(last)["global_step"]
    assert reached < 4000
    main(command(algorithm, tmp_path / "cut", *accumulate, "--ckpt_path", "last", steps=reached + 4))
    main(command(algorithm, tmp_path / "whole", *accumulate, steps=reached + 4))
    assert same_weights(tmp_path / "whole" / name / "checkpoints" / "last.ckpt", last)


@pytest.mark.parametrize(("algorithm", "steps"), [("MAML", 120), ("RL2", 40)])
def test_sigkill_loses_nothing_but_the_steps_since_the_last_checkpoint(algorithm, steps, tmp_path):
    """Catches half-written checkpoints, skipped or repeated tasks, and a best checkpoint forgotten by the resume."""
    kills(tmp_path, algorithm, times=1, steps=steps)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["MAML", "ProtoNet"])
def test_ten_kills(algorithm, tmp_path):
    """Catches what one kill does not: ten at random moments, five of each algorithm."""
    kills(tmp_path, algorithm, times=5, steps=300)


def test_last_is_safe_when_there_is_none_and_config_is_kept(tmp_path, capfd):
    """Catches a first run that fails for asking to resume, and a second that overwrites the first one's config."""
    main(command("ProtoNet", tmp_path, "--ckpt_path", "last", steps=2))
    run = tmp_path / "protonet"
    first = (run / "config.yaml").read_text()
    main(command("ProtoNet", tmp_path, "--ckpt_path", "last", steps=4))
    assert (run / "config.yaml").read_text() == first
    assert "max_steps: 4" in (run / "config.resume-1.yaml").read_text()
    main(command("ProtoNet", tmp_path, steps=2))
    assert (tmp_path / "protonet-2" / "config.yaml").is_file()
    rows = (run / "metrics.csv").read_text().splitlines()
    assert len(rows) > 1


def test_flags_win_over_the_checkpoint(tmp_path):
    """Catches hyperparameters of a checkpoint that silently replace explicit flags."""
    main(command("MAML", tmp_path, steps=2))
    from app.cli.builder import MetaboltCLI, run

    cli = MetaboltCLI(command("MAML", tmp_path, "--ckpt_path", "last", "--model.inner_rate", "0.123", steps=4))
    run(cli)
    assert cli.model.inner_rate == 0.123
    assert cli.trainer.global_step == 4


def test_a_run_does_not_go_on_with_another_optimizer(tmp_path, capsys):
    """Catches the state of one optimizer in another, which fails, or trains with what means something else."""
    main(command("MAML", tmp_path, steps=2))
    with pytest.raises(SystemExit):
        main(command("MAML", tmp_path, "--ckpt_path", "last", "--model.optimizer", "torch.optim.SGD", steps=4))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the state of torch.optim.Adam, with which torch.optim.SGD cannot go on" in error


ADAM = ("--model.optimizer", "torch.optim.Adam", "--model.optimizer.amsgrad")
PROP = ("--model.optimizer", "torch.optim.RMSprop", "--model.optimizer.centered")


@pytest.mark.parametrize(("optimizer", "moment"), [(ADAM, "max_exp_avg_sq"), (PROP, "grad_avg")])
def test_settings_that_need_moments_of_their_own_are_refused(optimizer, moment, tmp_path, capsys):
    """Catches a bare name of what is missing, told after the data were read."""
    main(command("MAML", tmp_path, *optimizer, "true", steps=2))
    main(command("MAML", tmp_path, *optimizer, "false", "--ckpt_path", "last", steps=4))  # fewer do
    main(command("MAML", tmp_path / "other", *optimizer, "false", steps=2))
    with pytest.raises(SystemExit) as stopped:
        main(command("MAML", tmp_path / "other", *optimizer, "true", "--ckpt_path", "last", steps=4))
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"has no {moment}, which its settings ask for now: leave" in error


def test_momentum_may_come_and_go(tmp_path):
    """Catches a resume that is refused though the optimizer makes by itself what it has not."""
    sgd = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.momentum")
    for steps, momentum in ((2, "0"), (4, "0.9"), (6, "0")):
        main(command("MAML", tmp_path, *sgd, momentum, "--ckpt_path", "last", steps=steps))


def test_weights_that_are_not_finite_are_never_saved(tmp_path, capsys):
    """Catches a training that goes on for hours with weights that are lost, and saves them over the good ones."""
    diverging = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "1e20", "--checkpoint_every", "1")
    with pytest.raises(SystemExit) as stopped:
        main(command("MAML", tmp_path, *diverging, steps=9))
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "meta-training diverged: " in error
    assert "--trainer.gradient_clip_val" in error
    saved = weights(tmp_path / "maml" / "checkpoints" / "last.ckpt")  # of the first step, finite and useless
    assert all(w.isfinite().all() for w in saved.values())


def test_full_disk_keeps_the_old_checkpoint_and_goes_on(tmp_path, monkeypatch):
    """Catches a half-written file that is later trusted, and a training that dies for lack of disk."""
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"step": 1}, path)

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="training goes on, free some space"):
        io.save_checkpoint({"step": 2}, path)
    assert load_checkpoint(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    monkeypatch.undo()
    io.save_checkpoint({"step": 3}, tmp_path / "best.ckpt")
    assert load_checkpoint(path) == {"step": 2}


@pytest.mark.parametrize("until", [9, 99])
def test_a_disk_that_is_full_for_a_while_costs_nothing_or_is_told(until, tmp_path, monkeypatch, capsys):
    """Catches a checkpoint that counts as saved and is not: results of older weights, and a run that ends as if all
    were well."""
    write = checkpoint_io.write_atomically

    def full(path: Path, content: bytes) -> None:
        if 5 < progress["step"] < until:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    progress = {"step": 0}
    monkeypatch.setattr(checkpoint_io, "write_atomically", full)
    flags = ("--trainer.val_check_interval", "4", "--trainer.callbacks", f"{__name__}.Progress")
    Progress.told = progress
    main(command("MAML", tmp_path / "whole", *flags[:2], steps=12))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if until > 12:
            with pytest.raises(SystemExit) as ended:
                main(command("MAML", tmp_path, *flags, steps=12))
            assert ended.value.code == 2
            assert "could not be written (No space left on device)" in capsys.readouterr().err
            assert load_checkpoint(tmp_path / "maml" / "checkpoints" / "last.ckpt")["global_step"] == 4
            return
        main(command("MAML", tmp_path, *flags, steps=12))
    runs = (tmp_path / "whole" / "maml", tmp_path / "maml")
    assert all(same_weights(*(run / "checkpoints" / f"{name}.ckpt" for run in runs)) for name in ("last", "best"))
    assert results_of(runs[0])["metrics"] == results_of(runs[1])["metrics"]


class Progress(pl.Callback):
    """Tells how many meta-updates there were."""

    told: ClassVar[dict[str, int]] = {}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.told["step"] = trainer.global_step


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"text, not a checkpoint"])
def test_damaged_checkpoint_is_one_clear_error(damage, tmp_path):
    """Catches a truncated or foreign file that is trusted, or that ends in a traceback."""
    path = tmp_path / "x.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.ones(100)}}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match="not a whole checkpoint"):
        load_checkpoint(path)


def test_choice_of_run(tmp_path):
    """Catches a fresh run in an old directory, and last, best or test that look in the wrong one."""
    assert choose_run(tmp_path, "a", None, "fit") == (tmp_path / "a", None)
    for name in ("a", "a-2", "a-10", "a-b"):
        write_atomically(tmp_path / name / "config.yaml", "name: a\n")
    assert choose_run(tmp_path, "a", None, "fit")[0].name == "a-11"
    assert choose_run(tmp_path, "a", None, "test")[0].name == "a-10"
    assert choose_run(tmp_path, "a", "last", "fit") == (tmp_path / "a-10", None)
    write_atomically(tmp_path / "a-10" / "checkpoints" / "last.ckpt", "")
    assert choose_run(tmp_path, "a", "last", "fit")[1] == tmp_path / "a-10" / "checkpoints" / "last.ckpt"
    with pytest.raises(ConfigError, match="no best checkpoint"):
        choose_run(tmp_path, "a", "best", "test")
    with pytest.raises(ConfigError, match="existing file"):
        choose_run(tmp_path, "a", "nothing.ckpt", "fit")
    # By its configuration, or by its checkpoint, an older one is meant.
    config = tmp_path / "a-2" / "config.yaml"
    write_atomically(tmp_path / "a-2" / "checkpoints" / "best.ckpt", "")
    assert choose_run(tmp_path, "a", "last", "fit", configs=[config]) == (tmp_path / "a-2", None)
    assert choose_run(tmp_path, "a", None, "test", configs=[Path("other.yaml"), config])[0].name == "a-2"
    assert choose_run(tmp_path, "a", str(tmp_path / "a-2" / "checkpoints" / "best.ckpt"), "test")[0].name == "a-2"


def test_a_run_that_is_named_like_a_number_of_another_is_its_own(tmp_path):
    """Catches ``sin`` that goes on in, or overwrites, what was trained as ``sin-10``; and a run whose configuration
    was lost, and that is overwritten."""
    for name in ("sin", "sin-10"):
        write_atomically(tmp_path / name / "config.yaml", f"name: {name}\nruns: runs\n")
        write_atomically(tmp_path / name / "checkpoints" / "last.ckpt", "")
    assert choose_run(tmp_path, "sin", "last", "fit")[0].name == "sin"
    assert choose_run(tmp_path, "sin", None, "test")[0].name == "sin"
    assert choose_run(tmp_path, "sin-10", "last", "fit")[0].name == "sin-10"
    write_atomically(tmp_path / "sin-2" / "results.json", "{}")
    assert choose_run(tmp_path, "sin", None, "fit", take=True)[0].name == "sin-3"
    release()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_step_that_validates_waits_for_the_validation(number, tmp_path):
    """Catches a validation that is skipped for good, with the best checkpoint that it would have chosen."""
    signals = ("--trainer.callbacks", f"{__name__}.SignalsItself", "--trainer.callbacks.number", str(int(number)))
    cut = command("MAML", tmp_path / "cut", "--checkpoint_every", "3", *signals, "--ckpt_path", "last")
    main(command("MAML", tmp_path / "whole", "--checkpoint_every", "3"))
    with pytest.raises(SystemExit, match="143"):
        main(cut)
    main(cut)
    whole, cut = (tmp_path / runs / "maml" for runs in ("whole", "cut"))
    assert results_of(whole)["metrics"] == results_of(cut)["metrics"]
    assert same_weights(*(r / "checkpoints" / "best.ckpt" for r in (whole, cut)))
    assert [row["step"] for row in validations(cut)] == [row["step"] for row in validations(whole)] == ["5", "11"]


class SignalsItself(pl.Callback):
    """Sends a signal to its own process, at the end of a step that validates."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 6:
            os.kill(os.getpid(), self.number)


def validations(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["val/accuracy"]]


def results_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def test_the_best_validation_survives_a_cut_right_after_it(tmp_path):
    """Catches a last.ckpt that is saved before the validation of its step counts: resumed, a worse one would be
    taken for the best and tested. Saves, validations and the cut coincide; accuracy falls by what is trained."""
    worse = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "100", "--checkpoint_every", "6")
    for runs, lengths in ((tmp_path / "whole", [24]), (tmp_path / "cut", [6, 24])):
        for steps in lengths:
            main(command("MAML", runs, *worse, "--ckpt_path", "last", steps=steps))
    whole, cut = tmp_path / "whole" / "maml", tmp_path / "cut" / "maml"
    state = load_checkpoint(cut / "checkpoints" / "last.ckpt")["callbacks"]
    best = next(value for key, value in state.items() if key.startswith("BestCheckpoint"))
    assert best["best_model_score"] is not None
    assert same_weights(*(r / "checkpoints" / "best.ckpt" for r in (whole, cut)))
    assert results_of(whole)["metrics"] == results_of(cut)["metrics"]


def test_a_checkpoint_of_a_validation_knows_its_score(tmp_path):
    """Catches callbacks whose state a checkpoint has from before the validation that it was saved after."""
    stopping = ("--trainer.callbacks", "pytorch_lightning.callbacks.EarlyStopping")
    stopping += ("--trainer.callbacks.monitor", "val/accuracy", "--trainer.callbacks.mode", "max")
    main(command("ProtoNet", tmp_path, *stopping, steps=6))
    content = load_checkpoint(tmp_path / "protonet" / "checkpoints" / "last.ckpt")
    scores = {key.split("{")[0]: value for key, value in content["callbacks"].items()}
    assert content["global_step"] == 6
    assert float(scores["BestCheckpoint"]["current_score"]) == float(scores["EarlyStopping"]["best_score"])


COSINE = ("--model.scheduler", "torch.optim.lr_scheduler.CosineAnnealingLR", "--model.scheduler.T_max")


@pytest.mark.parametrize("algorithm", ["ProtoNet", "RL2"])
def test_rates_and_schedules_are_the_flags_and_moments_the_checkpoints(algorithm, tmp_path):
    """Catches a learning rate, or the length of a schedule, that a checkpoint keeps against the flags."""
    adam = ("--model.optimizer", "torch.optim.Adam", "--model.optimizer.lr")
    run = tmp_path / algorithm.lower() / "checkpoints" / "last.ckpt"
    main(command(algorithm, tmp_path, *adam, "0.01", *COSINE, "6", steps=6))
    before = load_checkpoint(run)
    main(command(algorithm, tmp_path, *adam, "0.02", *COSINE, "12", "--ckpt_path", "last", steps=9))
    after = load_checkpoint(run)
    group = after["optimizer_states"][0]["param_groups"][0]
    assert group["initial_lr"] == 0.02
    assert group["lr"] == pytest.approx(0.02 * (1 + math.cos(math.pi * 9 / 12)) / 2)
    assert after["lr_schedulers"][0]["T_max"] == 12
    steps = [next(iter(c["optimizer_states"][0]["state"].values()))["step"].item() for c in (before, after)]
    assert steps[1] == pytest.approx(steps[0] * 9 / 6)  # moments went on


def test_a_schedule_may_come_and_go(tmp_path):
    """Catches a resume that fails, or keeps the rate of a schedule that is gone."""
    main(command("ProtoNet", tmp_path, *COSINE, "12", steps=6))
    run = tmp_path / "protonet" / "checkpoints" / "last.ckpt"
    main(command("ProtoNet", tmp_path, "--ckpt_path", "last", steps=8))
    content = load_checkpoint(run)
    assert content["lr_schedulers"] == []
    assert content["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-3
    main(command("ProtoNet", tmp_path, *COSINE, "20", "--ckpt_path", "last", steps=10))
    rate = load_checkpoint(run)["optimizer_states"][0]["param_groups"][0]["lr"]
    assert rate == pytest.approx(1e-3 * (1 + math.cos(math.pi * 10 / 20)) / 2)


def test_other_validation_tasks_choose_the_best_anew(tmp_path, capfd):
    """Catches the score on easy tasks kept for hard ones, by which best.ckpt never changes again."""
    easy, hard = ("--data.ways", "2", "--data.train_ways", "3"), ("--data.ways", "10", "--data.train_ways", "3")
    main(command("ProtoNet", tmp_path, *easy, steps=6))
    main(command("ProtoNet", tmp_path, *hard, "--ckpt_path", "last", steps=12))
    assert load_checkpoint(tmp_path / "protonet" / "checkpoints" / "best.ckpt")["global_step"] == 12


def test_tasks_are_counted_whatever_the_size_of_meta_batches(tmp_path):
    """Catches tasks that repeat, or are miscounted, after a resume with meta-batches of another size."""
    seen: list[int] = []
    met = ToyImages.on_after_batch_transfer

    def noting(self, batch, dataloader_idx):
        ready = met(self, batch, dataloader_idx)
        if self.trainer.training:
            seen.extend(ready.index.tolist())
        return ready

    with mock.patch.object(ToyImages, "on_after_batch_transfer", noting):
        main(command("ProtoNet", tmp_path, "--data.meta_batch_size", "4", steps=3))
        main(command("ProtoNet", tmp_path, "--data.meta_batch_size", "6", "--ckpt_path", "last", steps=5))
        main(command("ProtoNet", tmp_path, "--data.meta_batch_size", "5", "--ckpt_path", "last", steps=6))
    assert seen == [*range(12), *range(12, 24), *range(25, 30)]  # from the next multiple of the size
    state = load_checkpoint(tmp_path / "protonet" / "checkpoints" / "last.ckpt")["ToyImages"]
    assert state == {"batches": 6, "seen": 29, "next": 30}


def test_another_seed_of_the_data_is_refused(tmp_path, capsys):
    """Catches a run that goes on with another split, and validates on classes that it was trained on."""
    main(command("ProtoNet", tmp_path, steps=2))
    with pytest.raises(SystemExit):
        main(command("ProtoNet", tmp_path, "--data.seed", "1", "--ckpt_path", "last", steps=4))
    assert "the run's data has seed 0, not 1" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(("length", "warned"), [(3, True), (4, False), (9, False)])
def test_a_cosine_that_ends_before_the_run_is_told(length, warned, tmp_path):
    """Catches a run that ends at its starting rate without a word."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        main(command("ProtoNet", tmp_path, *COSINE, str(length), steps=4))
    assert any("rises again: give" in str(w.message) for w in told) == warned


def test_a_schedule_by_plateaus_goes_on_with_what_it_counted():
    """Catches a plateau that is counted from its beginning after a resume, and settings that flags do not win."""
    learner = ProtoNet(
        Conv4(hidden=4, image_size=8),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=7),
    )
    optimizer = torch.optim.Adam(learner.parameters())
    before = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=3)
    for value in (0.5, 0.7, 0.6):
        before.step(value)
    checkpoint = {
        "global_step": 3,
        "lr_schedulers": [before.state_dict()],
        "optimizer_states": [optimizer.state_dict()],
    }
    follow_configuration(learner, checkpoint)
    (after,) = checkpoint["lr_schedulers"]
    assert (after["best"], after["num_bad_epochs"], after["last_epoch"]) == (0.5, 2, 3)
    assert after["patience"] == 7
