"""A run whose training is one long stream: any learner on streams, experience by experience."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from datamodules.continual.streams import Streams
from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Support
from datamodules.core.errors import ConfigError
from models.continual.learner import ContinualLearner, correct
from models.core.chance import Chance
from models.core.checkpoint_io import CHECKPOINTS
from models.core.learner import MetaLearner
from models.core.metrics import FINGERPRINT

HISTORY = ("first", "before", "after", "online")  # what is kept of each experience, see ContinualLearner.followed


class Online(MetaLearner):
    """Learns one stream: training step s is experience s of the data, whose setting ``online`` is true.

    The learner is as in evaluation, and nothing of it is meta-trained: what changes with an experience is its state on
    the stream, which checkpoints hold, so that a run goes on in mid-stream to the bit. Before an experience is learned
    it is asked about it: that is what the training's metrics are of (prequential evaluation; Dawid, 1984). Validation
    and test ask about all experiences so far, on the queries that no experience teaches. Of the points of the stream
    those are told that a validation fell on.

    Args:
        learner: on streams. What it says of optimizer and scheduler is not used.
        **others: see MetaLearner; not used.
    """

    tasks = frozenset({"stream"})

    def __init__(self, learner: ContinualLearner, **others: Any) -> None:
        super().__init__(
            # A step of training is a step of an optimizer, of a parameter that stays what it is.
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
            batch_norm=learner.batch_norm,
            **{name: value for name, value in others.items() if name == "chunk"},
        )
        self.learner = learner.requires_grad_(False)
        self.paper, self.selects_by = learner.paper, learner.selects_by
        self.clock = nn.Parameter(torch.zeros(()))
        for stage in self.metrics.values():
            stage.declared.update(learner.declared_metrics())  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        self.experiences = 0  # so far
        self.state: Any = None
        self.history = torch.empty(len(HISTORY), 0)  # of each experience so far
        self.noted: dict[str, list[Tensor]] = {}
        self.rows: dict[int, Tensor] = {}  # of the matrices (2, experiences), by their points
        self.classes, self.key = 0, torch.zeros((), dtype=torch.int64)  # of the stream
        self._saved: dict[str, Any] | None = None  # in the checkpoint that was loaded
        self._store: dict[str, Any] | None = None  # of a store that was closed
        self._opened = False

    def check(self, data: EpisodicDataModule) -> str | None:
        if not getattr(data, "online", False):
            return "models.Online learns one stream: set data.online to true"
        return self.learner.check(data)

    def parameter_groups(self) -> list[Any]:
        return [self.clock]

    # Along the stream -----------------------------------------------------------------------------------------------

    def _right(self, state: Any, x: Tensor, y: Tensor) -> Tensor:
        """The share of right predictions on inputs (N, …)."""
        return correct(self.learner.predict(state, x), y).mean()

    def training_step(self, batch: Streams, batch_idx: int) -> Tensor:
        self.learner.eval()  # as on a stream of evaluation
        with torch.no_grad():
            encoded = self.learner.encoded(batch)
            x, q = encoded[batch.rows[0, 0]], encoded[batch.query_rows[0, 0]]
            y, qy = batch.y[0, 0], batch.query_y[0, 0]
            self.classes, self.key = batch.classes, batch.key[0]
            start = self.learner.begin(self.classes, Chance.of(self.key))
            state = start if self.state is None else self.state
            told = [self._right(start, q, qy), self._right(state, q, qy), self._right(state, x, y)]
            self.state = self.learner.update(state, Support(x, y, self.classes))
            first, before, online = told
            after = self._right(self.state, q, qy)
            self.history = torch.cat([self.history, torch.stack([first, before, after, online]).cpu()[:, None]], 1)
            for name, value in self.learner.noted(self.state).items():
                self.noted.setdefault(name, []).append(value.cpu())
            self.experiences += 1
            metrics = {"online": online[None], "learning_accuracy": after[None]}
            self.stage_metrics("train").update(batch.index, metrics)
        return 0.0 * self.clock

    def followed(self, streams: Streams) -> dict[str, Tensor]:
        """What was found along the stream, as ``ContinualLearner.followed`` has it, as far as it was gone along."""
        encoded, s = self.learner.encoded(streams), self.experiences
        now = []
        for rows, y in ((streams.query_rows, streams.query_y), (streams.rows, streams.y)):
            prediction = self.learner.predict(self.state, encoded[rows[0, :s]].flatten(0, 1))
            now.append(correct(prediction, y[0, :s].flatten()).unflatten(0, (s, -1)).mean(1).cpu())
        if s in streams.points:
            self.rows[s] = torch.stack(now)
        points = [p for p in sorted(self.rows) if p < s]
        of_points = [torch.nn.functional.pad(self.rows[p], (0, s - p), value=torch.nan) for p in points]
        matrix, learned = torch.stack([*of_points, torch.stack(now)], 1)
        found = dict(zip(HISTORY, self.history, strict=True)) | {"matrix": matrix, "learned": learned}
        found |= {name: torch.stack(values) for name, values in self.noted.items()}
        return {name: value[None].to(self.device) for name, value in found.items()}

    def evaluation_step(self, batch: Streams, stage: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.state is None:
            raise ConfigError("no experience was learned yet: train first, or give a checkpoint of models.Online")
        found = self.learner.with_facts(self.followed(batch), batch)
        metrics = self.learner.metrics_of_streams(found)
        told = [*(p for p in sorted(self.rows) if p < self.experiences), self.experiences]
        places = [batch.points.index(p) for p in told if p in batch.points]
        j = batch.experiences

        def spread(values: Tensor) -> Tensor:
            """Of the points that were told (1, P', …) to all, nan for the others."""
            of_points = values[:, [k for k, p in enumerate(told) if p in batch.points]]
            whole = of_points.new_full((1, len(batch.points), *values.shape[2:]), torch.nan)
            whole[:, places] = of_points
            return whole

        for name in ("accuracies", "learned_accuracies"):
            metrics[name] = spread(metrics[name])
        facts = kept = None
        if stage == "test":
            to_come = (0, j - found["matrix"].shape[2])
            facts = {**batch.task, FINGERPRINT: batch.fingerprint()}
            kept = {"matrix": torch.nn.functional.pad(spread(found["matrix"]), to_come, value=torch.nan)}
        self.stage_metrics(stage).update(batch.index, metrics, facts, kept)

    # What a run keeps -----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        steps, most = self.trainer.max_steps * self.trainer.accumulate_grad_batches, self.trainer.datamodule.experiences
        if stage == "fit" and steps > most:
            raise ConfigError(
                f"the stream has {most} experiences but the run takes {steps} steps: give --trainer.max_steps {most}, "
                "or raise data.experiences"
            )
        if self.trainer.world_size > 1:
            raise ConfigError("models.Online learns one stream, in one process: give --trainer.devices 1")

    def on_fit_start(self) -> None:
        self._resume()

    def on_validation_start(self) -> None:
        self._resume()

    def on_test_start(self) -> None:
        self._resume()

    def _resume(self) -> None:
        """Have the state of the checkpoint that was loaded, if any, and what of it is on disk."""
        saved, self._saved = self._saved, None
        if not self._opened:
            own = self.trainer.is_global_zero and not getattr(self.trainer, "fast_dev_run", False)
            folder = Path(self.trainer.default_root_dir).absolute() if own else None
            source = folder
            if saved is not None and self.trainer.ckpt_path is not None:
                beside = Path(self.trainer.ckpt_path).absolute().parent
                source = beside.parent if beside.name == CHECKPOINTS else beside
            state, trains = self._store if saved is None else saved["store"], self.trainer.state.fn == "fit"
            self.learner.open_store(folder, state, source, trains)
            self._opened = True
        if saved is not None:
            self.key, self.classes = saved["key"], saved["classes"]
            spec = tree_flatten(self.learner.begin(self.classes, Chance.of(self.key.to(self.device))))[1]
            self.state = tree_unflatten([leaf.to(self.device) for leaf in saved["state"]], spec)
            self.experiences, self.history = saved["experiences"], saved["history"]
            self.noted = {name: list(values) for name, values in saved["noted"].items()}
            self.rows = dict(zip(saved["points"], saved["rows"], strict=True))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.state is None:
            return
        points = sorted(self.rows)
        checkpoint["online"] = {
            "experiences": self.experiences,
            "classes": self.classes,
            "key": self.key.cpu(),
            "state": [leaf.detach().cpu().clone() for leaf in tree_flatten(self.state)[0]],
            "history": self.history.clone(),
            "noted": {name: torch.stack(values) for name, values in self.noted.items()},
            "points": points,
            "rows": [self.rows[p].clone() for p in points],
            "store": self.learner.save_store(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint.get("online")
        if self._opened:
            self.learner.close_store()
            self._opened = False

    def teardown(self, stage: str) -> None:
        if self._opened and not getattr(self.trainer, "fast_dev_run", False):  # which leaves no file
            self._store = self.learner.save_store() or self._store
            self.learner.close_store()
            self._opened = False
