"""What the benchmarks share: alternating timing, the table, learn2learn's side of every comparison and our loops.

Nothing here imports ``app`` on its own: it makes the allocator keep freed memory, which speeds learn2learn up too. A
worker process (``Worker``) that runs learn2learn as it comes must therefore do without.

learn2learn's side is its own Omniglot benchmark, ``learn2learn.vision.benchmarks.get_tasksets("omniglot")``, over PNG
files in torchvision's layout. Two things are taken from it that no measured step spends time on: torchvision's check of
the archives' MD5, which refuses archives that were packed again, and the first opening of all images to list their
labels, which we list from the folders instead.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import logging
import math
import os
import pickle
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
SETS = ("images_background", "images_evaluation")
AGREEMENT = 1e-4  # of gradients, relative; what is timed on both sides must be the same work
Tensors = tuple[Tensor, ...]  # support_x, support_y, query_x, query_y of one task


# Timing --------------------------------------------------------------------------------------------------------------


def timed(function: Callable[[], Any], device: str = "cpu", repeat: int = 1) -> Callable[[], float]:
    """A function that runs ``function`` ``repeat`` times and returns the seconds of one."""

    def run() -> float:
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(repeat):
            function()
        synchronize(device)
        return (time.perf_counter() - begin) / repeat

    return run


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def alternate(steps: dict[str, Callable[[], float]], seconds: float, at_least: int = 5) -> dict[str, list[float]]:
    """Seconds of every step, the steps in turn, each round beginning with another one.

    Args:
        steps: each runs once and returns the seconds that it took.
        seconds: rounds go on for about so long.
        at_least: rounds, after one that does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for step in steps.values():
        step()
    begin = time.perf_counter()
    done = 0
    while done < at_least or time.perf_counter() - begin < seconds:
        first = done % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(steps[name]())
        done += 1
    return times


