"""What is wrong with a command line, in one line that names the nearest valid word."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from typing import NoReturn

from pytorch_lightning.cli import LightningArgumentParser

import datamodules
import models
from models.generative.adversary import GAN


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


def explain(parser: LightningArgumentParser, message: str) -> str:
    """One line out of the parser's message; an unknown key or class is followed by the nearest valid one."""
    text = " ".join(message.split())
    if found := re.search(r"class_path '((?:models|datamodules)\.[\w.]+)'", text):
        classes = [f"models.{c}" for c in models.__all__] + [f"datamodules.{c}" for c in datamodules.__all__]
        if found[1] not in classes:
            near = difflib.get_close_matches(found[1], classes, 1, 0.4)
            return f"unknown class {found[1]!r}" + (f": did you mean {near[0]!r}?" if near else "")
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
    return text if len(text) <= 300 else text[:300] + " …"
