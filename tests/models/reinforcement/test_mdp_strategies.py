"""Strategies for tabular processes against restatements, enumeration and linear programming."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import linprog

from datamodules import TabularMDPs
from datamodules.core.streams import TaskStreams
from datamodules.reinforcement.mdps import plan
from models import MDPStrategy
from models.reinforcement.mdp_strategies import MDPStrategies, Posterior, Step, optimistic
from models.reinforcement.trials import run_trial

STATES, ACTIONS, HORIZON, EPISODES, TASKS = 3, 2, 3, 5, 4
KS_LIMIT = 1.95  # Kolmogorov's distance by 1 / sqrt(tasks) that a right sample exceeds once in a thousand


def random_process(rng: np.random.Generator, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    return rng.dirichlet(np.ones(STATES), (*shape, STATES, ACTIONS)), rng.normal(1, 1, (*shape, STATES, ACTIONS))


def backward(transitions: np.ndarray, rewards: np.ndarray, expected: Any = np.dot) -> np.ndarray:
    """Values of actions at each step of an episode, (H, S, A), by loops."""
    values, of_actions = np.zeros(STATES), np.zeros((HORIZON, STATES, ACTIONS))
    for h in reversed(range(HORIZON)):
        for s, a in itertools.product(range(STATES), range(ACTIONS)):
            of_actions[h, s, a] = rewards[s, a] + expected(transitions[s, a], values)
        values = of_actions[h].max(1)
    return of_actions


def test_value_iteration_is_the_best_of_all_policies():
    """Catches a plan for another horizon, or of values that belong to another step or state."""
    rng = np.random.default_rng(0)
    states, horizon = 2, 3
    transitions, rewards = rng.dirichlet(np.ones(states), (1, states, 2)), rng.normal(1, 1, (1, states, 2))
    best = np.full(states, -np.inf)
    for policy in itertools.product(range(2), repeat=states * horizon):
        table = np.array(policy).reshape(horizon, states)
        for start in range(states):
            at, total = np.eye(states)[start], 0.0
            for h in range(horizon):
                total += sum(at[s] * rewards[0, s, table[h, s]] for s in range(states))
                at = sum(at[s] * transitions[0, s, table[h, s]] for s in range(states))
            best[start] = max(best[start], total)
    tables = torch.from_numpy(transitions), torch.from_numpy(rewards)
    values, of_actions = plan(*tables, horizon)
    np.testing.assert_allclose(values[0, 0], best, rtol=1e-12)
    np.testing.assert_allclose(of_actions.amax(-1), values[:, :-1], rtol=0)
    told = plan(lambda values: torch.einsum("nsat,nt->nsa", tables[0], values), tables[1], horizon)
    torch.testing.assert_close(told[1], of_actions, rtol=0, atol=0)


def within(near: np.ndarray, radius: float, values: np.ndarray) -> float:
    """The highest expected value of probabilities within a distance of others, as a linear programme."""
    n = len(near)
    above = np.hstack([np.eye(n), -np.eye(n)])  # p - d <= near, and -p - d <= -near: d is how far each is
    below = np.hstack([-np.eye(n), -np.eye(n)])
    total = np.hstack([np.zeros(n), np.ones(n)])
    found = linprog(
        np.hstack([-values, np.zeros(n)]),
        A_ub=np.vstack([above, below, total]),
        b_ub=np.hstack([near, -near, radius]),
        A_eq=np.hstack([np.ones(n), np.zeros(n)])[None],
        b_eq=[1.0],
    )
    assert found.success
    return -found.fun


@pytest.mark.parametrize("radius", [0.0, 0.1, 0.7, 1.9, 5.0])
def test_optimistic_transitions_solve_the_linear_programme(radius):
    """Catches probability that is taken from the wrong states, or more of it than the distance allows."""
    rng = np.random.default_rng(1)
    near, _ = random_process(rng, 3)
    near[0, 0, 0] = [0, 1, 0]
    values = rng.normal(size=(3, STATES))
    radii = torch.full(near.shape[:-1], radius, dtype=torch.float64)
    got = optimistic(torch.from_numpy(near), radii, torch.from_numpy(values))
    for n, s, a in np.ndindex(*got.shape):
        assert got[n, s, a].item() == pytest.approx(within(near[n, s, a], radius, values[n]), abs=1e-9)


class Recount:
    """What was seen in one process, in plain numbers."""

    def __init__(self, steps: list[tuple[int, int, int, float]]) -> None:
        self.steps = steps
        self.counts, self.sums = np.zeros((STATES, ACTIONS, STATES)), np.zeros((STATES, ACTIONS))
        for state, action, reached, reward in steps:
            self.counts[state, action, reached] += 1
            self.sums[state, action] += reward
        self.visits = self.counts.sum(-1)

    def mean(self, prior_mean: float, weight: float) -> tuple[np.ndarray, np.ndarray]:
        transitions = (self.counts + weight) / (self.visits + STATES * weight)[..., None]
        return transitions, (weight * prior_mean + self.sums) / (weight + self.visits)

    def sample(self, uniform: Any, prior_mean: float) -> tuple[np.ndarray, np.ndarray]:
        gamma = np.array([-math.log1p(-u) for u in uniform(self.counts.size)]).reshape(self.counts.shape)
        for (state, action, reached, _), u in zip(self.steps, uniform(len(self.steps)), strict=True):
            gamma[state, action, reached] -= math.log1p(-u)
        normal = stats.norm.ppf(uniform(self.visits.size) + 2.0**-54).reshape(self.visits.shape)
        return gamma / gamma.sum(-1, keepdims=True), self.mean(prior_mean, 1.0)[1] + normal / np.sqrt(1 + self.visits)


SETTINGS = {"epsilon": 0.3, "samples": 3, "scale": 0.2, "confidence": 0.1, "prior_mean": 0.5}


def planned(strategy: str, seen: Recount, episode: int, weight: float, seed: float) -> np.ndarray:
    """Values of actions (H, S, A) that an episode, the first of which is 1, is gone through with."""
    prior_mean, scale = SETTINGS["prior_mean"], SETTINGS["scale"]
    if strategy in ("psrl", "optimistic-psrl"):
        stream = TaskStreams(0, "test", [int(seed * 2**53)])
        samples = SETTINGS["samples"] if strategy == "optimistic-psrl" else 1
        uniform = lambda size: stream.uniform(0.0, 1.0, size)[0]  # noqa: E731
        return np.max([backward(*seen.sample(uniform, prior_mean)) for _ in range(samples)], 0)
    if strategy == "ucrl2":
        bound = math.log(2 * STATES * ACTIONS * (episode + 1) / SETTINGS["confidence"])
        visits = np.maximum(seen.visits, 1)
        near = np.where(seen.visits[..., None] > 0, seen.counts / visits[..., None], 1 / STATES)
        rewards = seen.sums / visits + scale * np.sqrt(4 * bound / visits)
        with_radius = np.concatenate([near, scale * np.sqrt(4 * STATES * bound / visits)[..., None]], -1)
        return backward(with_radius, rewards, lambda row, values: within(row[:-1], row[-1], values))
    transitions, rewards = seen.mean(prior_mean, weight)
    if strategy == "beb":
        rewards = rewards + scale / (STATES * weight + seen.visits)
    return backward(transitions, rewards) if strategy != "random" else np.zeros((HORIZON, STATES, ACTIONS))


@pytest.mark.parametrize("strategy", get_args(MDPStrategies))
def test_acts_as_a_restatement_does(strategy):
    """Catches transitions that are counted for another pair, from the end of an episode to the start of the next, or
    not at all at its end; a plan that is a step or an episode late; a formula that is not the strategy's."""
    weight = 1.0 if strategy.endswith("psrl") else 0.25
    learner = MDPStrategy(STATES, ACTIONS, strategy, prior_weight=weight, **SETTINGS)
    data = TabularMDPs(STATES, ACTIONS, HORIZON, EPISODES)
    batch = data.distribution("test").sample(range(TASKS))
    trial = run_trial(batch, learner.agent())
    chance = batch.draws(EPISODES * HORIZON, learner.agent().draws, purpose=3)
    reached, before = trial.reached.argmax(-1), trial.seen.observation.argmax(-1)
    for task in range(TASKS):
        truth = backward(*(batch.task[name][task].double().numpy() for name in ("transitions", "rewards")))
        steps: list[tuple[int, int, int, float]] = []
        values = truth
        for t in range(EPISODES * HORIZON):
            if t % HORIZON == 0 and strategy != "value-iteration":
                values = planned(strategy, Recount(steps), t // HORIZON + 1, weight, chance[task, t, 1].item())
                told = [Step(*(torch.tensor([part]) for part in step)) for step in steps]
                np.testing.assert_allclose(learner.plan(told, HORIZON, chance[task, t, 1:])[0], values, atol=1e-6)
            state = int(before[t, task])
            preferred = values[t % HORIZON, state]
            if strategy == "epsilon-greedy" and chance[task, t, 1] < SETTINGS["epsilon"]:
                preferred = np.zeros(ACTIONS)
            best = np.flatnonzero(preferred > preferred.max() - 1e-7)
            assert trial.action[t, task] == best[int(chance[task, t, 0] * len(best))], (task, t)
            steps.append((state, int(trial.action[t, task]), int(reached[t, task]), float(trial.reward[t, task])))


def test_posterior_has_every_step_of_the_trial(monkeypatch):
    """Catches a last transition of an episode that is left out, or taken to lead to the next one's start."""
    learner = MDPStrategy(STATES, ACTIONS, "greedy")
    batch = TabularMDPs(STATES, ACTIONS, HORIZON, EPISODES).distribution("test").sample(range(TASKS))
    posteriors = []
    original = learner.plan

    def recorded(steps, horizon, draws):
        posteriors.append(Posterior(steps, TASKS, STATES, ACTIONS, draws.device))
        return original(steps, horizon, draws)

    monkeypatch.setattr(learner, "plan", recorded)
    trial = run_trial(batch, learner.agent())
    assert len(posteriors) == EPISODES
    for episode, posterior in enumerate(posteriors):
        for task in range(TASKS):
            counts = np.zeros((STATES, ACTIONS, STATES))
            sums = np.zeros((STATES, ACTIONS))
            for t in range(episode * HORIZON):
                pair = int(trial.seen.observation[t, task].argmax()), int(trial.action[t, task])
                counts[(*pair, int(trial.reached[t, task].argmax()))] += 1
                sums[pair] += trial.reward[t, task].item()
            np.testing.assert_array_equal(posterior.counts[task], counts)
            np.testing.assert_array_equal(posterior.visits[task], counts.sum(-1))
            np.testing.assert_allclose(posterior.rewards[task], sums, rtol=1e-12)
    # The last state of an episode is not always the first of the next: otherwise the above would tell nothing.
    assert trial.reached[HORIZON - 1 :: HORIZON].argmax(-1).any()


def test_samples_are_of_the_posterior():
    """Catches Dirichlet or normal samples with parameters that are off by one, or that depend on each other."""
    tasks = 4000
    seen = [(0, 1, 2, 3.0)] * 5 + [(0, 1, 0, -1.0)] * 2 + [(2, 0, 1, 0.5)]
    steps = [Step(*(torch.full((tasks,), part) for part in step)) for step in seen]
    posterior = Posterior(steps, tasks, STATES, ACTIONS, torch.device("cpu"))
    transitions, rewards = posterior.sample(TaskStreams(0, "test", np.arange(tasks)))
    recount = Recount(seen)
    np.testing.assert_allclose(transitions.sum(-1), 1, rtol=1e-12)
    limit = KS_LIMIT / math.sqrt(tasks)
    for s, a in itertools.product(range(STATES), range(ACTIONS)):
        parameters = 1 + recount.counts[s, a]
        for t in range(STATES):
            marginal = stats.beta(parameters[t], parameters.sum() - parameters[t])
            assert stats.kstest(transitions[:, s, a, t].numpy(), marginal.cdf).statistic < limit
        spread = 1 / math.sqrt(1 + recount.visits[s, a])
        normal = stats.norm((1 + recount.sums[s, a]) * spread**2, spread)
        assert stats.kstest(rewards[:, s, a].numpy(), normal.cdf).statistic < limit
    both = np.corrcoef(np.stack([transitions[:, 0, 1, 2], transitions[:, 2, 0, 1], rewards[:, 0, 1]]))
    assert np.abs(both[np.triu_indices(3, 1)]).max() < 4 / math.sqrt(tasks)


def test_an_oracle_gets_what_there_is():
    """Catches a plan that is not the process's own: its mean return is the optimum's, and no strategy's is higher."""
    batch = TabularMDPs(episodes=20).distribution("test").sample(range(200))
    optimum = 20 * batch.environment.optimum(batch.task)
    totals = {}
    for strategy in ("value-iteration", "greedy", "random"):
        totals[strategy] = run_trial(batch, MDPStrategy(10, 5, strategy).agent()).reward.sum(0)
    short = totals["value-iteration"] - optimum
    assert abs(short.mean()) < 4 * short.std() / math.sqrt(200)
    assert totals["value-iteration"].mean() > totals["greedy"].mean() > totals["random"].mean() + 50


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"epsilon": -0.1}, "epsilon"),
        ({"confidence": 0.0}, "confidence"),
        ({"prior_weight": 0.0}, "prior_weight"),
        ({"strategy": "psrl", "prior_weight": 0.5}, "leave prior_weight"),
        ({"samples": 0}, "samples"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, word):
    """Catches a posterior without a prior, which has no mean, and one that the samples would not be of."""
    with pytest.raises(ValueError, match=word):
        MDPStrategy(**{"observations": 3, "actions": 2, "strategy": "greedy"} | settings)
