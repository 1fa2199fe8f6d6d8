"""Task embeddings that are trained along with the learner that they condition, and the controls among them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from datamodules.core.episodes import Support
from datamodules.core.errors import ConfigError, at_least
from models.core.base_learner import BaseLearner
from models.core.conditioning import base_network, initialisation
from models.core.inner_loop import call, class_means, inner_gradient, split_parameters
from models.core.learner import MetaLearner
from models.core.task_embedding import TaskEmbedding
from models.networks.backbones import Backbone
from models.networks.recurrent import LSTMCell


class SetEncoder(TaskEmbedding):
    """A support set as a vector, whatever the order of its examples and of its classes (Zaheer et al., NeurIPS 2017).

    Regression: the mean over examples of what the backbone sees of x and y together. Classification: the mean over
    classes of a layer of the class means of features. A linear layer follows. Batch norm in it is by the support set.

    Args:
        backbone: of x and y together for regression, whose ``in_features`` count both; otherwise of x.
        size: d of the embedding.
    """

    def __init__(self, backbone: Backbone, size: int = 32) -> None:
        super().__init__()
        at_least(1, size=size)
        self.backbone, self.embedding_size = backbone, size
        self.of_class = nn.Sequential(nn.Linear(backbone.out_features, size), nn.ReLU())
        self.last = nn.Linear(size, size)

    def embed_task(self, support: Support) -> Tensor:
        if support.ways:
            examples = class_means(self.backbone(support.x), support)
        else:
            examples = self.backbone(torch.cat([support.x, support.y], -1))
        return self.last(self.of_class(examples).mean(0))


class RecurrentEncoder(TaskEmbedding):
    """MMAML's encoder of functions: a bidirectional LSTM over the pairs (x, y), its last state and its first.

    It depends on the order of the examples, as published; ``ordered`` reads them by increasing x.

    Args:
        inputs: numbers of x and y together.
        hidden: units of each direction; the embedding is twice as long.
        layers: stacked.
        ordered: by the sum of x.
    """

    def __init__(self, inputs: int = 2, hidden: int = 40, layers: int = 2, ordered: bool = False) -> None:
        super().__init__()
        at_least(1, inputs=inputs, hidden=hidden, layers=layers)
        self.embedding_size, self.ordered = 2 * hidden, ordered
        sizes = [inputs] + [2 * hidden] * (layers - 1)
        self.onward = nn.ModuleList(LSTMCell(size, hidden) for size in sizes)
        self.back = nn.ModuleList(LSTMCell(size, hidden) for size in sizes)

    def embed_task(self, support: Support) -> Tensor:
        if support.ways:
            raise ConfigError("RecurrentEncoder reads pairs of numbers x and y: for images choose models.SetEncoder")
        x = torch.cat([support.x.flatten(1), support.y], -1)
        if self.ordered:
            x = x[support.x.flatten(1).sum(1).argsort()]
        for onward, back in cast(Iterable[tuple[LSTMCell, LSTMCell]], zip(self.onward, self.back, strict=True)):
            x = torch.cat([onward.run(x), back.run(x.flip(0)).flip(0)], -1)
        half = self.embedding_size // 2
        return torch.cat([x[-1, :half], x[0, half:]])


class _OfLearner(TaskEmbedding):
    """An embedding by the very learner that it conditions, as it is without conditioning."""

    def attach(self, learner: nn.Module) -> None:
        assert isinstance(learner, MetaLearner)
        self._seen = [learner]  # in a list: its parameters are not this module's

    @property
    def learner(self) -> MetaLearner:
        return self._seen[0]


class GradientMeans(_OfLearner):
    """The mean entry of the support loss's gradient by each tensor of the initialisation, (tensors,).

    L2F's embedding (Baik, Hong and Lee, CVPR 2020): signed means at θ_0, constants for the meta-gradient.

    Args:
        differentiable: let the meta-gradient through, as the released code of ALFA does.
    """

    def __init__(self, differentiable: bool = False) -> None:
        super().__init__()
        self.differentiable = differentiable

    def attach(self, learner: nn.Module) -> None:
        super().attach(learner)
        _, network = base_network(learner)
        if not isinstance(network, BaseLearner):
            raise ConfigError(
                f"GradientMeans is of a support loss, and {type(learner).__name__} has none: choose models.MAML or "
                "another learner of gradient steps, or models.PrototypeMean"
            )
        self.embedding_size = len(initialisation(learner))

    def embed_task(self, support: Support) -> Tensor:
        learner = self.learner
        _, network = base_network(learner)
        assert isinstance(network, BaseLearner)
        start, fixed = split_parameters(network, adapt_normalization=False)

        def support_loss(parameters: dict[str, Tensor]) -> Tensor:
            return learner.support_loss(
                call(network, parameters | fixed, support.x, learner.statistics_source), support
            )

        gradient = inner_gradient(support_loss, network.resize_head(start, support.ways))
        means = torch.stack([g.mean() for g in gradient.values()])
        return means if self.differentiable else means.detach()


class PrototypeMean(_OfLearner):
    """The mean of the prototypes by the learner's own backbone (TADAM's; Oreshkin et al., NeurIPS 2018)."""

    def attach(self, learner: nn.Module) -> None:
        super().attach(learner)
        self.embedding_size = self._backbone().out_features

    def _backbone(self) -> Backbone:
        _, network = base_network(self.learner)
        backbone = network.backbone if isinstance(network, BaseLearner) else network
        assert isinstance(backbone, Backbone)
        return backbone

    def embed_task(self, support: Support) -> Tensor:
        features = call(self._backbone(), {}, support.x, self.learner.statistics_source)
        return (class_means(features, support) if support.ways else features).mean(0)


class ConstantEmbedding(TaskEmbedding):
    """One learned vector for all tasks: the control that has all of the conditioning's parameters and no condition.

    Args:
        size: d.
    """

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        at_least(1, size=size)
        self.embedding_size = size
        self.vector = nn.Parameter(torch.randn(size))

    def embed_task(self, support: Support) -> Tensor:
        return self.vector


class TaskLabel(TaskEmbedding):
    """Which group the task is of, 1 at its place and 0 elsewhere: the control that is told what others have to find.

    Args:
        groups: number of them: families of functions, domains of images.
    """

    reads_facts = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        at_least(2, groups=groups)
        self.embedding_size = groups

    def embed_task(self, support: Support) -> Tensor:
        group = (support.facts or {}).get("group")
        if group is None:
            raise ConfigError("TaskLabel needs tasks whose groups are known, as datamodules.FiveFamily has them")
        label = group == torch.arange(self.embedding_size, device=support.x.device)
        return label.to(support.x.dtype)
