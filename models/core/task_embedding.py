"""Task embeddings: a task as a vector, by what it shares with other tasks and where it differs."""

from __future__ import annotations

from torch import Tensor, nn

from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Support


class TaskEmbedding(nn.Module):
    """Maps the support set of ONE task to a vector, trained along with the learner that uses it.

    A learner whose own training gives it such vectors has the same two (``MetaLearner.embed_task``).
    """

    embedding_size: int
    reads_facts: bool = False
    """Whether it looks at what data know of a task (``Support.facts``), as an oracle does."""

    def attach(self, learner: nn.Module) -> None:
        """See the learner whose tasks are embedded, before training; most embeddings do not depend on it.

        Raises:
            ConfigError: it cannot embed this learner's tasks.
        """

    def check(self, data: EpisodicDataModule) -> str | None:
        """Why it cannot embed these tasks, and the cure; None if it can."""
        return None

    def embed_task(self, support: Support) -> Tensor:
        """What task this is, (embedding_size,)."""
        raise NotImplementedError
