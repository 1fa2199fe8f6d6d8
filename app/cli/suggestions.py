"""What is wrong with a command line, in one line that names the nearest valid word."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.cli import LightningArgumentParser

import datamodules
import models
from app.cli.failures import flat
from models.generative.adversary import GAN

# The arguments of the command that runs: the parser tells the last part of a key alone.
command_line: ContextVar[Sequence[str]] = ContextVar("command_line", default=())

# Parts of a configuration that are classes, whose settings may be given with or without init_args.
CLASSES = ("model", "data", "backbone", "network", "optimizer", "scheduler")

_UNKNOWN_CLASS = re.compile(
    r"Expected a dot import path string: (?P<short>[A-Za-z_]\w*)(?= |$)"
    r"|module '(?P<module>(?:torch|pytorch_lightning|models|datamodules)[\w.]*)' has no attribute '(?P<name>\w+)'"
)
_NO_MODULE = re.compile(r"No module named '(?P<missing>[\w.]+)'")
_NO_ATTRIBUTE = re.compile(r"module '(?P<module>[\w.]+)' has no attribute '(?P<missing>\w+)'")
_CLASS = re.compile(r"given class_path '(?P<path>[\w.]+)'|Got value: (?P<value>[\w.]+)$")
_KEY = re.compile(r'Parser key "(?P<key>[\w.]+)":')
_WRONG_TYPE = re.compile(
    r'Parser key "(?P<key>[\w.]+)": Expected an? (?P<type>typing\.Literal\[.*?\]|<class .*?>)\. '
    r"Got value: (?P<value>.*)"
)
_OUT_OF_RANGE = re.compile(
    r'Parser key "(?P<key>[\w.]+)": Not of type \w+: (?P<value>\S+) does not conform to restriction v>=(?P<least>\S+)'
)
_NO_TYPE_FITS = re.compile(
    r'Parser key "(?P<key>[\w.]+)":.*?Does not validate against any of the Union subtypes Subtypes: .*? '
    r"Errors: (?P<errors>.*) Given value type: .*? Given value: (?P<value>.*)"
)


class Parser(LightningArgumentParser):
    """Says what is wrong in one line, and which valid name is nearest."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if _tries():
            super().error(message, ex)
        sys.stderr.write(f"error: {explain(self, message)}\n")
        sys.exit(2)


def _tries() -> bool:
    """Whether the parser only tries whether settings of one class would do for another: an error then means no."""
    frames = (frame for frame, _ in traceback.walk_stack(None))
    return any(frame.f_code.co_name == "discard_init_args_on_class_path_change" for frame in frames)


def valid_names(parser: LightningArgumentParser) -> list[str]:
    """Every dotted key that a configuration may hold, those of all algorithms and data modules included."""
    names = [a.dest for a in parser._actions if a.dest not in ("help", "config", "print_config")]
    backbones = [
        *(models.Conv4, models.Conv2, models.ResNet, models.MLP, models.Learn2Learn),
        *(models.Pretrained, models.UnitLength, models.Averaged),
    ]
    for prefix, classes in (
        ("model.init_args.", models.ALGORITHMS + models.STRATEGIES),
        ("data.init_args.", datamodules.DATA),
        ("model.init_args.backbone.init_args.", backbones),
        ("model.init_args.gan.", [GAN]),
    ):
        for cls in classes:
            for base in inspect.getmro(cls):
                if base.__module__.split(".")[0] in ("models", "datamodules"):
                    names += [
                        prefix + p for p in inspect.signature(base.__init__).parameters if p not in ("self", "others")
                    ]
    return sorted(set(names))


def known_classes() -> list[str]:
    """Paths of what a configuration names: this project's classes, optimizers, schedulers, Lightning's callbacks."""
    libraries = (torch.optim, torch.optim.lr_scheduler, pl.callbacks)
    others = [
        f"{library.__name__}.{name}"
        for library in libraries
        for name, found in vars(library).items()
        if inspect.isclass(found) and name[0].isupper()
    ]
    return others + [f"datamodules.{c}" for c in datamodules.__all__] + [f"models.{c}" for c in models.__all__]


