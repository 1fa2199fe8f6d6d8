"""What a run tells while it runs."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import app  # noqa: F401  first, as in a run: it makes pytorch_lightning importable beside a broken torchvision
from app.cli.builder import main
from app.dashboard.callback import Dashboard
from app.evaluate import main as evaluate
from app.runs.progress import TaskProgress
from datamodules.core.metric import Metric

FLAGS = [
    *("--model", "models.MAML", "--model.outputs", "1", "--model.backbone", "models.MLP"),
    *("--data", "datamodules.Sinusoid", "--data.val_tasks", "8", "--data.test_tasks", "60"),
    *("--data.eval_batch_size", "4", "--trainer.max_steps", "6", "--trainer.val_check_interval", "3"),
    *("--trainer.accelerator", "cpu", "--wandb", "off", "--name", "sin"),
]


# Lightning calls what jsonargparse 5 will not have.
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_a_line_tells_that_it_has_begun(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """Catches a redirected output that is silent for half a minute: does it run, where, for how long?"""
    monkeypatch.setattr(Dashboard, "_draw", lambda *_: None)

    def told() -> list[str]:
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("meta-")]

    run = tmp_path / "a folder whose name is longer than a line of eighty letters is, as some are" / "sin"
    runs = ["--runs", str(run.parent)]
    main([*FLAGS, *runs])
    train, *_, test = told()
    assert train == f"meta-train: 6 meta-updates, on cpu, in {run}"
    assert test == f"meta-test: 15 batches on cpu, in {run}"
    main([*FLAGS, *runs, "--ckpt_path", "last", "--trainer.max_steps", "9"])
    assert told()[0] == f"meta-train: 9 meta-updates, 6 of them done, on cpu, in {run}"
    main([*FLAGS, *runs, "--ckpt_path", "last", "--stage", "validate"])
    assert told() == [f"meta-val: 2 batches on cpu, in {run}"]
    evaluate(["--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--tasks", "4"])
    assert told() == [f"meta-test: 1 batch on cpu, in {run / 'evaluations' / 'last-tasks-4'}"]


def trainer(fn: str = "fit", **others: Any) -> Any:
    progress = SimpleNamespace(total=SimpleNamespace(ready=5))
    given = {
        "callback_metrics": {},
        "state": SimpleNamespace(fn=fn),
        "strategy": SimpleNamespace(root_device=torch.device("cpu")),
        "fit_loop": SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
        **{"num_val_batches": [40], "max_steps": 10, "accumulate_grad_batches": 1, "global_step": 5},
        **{"default_root_dir": "runs/x", "world_size": 1},
    }
    return SimpleNamespace(**given | others)


@pytest.mark.parametrize("terminal", [True, False])
def test_validation_is_shown(terminal: bool):
    """Catches a bar, or a log, that stands still while meta-validation runs, or keeps its number afterwards."""
    bar = TaskProgress("accuracy", Metric("higher", share=True), quiet_seconds=-1)
    bar.console = Console(file=io.StringIO(), force_terminal=terminal, width=150)
    bar.on_train_start(trainer(), None)  # pyright: ignore
    bar.on_validation_start(trainer(), None)  # pyright: ignore
    for number in range(40):
        bar._drawn_at = 0.0
        bar.on_validation_batch_end(trainer(), None, None, [0], number)
        if number == 11:
            note = bar.bar.tasks[0].fields["note"] if bar.bar else bar.console.file.getvalue().splitlines()[-1]  # pyright: ignore
            assert note.endswith("meta-val 12/40")
    measured = {"val/accuracy": torch.tensor(0.5), "val/accuracy_ci95": torch.tensor(0.01)}
    bar.on_validation_end(trainer(callback_metrics=measured), None)  # pyright: ignore
    if bar.bar is not None:
        assert bar.bar.tasks[0].fields["note"] == bar._note
        assert bar.bar.tasks[0].completed == 5
    assert bar._note == "val 50.00 ± 1.00 %"
    bar.on_validation_start(trainer(), None)  # pyright: ignore
    bar.on_validation_end(trainer(), None)  # pyright: ignore
    assert bar._note == "val 50.00 ± 1.00 %"  # of the one before, where the last one measured nothing
    bar.on_exception(trainer(), None, KeyboardInterrupt())  # pyright: ignore


def test_a_check_before_the_training_prints_nothing():
    """Catches an error, or a line of nothing, in a validation before the start; a bar of another rank."""
    for enabled in (True, False):
        bar = TaskProgress("accuracy", Metric("higher", share=True), quiet_seconds=-1)
        bar.console = Console(file=io.StringIO(), force_terminal=False)
        bar.enable() if enabled else bar.disable()
        bar.on_validation_start(trainer(), None)  # pyright: ignore
        bar.on_validation_batch_end(trainer(), None, None, [0], 0)
        bar.on_validation_end(trainer(), None)  # pyright: ignore
        if not enabled:
            bar.on_train_start(trainer(), None)  # pyright: ignore
            bar.on_validation_start(trainer(), None)  # pyright: ignore
        assert bar.console.file.getvalue() == ""  # pyright: ignore
