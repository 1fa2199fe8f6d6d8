"""Images that look like a task's, and the game that they play with a few-shot classifier."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from datamodules.core.episodes import Support, Task
from datamodules.core.errors import at_least
from datamodules.core.metric import Metric
from models.core.predictions import cross_entropies
from models.core.two_players import of_inputs_alone
from models.networks.batch_norm import recording
from models.networks.gaussians import standard_normal
from models.networks.generator import Generator

SEED = 0  # of all draws in evaluation
SMALLEST = 7  # side of the maps that a generator starts from, at most, pixels

Logits = Callable[[Tensor], Tensor]
"""Of inputs (n, *input), those of the N classes and of fakes: (n, N + 1)."""


@dataclass(frozen=True)
class GAN:
    """Settings of the game.

    Attributes:
        fakes: images generated for a set; None takes as many as it has labelled ones.
        latents: dimensions of the task's code.
        noise: dimensions of an image's noise.
        hidden: channels of the largest maps, in encoder and generator; smaller maps have twice as many.
        conditional: give the generator the task's code; otherwise noise alone.
        stochastic: draw codes and noise anew at every training step; otherwise they are drawn as in evaluation.
        weight: of the discriminator's terms on real and fake, in the inner loop too; 0 leaves the base learner.
        kl_weight: of KL(q(c|T) ‖ N(0, I)), nats, in the generator's loss.
    """

    fakes: int | None = None
    latents: int = 64
    noise: int = 64
    hidden: int = 32
    conditional: bool = True
    stochastic: bool = True
    weight: float = 1.0
    kl_weight: float = 0.01

    def __post_init__(self) -> None:
        at_least(1, fakes=self.fakes, latents=self.latents, noise=self.noise, hidden=self.hidden)


class DatasetEncoder(nn.Module):
    """q(c|T): convolutions see each image by itself, statistics over the images make a Gaussian over the task's code.

    Args:
        shape: (channels, height, width) of an image.
        widths: channels of each convolution, every one of which halves the maps.
        latents: dimensions of the code.
    """

    def __init__(self, shape: tuple[int, ...], widths: list[int], latents: int) -> None:
        super().__init__()
        channels = [shape[0], *widths]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(channels))
        sides = [-(-side // 2 ** len(widths)) for side in shape[1:]]
        self.instance = nn.Linear(widths[-1] * math.prod(sides), 2 * latents)
        self.code = nn.Linear(4 * latents, 2 * latents)

    def forward(self, x: Tensor) -> Normal:
        """The distribution of the code, (latents,), of a set of images (n, C, H, W) in any order."""
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
        z = F.leaky_relu(self.instance(x.flatten(1)), 0.2)
        made = self.code(torch.cat([z.mean(0), z.var(0, correction=0)]))
        mean, log_variance = made.to(torch.promote_types(made.dtype, torch.float32)).chunk(2, -1)
        return Normal(mean, (0.5 * log_variance).exp(), validate_args=False)


OWN_METRICS = {
    "supervised_loss": Metric("lower"),
    **{name: Metric() for name in ("real_loss", "fake_loss", "generator_loss", "kl")},
}
"""What ``Adversary.objective`` measures of a task."""


class Adversary(nn.Module):
    """The generator of a task's fakes, and the losses of both players.

    Args:
        shape: (channels, height, width) of an image.
        gan: settings.

    Raises:
        ValueError: inputs that are not images.
    """

    def __init__(self, shape: tuple[int, ...], gan: GAN) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"images are generated, but the backbone's input has the shape {shape}")
        self.gan = gan
        halvings = max(1, math.ceil(math.log2(max(shape[1:]) / SMALLEST)))
        widths = [gan.hidden * 2 ** min(k, 2) for k in range(halvings)]
        self.encoder = DatasetEncoder(shape, widths, gan.latents) if gan.conditional else None
        self.generator = Generator(shape, widths, gan.noise + gan.latents * gan.conditional)

    def draw(self, like: Tensor, rng: np.random.Generator | None) -> Tensor:
        """Standard normal noise of a tensor's shape."""
        return standard_normal(like, rng)

    def forward(self, support: Support, images: int) -> tuple[Tensor, Tensor]:
        """Fakes (n, C, H, W) for a task, and KL(q(c|T) ‖ N(0, I)), nats; in evaluation the same at every call.

        Args:
            support: of the task; its unlabelled images tell of the task too.
            images: n, where the settings do not say.
        """
        x = support.x if support.unlabelled is None else torch.cat([support.x, support.unlabelled])
        # Noise that all tasks share: a prediction must not depend on which tasks it is made with.
        rng = None if self.training and self.gan.stochastic else np.random.default_rng(SEED)
        z = self.draw(x.new_zeros(self.gan.fakes or images, self.gan.noise), rng)
        divergence = x.new_zeros(())
        if self.encoder is not None:
            q = self.encoder(x)
            code = q.mean + q.stddev * self.draw(q.mean, rng)
            divergence = kl_divergence(q, Normal(0.0, 1.0)).sum()
            z = torch.cat([z, code.to(z.dtype).expand(len(z), -1)], -1)
        # Autocast leaves images of half precision, which an inner loop in its parameters' precision does not take.
        return self.generator(z).to(x.dtype), divergence

    def discriminator_terms(
        self, logits: Logits, task: Task, fakes: Tensor, shares: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of L_D on a task's labelled set and unlabelled images, and the logits (Q, N) of that set.

        Labelled images count by ``shares`` (Q,), if given.
        """
        labelled = logits(task.query_x)
        others: list[Tensor] = [fakes] if task.support.unlabelled is None else [fakes, task.support.unlabelled]
        with recording(None):  # running averages are those of labelled images
            fake, *unlabelled = [realness(logits(x)) for x in others]
        real = torch.cat([realness(labelled), *unlabelled])
        terms = {
            "supervised_loss": cross_entropies(promoted(labelled[:, :-1]), task.query_y, shares).mean(),
            "real_loss": F.softplus(-real).mean(),
            "fake_loss": F.softplus(fake).mean(),
        }
        return terms, labelled[:, :-1]

    def discriminator_loss(self, terms: dict[str, Tensor]) -> Tensor:
        """L_D = -log p(y | x, y ≤ N) - log p(y ≤ N | x) - log p(N + 1 | G(z, c)), each a mean over its images."""
        return terms["supervised_loss"] + self.gan.weight * (terms["real_loss"] + terms["fake_loss"])

    def generator_loss(self, logits: Logits, fakes: Tensor) -> Tensor:
        """L_G = -log p(y ≤ N | G(z, c)), whose gradient reaches the fakes alone, not what the logits are made of."""

        def loss(x: Tensor) -> Tensor:
            return F.softplus(-realness(logits(x))).mean()

        return of_inputs_alone(loss, fakes)

    def objective(self, logits: Logits, task: Task) -> tuple[Any, ...]:
        """One task's part of both players' losses, by the task's discriminator: see ``MetaLearner.objective``.

        Parameters of each player get the gradient of their own loss, so one meta-update moves both at once.
        """
        fakes, divergence = self(task.support, len(task.query_x))
        terms, prediction = self.discriminator_terms(logits, task, fakes.detach())
        generator_loss = self.generator_loss(logits, fakes)
        loss = self.discriminator_loss(terms) + generator_loss + self.gan.kl_weight * divergence
        metrics = terms | {"generator_loss": generator_loss, "kl": divergence}
        return loss, prediction, {"metrics": {name: value.detach() for name, value in metrics.items()}}


def promoted(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def realness(logits: Tensor) -> Tensor:
    """log p(y ≤ N | x) - log p(N + 1 | x), (n,), of the logits of N classes and of fakes, (n, N + 1)."""
    logits = promoted(logits)
    return logits[:, :-1].logsumexp(-1) - logits[:, -1]
