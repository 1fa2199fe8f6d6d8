"""What learners share that embed inputs by a backbone whose channels the task scales and shifts."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.func import functional_call

from datamodules.core.episodes import Episodes, Support
from models.core.base_learner import Parameters
from models.core.controls import Controlled
from models.core.embedding_learner import Embedded, EmbeddingLearner
from models.networks.batch_norm import BatchNorm, normalize_by, statistics_of


class Modulated(NamedTuple):
    """The scales and shifts of a task, by their names in the backbone, and the summary of its embedded support set."""

    modulation: Parameters
    summary: Any


class ModulatedLearner(Controlled, EmbeddingLearner):
    """Embeds every input of a task by the backbone with the task's own scales and shifts, then compares.

    An algorithm overrides ``modulation``, ``summarize`` and ``compare``, each for ONE task. Where ``conditioned`` is
    false, all tasks share one embedding; where it is true, the constructor calls ``conditioned_on``.
    """

    conditioned = True

    def modulation(self, x: Tensor, support: Support) -> Parameters:
        """Scales and shifts, by their names in the backbone.

        Args:
            x: inputs that share a pass, (N, *input); those of the support set lead.
            support: of the task.
        """
        raise NotImplementedError

    def embed(self, x: Tensor, modulation: Parameters | None = None) -> Tensor:
        """Embeddings (N, features) of inputs (N, *input); without modulation, those that all tasks share."""
        return functional_call(self.backbone, modulation, (x,)) if modulation else self.backbone(x)

    def modulate(self, x: Tensor, support: Support) -> Parameters:
        return self.modulation(x, support) if self.conditioned else {}

    def adapt(self, support: Support) -> Embedded:
        if self.batch_norm == "per_query":
            return Embedded(None, support=support)
        statistics = None
        with normalize_by(self.statistics_source):
            modulation = self.modulate(support.x, support)
            if self.batch_norm == "support":
                statistics = statistics_of(lambda: self.embed(support.x, modulation))
            summary = self.summarize(self.embed(support.x, modulation), support)
        return Embedded(Modulated(modulation, summary), statistics)

    def predict(self, state: Embedded, query_x: Tensor) -> Tensor:
        if state.support is not None:
            return super().predict(state, query_x)
        modulation, summary = state.summary
        with normalize_by(state.statistics or self.statistics_source):
            return self.compare(summary, self.embed(query_x, modulation))

    def together(self, support: Support, x: Tensor, first: int) -> Tensor:
        with normalize_by(self.statistics_source):
            z = self.embed(x, self.modulate(x, support))
            return self.compare(self.summarize(z[: len(support.y)], support), z[first:])

    @property
    def transductive(self) -> bool:
        # Other networks than the backbone see the support set alone.
        own = (m for m in self.backbone.modules() if isinstance(m, BatchNorm) and not m.fixed)
        return self.batch_norm == "transductive" and any(own)

    def embeds_once(self, batch: Episodes) -> bool:
        return not self.conditioned and super().embeds_once(batch)
