"""The base of learners on streams."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from datamodules.continual.streams import Streams
from datamodules.core.episodes import Support
from datamodules.core.errors import ConfigError
from models.core.chance import Chance
from models.core.learner import MetaLearner
from models.core.metrics import FINGERPRINT
from models.core.task_kinds import TOLD
from models.core.task_map import map_tasks
from models.networks.batch_norm import BatchNormMode, normalize_by

ENCODED_AT_ONCE = 4_000_000  # elements of inputs


class Stream(NamedTuple):
    """ONE stream, its inputs encoded or as they are.

    Attributes:
        x, y: of J experiences of N examples, (J, N, *input) and (J, N, …).
        query_x, query_y: (J, Q, *input) and (J, Q, …).
        remembered_x, remembered_y: (R, *input) and (R, …), of what was learned before; R may be 0.
        classes: that labels go up to; 0 for regression.
        chance: the stream's own.
    """

    x: Tensor
    y: Tensor
    query_x: Tensor
    query_y: Tensor
    remembered_x: Tensor
    remembered_y: Tensor
    classes: int
    chance: Chance

    def experience(self, number: int) -> Support:
        """What arrives at one moment."""
        return Support(self.x[number], self.y[number], self.classes)


class ContinualLearner(MetaLearner):
    """Learns from a stream, and keeps what it learned. An algorithm overrides ``begin``, ``update`` and ``predict``.

    Each is for ONE stream, mapped over by ``vmap``: the state is returned, never kept on ``self``, and holds tensors
    alone, of shapes that no experience changes. Where the learner is meta-trained it overrides ``objective``, of a
    Stream whose queries are those of its experiences, then what is remembered (see ``queries``).

    Args:
        batch_norm: "running" or "none" where inputs are encoded.
        **others: see MetaLearner.
    """

    tasks = frozenset({"stream"})
    asks_learned: ClassVar[bool] = False
    """Whether a stream's end is measured in meta-training also on the examples that it taught."""

    def __init__(self, batch_norm: BatchNormMode = "running", **others: Any) -> None:
        super().__init__(batch_norm=batch_norm, **others)
        if type(self).encode is not ContinualLearner.encode and batch_norm not in ("running", "none"):
            raise ValueError(
                f"batch_norm is {batch_norm} but {type(self).__name__} encodes the inputs of all streams together, "
                "none of which may depend on another: set it to running or none"
            )

    # What an algorithm overrides ------------------------------------------------------------------------------------

    def encode(self, inputs: Tensor) -> Tensor:
        """What of inputs (P, *input) no experience changes, (P, …): computed once, all that the others below see."""
        return inputs

    def begin(self, classes: int, chance: Chance) -> Any:
        """The state before the first experience of a stream with so many classes, 0 for regression."""
        raise NotImplementedError

    def update(self, state: Any, experience: Support) -> Any:
        """The state after an experience, whose x is encoded."""
        raise NotImplementedError

    def predict(self, state: Any, query_x: Tensor) -> Any:
        """Logits (Q, classes), or values (Q, out), for encoded inputs of any experience."""
        raise NotImplementedError

    def noted(self, state: Any) -> dict[str, Tensor]:
        """What is looked at in a state after an experience, by name; ``followed`` has it of all, (T, J, …)."""
        return {}

    def with_facts(self, found: dict[str, Tensor], streams: Streams) -> dict[str, Tensor]:
        """What was ``followed``, and what data tell of the experiences as far as metrics need it."""
        return found

    def open_store(self, folder: Path | None, state: dict[str, Any] | None, source: Path | None, trains: bool) -> None:
        """Where a run is one stream: find, or begin, what is kept on disk.

        Args:
            folder: of the run; None: where no other process finds it.
            state: what ``save_store`` left in the checkpoint that is gone on from; None at the beginning.
            source: folder of the run that this checkpoint is of.
            trains: whether experiences are learned; otherwise nothing on disk is changed.
        """

    def save_store(self) -> dict[str, Any] | None:
        """What a checkpoint needs to find again what is on disk; None where nothing is."""
        return None

    def close_store(self) -> None:
        """Let go of what is on disk."""

    # What all share -------------------------------------------------------------------------------------------------

    def map(self, function: Callable[..., Any], episodes: Streams, *further: Tensor) -> Any:  # pyright: ignore
        """``function`` of every Stream of a meta-batch, and of its row of each of ``further``."""
        return self.map_encoded(function, episodes.inputs, episodes, *further)

    def map_encoded(
        self,
        function: Callable[..., Any],
        encoded: Tensor,
        streams: Streams,
        *further: Tensor,
        chunk: int | None = None,
    ) -> Any:
        """``map`` with ``encoded`` (P, …) in the place of the streams' inputs, ``chunk`` streams at once, None: all."""
        s = streams
        none = s.rows.new_zeros(len(s), 0)
        remembered = (none, s.y.new_zeros(len(s), 0, *s.y.shape[3:]))
        if s.remembered_rows is not None and s.remembered_y is not None:
            remembered = (s.remembered_rows, s.remembered_y)

        def one(
            rows: Tensor, y: Tensor, q: Tensor, qy: Tensor, r: Tensor, ry: Tensor, key: Tensor, *more: Tensor
        ) -> Any:
            stream = Stream(encoded[rows], y, encoded[q], qy, encoded[r], ry, s.classes, Chance.of(key))
            return function(stream, *more)

        tensors = (s.rows, s.y, s.query_rows, s.query_y, *remembered, s.key, *further)
        randomness = "different" if self.training else "same"
        return map_tasks(one, *tensors, chunk=self.chunk or chunk or len(s), randomness=randomness)

    def queries(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """What a stream's end is measured on in meta-training: queries of all experiences, then what is remembered.

        Before them what was learned, where the learner ``asks_learned``.
        """
        x, y = [stream.query_x.flatten(0, 1), stream.remembered_x], [stream.query_y.flatten(0, 1), stream.remembered_y]
        if self.asks_learned:
            x, y = [stream.x.flatten(0, 1), *x], [stream.y.flatten(0, 1), *y]
        return torch.cat(x), torch.cat(y)

    def targets(self, batch: Streams) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        own = [batch.query_y.flatten(1, 2)]
        if self.asks_learned:
            own = [batch.y.flatten(1, 2), *own]
        return torch.cat(own if batch.remembered_y is None else [*own, batch.remembered_y], 1)

    def objective(self, task: Stream) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One stream's part of the meta-objective: the mean loss at its end, over the ``queries``."""
        inputs = torch.cat([task.x.flatten(0, 1), queries := self.queries(task)[0]])
        with normalize_by(self.statistics_source):
            encoded = self.encode(inputs)
        examples = len(inputs) - len(queries)
        seen = task._replace(x=encoded[:examples].unflatten(0, task.x.shape[:2]))
        state = self.begin(task.classes, task.chance)
        for number in range(len(task.x)):
            state = self.update(state, seen.experience(number))
        prediction = self.predict(state, encoded[examples:])
        return self.loss(prediction, self.queries(task)[1]), prediction

    def per_task(self, prediction: Any, target: Tensor) -> dict[str, Tensor]:
        return {"accuracy": correct(prediction, target).mean(-1)}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if getattr(self.trainer.datamodule, "online", False):
            raise ConfigError(
                f"data.online is true but {type(self).__name__} is meta-trained on many streams: give models.Online, "
                "with it as its learner"
            )

    def encoded(self, streams: Streams) -> Tensor:
        """All inputs of a meta-batch encoded, in evaluation."""
        inputs = streams.inputs
        size = max(1, ENCODED_AT_ONCE // max(1, inputs[0].numel()))
        with normalize_by(self.statistics_source):
            return torch.cat([self.encode(part) for part in inputs.split(size)])

    def followed(self, streams: Streams) -> dict[str, Tensor]:
        """What a learner does along streams of J experiences, with P of them at which all so far is tested.

        Returns:
            matrix (T, P, J): after the p-th point the accuracy on the queries of each experience so far, nan for those
            to come; learned (T, P, J): the same on the examples that were learned; first, before, after (T, J):
            accuracy on the queries of each experience before the stream, just before it arrives and just after;
            online (T, J): on its examples before they are learned. Beside them what is ``noted``.
        """
        points = set(streams.points)

        def one(stream: Stream) -> dict[str, Tensor]:
            state = self.begin(stream.classes, stream.chance)
            found: dict[str, list[Tensor]] = {n: [] for n in ("matrix", "learned", "before", "after", "online")}
            noted: dict[str, list[Tensor]] = {}
            first = self._right(state, stream.query_x, stream.query_y)
            for j in range(len(stream.x)):
                found["online"].append(self._right(state, stream.x[j : j + 1], stream.y[j : j + 1])[0])
                found["before"].append(self._right(state, stream.query_x[j : j + 1], stream.query_y[j : j + 1])[0])
                state = self.update(state, stream.experience(j))
                found["after"].append(self._right(state, stream.query_x[j : j + 1], stream.query_y[j : j + 1])[0])
                for name, value in self.noted(state).items():
                    noted.setdefault(name, []).append(value)
                if j + 1 in points:
                    to_come = first.new_full((len(stream.x) - j - 1,), torch.nan)
                    for name, x, y in (("matrix", stream.query_x, stream.query_y), ("learned", stream.x, stream.y)):
                        found[name].append(torch.cat([self._right(state, x[: j + 1], y[: j + 1]), to_come]))
            return {"first": first, **{name: torch.stack(values) for name, values in (found | noted).items()}}

        return self.map_encoded(one, self.encoded(streams), streams, chunk=self.followed_at_once)

    @property
    def followed_at_once(self) -> int | None:
        """How many streams are followed together in evaluation; None: all of a batch."""
        return None

    def _right(self, state: Any, x: Tensor, y: Tensor) -> Tensor:
        """The share of right predictions of each experience, (J,), of inputs (J, N, …)."""
        return correct(self.predict(state, x.flatten(0, 1)), y.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)

    def evaluation_step(self, batch: Streams, stage: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = self.with_facts(self.followed(batch), batch)
        facts = {**batch.task, FINGERPRINT: batch.fingerprint()} if stage == "test" else None
        kept = {"matrix": found["matrix"]} if stage == "test" else None
        metrics = self.metrics_of_streams(found) | by_instance(found["online"], batch.y)
        self.stage_metrics(stage).update(batch.index, metrics, facts, kept)

    def metrics_of_streams(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is measured of each stream, from what was found along it."""
        return stream_metrics(found)


def correct(prediction: Tensor, target: Tensor) -> Tensor:
    """Whether the likeliest class is right, 1 or 0; (…, Q, classes) and (…, Q) to (…, Q).

    Where no class has a chance there is no prediction, which is wrong.
    """
    most, label = prediction.max(-1)
    return ((label == target) & (most > -torch.inf)).float()


def by_instance(online: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Accuracy on an example before its label is told, by how often its class has been met (Santoro et al. 2016).

    Args:
        online: (T, J), of experiences of one example each.
        y: (T, J, 1) int64; every class comes as often.

    Returns:
        instances, (T, K), for the first to the K-th example of a class, and some of them by themselves; nothing where
        experiences have more examples than one or no class returns.
    """
    if y.shape[2] != 1 or y.is_floating_point():
        return {}
    same = y == y[..., 0][:, None]  # (T, J, J)
    instance = same.tril(-1).sum(-1)
    most = int(instance.max()) + 1
    if most == 1:
        return {}
    of = instance[..., None] == torch.arange(most, device=y.device)
    curve = (online[..., None] * of).sum(1) / of.sum(1)
    return {"instances": curve} | {f"instance_{k}": curve[:, k - 1] for k in TOLD if k <= most}


def stream_metrics(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Metrics of each stream from what was found along it, see ``ContinualLearner.followed``.

    With R the accuracy on the queries of an experience after another one, and R̄ before any (Lopez-Paz and Ranzato,
    NeurIPS 2017, section 2; forgetting: Chaudhry et al., ECCV 2018, eq. 3):

    accuracy: mean over j of R[J, j]; learned: the same on the examples that were learned; learning_accuracy: mean of
    R[j, j]; backward_transfer: mean over j < J of R[J, j] - R[j, j]; forgetting: mean over j < J of the most that
    R[i, j] was at an i < J, less R[J, j]; forward_transfer: mean over j > 1 of R[j - 1, j] - R̄[j]; online: mean
    accuracy on an experience before it is learned; two curves over the points.

    Forgetting takes the most over what was tested: R[j, j] and the points.
    """
    matrix, after = found["matrix"], found["after"]
    end = matrix[:, -1]
    seen = torch.cat([matrix[:, :-1], after[:, None]], 1).nan_to_num(-torch.inf).amax(1)
    return {
        "accuracy": end.mean(1),
        "learned": found["learned"][:, -1].mean(1),
        "learning_accuracy": after.mean(1),
        "backward_transfer": (end - after)[:, :-1].mean(1),
        "forgetting": (seen - end)[:, :-1].mean(1),
        "forward_transfer": (found["before"] - found["first"])[:, 1:].mean(1),
        "online": found["online"].mean(1),
        "accuracies": matrix.nanmean(-1),
        "learned_accuracies": found["learned"].nanmean(-1),
    }
