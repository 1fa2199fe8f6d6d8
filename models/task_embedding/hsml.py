"""Hierarchically structured meta-learning: clusters of tasks, learned, each with an initialisation of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.core.episodes import Episodes, Support, Task
from datamodules.core.errors import at_least
from datamodules.core.metric import Metric
from models.core.base_learner import BaseLearner, Parameters, entry, fit_outputs
from models.core.gradient_learner import GradientLearner
from models.core.inner_loop import (
    Adapted,
    adapted,
    call,
    last,
    sgd_path,
    split_parameters,
)
from models.core.learner import Paper
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNormMode
from models.task_embedding.clusters import ClusterLevel, FunctionLevel
from models.task_embedding.task_encoders import PoolingAutoencoder, RecurrentAutoencoder


class HSML(GradientLearner):
    """Encodes a task's support set, assigns it softly to a hierarchy of clusters, and gates MAML's initialisation.

    The gate η = σ(W [g; h] + b) of the task's code g and what the root of the hierarchy holds, h, multiplies every
    single initial parameter; gradient steps on the support set follow (eqs. 6 and 7). A reconstruction loss keeps the
    code informative. With ``max_clusters`` the first level grows while tasks keep getting harder (section 4.4).

    Args:
        backbone: the base learner without its head.
        outputs: rows of the head: ways, or the dimension of y.
        embedding: what the encoder sees of an input; None sees the input itself, flattened.
        features: size of F(x, y), an example together with its target, which the encoder reads and reconstructs.
        hidden: size of the task's code and of what clusters hold; 40 for regression, 128 for images.
        encoder: "recurrent", a GRU, or "pooling" autoencoder aggregator; or "functions", not of the paper and for
            regression on one output alone: the first level is a ``FunctionLevel``, a mixture of Bayesian regressions
            on what the embedding sees, whose log evidence of the examples stands in for their reconstruction.
            ``features``, ``ordered`` and, on that level, ``deviation`` are not for it.
        ordered: the recurrent encoder reads examples in the order of the sums of their inputs, so that it encodes a
            set; False reads them as they come, as published.
        clusters: of each level, the root last.
        deviation: σ of the soft assignment; 2 for regression, 10 for images.
        reconstruction_weight: ξ of the reconstruction loss in the meta-objective.
        inner_rate: α, the learning rate of the inner loop.
        inner_steps: gradient steps in meta-training.
        eval_inner_steps: gradient steps in evaluation; None takes as many as in training.
        first_order: leave out second derivatives of the inner loop.
        adapt_normalization: adapt batch norm's scale and shift too.
        max_clusters: that the first level may grow to; None keeps it as it is.
        expansion_interval: Q, meta-batches whose mean query loss is compared with that of the Q before.
        expansion_ratio: μ; a cluster is added where the loss is more than that many times as high.
        batch_norm, **others: see MetaLearner.
    """

    paper = Paper(
        "Yao, Wei, Huang and Li",
        "Hierarchically Structured Meta-learning",
        "ICML",
        2019,
        "https://arxiv.org/abs/1905.05301",
    )
    tasks = frozenset({"classification", "regression"})
    active: Tensor
    counted: Tensor
    losses: Tensor

    own_metrics = {
        "reconstruction": Metric("lower"),
        "assignment_entropy": Metric(),
        "families": Metric("higher", "mutual information of clusters and families", pooled="nmi"),
    }

    def __init__(
        self,
        backbone: Backbone,
        outputs: int = 5,
        embedding: Backbone | None = None,
        features: int = 20,
        hidden: int = 40,
        encoder: Literal["recurrent", "pooling", "functions"] = "recurrent",
        ordered: bool = True,
        clusters: Sequence[int] = (4, 2, 1),
        deviation: float = 2.0,
        reconstruction_weight: float = 0.01,
        inner_rate: float = 0.001,
        inner_steps: int = 5,
        eval_inner_steps: int | None = None,
        first_order: bool = False,
        adapt_normalization: bool = False,
        max_clusters: int | None = None,
        expansion_interval: int = 1000,
        expansion_ratio: float = 1.5,
        batch_norm: BatchNormMode = "transductive",
        **others: Any,
    ) -> None:
        super().__init__(outputs, inner_steps, eval_inner_steps, batch_norm, **others)
        at_least(1, features=features, hidden=hidden, expansion_interval=expansion_interval)
        at_least(1, **{f"clusters[{i}]": k for i, k in enumerate(clusters)})
        at_least(clusters[0], max_clusters=max_clusters)
        if len(clusters) < 2 or clusters[-1] != 1:
            raise ValueError(
                f"clusters are {list(clusters)} but must be of two or more levels, the last of 1, the root"
            )
        self.learner = BaseLearner(backbone, outputs)
        self.embedding = nn.Flatten() if embedding is None else embedding
        seen = math.prod(backbone.input_shape) if embedding is None else embedding.out_features
        sizes = [max_clusters or clusters[0], *clusters[1:]]
        self.levels = nn.ModuleList(ClusterLevel(k, hidden, deviation) for k in sizes)
        if encoder == "functions":
            if outputs != 1:
                raise ValueError(f"outputs is {outputs} but must be 1 where the encoder is of functions")
            self.joint = nn.Linear(seen, hidden)
            self.levels[0] = FunctionLevel(sizes[0], hidden)
        else:
            # F(x, y) is linear in what is seen of x, and in y: of classes it has a row each, like the head.
            self.joint = nn.Linear(seen, features)
            self.head_targets = nn.Parameter(nn.init.xavier_uniform_(torch.empty(outputs, features)))
            self.encoder = (RecurrentAutoencoder if encoder == "recurrent" else PoolingAutoencoder)(features, hidden)
        gated = {entry(n): p for part in split_parameters(self.learner, True) for n, p in part.items()}
        self.gates = nn.ParameterDict({n: torch.empty(*p.shape, 2 * hidden) for n, p in gated.items()})
        self.gate_biases = nn.ParameterDict({n: torch.zeros_like(p) for n, p in gated.items()})
        for gate in self.gates.values():
            nn.init.xavier_uniform_(gate.data.view(-1, 2 * hidden))
        self.ordered = ordered and encoder == "recurrent"
        self.reconstruction_weight = reconstruction_weight
        self.inner_rate = inner_rate
        self.first_order, self.adapt_normalization = first_order, adapt_normalization
        self.max_clusters, self.capacity = max_clusters, sizes[0]
        self.expansion_interval, self.expansion_ratio = expansion_interval, expansion_ratio
        # Of the first level: clusters in use; meta-batches of this window; their losses' sum, and the mean before.
        self.register_buffer("active", torch.tensor(clusters[0]))
        self.register_buffer("counted", torch.tensor(0))
        self.register_buffer("losses", torch.zeros(2))

    def class_rows(self) -> Parameters:
        of_gates = {n: p for n, p in self.named_parameters() if n.startswith(("gates.head_", "gate_biases.head_"))}
        return super().class_rows() | of_gates | {n: p for n, p in self.named_parameters() if n == "head_targets"}

    def encode(self, support: Support) -> tuple[Tensor, Tensor, Tensor | None]:
        """The task's code (hidden,), the loss of reconstructing its examples, its clusters (1, K) where those read."""
        level = self.levels[0]
        if isinstance(level, FunctionLevel):
            seen = call(self.embedding, {}, support.x, self.statistics_source)
            return level.read(self.joint(seen), support.y, self.active)
        targets = support.members() if support.ways else support.y
        rows = fit_outputs(self.head_targets, support.ways) if support.ways else self.head_targets
        seen = call(self.embedding, {}, support.x, self.statistics_source)
        examples = self.joint(seen) + targets.to(rows.dtype) @ rows
        if self.ordered:
            examples = examples[support.x.flatten(1).sum(1).argsort()]
        return *self.encoder(examples), None

    def hierarchy(self, code: Tensor, assignment: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """What the root holds, (hidden,), and each level's assignment (lower nodes, clusters), the first's if known."""
        nodes, assignments = code[None], []
        for number, level in enumerate(cast(Iterable[ClusterLevel], self.levels)):
            if number or assignment is None:
                assignment = level.assignment(nodes, None if number else self.active)
            assignments.append(assignment)
            nodes = level(nodes, assignment)
        return nodes[0], assignments

    def gate(self, code: Tensor, held: Tensor, ways: int) -> Parameters:
        """η: for each parameter of the base learner its gate, of the same shape, between 0 and 1."""
        names = [name for name, _ in self.learner.named_parameters() if entry(name) in self.gates]
        weights = self.learner.resize_head({n: self.gates[entry(n)] for n in names}, ways)
        biases = self.learner.resize_head({n: self.gate_biases[entry(n)] for n in names}, ways)
        both = torch.cat([code, held])
        flat = {n: F.linear(both, weights[n].flatten(0, -2), biases[n].flatten()) for n in names}
        return {n: torch.sigmoid(score).view(biases[n].shape) for n, score in flat.items()}

    def path(self, support: Support, gate: Parameters) -> Iterator[Adapted]:
        """MAML's inner loop from the gated initialisation."""
        parts = split_parameters(self.learner, self.adapt_normalization)
        start, fixed = (
            {n: p * gate[n] for n, p in self.learner.resize_head(part, support.ways).items()} for part in parts
        )

        def support_loss(parameters: Parameters, step: int) -> Tensor:
            return self.support_loss(call(self.learner, parameters | fixed, support.x, self.statistics_source), support)

        path = sgd_path(support_loss, start, self.inner_rate, self.steps, self.first_order)
        for step, parameters in enumerate(path):
            yield adapted(self.learner, parameters | fixed, support, self.batch_norm, step)

    def adaptation(self, support: Support) -> Iterator[Adapted]:
        code, _, read = self.encode(support)
        yield from self.path(support, self.gate(code, self.hierarchy(code, read)[0], support.ways))

    def assignments(self, episodes: Episodes) -> Tensor:
        """How far each task belongs to each cluster of the first level, (T, clusters)."""

        def of(task: Task) -> Tensor:
            code, _, read = self.encode(task.support)
            return self.hierarchy(code, read)[1][0][0]

        return self.map(of, episodes)

    def task_metrics(self, batch: Episodes) -> dict[str, Tensor]:
        """Where groups of tasks are known, each task's place in the table of groups and clusters."""
        if batch.task_groups is None:
            return {}
        fact, names = batch.task_groups
        family = F.one_hot(batch.task[fact], len(names))
        cluster = F.one_hot(self.assignments(batch).argmax(-1), self.capacity)
        return {"families": (family[:, :, None] * cluster[:, None]).float()}

    def objective(self, task: Task) -> tuple[Any, ...]:
        code, reconstruction, read = self.encode(task.support)
        held, (assignment, *_) = self.hierarchy(code, read)
        state = last(self.path(task.support, self.gate(code, held, task.support.ways)))
        prediction = self.predict(state, task.query_x)
        loss = self.loss(prediction, task.query_y)
        entropy = -torch.xlogy(assignment, assignment).sum()
        kept: dict[str, Any] = {"metrics": {"reconstruction": reconstruction, "assignment_entropy": entropy}}
        if self.max_clusters is not None:
            kept["query_loss"] = loss
        return loss + self.reconstruction_weight * reconstruction, prediction, kept

    def update_from_tasks(self, values: dict[str, Any]) -> None:
        """Add a cluster where the last Q meta-batches were harder than those before by more than μ."""
        # The same on all processes, and all of it in the checkpoint; the cluster's parameters, and the optimizer's
        # state of them, were there all along, untouched.
        self.counted += 1
        self.losses[0] += values["query_loss"]
        if self.counted < self.expansion_interval:
            return
        mean, before = self.losses[0] / self.expansion_interval, self.losses[1]
        if before > 0 and mean > self.expansion_ratio * before and self.active < self.capacity:
            self.active += 1
        self.losses.copy_(torch.stack([torch.zeros_like(mean), mean]))
        self.counted.zero_()
