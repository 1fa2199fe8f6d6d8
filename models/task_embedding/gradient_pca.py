"""A task as its gradient at a base network, seen along the directions in which training tasks' gradients differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Episodes, Support
from datamodules.core.errors import at_least
from datamodules.core.streams import TaskStreams
from models.core.base_learner import BaseLearner, Parameters
from models.core.gradient_learner import GradientLearner
from models.core.inner_loop import (
    Adapted,
    adapted,
    call,
    class_means,
    inner,
    inner_gradient,
    last,
    sgd_path,
    split_parameters,
)
from models.core.learner import Paper
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNormMode
from models.task_embedding.projection import BalancedSketch

HEAD = "head."


class GradientPCA(GradientLearner):
    """Meta-trains a base network, keeps what training tasks did to it along the way, and embeds a task by that.

    What a task does to the network is the gradient of its support loss at the base network's parameters, or the change
    of them by the inner loop; of the backbone, since rows of the head belong to classes that no two tasks share. Those
    of training tasks are kept as they are met, a uniform sample of all of them or the latest; their principal
    components make the embedding. With ``summary`` it is the distances to clusters of tasks in these components, or
    the probabilities of having come from each of them.

    The network is meta-trained as MAML's initialisation, of first order unless told otherwise: labels of few-shot tasks
    are names, so that joint training on support sets alone has nothing to learn. For classes the head is a task's own,
    from the means of its classes' features as in Proto-MAML (Triantafillou et al., ICLR 2020), by which names of labels
    have no part in the embedding.

    Args:
        backbone: the base learner without its head.
        outputs: rows of the head, with ``head`` "learned": ways, or the dimension of y.
        components: d of the principal components.
        of: "gradient", at the base network's parameters; "change", of the parameters by ``inner_steps`` steps.
        summary: "pca", the components themselves; "kmeans", the distances to ``clusters`` centres in them; "mixture",
            the responsibilities of as many Gaussians, of diagonal covariance.
        clusters: see there.
        records: training tasks that are kept.
        keep: "all", a uniform sample of all tasks of the training; "latest", the last ones.
        projected: size that gradients are projected to at random where they are larger, which keeps their inner
            products but for a standard error of projected^-½ of their lengths' product; 0 keeps them as they are.
        unit_length: scale each gradient to length 1: which way and not how far, which early and late tasks differ in.
        temperature: that the logits of prototypes are divided by in the embedding, not in predictions; see above.
        head: "prototypes", see above; "learned", MAML's own, for regression.
        inner_rate: α, the learning rate of the inner loop.
        inner_steps: gradient steps in meta-training.
        eval_inner_steps: gradient steps in evaluation; None takes as many as in training.
        first_order: leave out second derivatives of the inner loop.
        adapt_normalization: adapt batch norm's scale and shift too.
        batch_norm, **others: see MetaLearner.
    """

    paper = Paper(
        "Sattler, Müller and Samek",
        "Clustered Federated Learning: Model-Agnostic Distributed Multitask Optimization under Privacy Constraints",
        "IEEE Transactions on Neural Networks and Learning Systems",
        2021,
        "https://arxiv.org/abs/1910.01991",
    )
    tasks = frozenset({"classification", "regression"})
    kept: Tensor
    kept_tasks: Tensor
    fitted: Tensor
    mean: Tensor
    axes: Tensor
    explained: Tensor
    centres: Tensor
    precisions: Tensor
    log_weights: Tensor

    def __init__(
        self,
        backbone: Backbone,
        outputs: int = 5,
        components: int = 16,
        of: Literal["gradient", "change"] = "gradient",
        summary: Literal["pca", "kmeans", "mixture"] = "pca",
        clusters: int = 8,
        records: int = 2000,
        keep: Literal["all", "latest"] = "all",
        projected: int = 2048,
        unit_length: bool = True,
        temperature: float = 100.0,
        head: Literal["prototypes", "learned"] = "prototypes",
        inner_rate: float = 0.1,
        inner_steps: int = 1,
        eval_inner_steps: int | None = None,
        first_order: bool = True,
        adapt_normalization: bool = False,
        batch_norm: BatchNormMode = "transductive",
        **others: Any,
    ) -> None:
        super().__init__(outputs, inner_steps, eval_inner_steps, batch_norm, **others)
        at_least(1, components=components, clusters=clusters)
        at_least(2, records=records)
        at_least(0, projected=projected)
        if of == "change":
            at_least(1, inner_steps=inner_steps)
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature} but must be above 0")
        self.temperature = temperature
        self.learner = BaseLearner(backbone, outputs)
        self.prototypes = head == "prototypes"
        if self.prototypes:
            self.learner.head.requires_grad_(False)
        self.of, self.summary, self.keep, self.unit_length = of, summary, keep, unit_length
        self.inner_rate, self.first_order, self.adapt_normalization = inner_rate, first_order, adapt_normalization
        start, _ = split_parameters(self.learner, adapt_normalization)
        self.names = [name for name in start if not self.learner.in_head(name)]
        size = sum(start[name].numel() for name in self.names)
        self.sketch = BalancedSketch(size, projected) if 0 < projected < size else nn.Identity()
        size = min(size, projected or size)
        self.components, self.clusters = min(components, size), clusters
        # What was kept, a row for each task, and its number in meta-training, -1 where there is none yet.
        self.register_buffer("kept", torch.zeros(records, size))
        self.register_buffer("kept_tasks", torch.full((records,), -1))
        # What was fitted to that, and the last task that it knows of.
        self.register_buffer("fitted", torch.tensor(-1))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("axes", torch.zeros(self.components, size))
        self.register_buffer("explained", torch.zeros(self.components))
        self.register_buffer("centres", torch.zeros(clusters, self.components))
        self.register_buffer("precisions", torch.ones(clusters, self.components))
        self.register_buffer("log_weights", torch.zeros(clusters))

    def check(self, data: EpisodicDataModule) -> str | None:
        if self.prototypes and data.kind == "regression":
            return "head is prototypes, of which values have none: --model.init_args.head learned"
        return super().check(data)

    # The learner ------------------------------------------------------------------------------------------------------

    def prototype_head(self, support: Support) -> Parameters:
        """-‖z - c‖² of the classes' means c as a linear head: what classes share is left out.

        A mean of n examples is by variance / n nearer to a query than the class's own mean, which is taken off, so that
        unequal shots are no prior; with as many of each class it is the same for all.
        """
        z = call(self.learner.backbone, {}, support.x, self.statistics_source).to(self.learner.head.weight)
        means = class_means(z, support)
        members = support.members().to(z.dtype)
        spread = (z - members @ means).square().sum() / max(1, len(z) - support.ways)
        return {HEAD + "weight": 2 * means, HEAD + "bias": spread / members.sum(0) - means.square().sum(1)}

    def start(self, support: Support, temperature: float = 1.0) -> Parameters:
        """Parameters that adapt, before the first step; a head of prototypes is among them."""
        start, _ = split_parameters(self.learner, self.adapt_normalization)
        if not self.prototypes:
            return self.learner.resize_head(start, support.ways)
        return start | {name: value / temperature for name, value in self.prototype_head(support).items()}

    def loss_of(self, support: Support) -> Callable[[Parameters, int], Tensor]:
        """The support loss of the parameters that adapt."""
        _, fixed = split_parameters(self.learner, self.adapt_normalization)

        def support_loss(parameters: Parameters, step: int) -> Tensor:
            return self.support_loss(call(self.learner, parameters | fixed, support.x, self.statistics_source), support)

        return support_loss

    def adaptation(self, support: Support) -> Iterator[Adapted]:
        _, fixed = split_parameters(self.learner, self.adapt_normalization)
        start, loss = self.start(support), self.loss_of(support)
        for step, parameters in enumerate(sgd_path(loss, start, self.inner_rate, self.steps, self.first_order)):
            yield adapted(self.learner, parameters | fixed, support, self.batch_norm, step)

    # The embedding ----------------------------------------------------------------------------------------------------

    @property
    def embedding_size(self) -> int:
        return self.components if self.summary == "pca" else self.clusters

    def raw(self, support: Support) -> Parameters:
        """What the task does to the backbone, by the names of its parameters: their gradient or change."""
        with inner(dict(self.learner.named_parameters())):
            start, loss = self.start(support, self.temperature), self.loss_of(support)
            if self.of == "gradient":
                return inner_gradient(loss, start, 0)
            end = last(sgd_path(loss, start, self.inner_rate, self.inner_steps))
            return {name: end[name] - start[name] for name in self.names}

    def vector(self, support: Support) -> Tensor:
        """The same as one vector (P,), projected where that was asked for."""
        raw = self.raw(support)
        vector = self.sketch(torch.cat([raw[name].flatten() for name in self.names]))
        return vector / vector.norm().clamp(min=1e-12) if self.unit_length else vector

    def embed_task(self, support: Support) -> Tensor:
        vector = self.vector(support)
        score = self.axes @ (vector - self.mean)
        if self.summary == "pca":
            return score
        away = score - self.centres
        if self.summary == "kmeans":
            return away.square().sum(1).sqrt()
        fit = (self.precisions.log() - self.precisions * away.square()).sum(1) / 2
        return (self.log_weights + fit).softmax(0)

    # What training tasks leave ----------------------------------------------------------------------------------------

    def places(self, tasks: np.ndarray, seed: int) -> dict[int, int]:
        """Where the tasks of one meta-batch are kept, place to task; a function of their numbers and the seed alone.

        "all" is reservoir sampling (Vitter, 1985): task t takes a place of those 0 … t at random, if there is such.
        """
        slots = tasks % len(self.kept_tasks)
        if self.keep == "all":
            drawn = TaskStreams(seed, "train", tasks, 1).integers(tasks + 1)
            slots = np.where(tasks < len(self.kept_tasks), tasks, drawn)
        return {int(s): int(t) for s, t in zip(slots, tasks, strict=True) if s < len(self.kept_tasks)}

    @torch.no_grad()
    def record(self, batch: Episodes) -> None:
        """Keep what the tasks of a meta-batch do to the network as it is now; those that are to be kept."""
        first = int(batch.index[0]) // batch.meta_batch * batch.meta_batch
        tasks = np.arange(first, first + batch.meta_batch)
        places = self.places(tasks, self.trainer.datamodule.seed)
        if not places:
            return
        wanted = torch.tensor(list(places.values()), device=batch.index.device)
        found = batch.index[:, None] == wanted
        rows = self.kept.new_zeros(len(wanted), self.kept.shape[1])
        own = found.any(1).nonzero()[:, 0]
        if len(own):
            vectors = self.map(lambda task: self.vector(task.support), batch.apply(lambda t: t[own]))
            rows[found[own].int().argmax(1)] = vectors.to(rows)
        if self.trainer.world_size > 1:  # each process has its own tasks
            rows = self.trainer.strategy.reduce(rows, reduce_op="sum")
        slots = torch.tensor(list(places), device=rows.device)
        self.kept[slots], self.kept_tasks[slots] = rows, wanted

    def training_step(self, batch: Episodes, batch_idx: int) -> Tensor:
        self.record(batch)
        return super().training_step(batch, batch_idx)

    @torch.no_grad()
    def fit_components(self) -> None:
        """Fit the components, and clusters in them, to what is kept, unless nothing was kept since they were fitted."""
        newest = self.kept_tasks.max()
        if newest == self.fitted:
            return
        from sklearn.decomposition import PCA  # where they are fitted alone: it takes a second to import

        rows = self.kept[self.kept_tasks >= 0].double().cpu().numpy()
        count = min(self.components, len(rows) - 1)
        if count < 1:
            return
        pca = PCA(count, random_state=0).fit(rows)
        # Beyond the rank of what is kept directions are none of its own.
        own = pca.explained_variance_ > 1e-10 * max(pca.explained_variance_[0], 1e-30)
        self.mean.copy_(torch.from_numpy(pca.mean_))
        self.axes.zero_()[:count] = torch.from_numpy(pca.components_ * own[:, None])
        self.explained.zero_()[:count] = torch.from_numpy(pca.explained_variance_ratio_)
        scores = (rows - pca.mean_) @ self.axes.double().cpu().numpy().T
        if self.summary != "pca" and len(scores) >= self.clusters:
            self.fit_clusters(scores)
        self.fitted.copy_(newest)

    def fit_clusters(self, scores: np.ndarray) -> None:
        """Fit clusters to components (N, d)."""
        from sklearn.cluster import KMeans
        from sklearn.mixture import GaussianMixture

        several: Any = {"random_state": 0, "n_init": 10}
        if self.summary == "kmeans":
            self.centres.copy_(torch.from_numpy(KMeans(self.clusters, **several).fit(scores).cluster_centers_))
            return
        floor = 1e-6 * scores.var(0).max()  # of variances: scikit-learn's own is an absolute one
        mixture = GaussianMixture(self.clusters, covariance_type="diag", reg_covar=floor, **several).fit(scores)
        for own, theirs in (
            (self.centres, mixture.means_),
            (self.precisions, mixture.precisions_),
            (self.log_weights, np.log(np.asarray(mixture.weights_))),
        ):
            own.copy_(torch.from_numpy(theirs))

    def on_validation_epoch_start(self) -> None:
        self.fit_components()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.fit_components()  # in place: the checkpoint's state has the same tensors
