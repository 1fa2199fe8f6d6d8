"""The Neural Statistician on sets of scalars of four families: python -m benchmarks.scalar_sets

Sets of 200 numbers, each set from an exponential, Gaussian, uniform or Laplace distribution (Edwards and Storkey
2017, section 5.1), with a mean from U[-1, 1] and a variance from U[0.5, 2]. The reference code takes the second
number for a variance of the first and third family and for a scale of the others; here it is the variance of all
four. Such a set has neither labels nor queries to predict, and is of none of the kinds of task that runs know. What
a context of three dimensions has learned of it is told by linear probes: family by logistic regression, mean and
variance by least squares.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression
from torch import Tensor
from torch.optim import Adam

from datamodules.core.episodes import Support, Task
from models import MLP, NeuralStatistician

FAMILIES = ("exponential", "gaussian", "uniform", "laplace")
EXAMPLES = 200  # of a set
CLIP = 0.5  # of every gradient's values


def scalar_sets(count: int, rng: np.random.Generator, examples: int = EXAMPLES) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Sets (count · examples, 1), one after the other, and of each its family, mean and variance, (count,)."""
    family, mean, variance = rng.integers(4, size=count), rng.uniform(-1, 1, count), rng.uniform(0.5, 2, count)
    size = (count, examples)
    standard = np.stack(
        [
            rng.exponential(1, size) - 1,
            rng.normal(0, 1, size),
            rng.uniform(-(3**0.5), 3**0.5, size),
            rng.laplace(0, 0.5**0.5, size),
        ]
    )[family, np.arange(count)]  # of mean 0 and variance 1, all of them
    x = mean[:, None] + variance[:, None] ** 0.5 * standard
    facts = {"family": family, "mean": mean, "variance": variance}
    return torch.from_numpy(x).float().view(-1, 1), facts


def labels(count: int, examples: int = EXAMPLES) -> Tensor:
    return torch.arange(count).repeat_interleave(examples)


def statistician() -> NeuralStatistician:
    """As published but for the networks' depth and batch norm: 3 dimensions of c, 32 of z, width 128."""
    return NeuralStatistician(MLP(1, [128, 128]), context=3, latents=32, hidden=128, layers=2, alpha=0)


def train(learner: NeuralStatistician, steps: int, rng: np.random.Generator, batch: int = 16) -> None:
    """By Adam at 0.001, on new sets at every step; gradients are clipped by value."""
    optimizer, y = Adam(learner.parameters(), 1e-3), labels(batch)
    first = torch.arange(len(y)) % EXAMPLES == 0
    for _ in range(steps):
        x, _ = scalar_sets(batch, rng)
        optimizer.zero_grad()
        learner.objective(Task(Support(x[first], y[first], batch), x[~first], y[~first]))[0].backward()
        torch.nn.utils.clip_grad_value_(learner.parameters(), CLIP)
        optimizer.step()


def probe(
    codes: np.ndarray, facts: dict[str, np.ndarray], codes_too: np.ndarray, too: dict[str, np.ndarray]
) -> dict[str, float]:
    """What linear maps of codes (sets, d), fitted on the first, tell of the second: accuracy, and R² of the moments."""
    found = {"family": LogisticRegression(max_iter=2000).fit(codes, facts["family"]).score(codes_too, too["family"])}
    for name in ("mean", "variance"):
        found[name] = LinearRegression().fit(codes, facts[name]).score(codes_too, too[name])
    return {name: float(value) for name, value in found.items()}


@torch.no_grad()
def contexts(learner: NeuralStatistician, x: Tensor, count: int) -> np.ndarray:
    """Means of q(c | D), (sets, 3), batch norm by these sets themselves."""
    return learner.summarize(learner.embed(x), Support(x, labels(count), count)).mean.numpy()


def measure(learner: NeuralStatistician, count: int = 1000) -> dict[str, float]:
    """The probes of contexts, on new sets."""
    rng = np.random.default_rng(1)
    (x, facts), (x_too, too) = scalar_sets(count, rng), scalar_sets(count, rng)
    return probe(contexts(learner, x, count), facts, contexts(learner, x_too, count), too)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    learner, begin = statistician(), time.process_time()
    print("steps, family (accuracy), mean (R²), variance (R²), seconds")
    for steps in (0, args.steps):
        train(learner, steps, np.random.default_rng(args.seed))
        found = ", ".join(f"{value:.3f}" for value in measure(learner).values())
        print(f"{steps}, {found}, {time.process_time() - begin:.0f}")


if __name__ == "__main__":
    main()
