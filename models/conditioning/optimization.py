"""A task embedding sets how the inner loop descends."""

from __future__ import annotations

from torch import Tensor, nn

from datamodules.core.errors import ConfigError
from models.core.base_learner import Parameters
from models.core.conditioning import Conditioning


class Rates(Conditioning):
    """Multiplies the inner loop's learned rates by what the task embedding says: each tensor of them by exp(w · e).

    For learners that have learned rates: MetaSGD, and MAML with ``learned_rates``. It starts from no change.
    """

    def attach(self, learner: nn.Module, embedding_size: int) -> None:
        self.names = [n for n, _ in learner.named_parameters() if n.split(".")[0] == "rates"]
        if not self.names:
            raise ConfigError(
                f"{type(learner).__name__} has no learned rates: choose models.MetaSGD, or models.MAML with "
                "learned_rates, or another conditioning"
            )
        self.generator = nn.Linear(embedding_size, len(self.names), bias=False)
        nn.init.zeros_(self.generator.weight)

    def forward(self, embedding: Tensor, parameters: Parameters) -> Parameters:
        factors = self.generator(embedding).exp()
        return {n: factor * parameters[n] for n, factor in zip(self.names, factors, strict=True)}


class UpdateRule(Conditioning):
    """Hands the task embedding to a learner whose own update rule reads one, as ``models.ALFA`` with ``code_size``."""

    def attach(self, learner: nn.Module, embedding_size: int) -> None:
        code = dict(learner.named_buffers()).get("code")
        if code is None or len(code) != embedding_size:
            has = "none" if code is None else f"one of {len(code)}"
            raise ConfigError(
                f"the update rule is to read an embedding of {embedding_size} numbers but has {has}: choose "
                f"models.ALFA with code_size {embedding_size}"
            )

    def forward(self, embedding: Tensor, parameters: Parameters) -> Parameters:
        return {"code": embedding}
