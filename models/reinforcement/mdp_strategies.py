"""Strategies for tabular Markov decision processes that people designed, which know how these are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from datamodules.core.errors import at_least
from datamodules.core.streams import TaskStreams
from datamodules.reinforcement.environments import Environment, Facts, normal
from datamodules.reinforcement.mdps import TabularMDP, plan
from models.core.learner import Paper
from models.reinforcement.bandit_strategies import choose
from models.reinforcement.learner import ReinforcementLearner
from models.reinforcement.trials import Seen

MDPStrategies = Literal[
    "random", "greedy", "epsilon-greedy", "psrl", "optimistic-psrl", "ucrl2", "beb", "value-iteration"
]
ROUNDING = 1e-9  # values of actions this close are equal: sums differ by how many processes are computed together


class Step(NamedTuple):
    """A step of N processes, each part (N,): the state, the action, the state that it led to, int64; the reward."""

    state: Tensor
    action: Tensor
    reached: Tensor
    reward: Tensor


class Posterior:
    """What steps tell of N processes: transitions from Dirichlet(w, …, w), rewards N(mean, 1), means N(m, 1 / w).

    Args:
        steps: of all episodes so far.
        tasks, states, actions: their numbers N, S and A.
        device: where to compute.
        prior_mean, prior_weight: m and w.

    Attributes:
        cells: of each step, its transition as a place in (S · A · S), (N, steps) int64.
        counts: of each transition, (N, S, A, S) float64.
        visits: of each state and action, (N, S, A).
        rewards: their sums, (N, S, A).
    """

    def __init__(
        self,
        steps: Sequence[Step],
        tasks: int,
        states: int,
        actions: int,
        device: torch.device,
        prior_mean: float = 1.0,
        prior_weight: float = 1.0,
    ) -> None:
        def total(size: int, at: Tensor, values: Tensor) -> Tensor:
            return torch.zeros(tasks, size, dtype=torch.float64, device=device).scatter_add_(1, at, values.double())

        empty = torch.empty(tasks, 0, dtype=torch.int64, device=device)
        parts = [torch.stack(part, 1) for part in zip(*steps, strict=True)] or [empty] * 4
        state, action, reached, reward = parts
        pairs = state * actions + action
        self.prior_mean, self.prior_weight = prior_mean, prior_weight
        self.cells = pairs * states + reached
        self.counts = total(states * actions * states, self.cells, torch.ones_like(self.cells))
        self.counts = self.counts.view(tasks, states, actions, states)
        self.visits = self.counts.sum(-1)
        self.rewards = total(states * actions, pairs, reward).view(tasks, states, actions)

    def mean(self) -> tuple[Tensor, Tensor]:
        """Transitions (N, S, A, S) and mean rewards (N, S, A) to expect."""
        weight, weights = self.prior_weight, self.prior_weight * self.counts.shape[-1]
        transitions = (weight + self.counts) / (weights + self.visits[..., None])
        return transitions, (weight * self.prior_mean + self.rewards) / (weight + self.visits)

    def sample(self, streams: TaskStreams) -> tuple[Tensor, Tensor]:
        """Transitions and mean rewards as they may be, of the same shapes, where the prior's weight is 1."""
        assert self.prior_weight == 1

        def uniform(size: int) -> Tensor:
            return torch.from_numpy(streams.uniform(0.0, 1.0, size)).to(self.counts.device)

        # Gamma(1 + n) is a sum of 1 + n exponential numbers: one of each cell, and one of each step that went there.
        prior, observed = -(-uniform(self.counts[0].numel())).log1p(), -(-uniform(self.cells.shape[1])).log1p()
        gamma = prior.scatter_add(1, self.cells, observed).view_as(self.counts)
        deviation = (1 + self.visits).rsqrt() * normal(uniform(self.visits[0].numel())).view_as(self.visits)
        return gamma / gamma.sum(-1, keepdim=True), self.mean()[1] + deviation


class Memory(NamedTuple):
    """Of a trial: the steps so far, the state that the next is from, and the actions' values (N, H, S, A)."""

    horizon: int
    steps: tuple[Step, ...] = ()
    state: Tensor | None = None
    values: Tensor | None = None


class MDPAgent:
    """Plans at the start of each episode, and takes actions of the highest value; chance decides among equals."""

    draws = 2  # which of equals; whether to explore, or the seed of what a plan draws

    def __init__(self, learner: MDPStrategy) -> None:
        self.learner = learner

    def begin(self, environment: Environment, task: Facts) -> Memory:
        if self.learner.strategy != "value-iteration":
            return Memory(environment.horizon)
        values = plan(task["transitions"].double(), task["rewards"].double(), environment.horizon)[1]
        return Memory(environment.horizon, values=values)

    def act(self, memory: Memory, seen: Seen, draws: Tensor) -> tuple[Memory, Tensor, Any]:
        states, strategy = self.learner.states, self.learner.strategy
        horizon, steps, last, values = memory
        if last is not None:
            reached = seen.reached[:, :states].argmax(1)
            steps = (*steps, Step(last, seen.action.argmax(1), reached, seen.reward))
        state, at = seen.observation[:, :states].argmax(1), len(steps) % horizon
        if values is None or (at == 0 and strategy not in ("random", "value-iteration")):
            values = self.learner.plan(steps, horizon, draws[:, 1])
        preference = values[torch.arange(len(state), device=state.device), at, state]
        if strategy == "epsilon-greedy":
            preference = preference.masked_fill(draws[:, 1:] < self.learner.epsilon, 0.0)
        return Memory(horizon, steps, state, values), choose(preference, draws[:, 0], ROUNDING), ()


