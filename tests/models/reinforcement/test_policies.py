"""Distributions over actions, advantages and the clipped objective, against torch's own, sums and hand numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import distributions

from datamodules.reinforcement.environments import normal
from models.reinforcement.policies import (
    ActionHead,
    Categorical,
    Gaussian,
    clipped_objective,
    draws_per_action,
    encode,
    generalized_advantages,
    single,
)


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pairs(kind: str) -> tuple:
    """Two of ours and the same two of torch's, (5, 2) of them."""
    if kind == "categorical":
        logits = [3 * numbers(5, 2, 4, seed=s) for s in (1, 2)]
        return [Categorical(x) for x in logits], [distributions.Categorical(logits=x) for x in logits]
    parts = [(numbers(5, 2, 3, seed=s), 0.5 * numbers(5, 2, 3, seed=s + 9)) for s in (1, 2)]
    theirs = [distributions.Independent(distributions.Normal(m, d.exp()), 1) for m, d in parts]
    return [Gaussian(m, d) for m, d in parts], theirs


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_distributions_are_torchs(kind):
    """Catches a density without its constant, an entropy or divergence with a wrong sign or the two the wrong way
    round, and sums over another dimension."""
    (one, other), (one_of_torch, other_of_torch) = pairs(kind)
    action = one_of_torch.sample()
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(one.log_prob(action), one_of_torch.log_prob(action), **close)
    torch.testing.assert_close(one.entropy(), one_of_torch.entropy(), **close)
    for (a, b), (ours, theirs) in zip(
        ((one, other), (other, one)), ((one_of_torch, other_of_torch), (other_of_torch, one_of_torch)), strict=True
    ):
        torch.testing.assert_close(a.kl(b), distributions.kl_divergence(ours, theirs), **close)
    assert torch.equal(one.mode(), one_of_torch.mode if kind == "categorical" else one.mean)
    assert (one.kl(one).abs() < 1e-14).all()


def test_logits_need_not_be_normalised_or_small():
    """Catches exponentials that overflow, and a distribution that changes with a constant added to its logits."""
    logits = torch.tensor([0.0, 1.0, -2.0])
    for shift in (0.0, 1000.0, -1000.0):
        shifted = Categorical(logits + shift)
        torch.testing.assert_close(shifted.log_prob(torch.tensor(1)), logits.log_softmax(0)[1], rtol=1e-4, atol=1e-4)
        assert shifted.entropy().item() == pytest.approx(Categorical(logits).entropy().item(), abs=1e-4)
    certain = Categorical(torch.tensor([500.0, 0.0]))
    assert certain.entropy() == 0
    assert certain.kl(Categorical(torch.zeros(2))).item() == pytest.approx(math.log(2))


def test_choices_come_as_often_as_they_are_likely():
    """Catches a cumulated distribution that is read from the wrong side or off by one: n draws, evenly apart, give
    every action within 1 of n times its probability, in the order of the actions."""
    logits = torch.tensor([0.3, -1.0, 2.0, -5.0])
    count = 10_000
    draws = ((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None]
    drawn = Categorical(logits.expand(count, -1)).sample(draws)
    assert drawn.dtype == torch.int64 and drawn.shape == (count,)
    assert (drawn.diff() >= 0).all()
    expected = count * logits.double().softmax(0)
    assert (torch.bincount(drawn, minlength=4) - expected).abs().max() < 1


@pytest.mark.parametrize("draw", [0.0, 1 - 2.0**-53])
def test_the_ends_of_what_can_be_drawn_are_possible_actions(draw):
    """Catches an action that does not exist from the greatest uniform number, and one of probability 0 from either."""
    draws = torch.tensor([[draw]], dtype=torch.float64)
    infinite = torch.inf
    for logits, possible in (
        ([0.1] * 7, {0, 6}),
        ([-infinite, 0.0, 1.0, -infinite], {1, 2}),
        ([0.0, -infinite], {0}),
        ([-infinite, 0.0], {1}),
        ([-800.0, 0.0, -800.0], {1}),
    ):
        action = Categorical(torch.tensor([logits])).sample(draws).item()
        assert action == (min(possible) if draw == 0 else max(possible)), logits
    assert normal(draws).isfinite().all()
    for dtype in (torch.float32, torch.float64):
        assert Gaussian(torch.zeros(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)).sample(draws).isfinite().all()


def test_normal_numbers_are_normal():
    """Catches a quantile function of another distribution, or one that is not increasing."""
    draws = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    torch.testing.assert_close(normal(draws), torch.from_numpy(stats.norm.ppf(draws.numpy())), rtol=1e-9, atol=1e-12)
    uniform = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert stats.kstest(normal(uniform).numpy(), "norm").pvalue > 1e-4


def test_continuous_actions_have_their_mean_and_deviation():
    """Catches a variance taken for a deviation, or numbers of an action that share a draw."""
    mean, log_deviation = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -2.0])
    draws = torch.rand(20_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    drawn = Gaussian(mean.expand(20_000, -1), log_deviation.expand(20_000, -1)).sample(draws)
    assert drawn.dtype == torch.float32 and drawn.shape == (20_000, 2)
    for k in range(2):
        scale = math.exp(log_deviation[k])
        assert stats.kstest(drawn[:, k].numpy(), "norm", (mean[k].item(), scale)).pvalue > 1e-4
    assert abs(np.corrcoef(drawn.T.numpy())[0, 1]) < 4 / math.sqrt(20_000)


# Advantages ---------------------------------------------------------------------------------------------------------


def advantage_by_sum(rewards, values, t: int, discount: float, decay: float) -> float:
    """Eq. 16 of Schulman et al. (2016), to the end of the trial."""
    steps = len(rewards)
    total = 0.0
    for offset in range(steps - t):
        at = t + offset
        following = values[at + 1] if at + 1 < steps else 0.0
        total += (discount * decay) ** offset * (rewards[at] + discount * following - values[at])
    return total


@pytest.mark.parametrize(
    ("discount", "decay"), [(0.9, 0.7), (0.99, 1.0), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5), (1.0, 0.3)]
)
def test_advantages_are_the_sum_that_defines_them(discount, decay):
    """Catches a recursion that forgets a factor, a value that follows the last step, or steps the wrong way round."""
    rewards, values = numbers(6, 3), numbers(6, 3, seed=2)
    got = generalized_advantages(rewards, values, discount, decay)
    assert got.shape == (6, 3)
    for t in range(6):
        for n in range(3):
            expected = advantage_by_sum(rewards[:, n].tolist(), values[:, n].tolist(), t, discount, decay)
            assert got[t, n].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_advantages_between_their_limits():
    """Catches λ that is taken for 1 - λ: 1 is the discounted return less the value, 0 the temporal difference."""
    rewards, values = numbers(4, 2), numbers(4, 2, seed=2)
    returns = torch.stack([sum(0.9 ** (k - t) * rewards[k] for k in range(t, 4)) for t in range(4)])
    torch.testing.assert_close(generalized_advantages(rewards, values, 0.9, 1.0), returns - values)
    following = torch.cat([values[1:], torch.zeros(1, 2)])
    expected = rewards + 0.9 * following - values
    torch.testing.assert_close(generalized_advantages(rewards, values, 0.9, 0.0), expected)


