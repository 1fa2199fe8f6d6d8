"""How well a support set tells a function's family at all: python -m benchmarks.family_ceiling

Of the five families of MMAML's benchmark (``datamodules.FiveFamily``): the classifier that knows the families' law and
the noise, and gives a support set to the family that most likely made it. A line of small slope, a flat parabola and a
tanh of small scale are the same function but for the noise, so no embedding can tell families of all tasks; its
accuracy is the most that a probe of any embedding can have. Each family's likelihood is a mean over parameters drawn
from its law, with a confidence interval over tasks.
"""

from __future__ import annotations

import argparse
import math

import torch

from benchmarks.console import wide_console
from datamodules import FiveFamily
from datamodules.core.streams import TaskStreams
from datamodules.regression.functions import MODES, FiveFamilies
from models.core.metrics import interval


def likelihoods(x: torch.Tensor, y: torch.Tensor, noise: float, draws: int, seed: int = 1) -> torch.Tensor:
    """log p(y | x, family) up to a constant of each task (T, N) by each family, (T, families)."""
    found = torch.empty(len(x), len(MODES), dtype=torch.float64)
    for number, mode in enumerate(MODES):
        law = FiveFamilies([mode], 0.0)
        drawn = law.parameters(TaskStreams(seed, "train", range(draws)))
        task = {name: torch.from_numpy(values)[None] for name, values in drawn.items()}
        for place, (of_x, of_y) in enumerate(zip(x.double(), y.double(), strict=True)):
            values = law.function(task, of_x[None, None, :, None].expand(1, draws, -1, 1))[0, ..., 0]
            squared = (values - of_y).square().sum(1)
            found[place, number] = (-squared / (2 * noise**2)).logsumexp(0) - math.log(draws)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--shots", type=int, default=10)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=200_000, help="of parameters, for each family")
    args = parser.parse_args()
    data = FiveFamily(shots=args.shots)
    noise = data.distribution("test").family.noise  # pyright: ignore[reportAttributeAccessIssue]
    tasks = data.distribution("test").sample(range(args.tasks))
    told = likelihoods(tasks.support_x[..., 0], tasks.support_y[..., 0], noise, args.draws).argmax(1)
    family = tasks.task["family"]
    console = wide_console()
    for name, of in (("all", family >= 0), *((mode, family == k) for k, mode in enumerate(MODES))):
        mean, half = interval((told == family)[of].float())
        console.print(f"{name:10} {100 * mean:6.2f} ± {100 * half:.2f} % of {int(of.sum())} tasks", highlight=False)


if __name__ == "__main__":
    main()
