"""A trained learner, from its checkpoint alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from datamodules.core.errors import ConfigError
from models.core.checkpoint_io import load_checkpoint, refuse_foreign, refuse_missing


def configuration_of(text: Any, path: Any) -> dict[str, Any]:
    """The configuration that a checkpoint carries, from its text: what learner, what data.

    Nothing in it is executed: tags of YAML that would make objects are refused.

    Raises:
        ConfigError: it is no text, no YAML, or names no learner.
    """
    wrong = f"{path} carries no configuration of a learner"
    cure = "give a checkpoint of train.py"
    if not isinstance(text, str):
        raise ConfigError(f"{wrong}: {cure}")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{wrong} ({' '.join(str(error).split())[:120]}): {cure}") from error
    for part in ("model", "data"):
        named = config.get(part) if isinstance(config, dict) else None
        if part == "data" and isinstance(config, dict) and part not in config:
            continue  # to load a learner it is not needed
        if not isinstance(named, dict) or not isinstance(named.get("class_path"), str):
            raise ConfigError(f"{wrong} (its {part} is {str(named)[:60]}): {cure}")
        if not isinstance(named.get("init_args") or {}, dict):
            raise ConfigError(f"{wrong} (its {part}'s settings are {str(named['init_args'])[:60]}): {cure}")
    return config


def build(kind: type, path: str | Path, map_location: Any, settings: dict[str, Any]) -> Any:
    """The learner of a checkpoint with its weights, see ``MetaLearner.load_from_checkpoint``."""
    refuse_missing(path, "give a file, as runs/<name>/checkpoints/best.ckpt")
    content = load_checkpoint(path, map_location)
    refuse_foreign(content, path)
    config = configuration_of(content.get("config"), path)["model"]
    config["init_args"] = (config.get("init_args") or {}) | settings
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "model")
    try:
        learner: Any = parser.instantiate_classes(parser.parse_object(Namespace(model=config))).model
        learner.on_load_checkpoint(content)
        learner.load_state_dict(content["state_dict"])
    except Exception as error:  # whatever a constructor or the parser says of a configuration that does not fit
        text = " ".join(str(error).split())
        raise ConfigError(f"{path} does not make a {kind.__name__}: {text[:300]}") from error
    return learner.to(map_location).eval()
