"""What of a checkpoint a run goes on with, and what the configuration says anew."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from app.runs.checkpoints import BestCheckpoint
from datamodules.core.errors import ConfigError
from models.core.from_checkpoint import configuration_of

# What of the data's settings does not touch the meta-validation tasks.
NOT_OF_VALIDATION = frozenset(
    {
        *("meta_batch_size", "eval_batch_size", "workers", "test_tasks", "root", "warp"),
        *("train_ways", "train_shots", "train_queries", "max_train_shots", "train_tasks"),
    }
)


# Without which a training would begin anew from the weights.
STATE = ("optimizer_states", "lr_schedulers", "loops")


def reconcile(trainer: pl.Trainer, learner: Any, checkpoint: dict[str, Any], now: Any) -> None:
    """Make a checkpoint one that the run can go on from as its configuration says: hyperparameters and schedules are
    the configuration's, moments, weights and counters the checkpoint's.

    Args:
        trainer, learner: of the run, before its optimizers are set up.
        checkpoint: changed in place.
        now: the configuration of the run.

    Raises:
        ConfigError: what would go on as another training than it looks like; no whole checkpoint of a training.
    """
    path = trainer.ckpt_path
    was = configuration_of(checkpoint.get("config"), path)
    missing = [name for name in STATE if name not in checkpoint] + ["data"] * ("data" not in was)
    if missing:
        raise ConfigError(f"{path} has no {missing[0]} to go on with: give one of train.py, or start a new run")
    refuse_another_stream(was, now)
    of_model = [(c["model"].get("init_args") or {}) for c in (was, now)]
    one, other = ((part.get("optimizer") or {}).get("class_path") for part in of_model)
    if one != other:
        raise ConfigError(
            f"the run has the state of {one}, with which {other} cannot go on: leave the optimizer as it was, or "
            "start a new run"
        )
    if any(of_model[0].get(key) != of_model[1].get(key) for key in ("optimizer", "scheduler")):
        follow_configuration(learner, checkpoint)
    if validation_of(was) != validation_of(now):
        key = next((k for k in checkpoint.get("callbacks", {}) if k.startswith(BestCheckpoint.__name__)), None)
        if key is not None:
            del checkpoint["callbacks"][key]
            rank_zero_info("the meta-validation tasks are others than before: the best checkpoint is chosen anew")


def refuse_another_stream(was: Any, now: Any) -> None:
    """Refuse to go on with the same data by another seed: another split of its classes, tested on trained ones.

    Raises:
        ConfigError: naming both seeds.
    """
    one, other = ((c["data"]["class_path"], (c["data"].get("init_args") or {}).get("seed")) for c in (was, now))
    if one[0] == other[0] and one[1] != other[1]:
        raise ConfigError(
            f"the run's data has seed {one[1]}, not {other[1]}, by which classes are split and tasks drawn: leave "
            "--data.init_args.seed as it was, or start a new run"
        )


def validation_of(config: Any) -> dict[str, Any]:
    """What of a configuration makes its meta-validation tasks."""
    settings = config["data"].get("init_args") or {}
    return {n: v for n, v in settings.items() if n not in NOT_OF_VALIDATION} | {"data": config["data"]["class_path"]}


def follow_configuration(learner: Any, checkpoint: dict[str, Any]) -> None:
    """Give the checkpoint's optimizer the configuration's hyperparameters, and a schedule that has come as far.

    The schedule is stepped from its beginning, so that it is where it would be had it been there all along.

    Raises:
        ConfigError: the hyperparameters ask for moments that the checkpoint does not have.
    """
    made = learner.configure_optimizers()
    optimizer = made["optimizer"] if isinstance(made, dict) else made
    scheduler = made["lr_scheduler"]["scheduler"] if isinstance(made, dict) else None
    before = checkpoint["lr_schedulers"]
    if isinstance(scheduler, ReduceLROnPlateau):
        settings = scheduler.state_dict()
        kept = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr")
        settings |= {name: before[0][name] for name in kept if before and name in before[0]}
        checkpoint["lr_schedulers"] = [settings]
    elif scheduler is not None:
        steps = before[0].get("last_epoch", checkpoint["global_step"]) if before else checkpoint["global_step"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no optimizer steps in between
            for _ in range(steps):
                scheduler.step()
        checkpoint["lr_schedulers"] = [scheduler.state_dict()]
    else:
        checkpoint["lr_schedulers"] = []
    (state,) = checkpoint["optimizer_states"]
    kept = {name for moments in state["state"].values() for name in moments}
    if kept and (missing := sorted(moments_of(optimizer) - kept)):
        raise ConfigError(
            f"the run's state of {type(optimizer).__name__} has no {missing[0]}, which its settings ask for now: leave "
            "--model.init_args.optimizer as it was, or start a new run"
        )
    fresh = optimizer.state_dict()["param_groups"]
    state["param_groups"] = [
        new | {"params": old["params"]} for new, old in zip(fresh, state["param_groups"], strict=True)
    ]


def moments_of(optimizer: torch.optim.Optimizer) -> set[str]:
    """Names of what an optimizer keeps for a parameter, by a step of another that is made as it is; none where that
    takes no such step."""
    trial, parameter = copy.copy(optimizer), torch.nn.Parameter(torch.zeros(1, 1))
    trial.state = defaultdict(dict)
    trial.param_groups = [group | {"params": [parameter]} for group in optimizer.param_groups[:1]]
    parameter.grad = torch.zeros_like(parameter)
    try:
        trial.step()
    except Exception:  # told where the training itself takes one
        return set()
    return set(trial.state[parameter])


def cosine_shorter_than(scheduler: Any, steps: int) -> int | None:
    """The length of a cosine inside a schedule that ends before the run, from where the rate rises again; else None."""
    parts = [scheduler, *getattr(scheduler, "_schedulers", ())]
    lengths = [part.T_max for part in parts if isinstance(part, CosineAnnealingLR)]
    return next((length for length in lengths if length < steps and len(parts) == 1), None)
