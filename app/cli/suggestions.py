"""What is wrong with a command line, in one line that names the nearest valid word."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from typing import NoReturn

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LightningArgumentParser

import datamodules
import models
from models.generative.adversary import GAN

_UNKNOWN_CLASS = re.compile(
    r"Expected a dot import path string: (?P<short>[A-Za-z_]\w*)(?= |$)"
    r"|module '(?P<module>(?:torch|pytorch_lightning|models|datamodules)[\w.]*)' has no attribute '(?P<name>\w+)'"
)
_NO_TYPE_FITS = re.compile(
    r'Parser key "(?P<key>[\w.]+)":.*?Does not validate against any of the Union subtypes Subtypes: .*? '
    r"Errors: (?P<errors>.*) Given value type: .*? Given value: (?P<value>.*)"
)


class Parser(LightningArgumentParser):
    """Says what is wrong in one line, and which valid name is nearest."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sys.stderr.write(f"error: {explain(self, message)}\n")
        sys.exit(2)


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
    names = valid_names(parser)
    if found := re.search(r"unrecognized arguments: --([\w.]+)", text):
        near = difflib.get_close_matches(found[1], names, 1, 0.7)
        return f"unknown key {found[1]!r}" + (f": did you mean {near[0]!r}?" if near else "")
    found = re.search(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'", text)
    found = found or re.search(r"(?:Option|Key) '(?P<group>)(?P<key>[\w.]+)' is not (?:accepted|expected)", text)
    if found:
        # An inner parser speaks of its own key alone: the nearest name may belong to any part.
        inside = [n for n in names if n.startswith(found["group"] + ".")] if found["group"] else names
        by_leaf = {n.rsplit(".", 1)[-1]: n for n in sorted(inside, key=lambda n: n.count("."))}
        near = difflib.get_close_matches(found["key"].rsplit(".", 1)[-1], list(by_leaf), 1, 0.5)
        return f"unknown key {found['key']!r}" + (f": did you mean {by_leaf[near[0]]!r}?" if near else "")
    if found := _NO_TYPE_FITS.search(text):
        wanted = "; or ".join(dict.fromkeys(part.strip("- ") for part in f" {found['errors']}".split(" - ") if part))
        value = re.sub(r"^NestedArg\(key='(\w+)', val=(.*)\)$", r"\1 \2", found["value"])  # the parser's own word
        text = f"{found['key']} is {value}: {wanted}"
    return text if len(text) <= 300 else text[:300] + " …"
