"""MAML on Omniglot, 5-way 1-shot, 32 tasks to the meta-step: learn2learn's example against ours.

    python -m benchmarks.maml --root data

Both sides train the same network (four strided convolutions of 64 filters) from the same weights, adapt all of its
parameters by one second-order step, and agree on the meta-gradient before anything is timed.

- Meta-step alone, on the same images: with one query per class, as the paper trains, and with 15. learn2learn runs in
  this process, where the allocator keeps freed memory as in every run of ours, and as it comes, in its own process.
- The same with 1, 2, 4, ... tasks mapped over at once, and against the floor: one forward and backward pass through the
  same images, without any adaptation.
- End to end: learn2learn's taskset and loop against the command line's Trainer, its callbacks and loggers included.
- The Trainer against a bare loop of ours; the logging every 50 updates is spread over them.
- Peak memory of either meta-step, each in its own process.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import app
from benchmarks.common import (
    Floor,
    MetaStep,
    PeerMAML,
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
from models import MAML, Conv4

CONFIG = "configs/optimization/maml/omniglot-5way-1shot.yaml"
WAYS, SHOTS, RATE, TASKS = 5, 1, 0.4, 32
TARGETS = {1: (1.7, 2.0), 15: (1.1, None)}  # by queries per class: in the same process, and in learn2learn's own


def learner(device: str) -> MAML:
    """Ours, of fixed initial weights, adapting what learn2learn adapts."""
    torch.manual_seed(0)
    return MAML(Conv4(), WAYS, RATE, adapt_normalization=True).to(device)


def same_weights(ours: MAML, peer: PeerMAML) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Give learn2learn's network our weights; the pairs of parameters that stand for the same."""
    head, classifier = ours.learner.head, peer.network.classifier
    pairs = pair_blocks(ours.learner.backbone, peer.network.base)
    pairs += [(head.weight, classifier.weight), (head.bias, classifier.bias)]
    copy_weights(pairs)
    return pairs


def check(episodes: Episodes, device: str) -> dict[str, torch.Tensor]:
    """Assert that both sides have the same meta-gradient, in float64; returns learn2learn's weights."""
    peer = PeerMAML(WAYS, RATE, device)
    peer.network.double()
    double = episodes.apply(lambda t: t.double() if t.is_floating_point() else t)
    step = MetaStep(learner(device).double(), lambda: double)
    pairs = same_weights(step.learner, peer)
    state = {name: (t.float() if t.is_floating_point() else t).clone() for name, t in peer.network.state_dict().items()}
    step.gradient()
    peer.gradient(by_task(double))
    agree("MAML", [a.grad for a, _ in pairs], [b.grad for _, b in pairs])
    return state


def our_worker(content: dict[str, Any]) -> Callable[[], Any]:
    """Our meta-step for ``Worker``."""
    episodes = stack_tasks(content["tasks"], WAYS, content["device"])
    return MetaStep(learner(content["device"]), lambda: episodes)


def meta_step(report: Report, place: Data, queries: int, args: Any) -> None:
    """The meta-step alone, on a meta-batch that is on the device already."""
    device, tasks = args.device, 4 if args.quick else TASKS
    data = place.make(train_ways=WAYS, train_shots=SHOTS, train_queries=queries)
    episodes = Sampler(data, tasks, device)()
    state = check(episodes, device)
    peer, batch = PeerMAML(WAYS, RATE, device, state), by_task(episodes)
    content = {"peer": state, "tasks": [tuple(t.cpu() for t in task) for task in batch]}
    content |= {"ways": WAYS, "rate": RATE, "device": device}
    workers = {
        "learn2learn, own process": Worker("benchmarks.common:maml_step", content, place.png),
        "ours, own process": Worker("benchmarks.maml:our_worker", content, place.png),
    }
    for worker in workers.values():
        worker.ready()
    chunks = [2**i for i in range(tasks.bit_length())]
    steps = {"learn2learn": timed(lambda: peer.step(batch), device)}
    steps |= {name: worker.step for name, worker in workers.items()}
    steps["ours"] = timed(MetaStep(learner(device), lambda: episodes), device)
    steps |= {str(n): timed(MetaStep(learner(device), lambda: episodes, n), device) for n in chunks}
    steps["floor"] = timed(Floor(learner(device).learner, episodes), device)
    what = f"meta-step, {queries} quer{'y' if queries == 1 else 'ies'}"
    median = report.keep(what, alternate(steps, args.seconds, 2 if args.quick else 5))
    same, own = TARGETS[queries]
    report.rows += [
        Row(what, "learn2learn", median["learn2learn"], median["ours"], target=same),
        Row(what, "learn2learn, own process", median["learn2learn, own process"], median["ours"], target=own),
        *(Row(f"{what}, {n} at once", "learn2learn", median["learn2learn"], median[str(n)]) for n in chunks),
        Row(what, "the floor", median["floor"], median["ours"]),
        *memory_rows(what, *workers.values()),
    ]
    for worker in workers.values():
        worker.close()


def end_to_end(report: Report, place: Data, args: Any) -> None:
    """Sampling, transfer, meta-step and all that the Trainer does around them."""
    device, tasks = args.device, 4 if args.quick else TASKS

    content = {"ways": WAYS, "rate": RATE, "shots": SHOTS, "queries": 1, "count": tasks}
    content |= {"device": device, "folder": str(place.png)}
    worker = Worker("benchmarks.common:maml_end_to_end", content, place.png)
    worker.ready()

    def loops(cli: Any) -> dict[str, Callable[[], float]]:
        bare = MetaStep(learner(device), Sampler(cli.datamodule, tasks, device))
        found = {"bare loop": timed(bare, device, window), "learn2learn, PNG, own process": worker.step}
        tasksets = {
            "learn2learn, PNG": png_taskset(place.png, WAYS, SHOTS + 1),
            "learn2learn, memory": memory_taskset(*in_memory(cli.datamodule), WAYS, SHOTS + 1),
        }
        for name, taskset in tasksets.items():
            peer = PeerMAML(WAYS, RATE, device)
            found[name] = timed(lambda peer=peer, t=taskset: peer.step(peer.sample(t, SHOTS, 1, tasks)), device)
        return found

    window = 2 if args.quick else 5
    flags = ["--config", str(Path(app.__file__).parents[1] / CONFIG), *place.flags]
    flags += ["--model.init_args.adapt_normalization", "true", "--data.init_args.meta_batch_size", str(tasks)]
    times = measure_trainer(flags, loops, device, window, args.seconds, args.quick)
    median = report.keep("end to end", times)
    report.rows += trainer_rows("1 query", median, 50, target=3.0)
    worker.close()


def main() -> None:
    args = arguments("MAML on Omniglot, 5-way 1-shot, against learn2learn.", seconds=25)
    report = Report(f"MAML, {WAYS}-way {SHOTS}-shot, {4 if args.quick else TASKS} tasks", args.device)
    with omniglot(args.root, args.generated) as place:
        end_to_end(report, place, args)
        for queries in (1,) if args.quick else TARGETS:
            meta_step(report, place, queries, args)
    report.show(args.out)


if __name__ == "__main__":
    main()
