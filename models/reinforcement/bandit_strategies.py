"""Strategies for Bernoulli bandits that people designed: what a learner of bandits is measured against."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from scipy.special import betaincinv
from torch import Tensor

from datamodules.core.errors import at_least
from datamodules.reinforcement.bandits import BernoulliBandit
from datamodules.reinforcement.environments import Environment, Facts
from models.core.learner import Paper
from models.reinforcement.gittins import gittins_indices
from models.reinforcement.learner import ReinforcementLearner
from models.reinforcement.trials import Seen

BanditStrategies = Literal[
    "random", "greedy", "epsilon-greedy", "ucb1", "thompson", "optimistic-thompson", "likeliest-thompson", "gittins"
]
SAMPLING = ("thompson", "optimistic-thompson", "likeliest-thompson")


class Counts(NamedTuple):
    """What is known of the arms of N bandits: one more than the successes and failures, of a prior uniform in [0, 1].

    Attributes:
        successes, failures: (N, arms) float64; their parameters of the Beta distribution.
    """

    successes: Tensor
    failures: Tensor

    @property
    def pulls(self) -> Tensor:
        """With those of the prior, (N, arms)."""
        return self.successes + self.failures

    @property
    def mean(self) -> Tensor:
        return self.successes / self.pulls

    def sample(self, draws: Tensor) -> Tensor:
        """Of what the arms may pay, (…, N, arms), from uniform numbers of that shape."""
        parameters = (t.expand_as(draws).cpu().numpy() for t in self)
        return torch.from_numpy(betaincinv(*parameters, draws.cpu().numpy())).to(draws)

    def log_density(self, pays: Tensor) -> Tensor:
        """Of what the arms of each bandit may pay together, but for a constant: (…, N, arms) to (…, N)."""
        return (torch.xlogy(self.successes - 1, pays) + torch.xlogy(self.failures - 1, 1 - pays)).sum(-1)


class BanditAgent:
    """Counts successes and failures, and pulls the arm that a strategy prefers."""

    def __init__(self, learner: BanditStrategy) -> None:
        self.learner = learner
        samples = learner.samples if learner.strategy == "likeliest-thompson" else 1
        # Which of equals, whether to explore, and what the arms may pay.
        self.draws = 2 + (samples * learner.arms if learner.strategy in SAMPLING else 0)

    def begin(self, environment: Environment, task: Facts) -> Counts:
        ones = torch.ones_like(task["arms"], dtype=torch.float64)
        return Counts(ones, ones)

    def act(self, memory: Counts, seen: Seen, draws: Tensor) -> tuple[Counts, Tensor, Any]:
        pulled, paid = seen.action.double(), seen.reward.double()[:, None]
        memory = Counts(memory.successes + pulled * paid, memory.failures + pulled * (1 - paid))
        preference = self.learner.preference(memory, draws[:, 2:])
        if self.learner.strategy == "epsilon-greedy":
            preference = preference.masked_fill(draws[:, 1:2] < self.learner.epsilon, 0.0)
        among_equals = torch.zeros_like(draws[:, 0]) if self.learner.first_of_equals else draws[:, 0]
        return memory, choose(preference, among_equals), ()


class BanditStrategy(ReinforcementLearner):
    """Has nothing to train: it is evaluated as it is, with ``--stage test``.

    Every strategy starts from a uniform prior, which counts as a success and a failure of each arm.

    Args:
        actions: arms.
        strategy: "random", any arm. "greedy", the largest posterior mean. "epsilon-greedy", the same, but any arm with
            probability ``epsilon``. "ucb1", the largest mean + scale · sqrt(2 log t / pulls) at pull t (Auer,
            Cesa-Bianchi and Fischer, 2002, figure 1, where scale is 1). "thompson", the largest of a sample from the
            posterior (Thompson, Biometrika 1933). "optimistic-thompson", the same, but no sample counts for less than
            its mean (May et al., JMLR 2012, section 3). "likeliest-thompson", the largest of that one of ``samples``
            samples whose density is highest, which RL² calls optimistic (Duan et al., 2016, section 3.1). "gittins",
            the largest Gittins index, the best there is for discounted pulls without end (Gittins, 1979).
        epsilon, scale, samples: of these.
        discount: γ of the Gittins index.
        first_of_equals: of arms preferred alike pull the first, as the released code of RL² does, not any of them; that
            is the same for samples, but "greedy" explores less.
    """

    paper = Paper(
        "Auer, Cesa-Bianchi and Fischer",
        "Finite-time Analysis of the Multiarmed Bandit Problem",
        "Machine Learning",
        2002,
        "https://doi.org/10.1023/A:1013689704352",
    )

    def __init__(
        self,
        actions: int,
        strategy: BanditStrategies,
        epsilon: float = 0.1,
        scale: float = 0.2,
        samples: int = 10,
        discount: float = 0.99,
        first_of_equals: bool = False,
    ) -> None:
        super().__init__(actions=actions)
        at_least(1, actions=actions, samples=samples)
        if not (0 <= epsilon <= 1 and 0 <= discount < 1):
            raise ValueError(f"epsilon is {epsilon} and discount {discount}, but they must be in [0, 1] and in [0, 1)")
        self.arms = actions
        self.strategy: BanditStrategies = strategy
        self.epsilon, self.scale, self.samples, self.discount = epsilon, scale, samples, discount
        self.first_of_equals = first_of_equals

    def agent(self) -> BanditAgent:
        return BanditAgent(self)

    def check_environment(self, environment: Environment) -> str | None:
        if not isinstance(environment, BernoulliBandit):
            return "BanditStrategy pulls arms that pay or do not: give --data datamodules.Bandits or another learner"
        return super().check_environment(environment)

    def preference(self, counts: Counts, draws: Tensor) -> Tensor:
        """How much a strategy would pull each arm, (N, arms), from uniform numbers (N, arms), or more, or none."""
        match self.strategy:
            case "random":
                return torch.zeros_like(counts.mean)
            case "greedy" | "epsilon-greedy":
                return counts.mean
            case "ucb1":
                pull = counts.pulls.sum(1, keepdim=True) - 2 * self.arms + 1
                return counts.mean + self.scale * (2 * pull.log() / counts.pulls).sqrt()
            case "thompson":
                return counts.sample(draws)
            case "optimistic-thompson":
                return torch.maximum(counts.sample(draws), counts.mean)
            case "likeliest-thompson":
                samples = counts.sample(draws.unflatten(1, (self.samples, self.arms)).transpose(0, 1))
                likeliest = counts.log_density(samples).argmax(0)
                return samples[likeliest, torch.arange(len(likeliest), device=draws.device)]
            case "gittins":
                successes, failures = (count.long() - 1 for count in counts)
                pulls, known = int((successes + failures).sum(1).max()), 100
                while known < pulls:
                    known *= 10
                return gittins_indices(self.discount, known).to(draws.device)[successes, failures]


def choose(values: Tensor, draws: Tensor, tolerance: float = 0.0) -> Tensor:
    """One of the largest values of each row, all of them as likely.

    Args:
        values: (N, K).
        draws: uniform numbers (N,).
        tolerance: values this close to the largest count as equal to it.

    Returns:
        Places (N,) int64.
    """
    largest = values >= values.amax(1, keepdim=True) - tolerance
    which = (draws * largest.sum(1)).long()
    return (largest & (largest.cumsum(1) == which[:, None] + 1)).int().argmax(1)
