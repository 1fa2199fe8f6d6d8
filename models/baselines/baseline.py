"""Baselines without episodes in training: a classifier of all classes, whose features serve every task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.core.episodes import Episodes, Support, Task
from datamodules.core.errors import at_least
from models.core.base_learner import Parameters
from models.core.embedding_learner import Embedded, EmbeddingLearner
from models.core.inner_loop import Adapted, adapted, call, class_means, inner_gradient, query, shuffled_passes
from models.core.learner import Paper
from models.core.training_classes import expect_classes
from models.networks.backbones import Backbone

BACKBONE = "backbone."


class Baseline(EmbeddingLearner):
    """Learns to tell all meta-training classes apart; each task gets a head of its own (Baseline and Baseline++).

    A meta-batch is nothing but its images here: support and queries with the classes that they are of among all.
    The published head starts at random; ours from the classes' mean directions ("cosine") or from 0 ("linear", whose
    problem is convex), so that neither a seed nor the names of labels have a part in the result.

    Args:
        backbone: the embedding.
        classes: of the meta-training split; where turns are classes of their own, these.
        head: "linear", Baseline; "cosine", Baseline++: ``scale`` times the cosine of features and weights.
        adaptation: "head", SGD on the head as published; "all", on the backbone too; "centroid", the nearest mean of
            embeddings without any training; "logistic", the optimum of logistic regression on embeddings of unit
            length, its weights (not its biases) under a Gaussian prior of variance 1 (Tian et al., ECCV 2020).
        scale: of cosines in meta-training, 10 in the reference code for more than 200 classes.
        task_scale: of cosines of a task's head, 2 there since it has fewer.
        passes, batch: over the support set in the training of a task, and examples of a mini-batch; the last one of a
            pass has what is left.
        rate, momentum, dampening, weight_decay: of its SGD; by default as in the reference code.
        batch_norm, **others: see MetaLearner.
    """

    paper = Paper(
        "Chen, Liu, Kira, Wang and Huang",
        "A Closer Look at Few-shot Classification",
        "ICLR",
        2019,
        "https://arxiv.org/abs/1904.04232",
    )

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        head: Literal["linear", "cosine"] = "linear",
        adaptation: Literal["head", "all", "centroid", "logistic"] = "head",
        scale: float = 10.0,
        task_scale: float = 2.0,
        passes: int = 100,
        batch: int = 4,
        rate: float = 0.01,
        momentum: float = 0.9,
        dampening: float = 0.9,
        weight_decay: float = 0.001,
        **others: Any,
    ) -> None:
        super().__init__(backbone, **others)
        at_least(1, classes=classes, batch=batch)
        at_least(0, passes=passes)
        self.classifier = nn.Linear(backbone.out_features, classes, bias=head == "linear")
        self.classes, self.kind, self.method = classes, head, adaptation
        self.scale, self.task_scale = scale, task_scale
        self.passes, self.batch, self.rate = passes, batch, rate
        self.momentum, self.dampening, self.weight_decay = momentum, dampening, weight_decay

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            expect_classes(self.trainer.datamodule, self.classes)

    # Meta-training: one classification problem ----------------------------------------------------------------------

    def training_step(self, batch: Episodes, batch_idx: int) -> Tensor:
        of_way = batch.task["classes"]
        support_y, query_y = (of_way.gather(1, y) for y in (batch.support_y, batch.query_y))
        return super().training_step(replace(batch, support_y=support_y, query_y=query_y, ways=self.classes), batch_idx)

    def objective(self, task: Task) -> tuple[Any, ...]:
        with_queries = torch.cat([task.support.x, task.query_x]), torch.cat([task.support.y, task.query_y])
        weights: Parameters = dict(self.classifier.named_parameters())
        z = call(self.backbone, {}, with_queries[0], self.statistics_source)
        outputs = self.head(weights, z, self.scale)
        return self.loss(outputs, with_queries[1]), outputs[len(task.support.y) :]

    # A task: its own head -------------------------------------------------------------------------------------------

    def compare(self, summary: Parameters, z: Tensor) -> Tensor:
        return self.head(summary, z, self.task_scale)

    def head(self, summary: Parameters, z: Tensor, scale: float) -> Tensor:
        """Logits (N, rows) of embeddings (N, features) under a head, cosines times ``scale``."""
        if self.kind == "cosine":
            return scale * F.normalize(z, dim=-1) @ F.normalize(summary["weight"], dim=-1).T
        return F.linear(z, summary["weight"], summary["bias"])

    def first_head(self, z: Tensor, support: Support) -> Parameters:
        if self.kind == "cosine":
            return {"weight": class_means(F.normalize(z, dim=-1), support)}
        return {"weight": z.new_zeros(support.ways, z.shape[-1]), "bias": z.new_zeros(support.ways)}

    def centroids(self, z: Tensor, support: Support) -> Parameters:
        """-‖z - c‖² as a linear head: the term that classes share is left out."""
        if self.kind == "cosine":
            return self.first_head(z, support)
        c = class_means(z, support)
        return {"weight": 2 * c, "bias": -c.square().sum(1)}

    def logistic_regression(self, z: Tensor, support: Support, steps: int = 200) -> Parameters:
        """The minimum of Σ cross-entropy + ‖W‖² / 2, classes weighed alike, by Nesterov's accelerated gradient."""
        z = F.normalize(z, dim=-1)
        x = torch.cat([z, torch.ones_like(z[:, :1])], 1)
        wanted, shares = support.members().to(z.dtype), support.shares()
        assert shares is not None
        weighted = shares.to(z.dtype)[:, None] * x
        steepest = len(x) + 1  # Böhning's bound of the Hessian: half of Σ share ‖x‖², and the prior's 1
        momentum = (1 - steepest**-0.5) / (1 + steepest**-0.5)
        w = ahead = z.new_zeros(support.ways, x.shape[1])
        for _ in range(steps):
            slope = ((ahead @ x.T).softmax(0) - wanted.T) @ weighted + F.pad(ahead[:, :-1], (0, 1))
            w, before = ahead - slope / steepest, w
            ahead = w + momentum * (w - before)
        return {"weight": w[:, :-1], "bias": w[:, -1]}

    def sgd(self, loss: Callable[[Parameters, Tensor], Tensor], parameters: Parameters, examples: int) -> Parameters:
        """Stochastic gradient descent on mini-batches, the same ones for every task."""
        device = next(iter(parameters.values())).device
        velocity: Parameters = {}
        generator = torch.Generator(device).manual_seed(0)
        for rows in shuffled_passes(examples, self.batch, self.passes, device, generator):
            gradient = inner_gradient(loss, parameters, rows)
            gradient = {n: g + self.weight_decay * parameters[n] for n, g in gradient.items()}
            damped = 1 - self.dampening if velocity else 1.0
            velocity = {n: self.momentum * velocity.get(n, 0.0) + damped * g for n, g in gradient.items()}
            parameters = {n: p - self.rate * velocity[n] for n, p in parameters.items()}
        return parameters

    def summarize(self, z: Tensor, support: Support) -> Parameters:
        if self.method == "centroid":
            return self.centroids(z, support)
        if self.method == "logistic":
            return self.logistic_regression(z, support)

        def loss(head: Parameters, rows: Tensor) -> Tensor:
            return self.support_loss(self.compare(head, z[rows]), support, rows)

        return self.sgd(loss, self.first_head(z, support), len(z))

    def logits(self, parameters: Parameters, embed: Callable[[Parameters], Tensor]) -> Tensor:
        """Of a network and its head together, which fine-tuning moves both."""
        of_backbone = {n.removeprefix(BACKBONE): p for n, p in parameters.items() if n.startswith(BACKBONE)}
        return self.compare(parameters, embed(of_backbone))

    def adapt(self, support: Support) -> Embedded | Adapted:
        if self.method != "all":
            return super().adapt(support)
        own = dict(self.backbone.named_parameters())
        head = self.first_head(call(self.backbone, {}, support.x, self.statistics_source), support)

        def loss(parameters: Parameters, rows: Tensor) -> Tensor:
            x = support.x[rows]
            outputs = self.logits(parameters, lambda p: call(self.backbone, p, x, self.statistics_source))
            return self.support_loss(outputs, support, rows)

        moved = self.sgd(loss, head | {BACKBONE + n: p for n, p in own.items()}, len(support.y))
        backbone = {n: moved[BACKBONE + n] for n in own}
        return adapted(self.backbone, backbone, support, self.batch_norm)._replace(parameters=moved)

    def predict(self, state: Embedded | Adapted, query_x: Tensor) -> Tensor:
        if isinstance(state, Embedded):
            return super().predict(state, query_x)

        def embed(backbone: Parameters) -> Tensor:
            return query(self.backbone, state._replace(parameters=backbone), query_x, self.statistics_source)

        return self.logits(state.parameters, embed)

    def embeds_once(self, batch: Episodes) -> bool:
        return self.method != "all" and super().embeds_once(batch)  # no two tasks embed an image alike
