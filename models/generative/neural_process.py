"""Neural processes: a conditional neural process with a latent of the whole function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from datamodules.core.episodes import Support
from datamodules.core.errors import at_least
from models.core.learner import Paper
from models.generative.latent_process import LatentProcess
from models.generative.set_networks import BayesianLatent, PooledCode, PooledLatent


class NP(LatentProcess):
    """q(z|C) of the mean of codes of the points, and a deterministic code made alike.

    Args:
        inputs, outputs, latents, decoder_layers: see LatentProcess.
        hidden: units of every layer, and numbers of the deterministic code.
        encoder_layers: of a point, before the mean, of both paths.
        code_layers: after it.
        deterministic: have the deterministic path too (Kim et al., ICLR 2019, and the published results on Gaussian
            processes); Garnelo et al. have z alone.
        aggregation: "mean", as published, whose deviation of z is between 0.1 and 1 whatever the number of points; or
            "bayesian", where points are observations of z (Volpp et al., ICLR 2021) and the prior without points is
            N(0, I).
        **others: see LatentProcess.
    """

    paper = Paper(
        "Garnelo, Schwarz, Rosenbaum, Viola, Rezende, Eslami and Teh",
        "Neural Processes",
        "ICML workshop on Theoretical Foundations and Applications of Deep Generative Models",
        2018,
        "https://arxiv.org/abs/1807.01622",
    )

    def __init__(
        self,
        inputs: int = 1,
        outputs: int = 1,
        hidden: int = 128,
        latents: int = 128,
        encoder_layers: int = 4,
        code_layers: int = 2,
        decoder_layers: int = 3,
        deterministic: bool = True,
        aggregation: Literal["mean", "bayesian"] = "mean",
        **others: Any,
    ) -> None:
        at_least(1, encoder_layers=encoder_layers, code_layers=code_layers)
        super().__init__(inputs, outputs, hidden * deterministic, hidden, latents, decoder_layers, **others)
        point = inputs + outputs
        if aggregation == "bayesian":
            self.latent = BayesianLatent(latents, point, hidden, encoder_layers)
        else:
            self.latent = PooledLatent(latents, point, hidden, encoder_layers, code_layers)
        self.code = PooledCode(hidden, point, hidden, encoder_layers, code_layers) if deterministic else None

    def keep(self, support: Support) -> Sequence[Tensor]:
        return () if self.code is None else (self.code(support.x, support.y),)

    def codes(self, kept: Sequence[Tensor], query_x: Tensor) -> Sequence[Tensor]:
        return kept
