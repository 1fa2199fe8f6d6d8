"""Checkpoints of a few meta-updates, to evaluate and to predict with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from app.cli.builder import main
from app.dashboard.callback import Dashboard

SIZE = 16
CLASSES = {f"c{i:02d}": 6 for i in range(20)}


def picture(name: str, number: int, size: int = SIZE) -> Image.Image:
    """The number-th picture of a class: coarse blocks of the class's own colours, with noise."""
    blocks = np.random.default_rng([*name.encode()]).uniform(40, 215, (4, 4, 3))
    noise = np.random.default_rng([*name.encode(), number]).normal(0, 40, (SIZE, SIZE, 3))
    pixels = blocks.repeat(SIZE // 4, 0).repeat(SIZE // 4, 1) + noise
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image if size == SIZE else image.resize((size, size))


def picture_tree(root: Path, counts: Mapping[str, int], size: int = SIZE, first: int = 0) -> Path:
    """Writes ``counts[name]`` pictures into ``root/name``, PNG, numbered from ``first``; returns ``root``."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            picture(name, number, size).save(root / name / f"{number:02d}.png")
    return root


def train(runs: Path, name: str, algorithm: str, *flags: str) -> Path:
    """Trains for 40 meta-updates, unless flags say otherwise, without drawing; the checkpoint."""
    with mock.patch.object(Dashboard, "_draw"):
        main(
            [
                *("--runs", str(runs), "--name", name, "--wandb", "off", "--model", algorithm),
                *("--trainer.max_steps", "40", "--trainer.val_check_interval", "20"),
                *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", *flags),
            ]
        )
    return runs / name / "checkpoints" / "best.ckpt"


def train_on_pictures(runs: Path, name: str, algorithm: str, root: Path, *flags: str) -> Path:
    """Trains 2-way 1-shot on a tree of pictures, with a tiny convolutional network; the checkpoint."""
    return train(
        runs,
        name,
        algorithm,
        *("--model.backbone", "models.Conv4", "--model.backbone.hidden", "4", "--model.backbone.in_channels", "3"),
        *("--model.backbone.image_size", str(SIZE), "--model.backbone.downsample", "pool"),
        *("--data", "datamodules.ImageFolder", "--data.root", str(root), "--data.size", str(SIZE), "--data.ways", "2"),
        *("--data.queries", "2", "--data.fractions", "[0.3, 0.35, 0.35]", "--data.meta_batch_size", "2"),
        *("--data.val_tasks", "4", "--data.test_tasks", "20", *flags),
    )