class MDPStrategy(ReinforcementLearner):
    """Has nothing to train: it is evaluated as it is, with ``--stage test``.

    Args:
        observations, actions: numbers of states and actions, S and A.
        strategy: "random". "greedy", optimal for the posterior mean. "epsilon-greedy", the same, but any action with
            probability ``epsilon``. "psrl", posterior sampling: optimal for one sample of the posterior (Osband, Russo
            and Van Roy, NeurIPS 2013). "optimistic-psrl": by the highest value of each action in so many ``samples``
            (Osband and Van Roy, ICML 2017, section 6). "ucrl2": optimal for the best process within the confidence
            region (Jaksch, Ortner and Auer, JMLR 2010), for episodes. "beb", optimal for the posterior mean with
            scale / (S prior_weight + visits) added to the rewards (Kolter and Ng, ICML 2009). "value-iteration",
            optimal for the process as it is: an oracle.
        epsilon, samples: of these.
        scale: of the bonus, or of the radii of UCRL2's region, √(4 log(2SA(k + 1)/δ) / visits) in episode k and √S
            times that for transitions, which are TabulaRL's for episodes of a fixed horizon.
        confidence: δ of UCRL2.
        prior_mean: of rewards; 1 is how the tasks are drawn, but what RL² compares with has 0.
        prior_weight: of the prior, in observations; 1 is how the tasks are drawn, but what RL² compares with has 0.0001
            for "greedy" and "epsilon-greedy". "ucrl2" goes by what it saw alone.
    """

    paper = Paper(
        "Osband and Van Roy",
        "Why is Posterior Sampling Better than Optimism for Reinforcement Learning?",
        "ICML",
        2017,
        "https://arxiv.org/abs/1607.00215",
    )

    def __init__(
        self,
        observations: int,
        actions: int,
        strategy: MDPStrategies,
        epsilon: float = 0.1,
        samples: int = 10,
        scale: float = 0.1,
        confidence: float = 0.05,
        prior_mean: float = 1.0,
        prior_weight: float = 1.0,
    ) -> None:
        super().__init__(observations, actions)
        at_least(1, observations=observations, actions=actions, samples=samples)
        if not (0 <= epsilon <= 1 and 0 < confidence < 1):
            raise ValueError(f"epsilon is {epsilon} and confidence {confidence}, but they must be in [0, 1] and (0, 1)")
        if not prior_weight > 0:
            raise ValueError(f"prior_weight is {prior_weight} but must be above 0")
        if strategy.endswith("psrl") and prior_weight != 1:
            raise ValueError(f"{strategy} samples from a prior of weight 1: leave prior_weight {prior_weight} out")
        self.states, self.choices = observations, actions
        self.prior_mean, self.prior_weight = prior_mean, prior_weight
        self.strategy: MDPStrategies = strategy
        self.epsilon, self.samples, self.scale, self.confidence = epsilon, samples, scale, confidence

    def agent(self) -> MDPAgent:
        return MDPAgent(self)

    def check_environment(self, environment: Environment) -> str | None:
        if not isinstance(environment, TabularMDP):
            return "MDPStrategy plans in tables: give --data datamodules.TabularMDPs or another learner"
        if environment.revealed:
            return "MDPStrategy does not look at what is revealed: leave --data.init_args.revealed out"
        return super().check_environment(environment)

    def plan(self, steps: Sequence[Step], horizon: int, draws: Tensor) -> Tensor:
        """Values of actions in the next episode, (N, H, S, A), after so many steps; draws (N,) seed what is drawn."""
        prior = (self.prior_mean, self.prior_weight)
        posterior = Posterior(steps, len(draws), self.states, self.choices, draws.device, *prior)
        match self.strategy:
            case "psrl" | "optimistic-psrl":
                streams = TaskStreams(0, "test", (draws * 2**53).long().cpu().numpy())
                values = plan(*posterior.sample(streams), horizon)[1]
                for _ in range(1, self.samples if self.strategy == "optimistic-psrl" else 1):
                    values = torch.maximum(values, plan(*posterior.sample(streams), horizon)[1])
                return values
            case "ucrl2":
                visits = posterior.visits.clamp(min=1)
                share = 2 * self.states * self.choices * (len(steps) // horizon + 2) / self.confidence
                of_rewards = self.scale * (4 * torch.as_tensor(share).log() / visits).sqrt()
                # What was never seen leads anywhere alike.
                seen = posterior.visits[..., None] > 0
                near = torch.where(seen, posterior.counts / visits[..., None], 1 / self.states)
                rewards = posterior.rewards / visits
                radius = self.states**0.5 * of_rewards
                return plan(lambda values: optimistic(near, radius, values), rewards + of_rewards, horizon)[1]
            case "random":
                return torch.zeros_like(posterior.visits)[:, None].expand(-1, horizon, -1, -1)
            case _:
                transitions, rewards = posterior.mean()
                bonus = self.scale / (self.states * self.prior_weight + posterior.visits)
                bonus = bonus if self.strategy == "beb" else 0.0
                return plan(transitions, rewards + bonus, horizon)[1]


def optimistic(near: Tensor, radius: Tensor, values: Tensor) -> Tensor:
    """The highest expected value within a distance of transitions (Jaksch et al., 2010, figure 2), (N, S, A).

    Args:
        near: probabilities (N, S, A, S).
        radius: how far from them in all, the sum of absolute differences, (N, S, A).
        values: of the states, (N, S).
    """
    ordered, best_first = values.sort(dim=-1, descending=True)
    p = near.gather(-1, best_first[:, None, None].expand_as(near))
    p = torch.cat([(p[..., :1] + radius[..., None] / 2).clamp(max=1), p[..., 1:]], -1)
    before = p.cumsum(-1) - p
    # More at the best state; the worst ones give it up.
    return (torch.minimum(p, (1 - before).clamp(min=0)) * ordered[:, None, None]).sum(-1)
