"""MetaGAN: few-shot classifiers that also learn to tell a task's images from those that a generator makes for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.core.episodes import Support, Task
from models.core.base_learner import BaseLearner, Parameters
from models.core.gradient_learner import GradientLearner
from models.core.inner_loop import Adapted, adapted, call, sgd_path, split_parameters
from models.core.learner import Paper
from models.generative.adversary import GAN, OWN_METRICS, Adversary
from models.metric.relation_net import RelationNet
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNormMode

PAPER = Paper(
    "Zhang, Che, Ghahramani, Bengio and Song",
    "MetaGAN: An Adversarial Approach to Few-Shot Learning",
    "NeurIPS",
    2018,
    "https://papers.nips.cc/paper/2018/hash/4e4e53aa080247bc31d0eb4e7aeb07a0-Abstract.html",
)


class Discriminator(BaseLearner):
    """A base learner with a second linear head, of fakes: logits (n, outputs + 1), fakes last."""

    def __init__(self, backbone: Backbone, outputs: int) -> None:
        super().__init__(backbone, outputs)
        self.fake = nn.Linear(backbone.out_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.backbone(x)
        return torch.cat([self.head(z), self.fake(z)], -1)


class MetaGAN(GradientLearner):
    """MAML whose classifier is the discriminator of a game: of N + 1 classes, the last one are generated images.

    The generator makes images from noise and a code of the task, which a dataset encoder draws from the support set.
    The inner loop descends the discriminator's loss on the support set and fakes, in evaluation too; the
    meta-objective is that loss, after adaptation, on the queries and further fakes. The generator's loss is by the
    adapted discriminator, which counts as a constant, as fakes do in the inner loop: neither player's gradient passes
    through what the other one made of it. Predictions are of the N classes, given that the image is real.

    Unlabelled images of the task, where the data gives some, are real ones in both loops, and seen by the encoder.

    Args:
        backbone: the base learner without its heads.
        outputs: rows of the head of classes: ways.
        inner_rate: α, the learning rate of the inner loop.
        inner_steps: gradient steps in meta-training.
        eval_inner_steps: gradient steps in evaluation; None takes as many as in training.
        first_order: leave out second derivatives.
        gan: settings of the generator and of the game.
        batch_norm, **others: see MetaLearner.
    """

    paper = PAPER
    own_metrics = OWN_METRICS
    tasks = frozenset({"classification"})

    def __init__(
        self,
        backbone: Backbone,
        outputs: int = 5,
        inner_rate: float = 0.4,
        inner_steps: int = 1,
        eval_inner_steps: int | None = None,
        first_order: bool = False,
        gan: GAN = GAN(),
        batch_norm: BatchNormMode = "transductive",
        **others: Any,
    ) -> None:
        super().__init__(outputs, inner_steps, eval_inner_steps, batch_norm, **others)
        self.learner = Discriminator(backbone, outputs)
        self.adversary = Adversary(backbone.input_shape, gan)
        self.inner_rate = inner_rate
        self.first_order = first_order

    def adaptation(self, support: Support) -> Iterator[Adapted]:
        start, fixed = split_parameters(self.learner, adapt_normalization=False)
        with torch.no_grad():
            fakes, _ = self.adversary(support, len(support.x))

        def support_loss(parameters: Parameters, step: int) -> Tensor:
            def logits(x: Tensor) -> Tensor:
                return call(self.learner, parameters | fixed, x, self.statistics_source)

            known = Task(support, support.x, support.y)
            terms, _ = self.adversary.discriminator_terms(logits, known, fakes, support.shares())
            return self.adversary.discriminator_loss(terms)

        path = sgd_path(
            support_loss, self.learner.resize_head(start, support.ways), self.inner_rate, self.steps, self.first_order
        )
        for step, parameters in enumerate(path):
            yield adapted(self.learner, parameters | fixed, support, self.batch_norm, step)

    def logits(self, state: Adapted, x: Tensor) -> Tensor:
        """Logits (n, ways + 1) of any images, fakes last."""
        return super().predict(state, x)

    def predict(self, state: Adapted, query_x: Tensor) -> Tensor:
        return self.logits(state, query_x)[:, :-1]

    def generated_images(self, support: Support, count: int) -> Tensor:
        return self.adversary(support, count)[0]

    def objective(self, task: Task) -> tuple[Any, ...]:
        state = self.adapt(task.support)
        return self.adversary.objective(lambda x: self.logits(state, x), task)


class MetaGANRelation(RelationNet):
    """Relation networks as the discriminator: scores of the classes are logits beside that of fakes, which is 0.

    p(y = k | x) = exp(r_k) / (1 + Σ exp(r)), so the loss on labels is the cross-entropy of the scores. Images pass the
    network along with the support set, as queries do. A task is learned without fakes: evaluation is as in the base
    learner.

    Args:
        backbone: the embedding, whose features are maps: see RelationNet.
        filters, hidden, padding: of the relation module, see there.
        gan: settings of the generator and of the game.
        **others: see EmbeddingLearner.
    """

    paper = PAPER
    own_metrics = OWN_METRICS

    def __init__(
        self,
        backbone: Backbone,
        filters: int = 64,
        hidden: int = 8,
        padding: int = 1,
        gan: GAN = GAN(),
        **others: Any,
    ) -> None:
        super().__init__(backbone, "cross_entropy", filters, hidden, padding, **others)
        self.adversary = Adversary(backbone.input_shape, gan)

    def generated_images(self, support: Support, count: int) -> Tensor:
        return self.adversary(support, count)[0]

    def objective(self, task: Task) -> tuple[Any, ...]:
        support = task.support
        state = self.adapt(support) if self.batch_norm == "support" else None

        def logits(x: Tensor) -> Tensor:
            if state is not None:
                scores = self.predict(state, x)
            else:
                scores = self.together(support, torch.cat([support.x, x]), len(support.y))
            return F.pad(scores, (0, 1))

        return self.adversary.objective(logits, task)