def explain(parser: LightningArgumentParser, message: str) -> str:
    """One line out of the parser's message; an unknown key or class is followed by the nearest valid one."""
    text = " ".join(message.split())
    if found := re.search(r"class_path '((?:models|datamodules)\.[\w.]+)'", text):
        classes = [f"models.{c}" for c in models.__all__] + [f"datamodules.{c}" for c in datamodules.__all__]
        if found[1] not in classes:
            near = difflib.get_close_matches(found[1], classes, 1, 0.4)
            return f"unknown class {found[1]!r}" + (f": did you mean {near[0]!r}?" if near else "")
    if found := _UNKNOWN_CLASS.search(text):
        given = found["short"] or f"{found['module']}.{found['name']}"
        known = {path.rsplit(".", 1)[-1].lower(): path for path in known_classes()}
        near = difflib.get_close_matches(given.rsplit(".", 1)[-1].lower(), list(known), 1, 0.6)
        if near:
            return f"unknown class {given!r}: did you mean {known[near[0]]!r}?"
    if (found := re.search(r"Import path (\S+) does not correspond to a subclass of Backbone", text)) and "." in found[
        1
    ]:
        return f"{found[1]} is no Backbone: give --model.backbone models.Network --model.backbone.network {found[1]}"
    if found := re.search(r"the following arguments are required: (.+)", text):
        return _needs(parser, found[1].split(", "))
    if (wrong := _not_imported(text)) is not None:
        return wrong
    names = valid_names(parser)
    if found := re.search(r"unrecognized arguments: --([\w.]+)", text):
        near = difflib.get_close_matches(found[1], names, 1, 0.7)
        return f"unknown key {found[1]!r}" + (f": did you mean {near[0]!r}?" if near else "")
    found = re.search(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'", text)
    found = found or re.search(r"(?:Option|Key) '(?P<group>)(?P<key>[\w.]+)' is not (?:accepted|expected)", text)
    if found:
        # An inner parser speaks of its own key alone: where that was given tells the part.
        part = found["group"] or _whole_key(found["key"]).rpartition(".")[0].partition(".")[0]
        inside = [n for n in names if n.startswith(part + ".")] if part else names
        by_leaf = {n.rsplit(".", 1)[-1]: n for n in sorted(inside, key=lambda n: n.count("."))}
        near = difflib.get_close_matches(found["key"].rsplit(".", 1)[-1], list(by_leaf), 1, 0.5)
        return f"unknown key {found['key']!r}" + (f": did you mean {by_leaf[near[0]]!r}?" if near else "")
    if found := re.search(r"Parser key \"(?P<key>[\w.]+)\": Unable to load config '(?P<value>.*?)' -", text):
        return f"{found['key']} is {found['value']!r}, which is no configuration: give settings, or a YAML file of them"
    if found := _WRONG_TYPE.search(text):
        return _is_but(found["key"], found["value"], _types([found["type"]]))
    if found := _OUT_OF_RANGE.search(text):
        return _is_but(found["key"], found["value"], f"at least {found['least']}")
    if found := _NO_TYPE_FITS.search(text):
        wanted = list(dict.fromkeys(part.strip("- ") for part in f" {found['errors']}".split(" - ") if part))
        types = [of[1] for part in wanted if (of := re.fullmatch(r"Expected (?:an? )?(typing\.Literal.*|<.*)", part))]
        if types and all(part.startswith("Expected ") for part in wanted):
            return _is_but(found["key"], found["value"], _types(types))
        if re.search(r"NestedArg\(key='class_path', val=None\)", found["value"]):
            return f"{_whole_key(found['key'])}.class_path is null but must be a class: give one, or leave it out"
        value = re.sub(r"^NestedArg\(key='(\w+)', val=(.*)\)$", r"\1 \2", found["value"])  # the parser's own word
        text = f"{_whole_key(found['key'])} is {value}: {'; or '.join(p for p in wanted if 'NoneType' not in p)}"
    return text if len(text) <= 300 else text[:300] + " …"


def _is_but(key: str, value: str, wanted: str) -> str:
    shown = repr(value) if len(value) <= 100 else repr(value[:100] + " …")
    return f"{_whole_key(key, value)} is {shown} but must be {wanted}"


def _types(written: list[str]) -> str:
    """Types as people say them, from how the parser writes them."""
    choices, names = [], []
    for one in written:
        if literal := re.fullmatch(r"typing\.Literal\[(.*)\]", one):
            choices += literal[1].replace("'", "").split(", ")
        else:
            name = re.sub(r"<class '(?:.*\.)?(\w+)'>", r"\1", one)
            names.append("null" if name == "NoneType" else name)
    return " or ".join((["one of " + ", ".join(dict.fromkeys(choices))] if choices else []) + names)


def _not_imported(text: str) -> str | None:
    """What to do about a class that cannot be imported; None where the message speaks of something else."""
    key, named = _KEY.search(text), _CLASS.search(text)
    if key is None or named is None:
        return None
    path = named["path"] or named["value"]
    place = f"{_whole_key(key['key'], path)} is {path}, but"
    if found := _NO_MODULE.search(text):
        missing = found["missing"]
        if path == missing or path.startswith(missing + "."):
            return f"{place} there is no module {missing}: run from the folder that holds it, or add that to PYTHONPATH"
        return f"{place} its file imports {missing}, which is not there: install it, or add its folder to PYTHONPATH"
    if found := _NO_ATTRIBUTE.search(text):
        return f"{place} the module {found['module']} has no {found['missing']}: correct the name"
    if re.search(r"object has no attribute 'keys'", text):
        whole = _whole_key(key["key"])
        return f"{whole}.init_args holds no settings: give it keys and values, or leave it out"
    return None


def _needs(parser: LightningArgumentParser, missing: list[str]) -> str:
    """What to give for settings without a default, of which an inner parser names the last part alone."""
    if parts := [name for name in ("model", "data") if name in missing]:
        flags = {"model": "--model, as models.ProtoNet", "data": "--data, as datamodules.Omniglot"}
        return f"no {' and no '.join(parts)} given: give {' and '.join(flags[p] for p in parts)}, or a --config"
    name = missing[0]
    owner = _owner(parser, name)
    flag = f"--{owner}.{name}" if owner else f"its {name}"
    example = ", as models.Conv4" if name == "backbone" else ""
    article = "an" if name[0] in "aeiou" else "a"
    return f"{owner or 'a class'} needs {article} {name}: give {flag}{example}"


def _owner(parser: LightningArgumentParser, name: str) -> str | None:
    """The part of the configuration whose class has a setting without a default, without its ``init_args``."""
    given = {key.removesuffix(".class_path"): value for key, value in _given(command_line.get())}
    for part in ("model", "data"):
        module, _, kind = str(given.get(part)).rpartition(".")
        homes = [sys.modules.get(module)] if module else [models, datamodules]
        found = next((cls for home in homes if inspect.isclass(cls := getattr(home, kind, None))), None)
        for base in inspect.getmro(found) if found else ():
            parameter = inspect.signature(base.__init__).parameters.get(name)
            if parameter is not None and parameter.default is parameter.empty:
                return part
    inside = sorted((n for n in valid_names(parser) if n.endswith(f".init_args.{name}")), key=lambda n: n.count("."))
    return inside[0].removesuffix(f".{name}").replace(".init_args", "") if inside else None


def _whole_key(key: str, value: str | None = None) -> str:
    """The dotted key of a setting, of which an inner parser names the last part alone; as named where it is unknown."""
    if "." in key:
        return key
    named = [(path, str(of)) for path, of in _given(command_line.get()) if path.rpartition(".")[2] == key]
    paths = [path for path, of in named if of == value] or [path for path, _ in named]
    if not paths:
        return key
    return re.sub(
        r"\b(model|data|backbone|network|optimizer|scheduler)\.(?!init_args|class_path)", r"\1.init_args.", paths[-1]
    )


def _given(args: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a command line and of the configurations that it names."""
    for i, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if not flag.startswith("--"):
            continue
        value = value if equals else args[i + 1] if i + 1 < len(args) else ""
        if flag != "--config":
            yield flag.removeprefix("--"), value
            continue
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
            content = yaml.safe_load(Path(value).read_text() if len(value) < 1000 and Path(value).is_file() else value)
            yield from flat(content) if isinstance(content, dict) else ()
