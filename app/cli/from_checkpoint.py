"""What starts from a checkpoint: its options, its configuration, and what other data changes in it."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml

from app.cli.base_configs import whole
from app.cli.builder import MetaboltCLI
from app.runs.directory import out_folder
from datamodules import DATA
from datamodules.core.errors import ConfigError
from models.core.checkpoint_io import CHECKPOINTS, identity, load_checkpoint, refuse_foreign, refuse_missing
from models.core.from_checkpoint import configuration_of
from models.core.learner import MetaLearner
from models.networks.batch_norm import BatchNormMode

# What of the training's Trainer concerns the metrics; the rest belongs to the machine and the length of that training.
TRAINER_KEPT = ("precision", "deterministic", "benchmark")
# What of the training's data another data set takes over: what tasks look like and how many there are.
DATA_KEPT = ("ways", "shots", "queries", "episodes", "test_tasks", "eval_batch_size")
# What the same data set, named again, takes over too: by what its classes were split.
SPLIT_KEPT = ("protocol", "seed", "root")
# By what another data set fits its images to the trained network.
DATA_FROM_BACKBONE = {"size": "image_size", "channels": "in_channels"}
SHORT = {
    "ways": "data.init_args.ways",
    "shots": "data.init_args.shots",
    "queries": "data.init_args.queries",
    "episodes": "data.init_args.episodes",
    "tasks": "data.init_args.test_tasks",
    "batch_norm": "model.init_args.batch_norm",
    "inner_steps": "model.init_args.eval_inner_steps",
}


class Options(argparse.ArgumentParser):
    """Options of a program that starts from a checkpoint; what it does not know is left for the configuration."""

    def __init__(self, prog: str, description: str, several: bool = False) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog="Any key of the configuration may be given too, as in --model.init_args.inner_rate 0.1; "
            "it wins over the options above.",
            allow_abbrev=False,
        )
        what = "The checkpoint: runs/<name>/checkpoints/best.ckpt" + ("; several are compared." if several else ".")
        self.add_argument("--ckpt_path", required=True, nargs="+" if several else None, help=what)
        self.add_argument(
            "--out", type=out_folder, help="Folder for what is written; by default one of its own in the run's folder."
        )
        self.add_argument("--debug", action="store_true", help="Show the traceback of an error, too.")
        self.add_argument("--batch_norm", choices=get_args(BatchNormMode), help="What normalises a query.")
        self.add_argument("--inner_steps", type=int, help="Steps of the inner loop.")
        self.add_argument(
            "--data", help="Another data set: a class, with its settings as --data.root …, or a YAML file."
        )

    def split(self, args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The options, and the flags of the configuration among them."""
        options, keys = self.parse_known_args(args)
        for key in keys:
            name = key.removeprefix("--").split("=")[0]
            if not key.startswith("--") or "." in name:
                continue
            if near := difflib.get_close_matches(name, vars(options), 1, 0.7):
                self.error(f"unknown option --{name}: did you mean --{near[0]}?")
        return options, keys

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"error: {message}\n")
        sys.exit(2)


@dataclass(frozen=True)
class Trained:
    """A checkpoint.

    Attributes:
        path: of the file.
        identity: of what the file holds, see ``checkpoint_io.identity``.
        content: state_dict, global_step, ….
        config: the configuration of its training.
    """

    path: Path
    identity: str
    content: dict[str, Any]
    config: dict[str, Any]

    @property
    def run_dir(self) -> Path:
        """Its run's folder; for a checkpoint that was moved out of one, the folder it is in."""
        folder = self.path.absolute().parent
        return folder.parent if folder.name == CHECKPOINTS else folder


def open_checkpoint(path: Path) -> Trained:
    """Read a checkpoint and the configuration that it carries, or else the one beside it.

    Raises:
        ConfigError: there is no such file, or it is not a checkpoint of a run.
    """
    refuse_missing(path, "--ckpt_path takes a file, as runs/<name>/checkpoints/best.ckpt")
    try:
        found = identity(path)  # before: of a file that is replaced meanwhile, never the later one's
        content = load_checkpoint(path)
    except (OSError, AttributeError) as error:  # a file cut in two, or of another kind
        raise ConfigError(f"{path} is not a checkpoint ({type(error).__name__}): give another file") from error
    refuse_foreign(content, path)
    trained = Trained(path, found, content, {})
    text = content.get("config")
    beside = trained.run_dir / "config.yaml"
    if text is None and beside.is_file():
        text = beside.read_text()
    if text is None:
        raise ConfigError(f"{path} carries no configuration, and there is none at {beside}: give a run's checkpoint")
    config = configuration_of(text, path)
    if "data" not in config:
        raise ConfigError(f"{path} was trained on no data that its configuration names: give a run's checkpoint")
    return Trained(path, found, content, config)


