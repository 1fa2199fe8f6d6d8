"""Every YAML parses and builds what it describes."""

from __future__ import annotations

import inspect
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace

from app.cli.base_configs import whole
from app.cli.builder import main
from datamodules import Omniglot
from datamodules.core.errors import ConfigError
from models import STRATEGIES, Pretrained
from tests.support.fixtures import fake_omniglot, image_tree
from tests.support.processes import build

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RUNS = sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent.name not in ("overlays", "sweeps"))
OVERLAYS = sorted((CONFIGS / "overlays").glob("*.yaml"))
SWEEPS = sorted((CONFIGS / "sweeps").glob("*.yaml"))


def pretrained(path: Path, folder: Path) -> list[str]:
    """Flags that put a checkpoint with the right backbone in place of the one that a configuration starts from."""
    for name, part in build("--config", str(path), "--runs", str(folder)).model.named_modules():
        if isinstance(part, Pretrained):
            torch.save(
                {"state_dict": {f"backbone.{n}": v for n, v in part.backbone.state_dict().items()}},
                folder / "backbone.ckpt",
            )
            within = "backbone.init_args." * name.split(".").count("backbone")
            return [f"--model.init_args.{within}ckpt_path", str(folder / "backbone.ckpt")]
    return []


def settings(config: Namespace) -> dict[str, Any]:
    """A configuration without where it was read from."""
    return {key: value for key, value in config.clone(with_meta=False).as_dict().items() if key != "config"}


@pytest.mark.parametrize("path", RUNS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_configuration_builds_and_its_dump_builds_the_same(path, tmp_path):
    """Catches a key that was renamed in the code only, a head that does not fit the ways, an incomplete dump."""
    cli = build("--config", str(path), "--runs", str(tmp_path))
    assert cli.setting("name") == (path.stem if path.parent == CONFIGS else f"{path.parent.name}-{path.stem}")
    assert path.read_text().startswith("# ")
    copy = tmp_path / "config.yaml"
    copy.write_text(cli.yaml())
    again = cli.parser.parse_args(["--config", str(copy), "--wandb", "off"])  # all that is built is a function of this
    assert settings(again) == settings(cli.config)
    assert cli.trainer.max_steps > 0 or isinstance(cli.model, STRATEGIES)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Iterator[dict[str, Path]]:
    """Folders with enough characters of an alphabet, drawers and images for all configurations, by their data."""
    folder = tmp_path_factory.mktemp("data")
    omniglot = fake_omniglot(folder / "omniglot", drawers=20, smallest=20)
    images = image_tree(folder / "images", {f"class{k:02d}": 24 for k in range(40)})
    root = dict.fromkeys(("datamodules.Omniglot", "datamodules.ImageMixture"), folder / "omniglot")
    root |= {"datamodules.ImageFolder": images, "datamodules.Glyphs": Path("data")}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("characters", "drawers", "checksums"):
            patch.setattr(Omniglot, name, getattr(omniglot, name))
        patch.setattr(Omniglot, "maml_sizes", {"train": 70, "val": 25, "test": 25})
        yield root


def classes(path: Path, *flags: str) -> list[str]:
    """The flag that gives a learner of the meta-training classes as many as the small data has."""
    cli = build("--config", str(path), *flags)
    if "classes" not in inspect.signature(type(cli.model)).parameters:
        return []
    return ["--model.init_args.classes", str(len(cli.datamodule.distribution("train").class_names))]


SMALL_STREAMS = {
    "ClassStreams": [
        *("--data.init_args.queries", "3", "--data.init_args.experiences", "6", "--data.init_args.points", "null"),
        *("--data.init_args.val_experiences", "4", "--data.init_args.eval_batch_size", "2"),
    ],
    "TransformedStreams": ["--data.init_args.queries", "3", "--data.init_args.shots", "3"],
    "InstanceStreams": ["--data.init_args.eval_batch_size", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("path", RUNS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_configuration_runs(path, data, tmp_path):
    """Catches settings that build but do not run: a few meta-updates at full size, validated, tested and reported.
    Meta-updates of RL² as published are of few trials: of the paper's 250,000 steps each would take minutes."""
    of_run = whole(path)["data"]
    root = data.get(of_run.get("init_args", {}).get("source", of_run)["class_path"])
    flags = ["--data.init_args.root", str(root)] if root else []
    short = ["--config", str(CONFIGS / "overlays" / "debug.yaml"), "--runs", str(tmp_path), "--name", "x"]
    module = build("--config", str(path)).datamodule
    if module.kind == "stream":
        flags += SMALL_STREAMS[type(module).__name__]
    elif "aligned" not in path.read_text() and module.kind != "reinforcement":
        flags += ["--data.init_args.queries", "3"]
    if path.parent.name == "rl2" and not path.stem.endswith("-short"):
        flags += ["--data.init_args.meta_batch_size", "20", "--model.init_args.epochs", "1"]
    flags += [*pretrained(path, tmp_path), *classes(path, *flags, *short)]
    main(["--config", str(path), *short, *flags])
    metrics = json.loads((tmp_path / "x" / "results.json").read_text())["metrics"]
    assert all(math.isfinite(f["mean"]) for f in metrics.values())


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda p: p.stem)
def test_overlay_builds_on_a_configuration(path, tmp_path):
    """Catches an overlay that names what is not there, or that a later flag cannot override."""
    flags = (
        "--config",
        str(CONFIGS / "optimization/maml/linear-10shot.yaml"),
        "--config",
        str(path),
        "--runs",
        str(tmp_path),
    )
    if path.stem == "gpu" and not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="gpu"):
            build(*flags)
        return
    cli = build(*flags, "--trainer.max_steps", "77")
    assert cli.trainer.max_steps == 77


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_every_parameter_of_a_sweep_parses(path, tmp_path):
    """Catches a sweep that fails hours later, on an agent: each parameter at each of its ends."""
    sweep = yaml.safe_load(path.read_text())
    command = sweep["command"]
    base = [c for c in command if not c.startswith("${")]
    assert command[-1] == "${args}"
    assert sweep["metric"]["name"].startswith("val/")
    values = [
        [(name, v) for v in (p.get("values") or [p.get("value", p.get("min")), p.get("max", p.get("value"))])]
        for name, p in sweep["parameters"].items()
    ]
    longest = max(map(len, values))
    for choice in itertools.islice(zip(*map(itertools.cycle, values), strict=True), longest):
        cli = build(*base, "--runs", str(tmp_path), *(f"--{name}={value}" for name, value in choice))
        config = yaml.safe_load(cli.yaml())
        for name, value in choice:
            node = config
            for key in name.split("."):
                node = node[key]
            assert node == value
