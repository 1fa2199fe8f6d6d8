"""Follow the meta-leader: meta-learning along an online sequence of tasks, and its three rivals."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.continual.rainbow import VARIATIONS, RainbowImages
from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Episodes
from datamodules.core.errors import at_least
from datamodules.core.metric import Metric
from models.core.base_learner import entry
from models.core.learner import Paper
from models.networks.backbones import Backbone
from models.optimization.maml import MAML

Form = Literal["ftml", "everything", "scratch", "finetune"]
NOT_YET = -1.0


class FTML(MAML):
    """Tasks arrive one after another and are kept; MAML's initialisation is trained on all so far (algorithm 1).

    Each meta-update (algorithm 2) is one of MAML on tasks drawn from those that exist. Before the next batch of the
    current task arrives, and at its end, the learner adapts to all of the task's data so far, by ``eval_inner_steps``
    steps of gradient descent, and is measured on images of it that never arrive. The rivals of the paper are:

    "everything", TOE: one model for all tasks, trained on them together, that does not adapt.
    "finetune", FTL: the same, adapted to the current task's data before it is measured.
    "scratch": from the first weights at every task, trained on its own data, with ``drawn: current`` in the data.

    What is measured along the sequence is in the checkpoint, so that a run may stop anywhere and go on.

    Args:
        backbone: the base learner without its head.
        outputs: classes, the same in all tasks.
        form: see above.
        inner_rate: α of the inner loop, and of ``finetune``.
        inner_steps: gradient steps in meta-training, none in the rivals.
        eval_inner_steps: gradient steps on a task's data so far; None takes as many as ``inner_steps``.
        label_smoothing: share of a label that all classes have alike, in both loops.
        proficiency: accuracy from which on a task counts as learned.
        arrivals: batches of a task at most, as many as there is room for in the table of what was measured.
        **others: see MAML.
    """

    paper = Paper(
        "Finn, Rajeswaran, Kakade and Levine",
        "Online Meta-Learning",
        "ICML",
        2019,
        "https://arxiv.org/abs/1902.08438",
    )
    tasks = frozenset({"classification"})
    own_metrics = {
        "examples": Metric("lower", "examples to proficiency"),
        "first_batch": Metric("higher", "accuracy when met, after one batch", share=True),
        "ten_batches": Metric("higher", "accuracy when met, after ten batches", share=True),
        "all_batches": Metric("higher", "accuracy when met, after all batches", share=True),
        "regret": Metric("lower", "loss when met, less that by the final weights (nats)"),
        "arrivals": Metric("higher", curve=True),
    }
    learned: Tensor
    met: Tensor

    def __init__(
        self,
        backbone: Backbone,
        outputs: int = 10,
        form: Form = "ftml",
        inner_rate: float = 0.1,
        inner_steps: int = 5,
        eval_inner_steps: int | None = None,
        label_smoothing: float = 0.1,
        proficiency: float = 0.9,
        arrivals: int = 40,
        **others: Any,
    ) -> None:
        steps = inner_steps if eval_inner_steps is None else eval_inner_steps
        in_training, in_evaluation = {"ftml": (inner_steps, steps), "finetune": (0, steps)}.get(form, (0, 0))
        super().__init__(backbone, outputs, inner_rate, in_training, in_evaluation, **others)
        at_least(0, inner_steps=inner_steps)
        at_least(1, arrivals=arrivals)
        for name, share in (("label_smoothing", label_smoothing), ("proficiency", proficiency)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share} but must be a share between 0 and 1")
        self.form: Form = form
        self.label_smoothing, self.proficiency = label_smoothing, proficiency
        # Accuracy on each task after each of its arrivals, and its loss when it was met.
        self.register_buffer("learned", torch.full((VARIATIONS, arrivals), NOT_YET))
        self.register_buffer("met", torch.full((VARIATIONS,), NOT_YET))
        self.first = nn.Module()
        if form == "scratch":
            for name, value in self.learner.state_dict().items():
                self.first.register_buffer(entry(name), value.clone())

    def loss(self, prediction: Any, target: Tensor, shares: Tensor | None = None) -> Tensor:
        prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        of_each = F.cross_entropy(prediction, target, reduction="none", label_smoothing=self.label_smoothing)
        return (of_each if shares is None else of_each * shares.to(of_each)).mean()

    # Along the sequence ---------------------------------------------------------------------------------------------

    def check(self, data: EpisodicDataModule) -> str | None:
        if not isinstance(data, RainbowImages):
            return f"FTML learns along a sequence of tasks, which {type(data).__name__} has not: use RainbowImages"
        if data.drawn != (drawn := "current" if self.form == "scratch" else "all"):
            return f"with form {self.form} the data's drawn must be {drawn}: set data.drawn to {drawn}"
        if (most := self.learned.shape[1]) < data.most_arrivals:
            return f"arrivals is {most} but {data.most_arrivals} batches of a task may arrive: raise model.arrivals"
        return None

    @property
    def data(self) -> RainbowImages:
        """The sequence."""
        return self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]

    def on_train_batch_start(self, batch: Episodes, batch_idx: int) -> None:
        step = int(batch.index[0]) // batch.meta_batch
        self.record(step)
        task, arrived = self.data.sequence().moment(step)
        if arrived and (step == 0 or self.data.sequence().moment(step - 1)[0] != task):
            if step and self.form == "scratch":
                self.begin_anew()
            # The regret's f_t(U_t(w_t)): by the weights from before the task, and all its data that will arrive.
            self.met[task] = self.measured(self.data.sequence().whole([task]))["nll"][0]
        super().on_train_batch_start(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        # A run's last batch is followed by no other; Lightning tells the learner of it before the run is saved.
        self.record(self.data.next_task() // self.data.meta_batch_size)

    def record(self, step: int) -> None:
        """Before a step, measure what was learned of the current task, where the step before was the last as it was."""
        if step and (before := self.data.sequence().moment(step - 1)) != self.data.sequence().moment(step):
            task, arrived = before
            if arrived:
                self.learned[task, arrived - 1] = self.measured(self.data.current(step - 1))["accuracy"][0]

    def begin_anew(self) -> None:
        """Take back the first weights, and the optimizer's state of others."""
        kept = dict(self.first.named_buffers())
        self.learner.load_state_dict({name: kept[entry(name)] for name in self.learner.state_dict()})
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        optimizer.state.clear()

    @torch.no_grad()
    def measured(self, tasks: Episodes) -> dict[str, Tensor]:
        """Metrics on the queries of tasks as they are stored, after adaptation to their support sets."""
        ready = self.data.on_after_batch_transfer(tasks.to(self.device), 0)
        training = self.training
        self.eval()
        found = self.per_task(self.predictions(ready), ready.query_y)
        self.train(training)
        return found

    # After it -------------------------------------------------------------------------------------------------------

    def task_metrics(self, batch: Episodes) -> dict[str, Tensor]:
        """What was measured of each task when it was met; its regret, by the weights as they are now.

        A task that was not met, or not to its end, has no more than it was: an accuracy of 0 after batches that did
        not arrive, proficiency not reached, no regret.
        """
        number = batch.task["number"]
        arrivals = max(1, int((self.learned != NOT_YET).any(0).sum()))
        learned, met = self.learned[number, :arrivals], self.met[number]
        curve = learned.clamp(min=0)
        reached = learned >= self.proficiency
        batches = reached.int().argmax(1).where(reached.any(1), arrivals) + 1
        now = self.per_task(self.predictions(batch), batch.query_y)["nll"]
        return {
            "examples": (batches * batch.ways).float(),
            "first_batch": curve[:, 0],
            "ten_batches": curve[:, min(10, arrivals) - 1],
            "all_batches": curve[:, -1],
            "regret": (met - now).where(met != NOT_YET, 0.0),
            "arrivals": curve,
        }
