"""A configuration that gives only what differs from another one, which its key ``base`` names."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from datamodules.core.errors import ConfigError

BASE = "base"


def config_files(args: Sequence[str]) -> list[Path]:
    """The configuration files that arguments name, in their order."""
    given = [value for flag, value in pairwise(args) if flag == "--config"]
    given += [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]
    return [Path(value) for value in given if "\n" not in value]


def with_bases(args: Sequence[str]) -> list[str]:
    """Arguments in whose place of every configuration file with a base the whole of it stands.

    Raises:
        ConfigError: a base that cannot be read, or that leads back to itself; naming the files.
    """
    expanded, is_file = [], False
    for arg in args:
        flag, equals, value = arg.partition("=")
        if is_file:
            expanded.append(_whole_text(arg))
        elif equals and flag == "--config":
            expanded += [flag, _whole_text(value)]
        else:
            expanded.append(arg)
        is_file = not is_file and arg == "--config"
    return expanded


def _whole_text(given: str) -> str:
    """The configuration of a file with its bases as text; what has none, or is no file, as it is given."""
    path = Path(given)
    try:
        content = _load(path) if path.is_file() else None
    except (OSError, ValueError):  # too long for a name: a configuration's own text
        return given
    return yaml.safe_dump(whole(path)) if isinstance(content, dict) and BASE in content else given


def whole(path: Path) -> dict[str, Any]:
    """A configuration file laid over its base, that over its own, and so on.

    Mappings are laid over one another key by key; where a class is another one, its settings are its own alone.

    Raises:
        ConfigError: a base that cannot be read, or that leads back to itself; naming the files.
    """
    seen: list[Path] = []
    layers: list[dict[str, Any]] = []
    while True:
        if path.resolve() in seen:
            raise ConfigError(f"{path} is its own base, by way of {seen[-1]}: correct its {BASE}")
        seen.append(path.resolve())
        content = _load(path)
        if not isinstance(content, dict):
            raise ConfigError(f"{path} is no configuration: it must hold keys and values")
        base = content.pop(BASE, None)
        layers.append(content)
        if base is None:
            break
        if not isinstance(base, str):
            raise ConfigError(
                f"the {BASE} of {path} is {base!r}: give the path of another configuration, relative to it"
            )
        parent = path.parent / base
        if not parent.is_file():
            raise ConfigError(f"the {BASE} of {path} is {base}, but there is no file {parent}: correct it")
        path = parent
    result: dict[str, Any] = {}
    for layer in reversed(layers):
        result = over(result, layer)
    return result


def over(below: Any, above: Any) -> Any:
    """One part of a configuration laid over another."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if below.get("class_path") != above.get("class_path", below.get("class_path")):
        return above
    return below | {key: over(below[key], value) if key in below else value for key, value in above.items()}


def _load(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read ({' '.join(str(error).split())}): correct it") from error
