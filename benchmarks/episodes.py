"""Sampling tasks: learn2learn's Omniglot taskset, from PNG files and from memory, against ours.

    python -m benchmarks.episodes --root data

Both sides end with float32 images that a network takes: ours are gathered as bytes and normalised (``on_device``), as
the Trainer does. What learn2learn's RandomClassRotation turns image by image, ours takes from turned copies of the
store.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import app  # noqa: F401  first, as in a run
from benchmarks.common import Report, Row, alternate, arguments, memory_taskset, png_taskset, png_tree, timed
from datamodules.core.episodes import Episodes
from datamodules.images.omniglot import CHARACTERS, Omniglot

DRAWINGS = 200  # distinct ones of the generated data; its files share them


class GeneratedOmniglot(Omniglot):
    """Omniglot's layout with four characters to an alphabet, for where the data is not: it takes random drawings."""

    characters = {name: dict.fromkeys(alphabets, 4) for name, alphabets in CHARACTERS.items()}
    maml_sizes = {"train": 140, "val": 20, "test": 40}


@dataclass
class Data:
    """Where both sides find Omniglot.

    Attributes:
        png: folder of the PNG files as torchvision lays them out; gone with the benchmark.
        root: of our data module.
        module: our data module.
    """

    png: Path
    root: str
    module: type[Omniglot]

    def make(self, **settings: Any) -> Omniglot:
        data = self.module(protocol="maml", root=self.root, download=False, **settings)
        data.prepare_data()
        return data

    @property
    def flags(self) -> list[str]:
        """Of train.py, for this data."""
        name = "datamodules.Omniglot" if self.module is Omniglot else "benchmarks.episodes.GeneratedOmniglot"
        return ["--data", name, "--data.init_args.root", self.root, "--data.init_args.download", "false"]


@contextmanager
def omniglot(root: str, generated: bool) -> Iterator[Data]:
    """Omniglot for both sides, the PNG files in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        if generated:
            _generate(folder)
            yield Data(folder, name, GeneratedOmniglot)
        else:
            png_tree(Path(root), folder)
            yield Data(folder, root, Omniglot)


def _generate(folder: Path) -> None:
    """Random 105x105 one-bit drawings, as Omniglot has them, under the names of ``GeneratedOmniglot``."""
    rng = np.random.default_rng(0)
    drawings = []
    (folder / "drawings").mkdir(parents=True)
    for i in range(DRAWINGS):
        image = Image.new("1", (105, 105), 1)
        ImageDraw.Draw(image).line([float(v) for v in rng.uniform(15, 90, 12)], fill=0, width=3)
        drawings.append(folder / "drawings" / f"{i}.png")
        image.save(drawings[-1])
    number = 0
    for name, alphabets in GeneratedOmniglot.characters.items():
        for alphabet, characters in alphabets.items():
            for character in range(1, characters + 1):
                place = folder / "omniglot-py" / name / alphabet / f"character{character:02d}"
                place.mkdir(parents=True)
                for drawer in range(1, GeneratedOmniglot.drawers + 1):
                    number += 1
                    _link(drawings[number % DRAWINGS], place / f"{number // 20:04d}_{drawer:02d}.png")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def in_memory(data: Omniglot) -> tuple[Tensor, Tensor]:
    """Our training images as learn2learn would hold them, (N, 1, 28, 28) float32, and their labels."""
    classes = data.distribution("train").classes
    labels = torch.arange(len(classes)).repeat_interleave(torch.from_numpy(classes.counts))
    return data.normalize(classes.images), labels


class Sampler:
    """Meta-batches of our training tasks, one after the other, ready for the network.

    Args:
        data: the data module.
        tasks: of a meta-batch.
        device: "cpu" or "cuda".
    """

    def __init__(self, data: Omniglot, tasks: int, device: str) -> None:
        self.data, self.tasks, self.device = data, tasks, device
        self.distribution = data.distribution("train")
        self.steps = count()

    def __call__(self) -> Episodes:
        first = next(self.steps) * self.tasks
        episodes = self.distribution.sample(range(first, first + self.tasks)).to(self.device)
        episodes.meta_batch = self.tasks
        return self.data.on_device(episodes)


def main() -> None:
    args = arguments("Sampling tasks of Omniglot.", seconds=20)
    report = Report("Sampling", args.device)
    with omniglot(args.root, args.generated) as place:
        for ways, shots, queries, tasks, target in ((5, 1, 1, 32, 200.0), (20, 5, 15, 1, None)):
            data = place.make(train_ways=ways, train_shots=shots, train_queries=queries, meta_batch_size=tasks)
            images, labels = in_memory(data)
            peers = {
                "learn2learn, PNG": png_taskset(place.png, ways, shots + queries),
                "learn2learn, memory": memory_taskset(images, labels, ways, shots + queries),
            }
            loader = iter(data.train_dataloader())
            sizes = [1, 2, 4, 8, 16, 32, 128] if tasks > 1 else [1, 4]
            many = 2 if args.quick else 20
            few = (
                1 if args.quick else max(2, 40 // ways)
            )  # a lone task would find our images in the caches, not its own
            steps = {
                name: timed(lambda t=t: t.sample()[0].to(args.device), args.device, few) for name, t in peers.items()
            }
            steps |= {str(n): timed(Sampler(data, n, args.device), args.device, many) for n in sizes}
            steps["loader"] = timed(
                lambda loader=loader, data=data: data.on_device(next(loader).to(args.device)), args.device, many
            )
            what = f"{ways}-way {shots}-shot, {queries} queries"
            median = report.keep(what, alternate(steps, args.seconds, 2 if args.quick else 10))
            for against in peers:
                goal = target if against == "learn2learn, PNG" else None
                ours = median[str(tasks)] / tasks
                report.rows.append(Row(f"{what}, {tasks} at once", against, median[against], ours, "tasks/s", goal))
            others = {f"{n} at once": median[str(n)] / n for n in sizes if n != tasks}
            for how, ours in ({"DataLoader": median["loader"] / tasks} | others).items():
                base = median["learn2learn, PNG"]
                report.rows.append(Row(f"{what}, {how}", "learn2learn, PNG", base, ours, "tasks/s"))
    report.show(args.out)


if __name__ == "__main__":
    main()