def restore(learner: MetaLearner, trained: Trained) -> None:
    """Give the learner the checkpoint's weights.

    Raises:
        ConfigError: they are not of this model.
    """
    try:
        learner.on_load_checkpoint(trained.content)
        learner.load_state_dict(trained.content["state_dict"])
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise ConfigError(
            f"{trained.path} does not fit the model: {text[:200]} …; leave the network as it was trained"
        ) from error


def find_class(class_path: str) -> type | None:
    """The class of a dotted path; None where there is none."""
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError, TypeError):  # the last for a name with a dot before it
        return None
    return found if isinstance(found, type) else None


def takes(class_path: str, name: str) -> bool:
    """Whether a class has a setting; True for a class that cannot be found, which the parser reports."""
    found = find_class(class_path)
    return found is None or any(name in inspect.signature(base.__init__).parameters for base in inspect.getmro(found))


def other_data(given: str, config: dict[str, Any]) -> dict[str, Any]:
    """The ``data`` part of a configuration for another data set.

    Args:
        given: a class ("datamodules.ImageFolder", "ImageFolder"), or a YAML file with such a part, alone or in a whole
            configuration, over its base or not.
        config: of the training; the new data takes over ``DATA_KEPT``, and the size of images from the backbone.

    Raises:
        ConfigError: no such class, or a YAML file that is not there or names none.
    """
    data: dict[str, Any] = {"class_path": given if "." in given else f"datamodules.{given}"}
    if Path(given).suffix in (".yaml", ".yml"):
        if not Path(given).is_file():
            raise ConfigError(f"there is no file {given}: correct --data")
        content = whole(Path(given))
        data = content.get("data", content)
        if not isinstance(data, dict) or not isinstance(data.get("class_path"), str):
            raise ConfigError(f"{given} names no data set: give it a class_path, and settings in init_args")
    if find_class(data["class_path"]) is None:
        near = difflib.get_close_matches(data["class_path"], [f"datamodules.{c.__name__}" for c in DATA], 1, 0.4)
        raise ConfigError(f"unknown class {data['class_path']!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    old = config["data"].get("init_args") or {}
    network = config["model"].get("init_args") or {}
    while isinstance(backbone := network.get("backbone"), dict):  # a pretrained backbone holds the network
        network = backbone.get("init_args") or {}
    same = data["class_path"] == config["data"]["class_path"]
    start = {name: old[name] for name in (*DATA_KEPT, *(SPLIT_KEPT if same else ())) if name in old}
    start |= {name: network[its] for name, its in DATA_FROM_BACKBONE.items() if its in network}
    settings = {name: value for name, value in start.items() if takes(data["class_path"], name)}
    return {"class_path": data["class_path"], "init_args": settings | (data.get("init_args") or {})}


def configuration(trained: Trained, options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The training's configuration made ready for use, and the short options as flags over it.

    Raises:
        ConfigError: an option that the learner or the data does not have.
    """
    config = trained.config | {"trainer": {}}
    before = trained.config.get("trainer") or {}
    config["trainer"] = {name: before[name] for name in TRAINER_KEPT if before.get(name) is not None}
    config["trainer"]["devices"] = 1
    if options.data is not None:
        config["data"] = other_data(options.data, trained.config)
    flags = []
    for option, key in SHORT.items():
        value = getattr(options, option, None)
        if value is not None:
            class_path = config[key.split(".")[0]]["class_path"]
            name = key.rsplit(".", 1)[1]
            if not takes(class_path, name):
                raise ConfigError(f"{class_path} has no {name}: leave out --{option}")
            flags += [f"--{key}", str(value)]
    return config, flags


class FromCheckpoint(MetaboltCLI):
    """Builds what a checkpoint was trained with, but for what is given here.

    Args:
        trained: the checkpoint.
        options: of the command line.
        keys: flags of the configuration; they win over the options.
    """

    def __init__(self, trained: Trained, options: argparse.Namespace, keys: Sequence[str]) -> None:
        self.trained, self.options = trained, options
        config, flags = configuration(trained, options)
        own = ["--stage", "test", "--ckpt_path", str(trained.path)]
        super().__init__(["--config", yaml.safe_dump(config), *flags, *keys, *own])
