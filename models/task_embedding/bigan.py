"""A bidirectional GAN of sets: an encoder from sets to codes and a generator back, learned by one game."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad

from datamodules.core.episodes import Support, Task
from datamodules.core.errors import at_least
from datamodules.core.metric import Metric
from models.core.embedding_learner import EmbeddingLearner
from models.core.inner_loop import class_means
from models.core.learner import Paper
from models.core.two_players import of_inputs_alone
from models.networks.backbones import Backbone
from models.networks.batch_norm import normalize_by, recording
from models.networks.gaussians import Gaussian, standard_normal
from models.networks.generator import Generator

SEED = 0  # of all draws that are not to change


class DenseGenerator(nn.Module):
    """Vectors (n, inputs) to examples (n, outputs): dense layers with ReLU between them."""

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise([inputs, *hidden, outputs]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class PairDiscriminator(nn.Module):
    """D: a set together with a code, to the logit that the set is real and the code is the encoder's.

    Each example by itself goes through convolutions of stride 2, or none where it is a vector, and a dense layer; the
    mean over the set, and the code, go through two more. Without batch norm, so that no pair depends on another.

    Args:
        shape: of an example.
        widths: channels of the convolutions.
        hidden: width of the dense layers.
        codes: dimensions of a code.
    """

    def __init__(self, shape: tuple[int, ...], widths: Sequence[int], hidden: int, codes: int) -> None:
        super().__init__()
        channels, features = [shape[0], *widths], shape[0]
        self.convs = nn.ModuleList()
        if len(shape) == 3:
            self.convs.extend(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(channels))
            features = channels[-1] * int(np.prod([-(-side // 2 ** len(widths)) for side in shape[1:]]))
        self.instance = nn.Sequential(nn.Linear(features, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, hidden))
        self.pair = nn.Sequential(
            nn.Linear(hidden + codes, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, hidden), nn.LeakyReLU(0.2)
        )
        self.last = nn.Linear(hidden, 1)

    def forward(self, sets: Support, codes: Tensor) -> Tensor:
        """Logits (sets,) of sets with their codes (sets, codes)."""
        x = sets.x
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
        pooled = class_means(F.leaky_relu(self.instance(x.flatten(1)), 0.2), sets)
        logits = self.last(self.pair(torch.cat([pooled, codes.to(pooled.dtype)], -1))).squeeze(-1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class BiGAN(EmbeddingLearner):
    """Learns what tells one set from another by a game of three: E encodes sets, G makes sets, D tells pairs apart.

    Pairs are real sets with codes of E's, (D, c ~ q(c | D)), and G's sets with the codes that they were made of,
    (G(c), c ~ N(0, I)). Where D cannot tell them apart their joint distributions are one, and q(c | D) is the posterior
    of the code under G: E inverts G. Donahue et al. and Dumoulin et al. (ICLR 2017) have single images in the place of
    sets; that E pools a set by its mean, and that G makes each of a set's examples of the code and of noise of its
    own, is this project's design.

    A class is a set, as in the Neural Statistician, and queries are classified as there: by the class k of the least
    KL(q(c | D_k) ‖ q(c | x)).

    Args:
        backbone: of the encoder, on each example by itself.
        codes: dimensions of c.
        noise: dimensions of the noise of each example that is generated.
        hidden: width of dense layers.
        widths: channels of the discriminator's convolutions, and of the generator's, the last one first; images alone.
        dense: widths of the generator's hidden layers; vectors alone.
        penalty: γ, of half the squared gradient of D's logit by a real pair, in D's loss (R1; Mescheder et al., ICML
            2018), without which D wins before the others have learned; 0 leaves it out.
        stochastic: draw codes and noise anew at every training step; False draws the same ones at every step.
        **others: see EmbeddingLearner.
    """

    paper = Paper(
        "Donahue, Krähenbühl and Darrell",
        "Adversarial Feature Learning",
        "ICLR",
        2017,
        "https://arxiv.org/abs/1605.09782",
    )
    own_metrics = {
        "discriminator_loss": Metric(label="discriminator's loss (nats)"),
        "generator_loss": Metric(label="encoder's and generator's loss (nats)"),
        "cycle_error": Metric("lower", "squared error of E(G(c)), per dimension"),
    }

    def __init__(
        self,
        backbone: Backbone,
        codes: int = 64,
        noise: int = 16,
        hidden: int = 256,
        widths: Sequence[int] = (32, 64),
        dense: Sequence[int] = (64, 64),
        penalty: float = 1.0,
        stochastic: bool = True,
        **others: Any,
    ) -> None:
        super().__init__(backbone, **others)
        at_least(0, penalty=penalty)
        at_least(1, codes=codes, noise=noise, hidden=hidden, **{f"widths[{i}]": w for i, w in enumerate(widths)})
        shape = backbone.input_shape
        self.encoder = DenseGenerator(backbone.out_features, [hidden], 2 * codes)
        if len(shape) == 3:
            self.generator = Generator(shape, list(widths), codes + noise)
        else:
            self.generator = DenseGenerator(codes + noise, dense, shape[0])
        self.discriminator = PairDiscriminator(shape, widths, hidden, codes)
        self.codes, self.noise, self.penalty, self.stochastic = codes, noise, penalty, stochastic

    @property
    def embedding_size(self) -> int:
        return self.codes

    def encode(self, pooled: Tensor) -> Gaussian:
        """q(c | D), (sets, codes), of the mean features of sets."""
        return Gaussian.of(self.encoder(pooled))

    def summarize(self, z: Tensor, support: Support) -> Gaussian:
        return self.encode(class_means(z, support))

    def compare(self, summary: Gaussian, z: Tensor) -> Tensor:
        return -summary.kl(self.encode(z)[:, None])

    def embed_task(self, support: Support) -> Tensor:
        """The mean of q(c | D), (codes,), D being all of the support set."""
        with normalize_by(self.statistics_source):
            return self.encode(self.embed(support.x).mean(0, keepdim=True)).mean[0]

    def generate(self, codes: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """An example (n, *input) of each code (n, codes), with noise of its own."""
        noise = standard_normal(codes.new_zeros(len(codes), self.noise), rng)
        return self.generator(torch.cat([codes, noise], -1))

    def steepness(self, real: Support, code: Tensor) -> Tensor:
        """Half the squared gradient of D's logit by a real pair, a mean over sets."""

        def logits(x: Tensor, code: Tensor) -> Tensor:
            return self.discriminator(Support(x, real.y, real.ways), code).sum()

        of_x, of_code = grad(logits, (0, 1))(real.x, code)
        return (of_x.square().sum() + of_code.square().sum()) / (2 * real.ways)

    def objective(self, task: Task) -> tuple[Any, ...]:
        support, shots = task.support, len(task.support.y)
        y = torch.cat([support.y, task.query_y])
        rng = None if self.stochastic else np.random.default_rng(SEED)
        real = Support(torch.cat([support.x, task.query_x]), y, support.ways)
        with normalize_by(self.statistics_source):
            z = self.embed(real.x)
            q = self.summarize(z, real)
        code = q.sample(standard_normal(q.mean, rng))
        drawn = standard_normal(q.mean, rng)
        made = self.generate(drawn[y], rng).to(real.x.dtype)

        def discriminator_loss(code: Tensor, made: Tensor) -> Tensor:
            of_real, of_fake = self.discriminator(real, code), self.discriminator(Support(made, y, real.ways), drawn)
            return F.softplus(-of_real).mean() + F.softplus(of_fake).mean()

        def generator_loss(code: Tensor, made: Tensor) -> Tensor:
            of_real, of_fake = self.discriminator(real, code), self.discriminator(Support(made, y, real.ways), drawn)
            return F.softplus(of_real).mean() + F.softplus(-of_fake).mean()

        of_d = discriminator_loss(code.detach(), made.detach())
        of_g = of_inputs_alone(generator_loss, code, made)
        penalty = self.penalty * self.steepness(real, code.detach()) if self.penalty else 0.0
        with torch.no_grad(), recording(None), normalize_by(self.statistics_source):
            prediction = self.compare(self.summarize(z[:shots], support), z[shots:])
            again = self.summarize(self.embed(made), Support(made, y, real.ways))
            cycle_error = (again.mean - drawn).square().mean()
        metrics = {"discriminator_loss": of_d.detach(), "generator_loss": of_g.detach(), "cycle_error": cycle_error}
        return of_d + of_g + penalty, prediction, {"metrics": metrics}

    def generated_images(self, support: Support, count: int) -> Tensor | None:
        """Of the classes in turn: G of the mean of q(c | D_k), with noise that is the same at every call."""
        if len(support.x.shape) != 4:
            return None
        with normalize_by(self.statistics_source):
            codes = self.summarize(self.embed(support.x), support).mean
        turn = torch.arange(count, device=codes.device) % support.ways
        return self.generate(codes[turn], np.random.default_rng(SEED)).to(support.x.dtype)
