"""Task2Vec: a task is what of a network's weights matters to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vjp, vmap

from datamodules.core.episodes import Support
from datamodules.core.errors import ConfigError, at_least
from models.core.base_learner import Parameters
from models.core.embedding_learner import EmbeddingLearner
from models.core.inner_loop import call, inner
from models.core.learner import Paper
from models.networks.backbones import Backbone
from models.networks.batch_norm import Source, normalize_by
from models.task_embedding.distances import DISTANCES, Distance, pairwise

AT_ONCE = 64  # inputs whose gradients are held together
Head = tuple[Tensor, Tensor]
"""Weight (outputs, features) and bias (outputs,)."""


def diagonal_fisher(
    outputs: Callable[[Parameters, Tensor], Tensor],
    parameters: Parameters,
    x: Tensor,
    classes: bool,
    luck: Tensor | None = None,
) -> Parameters:
    """E over inputs and over y of the model's own distribution of (∂ log p(y | x) / ∂θ)², element by element.

    The square is of each input's own gradient: that of a batch's mean gradient would be of F / batch, and only because
    sampled labels have scores of mean zero.

    Args:
        outputs: of parameters and inputs (N, *input): logits, or means of Gaussians of variance 1, (N, outputs).
        parameters: θ.
        x: inputs (N, *input).
        classes: whether outputs are logits.
        luck: uniform numbers (N, draws) that labels are sampled by; None takes the exact mean over labels.
    """

    def of_one(one: Tensor, *luck: Tensor) -> Parameters:
        y, pull, *_ = vjp(lambda p: outputs(p, one[None])[0], parameters)
        identity = torch.eye(len(y), dtype=y.dtype, device=y.device)
        scores, shares = identity, torch.ones_like(y)  # of a Gaussian: E (y - f)(y - f)ᵀ is the identity
        if classes:
            p = y.softmax(-1)
            scores, shares = identity - p, p
            if luck:
                label = (luck[0][:, None] > p.cumsum(-1)[:-1]).sum(-1)
                scores = (label[:, None] == torch.arange(len(y), device=y.device)).to(y.dtype) - p
                shares = torch.full_like(scores[:, 0], 1 / len(scores))
        total = {n: torch.zeros_like(p) for n, p in parameters.items()}
        for score, share in zip(scores.unbind(0), shares.unbind(0), strict=True):
            gradient, *_ = pull(score)
            total = {n: t + share * gradient[n].square() for n, t in total.items()}
        return total

    given = () if luck is None else (luck,)
    with inner(parameters):
        of_each = vmap(of_one, chunk_size=AT_ONCE)(x, *given)
    return {n: f.mean(0) for n, f in of_each.items()}


class Task2Vec(EmbeddingLearner):
    """Embeds a task by the diagonal Fisher information of a probe network's filters after a head is fitted to it.

    The probe is one for all tasks and is not adapted: only the head is fitted, on the support set's features. Labels
    are of the model's own distribution, squares of each example's own gradient; weights alone count (convolutions' and
    batch norm's), averaged over each output filter, and the head is left out. Batch norm is by running averages.

    As a learner it predicts by the head. Then there is one number to train, how strongly the head is held to 0, by the
    likelihood of the queries of meta-training tasks; and a backbone that is not frozen is trained through the head's
    fit, which is not of the paper.

    Args:
        backbone: the probe, as a rule ``Pretrained``.
        head: "convex", the minimum of the mean loss and ridge / 2 · (mean squared length of features) · ‖W‖², which no
            order, seed or scale of features has a part in; "adam", as published: so many ``passes`` of ``draws``
            examples, classes balanced, in batches of ``batch``; from 0, where the paper has random weights, and with
            the same draws for all tasks.
        ridge: to start from.
        iterations: of the convex fit; accelerated, with the whole Hessian's bound for a metric.
        passes, draws, batch, rate, weight_decay: of Adam, by default as published.
        labels: "exact", the mean over all labels of the model's distribution; "sampled", by so many ``samples`` of each
            example, the same uniform numbers for all tasks.
        samples: see there; 1 as published.
        distance: between tasks, see ``models.task_embedding.distances``.
        **others: see MetaLearner.
    """

    paper = Paper(
        "Achille, Lam, Tewari, Ravichandran, Maji, Fowlkes, Soatto and Perona",
        "Task2Vec: Task Embedding for Meta-Learning",
        "ICCV",
        2019,
        "https://arxiv.org/abs/1902.03545",
    )
    tasks = frozenset({"classification", "regression"})

    def __init__(
        self,
        backbone: Backbone,
        head: Literal["convex", "adam"] = "convex",
        ridge: float = 0.01,
        iterations: int = 200,
        passes: int = 10,
        draws: int = 10_000,
        batch: int = 64,
        rate: float = 4e-4,
        weight_decay: float = 1e-4,
        labels: Literal["exact", "sampled"] = "exact",
        samples: int = 1,
        distance: Distance = "cosine",
        **others: Any,
    ) -> None:
        super().__init__(backbone, **others)
        at_least(1, iterations=iterations, batch=batch, draws=draws, samples=samples)
        at_least(0, passes=passes)
        if not ridge > 0:
            raise ValueError(f"ridge is {ridge} but must be above 0")
        self.log_ridge = nn.Parameter(torch.tensor(float(ridge)).log())
        self.head, self.iterations, self.labels, self.samples = head, iterations, labels, samples
        self.batch, self.rate, self.weight_decay = batch, rate, weight_decay
        self.head_steps = passes * (draws // batch)
        self.distance: Distance = distance

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.head == "adam":
            raise ConfigError(
                "head is adam, which leaves nothing to train: train with head convex, and evaluate that checkpoint "
                "with --model.init_args.head adam"
            )

    # The head ---------------------------------------------------------------------------------------------------------

    def summarize(self, z: Tensor, support: Support) -> Head:
        x = torch.cat([z, torch.ones_like(z[:, :1])], 1)
        target = support.members().to(z.dtype) if support.ways else support.y.to(z.dtype)
        shares = support.shares()
        shares = torch.ones_like(z[:, 0]) if shares is None else shares.to(z.dtype)
        w = (self.convex if self.head == "convex" else self.adam)(x, target, shares, bool(support.ways))
        return w[:, :-1], w[:, -1]

    def compare(self, summary: Head, z: Tensor) -> Tensor:
        return F.linear(z, *summary)

    def convex(self, x: Tensor, target: Tensor, shares: Tensor, classes: bool) -> Tensor:
        """The minimum (outputs, features + 1) for features with a 1 (S, features + 1) and targets (S, outputs)."""
        size = x[:, :-1].square().sum(1).mean()
        ridge = self.log_ridge.exp() * size
        penalty = torch.cat([ridge.expand(x.shape[1] - 1), torch.zeros_like(ridge[None])])
        moment = x.T @ (shares[:, None] * x) / len(x)
        weighted = shares[:, None] * x / len(x)
        if not classes:
            return torch.linalg.solve(moment + penalty.diag(), weighted.T @ target).T
        # Böhning's bound of the Hessian (1992) as the metric; the condition number in it is 1 + 1 / ridge at most.
        metric = torch.linalg.inv(moment / 2 + penalty.diag())
        root = (1 + 1 / self.log_ridge.exp()).sqrt()
        momentum = (root - 1) / (root + 1)
        w = ahead = x.new_zeros(target.shape[1], x.shape[1])
        for _ in range(self.iterations):
            slope = ((x @ ahead.T).softmax(-1) - target).T @ weighted + ahead * penalty
            w, before = ahead - slope @ metric, w
            ahead = w + momentum * (w - before)
        return w

    def adam(self, x: Tensor, target: Tensor, shares: Tensor, classes: bool) -> Tensor:
        """The same by Adam (Kingma and Ba, 2015), weight decay added to the gradient."""
        w = first = second = x.new_zeros(target.shape[1], x.shape[1])
        generator = torch.Generator(x.device).manual_seed(0)
        likely = (shares / len(x)).cumsum(0)[:-1]
        for step in range(1, self.head_steps + 1):
            luck = torch.rand(self.batch, generator=generator, device=x.device, dtype=x.dtype)
            rows = (luck[:, None] > likely).sum(1)
            outputs = x[rows] @ w.T
            away = (outputs.softmax(-1) if classes else outputs) - target[rows]
            slope = away.T @ x[rows] / self.batch + self.weight_decay * w
            first = 0.9 * first + 0.1 * slope
            second = 0.999 * second + 0.001 * slope.square()
            w = w - self.rate * first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        return w

    # The embedding ----------------------------------------------------------------------------------------------------

    @property
    def source(self) -> Source:
        """Of batch norm's statistics in the probe: no example's Fisher information depends on another example."""
        return "none" if self.batch_norm == "none" else "running"

    def filters(self) -> Parameters:
        """The probe's weights, by name: rows are filters."""
        return {n: p.detach() for n, p in self.backbone.named_parameters() if n.split(".")[-1] == "weight"}

    @property
    def embedding_size(self) -> int:
        return sum(len(p) for p in self.filters().values())

    def information(self, support: Support) -> Parameters:
        """The diagonal Fisher information of the probe's weights, by name, under the support set's head."""
        with inner(self.filters()):
            with normalize_by(self.source):
                head = self.summarize(self.embed(support.x), support)

            def outputs(parameters: Parameters, x: Tensor) -> Tensor:
                return self.compare(head, call(self.backbone, parameters, x, self.source))

            luck = None
            if self.labels == "sampled":
                generator = torch.Generator(support.x.device).manual_seed(0)
                size, where = (len(support.y), self.samples), support.x.device
                luck = torch.rand(size, generator=generator, device=where, dtype=support.x.dtype)
            return diagonal_fisher(outputs, self.filters(), support.x, bool(support.ways), luck)

    def embed_task(self, support: Support) -> Tensor:
        return torch.cat([f.flatten(1).mean(1) if f.dim() > 1 else f for f in self.information(support).values()])

    def embedding_distances(self, a: Tensor, b: Tensor) -> Tensor:
        return pairwise(DISTANCES[self.distance], a, b)
