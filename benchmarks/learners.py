"""Every learner's training step on Omniglot-sized tasks: tasks a second and peak memory, in one table.

    python -m benchmarks.learners

Each runs as its full-length configuration has it, whole meta-updates on one meta-batch of random images, in a process
of its own. Our MAML runs in turn with each of the others, so that every ratio is of one moment. Where
learn2learn has the algorithm it does the same work from the same weights, in its own process and as it comes; the
gradients are compared before anything is timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import (
    MetaStep,
    Report,
    Row,
    Tensors,
    Worker,
    agree,
    alternate,
    arguments,
    by_task,
    copy_weights,
    load_learn2learn,
    memory_rows,
    pair_blocks,
    stack_tasks,
)

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@dataclass(frozen=True)
class Learner:
    """What is measured.

    Attributes:
        config: of the learner, below ``configs``.
        flags: over it.
        peer: the name of learn2learn's, for ``Peer``; None where it has none.
    """

    config: str
    flags: tuple[str, ...] = ()
    peer: str | None = None


# learn2learn adapts batch norm's scale and shift too.
RATE = 0.0625  # that Meta-SGD's rates start from
WHOLE = ("--model.init_args.adapt_normalization", "true")
LEARNERS = {
    "MAML": Learner("optimization/maml/omniglot-5way-1shot", WHOLE, "MAML"),
    "FOMAML": Learner("optimization/fomaml/omniglot-5way-1shot", WHOLE, "FOMAML"),
    "MAML++": Learner("optimization/mamlpp/omniglot-5way-1shot", ("--model.init_args.first_order_updates", "0")),
    "ANIL": Learner("optimization/anil/omniglot-5way-1shot", (), "ANIL"),
    "Meta-SGD": Learner(
        "optimization/meta_sgd/omniglot-5way-1shot", (*WHOLE, "--model.init_args.inner_rate", str(RATE)), "Meta-SGD"
    ),
    "Reptile": Learner("optimization/reptile/omniglot-5way-1shot"),
    "iMAML": Learner("optimization/imaml/omniglot-5way-1shot"),
    "BMAML": Learner("bayesian/bmaml/omniglot-5way-1shot"),
    "ABML": Learner("bayesian/abml/omniglot-5way-1shot"),
    "ProtoNet": Learner("metric/protonet/omniglot-60way-1shot"),
}


def build(flags: Sequence[str]) -> Any:
    """The command line's learner and data."""
    from app.cli.builder import MetaboltCLI

    own = ("--wandb", "off", "--runs", tempfile.gettempdir(), "--trainer.accelerator", "cpu")
    return MetaboltCLI([*flags, *own])


def random_tasks(data: Any, tasks: int) -> Any:
    """A meta-batch of random images of the shape that this data has in training."""
    from datamodules.core.episodes import Episodes

    generator = torch.Generator().manual_seed(0)
    label = torch.arange(data.train_ways)
    labels = [label.repeat_interleave(n).expand(tasks, -1) for n in (data.train_shots, data.train_queries)]
    images = [torch.rand(*y.shape, 1, 28, 28, generator=generator) for y in labels]
    return Episodes(images[0], labels[0], images[1], labels[1], torch.arange(tasks), len(label), tasks)


def our_worker(content: dict[str, Any]) -> Callable[[], Any]:
    """Our meta-update for ``Worker``."""
    learner = build(content["flags"]).model.to(content["device"]).train()
    episodes = stack_tasks(content["tasks"], content["ways"], content["device"])
    return MetaStep(learner, lambda: episodes, learner.chunk)


class Peer:
    """learn2learn's algorithm in the loop of its examples, on its OmniglotCNN.

    Args:
        name: "MAML", "FOMAML", "ANIL" or "Meta-SGD".
        ways: outputs.
        rate, steps: of the inner loop.
        device: "cpu" or "cuda".
        state: of the network; None keeps learn2learn's initialisation.
    """

    def __init__(
        self, name: str, ways: int, rate: float, steps: int, device: str, state: dict[str, Tensor] | None = None
    ) -> None:
        l2l = load_learn2learn()
        self.network = l2l.vision.models.OmniglotCNN(ways)
        if state is not None:
            self.network.load_state_dict(state)
        self.network.to(device)
        whole, head = self.network, self.network.classifier
        algorithms = l2l.algorithms
        self.features: Callable[[Tensor], Tensor] = lambda x: x
        if name == "ANIL":
            # As OmniglotCNN's own forward pass, up to its head.
            self.features = lambda x: whole.base(x.view(-1, 1, 28, 28)).mean(dim=[2, 3])
            self.algorithm = algorithms.MAML(head, lr=rate)
            parameters = [*whole.base.parameters(), *self.algorithm.parameters()]
        elif name == "Meta-SGD":
            # Its MetaSGD leaves a module that is registered twice, as OmniglotCNN's base is, unadapted.
            once = nn.Sequential(whole.base, l2l.nn.Lambda(lambda x: x.mean(dim=[2, 3])), head)
            self.algorithm = algorithms.MetaSGD(once, lr=rate)
            parameters = list(self.algorithm.parameters())
        else:
            self.algorithm = algorithms.MAML(whole, lr=rate, first_order=name == "FOMAML")
            parameters = list(self.algorithm.parameters())
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3)
        self.steps, self.device = steps, device

    def gradient(self, tasks: Sequence[Tensors]) -> None:
        """Leave the meta-gradient in ``.grad``."""
        self.optimizer.zero_grad()
        for task in tasks:
            support_x, support_y, query_x, query_y = (t.to(self.device) for t in task)
            support, query = self.features(support_x), self.features(query_x)
            learner = self.algorithm.clone()
            for _ in range(self.steps):
                learner.adapt(F.cross_entropy(learner(support), support_y))
            (F.cross_entropy(learner(query), query_y) / len(tasks)).backward()

    def step(self, tasks: Sequence[Tensors]) -> None:
        self.gradient(tasks)
        self.optimizer.step()


