"""Prototypical Networks on Omniglot, 20-way 5-shot with 15 queries: learn2learn's training step against ours.

    python -m benchmarks.protonet --root data

learn2learn's example is on miniImageNet; here it trains its own four-block backbone for 28x28 images on its Omniglot
taskset. Both sides have the same weights and agree on the gradient before anything is timed.

- Training step alone, one task (400 images). learn2learn runs in this process, where the allocator keeps freed memory
  as in every run of ours, and as it comes, in its own process. The floor: a forward and backward pass through the same
  images.
- Four tasks to the step, 1, 2 and 4 of them mapped over at once.
- End to end: learn2learn's taskset and loop against the command line's Trainer, its callbacks and loggers included.
- The Trainer against a bare loop of ours, which keeps no running averages; the logging every 50 updates is spread over
  them.
- Peak memory of either step, each in its own process.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import app
from benchmarks.common import (
    Floor,
    MetaStep,
    PeerProtoNet,
    Report,
    Row,
    Worker,
    agree,
    alternate,
    arguments,
    by_task,
    copy_weights,
    measure_trainer,
    memory_rows,
    memory_taskset,
    pair_blocks,
    png_taskset,
    stack_tasks,
    timed,
    trainer_rows,
)
from benchmarks.episodes import Data, Sampler, in_memory, omniglot
from datamodules.core.episodes import Episodes
from models import Conv4, ProtoNet

CONFIG = "configs/metric/protonet/omniglot-60way-1shot.yaml"


class Shape(NamedTuple):
    """Of a training task: ways, shots, and queries of each class."""

    ways: int
    shots: int
    queries: int

    @property
    def settings(self) -> dict[str, int]:
        """Of our data module."""
        return {"train_ways": self.ways, "train_shots": self.shots, "train_queries": self.queries}


def learner(device: str) -> ProtoNet:
    """Ours, of fixed initial weights."""
    torch.manual_seed(0)
    return ProtoNet(Conv4(downsample="pool")).to(device)


def check(episodes: Episodes, device: str) -> dict[str, Tensor]:
    """Assert that both sides have the same gradient, in float64; returns learn2learn's weights."""
    peer = PeerProtoNet(episodes.ways, device)
    peer.network.double()
    double = episodes.apply(lambda t: t.double() if t.is_floating_point() else t)
    step = MetaStep(learner(device).double(), lambda: double)
    pairs = pair_blocks(step.learner.backbone, peer.network)
    copy_weights(pairs)
    state = {name: (t.float() if t.is_floating_point() else t).clone() for name, t in peer.network.state_dict().items()}
    step.gradient()
    peer.gradient(by_task(double))
    agree("ProtoNet", [a.grad for a, _ in pairs], [b.grad for _, b in pairs])
    return state


def our_worker(content: dict[str, Any]) -> Callable[[], Any]:
    """Our training step for ``Worker``."""
    episodes = stack_tasks(content["tasks"], content["ways"], content["device"])
    return MetaStep(learner(content["device"]), lambda: episodes)


def step_alone(report: Report, place: Data, shape: Shape, args: Any) -> None:
    """The training step alone, on a task that is on the device already."""
    device = args.device
    data = place.make(**shape.settings)
    episodes, several = Sampler(data, 1, device)(), Sampler(data, 4, device)()
    state = check(episodes, device)
    peer, batch, batch4 = PeerProtoNet(shape.ways, device, state), by_task(episodes), by_task(several)
    content = {"peer": state, "tasks": [tuple(t.cpu() for t in task) for task in batch]}
    content |= {"ways": shape.ways, "device": device}
    workers = {
        "learn2learn, own process": Worker("benchmarks.common:protonet_step", content, place.png),
        "ours, own process": Worker("benchmarks.protonet:our_worker", content, place.png),
    }
    for worker in workers.values():
        worker.ready()
    chunks = [1, 2, 4]
    steps = {"learn2learn": timed(lambda: peer.step(batch), device)}
    steps |= {name: worker.step for name, worker in workers.items()}
    steps |= {
        "ours": timed(MetaStep(learner(device), lambda: episodes), device),
        "floor": timed(Floor(learner(device).backbone, episodes), device),
        "learn2learn, 4 tasks": timed(lambda: peer.step(batch4), device),
    }
    steps |= {str(n): timed(MetaStep(learner(device), lambda: several, n), device) for n in chunks}
    steps["chosen"] = timed(MetaStep(learner(device), lambda: several), device)
    median = report.keep("step", alternate(steps, args.seconds, 1 if args.quick else 5))
    four = median["learn2learn, 4 tasks"]
    report.rows += [
        Row("step", "learn2learn", median["learn2learn"], median["ours"]),
        Row("step", "learn2learn, own process", median["learn2learn, own process"], median["ours"]),
        Row("step", "the floor", median["floor"], median["ours"]),
        Row("step, 4 tasks", "learn2learn", four, median["chosen"]),
        *(Row(f"step, 4 tasks, {n} at once", "learn2learn", four, median[str(n)]) for n in chunks),
        *memory_rows("step", *workers.values()),
    ]
    for worker in workers.values():
        worker.close()


def end_to_end(report: Report, place: Data, shape: Shape, args: Any) -> None:
    """Sampling, transfer, training step and all that the Trainer does around them."""
    device, window = args.device, 2 if args.quick else 10
    ways, shots, queries = shape
    content = shape._asdict() | {"count": 1, "device": device, "folder": str(place.png)}
    worker = Worker("benchmarks.common:protonet_end_to_end", content, place.png)
    worker.ready()

    def loops(cli: Any) -> dict[str, Callable[[], float]]:
        bare = MetaStep(learner(device), Sampler(cli.datamodule, 1, device))
        found = {"bare loop": timed(bare, device, window), "learn2learn, PNG, own process": worker.step}
        tasksets = {
            "learn2learn, PNG": png_taskset(place.png, ways, shots + queries),
            "learn2learn, memory": memory_taskset(*in_memory(cli.datamodule), ways, shots + queries),
        }
        for name, taskset in tasksets.items():
            peer = PeerProtoNet(ways, device)
            found[name] = timed(lambda peer=peer, t=taskset: peer.step(peer.sample(t, shots, queries, 1)), device)
        return found

    flags = ["--config", str(Path(app.__file__).parents[1] / CONFIG), *place.flags, "--data.init_args.protocol", "maml"]
    flags += [v for name, value in shape.settings.items() for v in (f"--data.init_args.{name}", str(value))]
    times = measure_trainer(flags, loops, device, window, args.seconds, args.quick)
    median = report.keep("end to end", times)
    report.rows += trainer_rows("1 task", median, 50, target=6.0)
    worker.close()


def main() -> None:
    args = arguments("Prototypical Networks on Omniglot, 20-way 5-shot, against learn2learn.", seconds=30)
    shape = Shape(5, 1, 5) if args.quick else Shape(20, 5, 15)
    report = Report(f"ProtoNet, {shape.ways}-way {shape.shots}-shot, {shape.queries} queries", args.device)
    with omniglot(args.root, args.generated) as place:
        end_to_end(report, place, shape, args)
        step_alone(report, place, shape, args)
    report.show(args.out)


if __name__ == "__main__":
    main()
