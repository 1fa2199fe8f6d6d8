"""Strategies for bandits against a restatement, pull by pull."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from scipy import stats

from datamodules import Bandits
from models import BanditStrategy
from models.reinforcement.bandit_strategies import BanditStrategies, Counts, choose
from models.reinforcement.gittins import gittins_indices
from models.reinforcement.trials import run_trial

ARMS, PULLS, TASKS = 4, 25, 6


def index(strategy: str, settings: dict, wins: list[int], losses: list[int], pull: int, uniform: list[float]) -> list:
    """How much each arm is preferred, by the definitions, from wins and losses with those of the prior."""
    total = [w + n for w, n in zip(wins, losses, strict=True)]
    means = [w / t for w, t in zip(wins, total, strict=True)]
    if strategy == "random":
        return [0.0] * ARMS
    if strategy in ("greedy", "epsilon-greedy"):
        return means
    if strategy == "ucb1":
        return [m + settings["scale"] * math.sqrt(2 * math.log(pull) / t) for m, t in zip(means, total, strict=True)]
    if strategy == "gittins":
        table = gittins_indices(settings["discount"], 30)
        return [table[w - 1, n - 1].item() for w, n in zip(wins, losses, strict=True)]
    samples = []
    for first in range(0, len(uniform), ARMS):
        samples.append([stats.beta.ppf(uniform[first + k], wins[k], losses[k]) for k in range(ARMS)])
    if strategy == "likeliest-thompson":
        densities = [math.prod(stats.beta.pdf(s[k], wins[k], losses[k]) for k in range(ARMS)) for s in samples]
        return samples[max(range(len(samples)), key=lambda i: round(math.log(densities[i]), 9))]
    assert len(samples) == 1
    return samples[0] if strategy == "thompson" else [max(s, m) for s, m in zip(samples[0], means, strict=True)]


@pytest.mark.parametrize("strategy", get_args(BanditStrategies))
@pytest.mark.parametrize("first_of_equals", [False, True])
def test_pulls_what_a_restatement_pulls(strategy, first_of_equals):
    """Catches outcomes that are counted for another arm or a pull late, and a formula that is not the strategy's."""
    settings = {"epsilon": 0.3, "scale": 0.4, "samples": 3, "discount": 0.9}
    learner = BanditStrategy(ARMS, strategy, first_of_equals=first_of_equals, **settings)
    batch = Bandits(ARMS, PULLS).distribution("test").sample(range(TASKS))
    trial = run_trial(batch, learner.agent())
    chance, outcomes = batch.draws(PULLS, learner.agent().draws, purpose=3), batch.draws(PULLS, 1, purpose=2)
    for task in range(TASKS):
        wins, losses = [1] * ARMS, [1] * ARMS
        for t in range(PULLS):
            equals, explore, *uniform = chance[task, t].tolist()
            preferred = index(strategy, settings, wins, losses, t + 1, uniform)
            if strategy == "epsilon-greedy" and explore < settings["epsilon"]:
                preferred = [0.0] * ARMS
            best = [k for k in range(ARMS) if preferred[k] == max(preferred)]
            arm = best[0] if first_of_equals else best[int(equals * len(best))]
            assert trial.action[t, task] == arm, (task, t)
            paid = outcomes[task, t, 0] < batch.task["arms"][task, arm]
            assert trial.reward[t, task] == float(paid)
            (wins if paid else losses)[arm] += 1


def test_confidence_bound_is_of_the_pull_to_come():
    """Catches a logarithm of another pull, or of pulls that the prior counts for, which seldom changes a choice."""
    counts = Counts(*(torch.tensor([part], dtype=torch.float64) for part in ([3, 1, 2, 1], [1, 2, 2, 1])))
    found = BanditStrategy(ARMS, "ucb1", scale=0.4).preference(counts, torch.empty(1, 0))
    # Five pulls so far.
    expected = [3 / 4, 1 / 3, 2 / 4, 1 / 2]
    expected = [m + 0.4 * math.sqrt(2 * math.log(6) / n) for m, n in zip(expected, (4, 3, 4, 2), strict=True)]
    np.testing.assert_allclose(found[0], expected, rtol=1e-12)


def test_samples_are_of_the_posterior():
    """Catches successes and failures that are mixed up, and quantiles that are off in the tails."""
    counts = Counts(*(torch.tensor([[1.0, 3.0, 40.0, 900.0]], dtype=torch.float64).roll(k, 1) for k in (0, 1)))
    uniform = torch.tensor([1e-12, 1e-3, 0.3, 0.999, 1 - 1e-12], dtype=torch.float64)[:, None, None].expand(5, 1, 4)
    samples = counts.sample(uniform)
    found = stats.beta.cdf(samples.numpy(), counts.successes.numpy(), counts.failures.numpy())
    np.testing.assert_allclose(found, uniform.numpy(), rtol=1e-6)


def test_one_of_the_largest_is_as_likely_as_another():
    """Catches ties that go to some arm more often, and an arm that is not among the largest at either end."""
    values = torch.tensor([[0.5, 0.2, 0.5, 0.5 - 1e-12, 0.4]], dtype=torch.float64).expand(300, -1)
    draws = (torch.arange(300, dtype=torch.float64) + 0.5) / 300
    assert torch.bincount(choose(values, draws), minlength=5).tolist() == [150, 0, 150, 0, 0]
    assert torch.bincount(choose(values, draws, 1e-9), minlength=5).tolist() == [100, 0, 100, 100, 0]
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    for arms in range(1, 70):
        assert choose(torch.zeros(2, arms), ends).tolist() == [0, arms - 1]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"epsilon": 1.5}, "epsilon"),
        ({"discount": 1.0}, "discount"),
        ({"samples": 0}, "samples"),
        ({"actions": 0}, "act"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, word):
    """Catches a probability above 1, and an index of rewards without end, which would run for ever."""
    with pytest.raises(ValueError, match=word):
        BanditStrategy(**{"actions": 3, "strategy": "gittins"} | settings)
