"""Codes of sets on a family whose posterior is known: python -m benchmarks.set_codes

Sets of vectors, c ~ N(0, 1) and x | c ~ N(W c, σ²I). BiGAN and the Neural Statistician learn a code of one dimension
from the sets alone, and are compared with the exact posterior of c, whose sign alone is theirs to choose.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from datamodules.core.episodes import Support, Task
from models import MLP, BiGAN, NeuralStatistician

EXAMPLES = 4  # of a set
DIRECTION = torch.tensor([1.2, -0.8])  # W
NOISE = 0.5  # σ
PRECISION = (1 + EXAMPLES / NOISE**2 * DIRECTION.square().sum()).item()  # of the exact posterior


def sets(count: int, generator: torch.Generator) -> Support:
    """So many sets of the family."""
    y = torch.arange(count).repeat_interleave(EXAMPLES)
    c = torch.randn(count, 1, generator=generator)
    return Support(c[y] * DIRECTION + NOISE * torch.randn(len(y), 2, generator=generator), y, count)


def posterior_mean(x: Tensor) -> Tensor:
    """Of c, (sets, 1), exact."""
    means = x.view(-1, EXAMPLES, 2).mean(1)
    return EXAMPLES / NOISE**2 / PRECISION * (means @ DIRECTION)[:, None]


def bigan() -> BiGAN:
    return BiGAN(MLP(2, []), codes=1, noise=2, hidden=32, dense=[], batch_norm="none")


def statistician() -> NeuralStatistician:
    return NeuralStatistician(MLP(2, []), context=1, latents=1, hidden=32, layers=1, alpha=0)


def train(learner: BiGAN | NeuralStatistician, steps: int, rate: float, seed: int = 0, batch: int = 64) -> None:
    """By Adam at a rate that falls by a cosine, on new sets at every step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = Adam(learner.parameters(), rate, betas=(0.5, 0.99))
    schedule = CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        new = sets(batch, generator)
        first = torch.arange(len(new.y)) % EXAMPLES == 0
        task = Task(Support(new.x[first], new.y[first], batch), new.x[~first], new.y[~first])
        optimizer.zero_grad()
        learner.objective(task)[0].backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def measure(learner: BiGAN | NeuralStatistician, count: int = 2000, seed: int = 1) -> dict[str, float]:
    """The code's mean beside the exact posterior's: correlation and root mean square; deviation; E(G(c)) beside c."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    new = sets(count, generator)
    q = learner.summarize(learner.embed(new.x), new)
    exact = posterior_mean(new.x)
    sign = (exact * q.mean).sum().sign()
    c = torch.randn(count, 1, generator=generator)
    made = learner.generate(c[new.y])
    again = learner.summarize(learner.embed(made), Support(made, new.y, count)).mean
    return {
        "correlation": (sign * torch.corrcoef(torch.cat([q.mean, exact], 1).T)[0, 1]).item(),
        "posterior_error": (sign * q.mean - exact).square().mean().sqrt().item(),
        "deviation": (0.5 * q.log_variance).exp().mean().item(),
        "cycle_error": (again - c).square().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"exact: deviation {PRECISION**-0.5:.3f}, cycle error {1 / PRECISION:.3f}; {args.steps} steps")
    for make in (bigan, statistician):
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            learner, begin = make(), time.process_time()
            train(learner, args.steps, 5e-3, seed)
            numbers = ", ".join(f"{name} {value:.3f}" for name, value in measure(learner).items())
            print(f"{type(learner).__name__}, seed {seed}: {numbers}, {time.process_time() - begin:.0f} s")


if __name__ == "__main__":
    main()