# The table -----------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One comparison.

    Attributes:
        what: is compared.
        against: the baseline's name.
        base, ours: median seconds of a step, or of one task or step for "tasks/s" or "steps/s"; or MiB.
        unit: "ms", "tasks/s", "steps/s" or "MiB".
        target: least ratio base / ours; for an overhead, the most that ours / base may exceed 1 by.
        overhead: whether it is one.
    """

    what: str
    against: str
    base: float
    ours: float
    unit: str = "ms"
    target: float | None = None
    overhead: bool = False

    @property
    def ratio(self) -> float:
        if self.overhead:
            return self.ours / self.base - 1
        return self.base / self.ours if self.ours else math.inf

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.ratio <= self.target if self.overhead else self.ratio >= self.target

    def cells(self) -> list[str]:
        def show(value: float) -> str:
            if self.unit.endswith("/s"):
                return f"{1 / value:,.0f} {self.unit}"
            return f"{1e3 * value:,.2f} ms" if self.unit == "ms" else f"{value:,.0f} MiB"

        ratio = f"{100 * self.ratio:+.1f} %" if self.overhead else f"{self.ratio:,.2f}x"
        target = ""
        if self.target is not None:
            bound = f"<= {100 * self.target:.0f} %" if self.overhead else f">= {self.target:g}x"
            target = f"{bound} {'met' if self.met else 'MISSED'}"
        return [self.what, self.against, show(self.base), show(self.ours), ratio, target]


@dataclass
class Report:
    """The rows of one benchmark; printed as a table, last of all, and written as JSON."""

    name: str
    device: str
    rows: list[Row] = field(default_factory=list)
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def keep(self, section: str, times: dict[str, list[float]]) -> dict[str, float]:
        """Medians of a section's times, which are kept for the JSON file."""
        self.samples[section] = times
        return {name: statistics.median(values) for name, values in times.items() if values}

    def show(self, out: str | None) -> None:
        facts = machine(self.device)
        if out:
            rows = [asdict(r) | {"ratio": r.ratio, "met": r.met} for r in self.rows]
            content = {"benchmark": self.name, "machine": facts, "rows": rows, "seconds": self.samples}
            Path(out).write_text(json.dumps(content, indent=1) + "\n")
        print(f"\n{self.name}: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
        cells = [["what", "against", "baseline", "ours", "ratio", "target"], *(r.cells() for r in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(6)]
        cells.insert(1, ["-" * w for w in widths])
        for row in cells:
            padded = zip(row, "<<>>><", widths, strict=True)
            print("  ".join(f"{cell:{side}{width}}" for cell, side, width in padded).rstrip(), flush=True)


def machine(device: str) -> dict[str, Any]:
    """What the metrics depend on."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        named = [s for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("model name")]
        model = named[0].split(":", 1)[1].strip() if named else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"cpu": model, "cores": cores, "threads": torch.get_num_threads(), "device": device}
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts | {"torch": torch.__version__, "learn2learn": load_learn2learn().__version__}


def arguments(description: str, seconds: float, data: bool = True, plot: bool = False) -> argparse.Namespace:
    """The options of a benchmark.

    Args:
        description: of it.
        seconds: the default time of one section.
        data: whether it reads Omniglot.
        plot: whether it draws its metrics too.
    """
    parser = argparse.ArgumentParser(description=description)
    if data:
        place = "folder of Omniglot's two archives (or what they extract to)"
        parser.add_argument("--root", default="data", help=place)
        parser.add_argument("--generated", action="store_true", help="random drawings of the same size instead")
    if plot:
        parser.add_argument("--plot", help="also draw the metrics to this PNG file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=seconds, help="about how long each section is measured")
    parser.add_argument("--quick", action="store_true", help="a smoke test: its metrics tell nothing")
    parser.add_argument("--out", help="also write the metrics to this JSON file")
    args = parser.parse_args()
    if args.quick:
        args.seconds = 0.0
    return args


def agree(name: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Assert that two gradients are the same up to rounding: norm of the difference by norm."""
    a, b = (torch.cat([g.double().flatten() for g in gradient]) for gradient in (ours, theirs))
    difference = ((a - b).norm() / b.norm()).item()
    assert difference <= AGREEMENT, f"{name}: gradients differ by {difference:.1e}, so the work is not the same"
    print(f"{name}: gradients agree to {difference:.1e}", flush=True)


# learn2learn's data --------------------------------------------------------------------------------------------------


def load_learn2learn() -> ModuleType:
    """learn2learn, made importable beside a torchvision whose operators do not load; nothing else of ``app`` is run."""
    if "datamodules.core.runtime" not in sys.modules and "learn2learn" not in sys.modules:
        spec = importlib.util.spec_from_file_location("_runtime", ROOT / "datamodules" / "core" / "runtime.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["_runtime"] = module  # the declared schemas live as long as it
        spec.loader.exec_module(module)
        module.declare_torchvision_operators()
    return importlib.import_module("learn2learn")


def png_tree(root: Path, folder: Path) -> None:
    """Put Omniglot's PNG files into ``folder`` as torchvision lays them out: extracted, or linked if they are already.

    Raises:
        SystemExit: there is no Omniglot under ``root``; the message names the cure.
    """
    target = folder / "omniglot-py"
    target.mkdir(parents=True)
    for name in SETS:
        places = [root / sub / file for sub in ("", "omniglot", "omniglot-py") for file in (name, f"{name}.zip")]
        found = next((p for p in places if p.exists()), None)
        if found is None:
            cure = "give --root the folder of Omniglot's two archives, or use --generated"
            raise SystemExit(f"error: no {name}.zip under {root}/: {cure}")
        if found.is_dir():
            (target / name).symlink_to(found.resolve(), target_is_directory=True)
            continue
        with zipfile.ZipFile(found) as archive:
            archive.extractall(target)


def png_taskset(folder: Path, ways: int, samples: int) -> Any:
    """learn2learn's own Omniglot taskset over the PNG files of ``png_tree``, for meta-training.

    Args:
        ways: classes of a task.
        samples: images of each class, shots and queries together.
    """
    l2l = load_learn2learn()
    from torchvision.datasets import Omniglot

    with mock.patch.object(Omniglot, "_check_integrity", return_value=True):
        whole = l2l.vision.datasets.FullOmniglot(root=str(folder))
        background, evaluation = whole.dataset.datasets
        labels = [label for _, label in background._flat_character_images]
        labels += [len(background._characters) + label for _, label in evaluation._flat_character_images]
        indices: dict[int, list[int]] = defaultdict(list)
        for i, label in enumerate(labels):
            indices[label].append(i)
        bookkeeping = {
            "labels_to_indices": indices,
            "indices_to_labels": dict(enumerate(labels)),
            "labels": list(indices),
        }
        Path(whole._bookkeeping_path).write_bytes(pickle.dumps(bookkeeping))
        tasksets = l2l.vision.benchmarks.get_tasksets(
            "omniglot",
            train_ways=ways,
            train_samples=samples,
            test_ways=ways,
            test_samples=samples,
            num_tasks=20_000,  # as its example has it
            root=str(folder),
        )
    return tasksets.train


def memory_taskset(images: Tensor, labels: Tensor, ways: int, samples: int) -> Any:
    """The same task transforms over images that are in memory already, (N, 1, 28, 28) float32."""
    l2l = load_learn2learn()
    dataset = l2l.data.MetaDataset(
        torch.utils.data.TensorDataset(images, labels), indices_to_labels=dict(enumerate(labels.tolist()))
    )
    transforms = [
        l2l.data.transforms.FusedNWaysKShots(dataset, n=ways, k=samples),
        l2l.data.transforms.LoadData(dataset),
        l2l.data.transforms.RemapLabels(dataset),
        l2l.data.transforms.ConsecutiveLabels(dataset),
        l2l.vision.transforms.RandomClassRotation(dataset, [0.0, 90.0, 180.0, 270.0]),
    ]
    return l2l.data.TaskDataset(dataset, transforms, num_tasks=20_000)


def split_task(data: Tensor, labels: Tensor, shots: int, queries: int) -> Tensors:
    """A sampled task as support and queries; the images of a class stand one after the other."""
    is_support = torch.arange(len(labels)) % (shots + queries) < shots
    return data[is_support], labels[is_support], data[~is_support], labels[~is_support]


# learn2learn's steps -------------------------------------------------------------------------------------------------


class PeerMAML:
    """MAML as learn2learn's Omniglot example runs it, with its OmniglotCNN: a loop over clones.

    Args:
        ways: outputs.
        rate: of the inner loop, one step.
        device: "cpu" or "cuda".
        state: of the network; None keeps learn2learn's initialisation.
    """

    def __init__(self, ways: int, rate: float, device: str, state: dict[str, Tensor] | None = None) -> None:
        l2l = load_learn2learn()
        self.network = l2l.vision.models.OmniglotCNN(ways)
        if state is not None:
            self.network.load_state_dict(state)
        self.maml = l2l.algorithms.MAML(self.network.to(device), lr=rate, first_order=False)
        self.optimizer = torch.optim.Adam(self.maml.parameters(), lr=1e-3)
        self.loss = nn.CrossEntropyLoss()
        self.device = device

    def gradient(self, tasks: Iterable[Tensors]) -> float:
        """Leave the meta-gradient in ``.grad``; returns the mean accuracy, as the example prints it."""
        self.optimizer.zero_grad()
        error = accuracy = 0.0
        count = 0
        for task in tasks:
            support_x, support_y, query_x, query_y = (t.to(self.device) for t in task)
            learner = self.maml.clone()
            learner.adapt(self.loss(learner(support_x), support_y))
            prediction = learner(query_x)
            query_error = self.loss(prediction, query_y)
            query_error.backward()
            error += query_error.item()
            accuracy += (prediction.argmax(1) == query_y).float().mean().item()
            count += 1
        for parameter in self.maml.parameters():
            parameter.grad.mul_(1 / count)
        return accuracy / count

    def step(self, tasks: Iterable[Tensors]) -> None:
        self.gradient(tasks)
        self.optimizer.step()

    def sample(self, taskset: Any, shots: int, queries: int, count: int) -> list[Tensors]:
        """Tasks of a taskset."""
        return [split_task(*taskset.sample(), shots, queries) for _ in range(count)]


class PeerProtoNet:
    """A Prototypical Network as learn2learn's miniImageNet example trains it, with its CNN4Backbone for 28x28 images.

    Args:
        ways: classes of a task; the images of class 0 come first, and so on.
        device: "cpu" or "cuda".
        state: of the network; None keeps learn2learn's initialisation.
    """

    def __init__(self, ways: int, device: str, state: dict[str, Tensor] | None = None) -> None:
        self.network = load_learn2learn().vision.models.CNN4Backbone(hidden_size=64, channels=1, max_pool=True)
        if state is not None:
            self.network.load_state_dict(state)
        self.network.to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-3)
        self.ways, self.device = ways, device

    def gradient(self, tasks: Collection[Tensors]) -> float:
        """Leave the gradient in ``.grad``; returns the mean accuracy."""
        self.optimizer.zero_grad()
        accuracy = 0.0
        for task in tasks:
            support_x, support_y, query_x, query_y = (t.to(self.device) for t in task)
            embeddings = self.network(torch.cat([support_x, query_x]))
            support, query = embeddings[: len(support_y)], embeddings[len(support_y) :]
            prototypes = support.reshape(self.ways, -1, support.shape[1]).mean(1)
            logits = -((query[:, None] - prototypes[None]) ** 2).sum(2)
            (F.cross_entropy(logits, query_y) / len(tasks)).backward()
            accuracy += (logits.argmax(1) == query_y).float().mean().item()
        return accuracy / len(tasks)

    def step(self, tasks: Collection[Tensors]) -> None:
        self.gradient(tasks)
        self.optimizer.step()

    def sample(self, taskset: Any, shots: int, queries: int, count: int) -> list[Tensors]:
        """Tasks of a taskset, their images sorted by label, as the example does."""
        tasks = []
        for _ in range(count):
            images, labels = taskset.sample()
            order = labels.sort().indices
            tasks.append(split_task(images[order], labels[order], shots, queries))
        return tasks


def maml_step(content: dict[str, Any]) -> Callable[[], Any]:
    """learn2learn's meta-step for ``Worker``."""
    peer = PeerMAML(content["ways"], content["rate"], content["device"], content["peer"])
    tasks = [tuple(t.to(content["device"]) for t in task) for task in content["tasks"]]
    return lambda: peer.step(tasks)


def maml_end_to_end(content: dict[str, Any]) -> Callable[[], Any]:
    """learn2learn's meta-update from PNG files for ``Worker``."""
    peer = PeerMAML(content["ways"], content["rate"], content["device"])
    taskset = png_taskset(Path(content["folder"]), content["ways"], content["shots"] + content["queries"])
    return lambda: peer.step(peer.sample(taskset, content["shots"], content["queries"], content["count"]))


def protonet_step(content: dict[str, Any]) -> Callable[[], Any]:
    """learn2learn's training step for ``Worker``."""
    peer = PeerProtoNet(content["ways"], content["device"], content["peer"])
    tasks = [tuple(t.to(content["device"]) for t in task) for task in content["tasks"]]
    return lambda: peer.step(tasks)


def protonet_end_to_end(content: dict[str, Any]) -> Callable[[], Any]:
    """learn2learn's training step from PNG files for ``Worker``."""
    peer = PeerProtoNet(content["ways"], content["device"])
    taskset = png_taskset(Path(content["folder"]), content["ways"], content["shots"] + content["queries"])
    return lambda: peer.step(peer.sample(taskset, content["shots"], content["queries"], content["count"]))


# Our steps -----------------------------------------------------------------------------------------------------------


def by_task(episodes: Any) -> list[Tensors]:
    """A meta-batch (``Episodes``) as learn2learn takes it."""
    parts = episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y
    return [tuple(t.contiguous() for t in task) for task in zip(*parts, strict=True)]


def stack_tasks(tasks: Iterable[Tensors], ways: int, device: str) -> Any:
    """The meta-batch that ``by_task`` took apart."""
    from datamodules.core.episodes import Episodes

    parts = [torch.stack(part).to(device) for part in zip(*tasks, strict=True)]
    return Episodes(*parts, index=torch.arange(len(parts[0])), ways=ways, meta_batch=len(parts[0]))


def pair_blocks(backbone: nn.Module, blocks: Iterable[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """Parameters of our Conv4 and of learn2learn's blocks that stand for the same."""
    pairs = []
    for conv, norm, block in zip(backbone.convs, backbone.norms, blocks, strict=True):
        for ours, theirs in ((conv, block.conv), (norm, block.normalize)):
            pairs += [(ours.weight, theirs.weight), (ours.bias, theirs.bias)]
    return pairs


@torch.no_grad()
def copy_weights(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Give learn2learn's network our weights."""
    for ours, theirs in pairs:
        theirs.copy_(ours)


class MetaStep:
    """A bare meta-update of ours.

    Args:
        learner: a MetaLearner of its own.
        episodes: makes the next meta-batch, on the device.
        chunk: tasks mapped over at once; None leaves the learner's choice.
    """

    def __init__(self, learner: Any, episodes: Callable[[], Any], chunk: int | None = None) -> None:
        self.learner = learner
        self.learner.chunk = chunk
        self.optimizer = torch.optim.Adam(self.learner.parameters(), lr=1e-3)
        self.episodes = episodes

    def gradient(self) -> None:
        self.optimizer.zero_grad()
        loss, *_ = self.learner.map(self.learner.objective, self.episodes())
        loss.mean().backward()

    def __call__(self) -> None:
        self.gradient()
        self.optimizer.step()


class Floor:
    """One forward and backward pass of a network of its own through all images, and the optimizer's step."""

    def __init__(self, network: nn.Module, episodes: Any) -> None:
        self.network = network
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-3)
        self.x = torch.cat([episodes.support_x.flatten(0, 1), episodes.query_x.flatten(0, 1)])

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.network(self.x).square().mean().backward()
        self.optimizer.step()


def measure_trainer(
    flags: Sequence[str],
    loops: Callable[[Any], dict[str, Callable[[], float]]],
    device: str,
    window: int,
    seconds: float,
    quick: bool,
) -> dict[str, list[float]]:
    """Seconds of one meta-update of the command line's Trainer and, in turn with it, of other loops.

    After every ``window`` meta-updates a callback, the last one, stops the Trainer's clock and runs the others.

    Args:
        flags: of train.py.
        loops: the others by name, from the MetaboltCLI; each returns the seconds of one meta-update.
        window: meta-updates; divides the 50 between two writings of the log.
        seconds: that it goes on for about, once the log has been written twice.
        quick: stop after three windows, whatever they hold.

    Returns:
        "Trainer", of windows without a writing of the log, "log", seconds of one writing (empty if there was none),
        and the other loops'.
    """
    import pytorch_lightning as pl
    import rich.console

    from app.cli.builder import MetaboltCLI, quiet_lightning

    class Interleave(pl.Callback):
        def __init__(self, others: dict[str, Callable[[], float]]) -> None:
            self.others = others
            self.times: dict[str, list[float]] = {name: [] for name in ("Trainer", "with log", *others)}
            self.first = self.begin = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            done, every = batch_idx + 1, trainer.log_every_n_steps
            if done % window:
                return
            synchronize(device)
            spent = (time.perf_counter() - self.begin) / window
            if done > window:  # the first one warms up
                # The learner writes its metrics after this hook, and so at the beginning of the next window.
                logged = done - window and (done - window) % every == 0
                self.times["with log" if logged else "Trainer"].append(spent)
            with torch.enable_grad():
                for name, other in self.others.items():
                    self.times[name].append(other())
            enough = time.perf_counter() - self.first > seconds and done > 2 * every
            trainer.should_stop = done >= 3 * window if quick else enough
            synchronize(device)
            self.begin = time.perf_counter()

    quiet_lightning()
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as runs:
        accelerator = ["--trainer.accelerator", "cpu" if device == "cpu" else "gpu", "--trainer.devices", "1"]
        # One validation, of few tasks, comes when it stops; that is not timed.
        own = ["--runs", runs, "--wandb", "off", "--trainer.max_steps", "1000000", "--data.init_args.val_tasks", "8"]
        cli = MetaboltCLI([*flags, *accelerator, *own])
        others = loops(cli)
        for other in others.values():
            other()
        interleave = Interleave(others)
        cli.trainer.callbacks.append(interleave)
        bar = cli.trainer.progress_bar_callback
        if bar is not None:  # it does its work, but its rates would count the other loops' time
            bar.console = rich.console.Console(file=io.StringIO())
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    times = interleave.times
    plain = statistics.median(times["Trainer"])
    times["log"] = [(t - plain) * window for t in times.pop("with log")]
    return times


def trainer_rows(what: str, median: dict[str, float], log_every: int, target: float) -> list[Row]:
    """Rows of ``measure_trainer``'s medians; the log's cost is spread over the meta-updates between two writings.

    Args:
        target: least ratio to learn2learn from PNG files.
    """
    ours = median["Trainer"] + median.get("log", 0.0) / log_every
    peers = {"learn2learn, PNG": target, "learn2learn, PNG, own process": target, "learn2learn, memory": None}
    return [
        *(Row(f"{what}, end to end", name, median[name], ours, target=goal) for name, goal in peers.items()),
        Row(f"{what}, Trainer", "bare loop", median["bare loop"], ours, target=0.05, overhead=True),
    ]


def memory_rows(what: str, theirs: Worker, ours: Worker, against: str = "learn2learn, own process") -> list[Row]:
    """Peak memory of two workers that have run: of the process, of its steps alone, and on the GPU if they used one."""
    rows = []
    names = ("peak memory", "peak memory over imports", "peak GPU memory")
    for name, base, own in zip(names, theirs.memory(), ours.memory(), strict=True):
        if base:
            rows.append(Row(f"{what}, {name}", against, base, own, "MiB"))
    return rows


# Processes of their own ----------------------------------------------------------------------------------------------


class Worker:
    """A step in a process of its own, with its own allocator and its own peak memory.

    Args:
        factory: "module:function", which makes the step from ``content``.
        content: what the factory needs, of types that ``torch.load(weights_only=True)`` takes; "device" among them.
        folder: for its files.
    """

    def __init__(self, factory: str, content: dict[str, Any], folder: Path) -> None:
        handle, name = tempfile.mkstemp(dir=folder, suffix=".pt")
        os.close(handle)
        torch.save(content, name)
        self.log = open(f"{name}.log", "w+")  # noqa: SIM115  open as long as the process
        command = [sys.executable, "-m", "benchmarks.common", factory, name]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )

    def _ask(self, what: str) -> list[float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(what, file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"the worker process failed:\n{self.log.read()[-2000:]}")
        return [float(v) for v in line.split()]

    def ready(self) -> None:
        """Wait until it has imported everything."""
        self._ask("memory")

    def step(self) -> float:
        """Run one step there; its seconds."""
        return self._ask("step")[0]

    def memory(self) -> list[float]:
        """MiB: peak resident memory, what of it came after the imports, and peak memory on the GPU (0 without)."""
        return self._ask("memory")

    def close(self) -> None:
        self.process.communicate()
        self.log.close()


class Memory:
    """Peak memory of this process from now on, MiB, above what it holds now.

    Where the kernel cannot forget an earlier peak, that of the imports hides a smaller one of the steps.
    """

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes what is held now
        self.before = self._peak()

    def _peak(self) -> float:
        status = Path("/proc/self/status")
        if status.is_file():
            return next(float(s.split()[1]) / 2**10 for s in status.read_text().splitlines() if s.startswith("VmHWM"))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS

    def metrics(self) -> tuple[float, float, float]:
        """Peak, of it after the imports, and on the GPU."""
        peak = self._peak()
        gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
        return peak, peak - self.before, gpu


def serve(factory: str, file: str) -> None:
    """A worker's side of ``Worker``."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    module, function = factory.split(":")
    content = torch.load(file, weights_only=True)
    step = timed(getattr(importlib.import_module(module), function)(content), content["device"])
    memory = Memory()
    for line in sys.stdin:
        answer = memory.metrics() if line.strip() == "memory" else (step(),)
        print(*answer, file=answers, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