def peer_worker(content: dict[str, Any]) -> Callable[[], Any]:
    """learn2learn's meta-update for ``Worker``."""
    peer = Peer(*(content[k] for k in ("name", "ways", "rate", "steps", "device", "peer")))
    tasks = [tuple(t.to(content["device"]) for t in task) for task in content["tasks"]]
    return lambda: peer.step(tasks)


def compare_gradients(name: str, learner: Any, episodes: Any, rate: float, device: str) -> dict[str, Tensor]:
    """Assert that both sides have the same meta-gradient, in float64; returns learn2learn's weights."""
    peer = Peer(name, episodes.ways, rate, learner.inner_steps, device)
    peer.network.double()
    if name == "Meta-SGD":
        peer.algorithm.double()
    learner = learner.double()
    head, classifier = learner.learner.head, peer.network.classifier
    pairs = pair_blocks(learner.learner.backbone, peer.network.base)
    pairs += [(head.weight, classifier.weight), (head.bias, classifier.bias)]
    copy_weights(pairs)
    state = {n: (t.float() if t.is_floating_point() else t).clone() for n, t in peer.network.state_dict().items()}
    double = episodes.apply(lambda t: t.double() if t.is_floating_point() else t)
    MetaStep(learner, lambda: double).gradient()
    peer.gradient(by_task(double))
    agree(name, [a.grad for a, _ in pairs], [b.grad for _, b in pairs])
    return state


def measure(report: Report, name: str, maml: tuple[Worker, int] | None, folder: Path, args: Any) -> tuple[Worker, int]:
    """One learner's rows, beside our MAML's and learn2learn's; returns its worker, which still runs, and its tasks."""
    what = LEARNERS[name]
    flags = ["--config", str(CONFIGS / f"{what.config}.yaml"), *what.flags]
    cli = build(flags)
    learner = cli.model
    tasks = 2 if args.quick else cli.datamodule.meta_batch_size
    episodes = random_tasks(cli.datamodule, tasks)
    content: dict[str, Any] = {"ways": episodes.ways, "device": args.device, "tasks": by_task(episodes)}
    ours = Worker("benchmarks.learners:our_worker", content | {"flags": flags}, folder)
    others = {} if maml is None else {"our MAML": maml}
    if what.peer is not None:
        settings = {"name": what.peer, "rate": getattr(learner, "inner_rate", RATE), "steps": learner.inner_steps}
        state = compare_gradients(what.peer, learner, episodes, settings["rate"], args.device)
        peer = Worker("benchmarks.learners:peer_worker", content | settings | {"peer": state}, folder)
        others["learn2learn"] = (peer, tasks)
    for worker in (ours, *(w for w, _ in others.values())):
        worker.ready()
    steps = {"ours": ours.step} | {key: worker.step for key, (worker, _) in others.items()}
    median = report.keep(name, alternate(steps, args.seconds, 2 if args.quick else 5))
    for key, (worker, of_worker) in others.items():
        report.rows.append(Row(name, key, median[key] / of_worker, median["ours"] / tasks, "tasks/s"))
        report.rows += memory_rows(name, worker, ours, key)
    if "learn2learn" in others:
        others["learn2learn"][0].close()
    return ours, tasks


def main() -> None:
    args = arguments("Training steps of every learner.", seconds=12)
    report = Report("Learners, Omniglot-sized tasks, each as its full-length configuration", args.device)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        maml = None
        for name in LEARNERS:
            worker = measure(report, name, maml, Path(folder), args)
            if maml is None:
                maml = worker
            else:
                worker[0].close()
        if maml is not None:
            maml[0].close()
    report.show(args.out)


if __name__ == "__main__":
    main()
