"""Training on the stream itself: what learners on streams are held against."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.continual.streams import Streams
from models.continual.descent import drawn
from models.continual.head_learner import Adapts, HeadLearner
from models.continual.learner import Stream
from models.core.base_learner import Parameters
from models.core.chance import Chance
from models.core.learner import Paper
from models.networks.backbones import Backbone


class FineTune(HeadLearner):
    """Trains a network, or its new head, by a step for each example of a stream, and takes no care of what it knew.

    Meta-training is a classification of all images that streams show, by a head of all classes: of "Pretraining"
    (Javed and White, 2019) the head alone adapts afterwards. With a frozen ``models.Pretrained`` for a backbone the
    representation is that of another learner. ``start: random`` learns from scratch, whatever was trained. ``shuffled``
    is the oracle that has all examples of all experiences so far at once, in random order.

    Args:
        backbone: of the features.
        classes: of the meta-training split, rows of its head; None: as many as the data has.
        eval_adapts: what learns on a stream: a new "head", or the whole "network".
        start: of the network: as it was "trained", or drawn at "random" for each stream.
        shuffled: at each point of a stream learn anew from all examples so far, in random order.
        passes: through the examples: of one experience after another or, where they are shuffled, of all.
        **others: see HeadLearner and MetaLearner.
    """

    paper = Paper(
        "Javed and White",
        "Meta-Learning Representations for Continual Learning",
        "NeurIPS",
        2019,
        "https://arxiv.org/abs/1905.12588",
    )
    asks_learned = True

    def __init__(
        self,
        backbone: Backbone,
        classes: int | None = None,
        eval_adapts: Adapts = "head",
        start: Literal["trained", "random"] = "trained",
        shuffled: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(backbone, classes, eval_adapts=eval_adapts, **others)
        if start == "random" and eval_adapts == "head":
            raise ValueError("start is random but eval_adapts is head, over features that nothing trains: give network")
        self.start_from, self.shuffled = start, shuffled

    def objective(self, task: Stream) -> tuple[Tensor, Tensor]:
        inputs, targets = self.queries(task)  # all that the stream shows
        prediction = self.logits({}, inputs)
        return self.loss(prediction, targets), prediction

    def start(self, chance: Chance) -> tuple[Parameters, Chance]:
        parameters, chance = super().start(chance)
        if self.start_from == "random":
            for name, p in parameters.items():
                if p.dim() > 1:
                    parameters[name], chance = drawn(chance, tuple(p.shape), p)
                else:  # norms' scales and all biases
                    parameters[name] = torch.full_like(p, 0.0 if name.endswith("bias") else 1.0)
        return parameters, chance

    # The oracle -----------------------------------------------------------------------------------------------------

    def followed(self, streams: Streams) -> dict[str, Tensor]:
        """Of an oracle only what it knows at each point: it meets no experience by itself."""
        if not self.shuffled:
            return super().followed(streams)

        def one(stream: Stream) -> dict[str, Tensor]:
            found: dict[str, list[Tensor]] = {"matrix": [], "learned": []}
            chance = stream.chance
            for point in streams.points:
                state, chance = self.learned_at_once(stream, point, chance)
                for name, x, y in (("matrix", stream.query_x, stream.query_y), ("learned", stream.x, stream.y)):
                    right = self._right(state, x[:point], y[:point])
                    found[name].append(torch.cat([right, right.new_full((len(x) - point,), torch.nan)]))
            return {name: torch.stack(values) for name, values in found.items()}

        return self.map_encoded(one, self.encoded(streams), streams, chunk=self.followed_at_once)

    def learned_at_once(self, stream: Stream, experiences: int, chance: Chance) -> tuple[Any, Chance]:
        """The state after passes through all examples of the first experiences, in another random order each."""
        x, y = stream.x[:experiences].flatten(0, 1), stream.y[:experiences].flatten(0, 1)
        state = self.begin(stream.classes, chance)
        step = self.step_of_network if self.eval_adapts == "network" else self.step_of_head
        for _ in range(self.passes):
            lots, chance = chance.uniform(len(x))
            for place in lots.argsort():
                state = step(state, x[place], y[place])
        return state, chance

    def metrics_of_streams(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.shuffled:
            return super().metrics_of_streams(found)
        matrix, learned = found["matrix"], found["learned"]
        return self.metrics_of_rate(matrix) | {
            "accuracy": matrix[:, -1].mean(1),
            "learned": learned[:, -1].mean(1),
            "accuracies": matrix.nanmean(-1),
            "learned_accuracies": learned.nanmean(-1),
        }
