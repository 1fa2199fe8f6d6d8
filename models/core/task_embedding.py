"""Task embeddings: a task as a vector, by what it shares with other tasks and where it differs."""

from __future__ import annotations

from torch import Tensor, nn

from datamodules.core.episodes import Support


class TaskEmbedding(nn.Module):
    """Maps the support set of ONE task to a vector, trained along with the learner that uses it.

    A learner whose own training gives it such vectors has the same two (``MetaLearner.embed_task``).
    """

    embedding_size: int

    def embed_task(self, support: Support) -> Tensor:
        """What task this is, (embedding_size,)."""
        raise NotImplementedError