def test_advantages_leave_what_they_are_given():
    """Catches an estimate that writes into its rewards or values, which the next one would read."""
    rewards, values = numbers(4, 2), numbers(4, 2, seed=2)
    kept = rewards.clone(), values.clone()
    generalized_advantages(rewards, values, 0.9, 0.5)
    assert torch.equal(rewards, kept[0]) and torch.equal(values, kept[1])


# The clipped objective ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.1, 2.0, 2.2, 2.2),
        (1.5, 2.0, 2.4, 0.0),  # no gain from going further
        (1.5, -2.0, -3.0, -3.0),  # but from going back
        (0.5, 2.0, 1.0, 1.0),
        (0.5, -2.0, -1.6, 0.0),
        (0.9, -2.0, -1.8, -1.8),
    ],
)
def test_the_clipped_objective_by_hand(ratio, advantage, value, slope):
    """Catches a minimum taken for a maximum, and a clipped ratio alone, which does not pull back what went too far."""
    log_ratio = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
    got = clipped_objective(log_ratio, torch.tensor(advantage, dtype=torch.float64), 0.2)
    got.backward()
    assert got.item() == pytest.approx(value, rel=1e-12)
    assert log_ratio.grad.item() == pytest.approx(slope, rel=1e-12, abs=1e-12)  # by the logarithm: ratio × advantage


# Heads --------------------------------------------------------------------------------------------------------------


def test_a_head_of_discrete_actions():
    """Catches logits that are not linear in the features, or that favour an action before anything is learnt."""
    head = ActionHead(6, 3, discrete=True).double()
    features = numbers(5, 2, 6)
    choice = head(features)
    assert isinstance(choice, Categorical) and choice.logits.shape == (5, 2, 3)
    torch.testing.assert_close(choice.logits, features @ head.linear.weight.T + head.linear.bias)
    assert not head.linear.bias.any() and 0 < head.linear.weight.abs().max() <= 0.01 / math.sqrt(6)
    assert {n for n, _ in head.named_parameters()} == {"linear.weight", "linear.bias"}
    assert draws_per_action(3, True) == 1


def test_a_head_of_continuous_actions():
    """Catches a deviation that depends on the state, is not learnt, or does not start where it is asked to."""
    head = ActionHead(6, 3, discrete=False, deviation=0.5).double()
    with torch.no_grad():
        head.linear.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    features = numbers(5, 2, 6)
    choice = head(features)
    assert isinstance(choice, Gaussian)
    torch.testing.assert_close(choice.mean, features @ head.linear.weight.T + head.linear.bias)
    torch.testing.assert_close(choice.log_deviation, torch.full((5, 2, 3), math.log(0.5), dtype=torch.float64))
    choice.log_prob(numbers(5, 2, 3, seed=7)).sum().backward()
    z = (numbers(5, 2, 3, seed=7) - choice.mean.detach()) / 0.5
    torch.testing.assert_close(head.log_deviation.grad, (z.square() - 1).sum((0, 1)))
    assert draws_per_action(3, False) == 3


@pytest.mark.parametrize("discrete", [True, False])
def test_probabilities_are_in_single_precision_at_least(discrete):
    """Catches ratios of probabilities that are rounded to the 8 bits of bfloat16 under autocast."""
    head = ActionHead(4, 3, discrete)
    with torch.autocast("cpu", torch.bfloat16):
        choice = head(torch.randn(2, 4))
    assert all(part.dtype == torch.float32 for part in choice)
    assert single(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert single(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def test_actions_as_a_network_takes_them():
    """Catches numbers of actions in place of one-hot, and continuous actions that are changed."""
    assert encode(torch.tensor([[2, 0]]), 3, True).tolist() == [[[0, 0, 1], [1, 0, 0]]]
    action = numbers(4, 2)
    assert encode(action, 2, False) is action
