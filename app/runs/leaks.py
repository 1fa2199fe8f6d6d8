"""Classes that were trained on must not be among those that are validated or tested on."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import nn

from datamodules.core.base import EpisodicDataModule
from datamodules.core.errors import ConfigError
from models.core.pretrained import FromCheckpoint

KEY = "trained_classes"  # of a checkpoint


def trained_classes(checkpoint: Any) -> frozenset[int]:
    """Digests of the classes that a checkpoint's weights were trained on, its backbone's included; empty if unknown.

    Raises:
        ConfigError: what stands there are none.
    """
    known = checkpoint.get(KEY)
    if known is None:
        return frozenset()
    if not isinstance(known, torch.Tensor) or known.dim() != 1 or known.dtype != torch.int64:
        raise ConfigError(
            f"the checkpoint's {KEY} are no list of classes ({type(known).__name__}): give a checkpoint of train.py"
        )
    return frozenset(known.tolist())


def of_parts(learner: nn.Module) -> frozenset[int]:
    """Of the classes that a learner's parts from other checkpoints were trained on."""
    parts = (part.trained_classes for part in learner.modules() if isinstance(part, FromCheckpoint))
    return frozenset().union(*parts)


def as_tensor(digests: Set[int]) -> torch.Tensor:
    """How a checkpoint keeps them, (K,) int64."""
    return torch.tensor(sorted(digests), dtype=torch.int64)


def refuse_leaks(trained: Set[int], data: EpisodicDataModule, split: str, whose: str) -> None:
    """Refuse a split with classes that were trained on.

    Args:
        trained: digests of the classes.
        data: with the split.
        split: "val" or "test".
        whose: what was trained on them, for the message.

    Raises:
        ConfigError: there are such, and how many.
    """
    asked = data.distribution(split).class_digests()
    if known := len(asked & trained):
        what = {"val": "meta-validation", "test": "meta-test"}[split]
        raise ConfigError(
            f"{whose} was trained on {known} of the {len(asked)} {what} classes: leave protocol and seed of the data "
            "as they were, or allow it with --allow_overlap true"
        )
