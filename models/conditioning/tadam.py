"""TADAM: prototypical networks whose features are conditioned on the task."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.core.episodes import Support, Task
from datamodules.core.errors import at_least
from datamodules.core.metric import Metric
from models.conditioning.modulated import ModulatedLearner
from models.core.base_learner import Parameters
from models.core.inner_loop import call, class_means
from models.core.learner import Paper
from models.core.training_classes import expect_classes
from models.networks.backbones import Backbone
from models.networks.batch_norm import normalize_by
from models.networks.modulation import activated


class ResidualNetwork(nn.Module):
    """Fully connected layers, every one after the first beside an identity, with SiLU between them."""

    def __init__(self, inputs: int, outputs: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(inputs if k == 0 else outputs, outputs) for k in range(layers))
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=(0.2 / outputs) ** 0.5)  # as the reference code
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        for k, layer in enumerate(self.layers):
            x = layer(F.silu(x)) + F.silu(x) if k else layer(x)
        return x


class TaskEmbeddingNetwork(nn.Module):
    """TEN: from the task's centre, scale and shift of every modulated layer: γ = γ0 h(c̄) + 1, β = β0 g(c̄).

    Args:
        features: size of the centre.
        points: channels of the modulated layers, by name.
        layers: of each of the networks h and g, of which every modulated layer has its own.
    """

    def __init__(self, features: int, points: Mapping[str, int], layers: int) -> None:
        super().__init__()
        self.points = tuple(points)
        self.scales, self.shifts = (
            nn.ModuleList(ResidualNetwork(features, channels, layers) for channels in points.values()) for _ in range(2)
        )
        self.scale_factor = nn.Parameter(torch.zeros(len(points)))  # γ0
        self.shift_factor = nn.Parameter(torch.zeros(len(points)))  # β0

    def forward(self, centre: Tensor) -> Parameters:
        found: Parameters = {}
        for k, name in enumerate(self.points):
            found[f"{name}.scale"] = self.scale_factor[k] * self.scales[k](centre) + 1
            found[f"{name}.shift"] = self.shift_factor[k] * self.shifts[k](centre)
        return found

    def penalty(self) -> Tensor:
        """½ Σ γ0² + ½ Σ β0²."""
        return (self.scale_factor.square().sum() + self.shift_factor.square().sum()) / 2


class TADAM(ModulatedLearner):
    """Classifies by the nearest prototype under a scaled metric, in features that the task itself modulates.

    A first pass without modulation gives the task's centre, the mean of its prototypes. From it the task embedding
    network makes a scale and a shift of every convolution's channels for a second pass, whose prototypes and queries
    are compared: softmax(-α ‖z - c‖²), with a learned α (sections 2.1 and 2.2). In meta-training, less and less often,
    the features also learn to tell all meta-training classes apart, by a head that is of no use later (section 2.3).

    Args:
        backbone: the embedding, with places where it can be modulated.
        classes: of the meta-training split, for the auxiliary task; None leaves it out.
        conditioned: modulate the features; otherwise one pass, and no task embedding network.
        layers: of each of its networks.
        scale: what α starts from.
        penalty: λ of λ/2 (Σ γ0² + Σ β0²), over the factors of all modulated layers.
        co_training_steps: T, meta-updates: step t takes the auxiliary task along with probability
            ``co_training_rate``^⌊20 t / T⌋.
        co_training_rate: by which that probability falls, 20 times.
        **others: see EmbeddingLearner.
    """

    paper = Paper(
        "Oreshkin, Rodríguez López and Lacoste",
        "TADAM: Task dependent adaptive metric for improved few-shot learning",
        "NeurIPS",
        2018,
        "https://arxiv.org/abs/1805.10123",
    )
    own_metrics = {"auxiliary_loss": Metric("lower")}
    reads_facts = True

    def __init__(
        self,
        backbone: Backbone,
        classes: int | None = None,
        conditioned: bool = True,
        layers: int = 3,
        scale: float = 1.0,
        penalty: float = 0.01,
        co_training_steps: int = 30_000,
        co_training_rate: float = 0.9,
        **others: Any,
    ) -> None:
        super().__init__(backbone, **others)
        at_least(1, classes=classes, layers=layers, co_training_steps=co_training_steps)
        at_least(0, co_training_rate=co_training_rate)
        self.conditioned, self.classes, self.penalty = conditioned, classes, penalty
        self.co_training_steps, self.co_training_rate = co_training_steps, co_training_rate
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        if conditioned:
            self.ten = TaskEmbeddingNetwork(backbone.out_features, activated(backbone), layers)
            self.conditioned_on(backbone.out_features)
        if classes is not None:
            self.classifier = nn.Linear(backbone.out_features, classes)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.classes is not None:
            expect_classes(self.trainer.datamodule, self.classes)

    # A task ---------------------------------------------------------------------------------------------------------

    def centre(self, x: Tensor, support: Support) -> Tensor:
        """c̄ (features,), the mean of the prototypes of a pass without modulation."""
        return class_means(self.embed(x)[: len(support.y)], support).mean(0)

    def modulation(self, x: Tensor, support: Support) -> Parameters:
        return self.ten(self.seen(lambda: self.centre(x, support)))

    def summarize(self, z: Tensor, support: Support) -> Tensor:
        """Prototypes (ways, features)."""
        return class_means(z, support)

    def compare(self, summary: Tensor, z: Tensor) -> Tensor:
        return -self.scale * (z[:, None] - summary).square().sum(-1)

    @property
    def embedding_size(self) -> int:
        return self.backbone.out_features

    def embed_task(self, support: Support) -> Tensor:
        """c̄, what the modulation is made of."""
        with normalize_by(self.statistics_source):
            return self.centre(support.x, support)

    # Meta-training --------------------------------------------------------------------------------------------------

    def co_training_probability(self, step: int) -> float:
        """With which a meta-update takes the auxiliary task along."""
        return self.co_training_rate ** (20 * step // self.co_training_steps)

    def co_trains(self, step: int) -> bool:
        """The coin of a meta-update: a function of the seed and its number, the same for all processes."""
        trainer = getattr(self, "_trainer", None)
        seed = 0 if trainer is None else trainer.datamodule.seed
        return random.Random(f"{seed}/{step}").random() < self.co_training_probability(step)

    def auxiliary_loss(self, task: Task) -> Tensor:
        """Of telling the task's images apart among all meta-training classes, by features without modulation."""
        support, ids = task.support, (task.support.facts or {}).get("classes")
        if ids is None or not self.co_trains(self.meta_updates):
            # A gradient of 0: processes that train together wait for one of every parameter.
            return 0.0 * torch.stack([p.sum() for p in self.classifier.parameters()]).sum()
        z = call(self.backbone, {}, torch.cat([support.x, task.query_x]), self.statistics_source)
        return self.loss(self.classifier(z), ids[torch.cat([support.y, task.query_y])])

    def objective(self, task: Task) -> tuple[Any, ...]:
        # The running averages are of the pass that comes last: the one that classifies.
        auxiliary = self.scale.new_zeros(()) if self.classes is None else self.auxiliary_loss(task)
        loss, prediction, left = super().objective(task)
        loss = loss + auxiliary
        if self.conditioned:
            loss = loss + self.penalty * self.ten.penalty()
        return loss, prediction, {**left, "metrics": {"auxiliary_loss": auxiliary.detach()}}
