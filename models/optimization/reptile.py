"""Reptile: move towards what each task's training ends at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.core.episodes import Support, Task
from datamodules.core.errors import at_least
from models.core.base_learner import BaseLearner, Parameters, entry
from models.core.inner_loop import (
    Adapted,
    adapted,
    call,
    inner_gradient,
    last,
    mini_batches,
    query,
    split_parameters,
    with_gradient,
)
from models.core.learner import MetaLearner, Paper
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNormMode


class Reptile(MetaLearner):
    """Trains on each task by mini-batches and moves the initialisation towards the result: θ + ε mean(φ - θ) (alg. 2).

    Training tasks have more shots than test tasks (``data.train_shots``). The outer step ε is the meta-optimizer's
    rate, SGD's from 1 falling linearly to 0 in the paper. The published results without transduction are those of
    ``batch_norm`` "per_query", those with it of "transductive".

    Args:
        backbone: the base learner without its head.
        outputs: rows of the head: ways, or the dimension of y.
        inner_rate: learning rate of the inner optimizer.
        inner_steps: mini-batches of a training task.
        inner_batch: examples of a mini-batch; drawn without replacement, over and over.
        eval_inner_steps: mini-batches in evaluation.
        eval_inner_batch: examples of each; None takes as many as in training.
        inner_optimizer: "adam", without momentum (β1 = 0), as published, or "sgd".
        beta2: decay of Adam's second moments; they are carried from task to task in training, and evaluation starts
            from them but leaves them as they are.
        batch_norm, **others: see MetaLearner.
    """

    paper = Paper(
        "Nichol, Achiam and Schulman",
        "On First-Order Meta-Learning Algorithms",
        "arXiv",
        2018,
        "https://arxiv.org/abs/1803.02999",
    )
    tasks = frozenset({"classification", "regression"})

    def __init__(
        self,
        backbone: Backbone,
        outputs: int = 5,
        inner_rate: float = 1e-3,
        inner_steps: int = 5,
        inner_batch: int = 10,
        eval_inner_steps: int = 50,
        eval_inner_batch: int | None = None,
        inner_optimizer: Literal["adam", "sgd"] = "adam",
        beta2: float = 0.999,
        batch_norm: BatchNormMode = "transductive",
        **others: Any,
    ) -> None:
        super().__init__(batch_norm=batch_norm, **others)
        at_least(1, outputs=outputs, inner_batch=inner_batch, eval_inner_batch=eval_inner_batch)
        at_least(0, inner_steps=inner_steps, eval_inner_steps=eval_inner_steps)
        self.learner = BaseLearner(backbone, outputs)
        self.outputs = outputs
        self.inner_rate = inner_rate
        self.inner_steps, self.eval_inner_steps = inner_steps, eval_inner_steps
        self.inner_batch, self.eval_inner_batch = inner_batch, eval_inner_batch or inner_batch
        self.inner_optimizer: Literal["adam", "sgd"] = inner_optimizer
        self.beta2 = beta2
        self.register_buffer("updates", torch.zeros((), dtype=torch.float64))  # of the second moments
        self.moments = torch.nn.Module()
        for name, p in self.start().items():
            self.moments.register_buffer(entry(name), torch.zeros_like(p))

    def start(self) -> Parameters:
        """θ: all parameters that train, batch norm's too."""
        return split_parameters(self.learner, adapt_normalization=True)[0]

    def second_moments(self, ways: int) -> Parameters:
        """Adam's running means of squared gradients, as the tasks so far left them."""
        return self.learner.resize_head({n: self.moments.get_buffer(entry(n)) for n in self.start()}, ways)

    def mini_batches(self, examples: int) -> Tensor:
        """Which examples each inner step takes, (steps, batch).

        In evaluation the same for every task, so that a result depends on the task alone.
        """
        if self.training:
            return mini_batches(examples, self.inner_batch, self.inner_steps, self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        return mini_batches(examples, self.eval_inner_batch, self.eval_inner_steps, self.device, generator)

    def inner_loop(self, support: Support) -> Iterator[tuple[Parameters, Parameters]]:
        """Parameters and second moments, before the first mini-batch and after each one; no graph is kept."""

        def loss(parameters: Parameters, rows: Tensor) -> Tensor:
            outputs = call(self.learner, parameters, support.x[rows], self.statistics_source)
            return self.support_loss(outputs, support, rows)

        parameters = self.learner.resize_head({n: p.detach() for n, p in self.start().items()}, support.ways)
        moments, count = self.second_moments(support.ways), self.updates
        yield parameters, moments
        for rows in self.mini_batches(len(support.y)):
            step = inner_gradient(loss, parameters, rows, mixed_precision=True)
            if self.inner_optimizer == "adam":
                count = count + 1
                moments = {n: m.lerp(step[n].square(), 1 - self.beta2) for n, m in moments.items()}
                unbias = (1 - self.beta2**count).to(support.x.dtype)
                step = {n: g / ((moments[n] / unbias).sqrt() + 1e-8) for n, g in step.items()}
            parameters = {n: p - self.inner_rate * step[n] for n, p in parameters.items()}
            yield parameters, moments

    def adaptation(self, support: Support) -> Iterator[Adapted]:
        for step, (parameters, _) in enumerate(self.inner_loop(support)):
            yield adapted(self.learner, parameters, support, self.batch_norm, step)

    def adapt(self, support: Support) -> Adapted:
        return adapted(self.learner, last(self.inner_loop(support))[0], support, self.batch_norm)

    def predict(self, state: Adapted, query_x: Tensor) -> Tensor:
        return query(self.learner, state, query_x, self.statistics_source)

    def objective(self, task: Task) -> tuple[Any, ...]:
        parameters, moments = last(self.inner_loop(task.support))
        prediction = self.predict(adapted(self.learner, parameters, task.support, self.batch_norm), task.query_x)
        toward = [(p * (p - parameters[n]).detach()).sum() for n, p in self.start().items()]
        loss = with_gradient(self.loss(prediction, task.query_y), torch.stack(toward).sum())
        return loss, prediction, moments

    def update_from_tasks(self, values: dict[str, Any]) -> None:
        # The reference code goes through the tasks one by one, each from the moments of the one before. Here they go
        # side by side from the same, and leave their mean.
        for name, moment in values.items():
            self.moments.get_buffer(entry(name)).copy_(moment)
        self.updates += self.inner_steps
