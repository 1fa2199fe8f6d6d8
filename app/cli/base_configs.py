"""A configuration that gives only what differs from another one, which its key ``base`` names."""

from __future__ import annotations

import contextlib
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
        there = path.exists()
    except (OSError, ValueError):  # too long for a name: a configuration's own text
        there = False
    if there:
        return yaml.safe_dump(whole(path)) if BASE in load(path) else given
    with contextlib.suppress(yaml.YAMLError):  # a file that is not there, of which the parser tells
        if isinstance(content := _parsed(given, "--config"), dict):
            _refuse_misshapen(content, "--config")
    return given


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
        content = load(path)
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


def load(path: Path) -> dict[str, Any]:
    """The keys and values of one configuration file.

    Raises:
        ConfigError: it cannot be read, or is no configuration; naming the file.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ConfigError(f"{path} is no regular file: give a YAML file")
    try:
        content = _parsed(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read ({' '.join(str(error).split())}): correct it") from error
    if content is None:
        raise ConfigError(f"{path} is empty: give it keys and values, or leave it out")
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no configuration: it must hold keys and values")
    _refuse_misshapen(content, str(path))
    return content


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML takes the last without a word."""

    def compose_mapping_node(self, anchor: Any) -> Any:  # as written, before any are merged into it
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _Twice(f"gives {key.value} twice, again in line {key.start_mark.line + 1}: leave one out")
                seen.add(key.value)
        return node


class _Twice(Exception):
    pass


def _parsed(text: str, where: str) -> Any:
    """What a text of YAML holds.

    Raises:
        ConfigError: a key twice, or values too deep inside one another.
        YAMLError: it is no YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except _Twice as error:
        raise ConfigError(f"{where} {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{where} holds too many values inside one another: make it flatter") from error


def _refuse_misshapen(content: dict[str, Any], where: str) -> None:
    """Refuse what the parser takes for settings though it holds none.

    Raises:
        ConfigError: naming the file and the key.
    """
    for key, wanted in (("trainer", dict), ("model", (dict, str)), ("data", (dict, str))):
        if key in content and not isinstance(content[key], wanted):
            what = "settings" if wanted is dict else "a class_path and init_args"
            raise ConfigError(f"{key} is {_short(content[key])} in {where}: give it {what}, or leave it out")
    _refuse_empty_settings(content, where, "", ())


def _refuse_empty_settings(part: Any, where: str, path: str, above: tuple[int, ...]) -> None:
    if id(part) in above:
        raise ConfigError(f"{path[:60].strip('.')} in {where} holds itself, by an alias (*): give it values")
    if isinstance(part, dict):
        if not isinstance(part.get("init_args", {}), dict):
            value = _short(part["init_args"])
            raise ConfigError(f"{path}init_args is {value} in {where}: give it settings, or leave it out")
        for key, value in part.items():
            _refuse_empty_settings(value, where, f"{path}{key}.", (*above, id(part)))
    elif isinstance(part, list):
        for i, value in enumerate(part):
            _refuse_empty_settings(value, where, f"{path}{i}.", (*above, id(part)))


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else text[:60] + " …"
