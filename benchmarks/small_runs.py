"""Many small trainings, one after the other, that are not done again: what tables of measurements are made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from app.cli.builder import main as train
from app.runs.directory import RESULTS
from models.core.checkpoint_io import CHECKPOINTS

QUIET = ["--wandb", "off", "--pictures", "false", "--trainer.accelerator", "cpu"]
QUIET += ["--trainer.enable_progress_bar", "false", "--open_set_tasks", "0"]


def trained(runs: Path, name: str, steps: int, seed: int, words: Sequence[str]) -> Path:
    """The last checkpoint of a run, which is trained, or trained on, unless it is done.

    Args:
        runs: the folder of all runs.
        name: of the run in it.
        steps: meta-updates.
        seed: of the weights.
        words: what is trained on what, as train.py takes it.
    """
    if not (runs / name / RESULTS).is_file():
        length = ["--trainer.max_steps", steps, "--trainer.val_check_interval", steps, "--seed_everything", seed]
        own = ["--name", name, "--runs", runs, "--ckpt_path", "last"]
        train([str(word) for word in (*words, *length, *own, *QUIET)])
    return runs / name / CHECKPOINTS / "last.ckpt"
