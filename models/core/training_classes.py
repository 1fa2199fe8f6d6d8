"""Losses over all classes of meta-training: how many there are."""

from __future__ import annotations

from datamodules.core.base import EpisodicDataModule
from datamodules.core.errors import ConfigError


def expect_classes(data: EpisodicDataModule, classes: int) -> None:
    """Refuse data whose meta-training split has not so many classes, or does not tell.

    Raises:
        ConfigError: naming how many it has.
    """
    names = getattr(data.distribution("train"), "class_names", None)
    if names is None or len(names) != classes:
        found = "does not tell its classes" if names is None else f"has {len(names)} classes"
        cure = "" if names is None else f": --model.init_args.classes {len(names)}"
        raise ConfigError(f"classes is {classes} but the meta-training split {found}{cure}")
