"""Gittins indices against the published table, another algorithm, and what they are for."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from models.reinforcement.gittins import gittins_indices

# Gittins, Glazebrook and Weber, Multi-armed Bandit Allocation Indices, 2nd edition (2011), tables 8.1 and 8.3: by the
# parameters of the Beta distribution, which are one more than the successes and the failures.
PUBLISHED = {
    0.9: {(1, 1): 0.7029, (2, 1): 0.8001, (1, 2): 0.5001, (2, 2): 0.6346, (3, 1): 0.8452, (1, 3): 0.3796},
    0.99: {(1, 1): 0.8699, (2, 1): 0.9102, (1, 2): 0.7005, (2, 2): 0.7844},
}


@pytest.mark.parametrize("discount", PUBLISHED)
def test_published_table(discount):
    """Catches an index of another prior or of another problem, and a horizon or a grid that is too short or coarse."""
    table = gittins_indices(discount, 3)
    for (a, b), index in PUBLISHED[discount].items():
        assert table[a - 1, b - 1].item() == pytest.approx(index, abs=1e-4)


def restarting(a: int, b: int, discount: float, depth: int) -> float:
    """The index of an arm as (1 - γ) times the value of playing it where it may always start again (Katehakis and
    Veinott, 1987), by value iteration over the states that so many pulls lead to."""
    values = np.zeros((depth + 2, depth + 2))
    successes, failures = np.indices((depth + 1, depth + 1))
    pays = (a + successes) / (a + b + successes + failures)
    for _ in range(300):
        on = pays * (1 + discount * values[1:, :-1]) + (1 - pays) * discount * values[:-1, 1:]
        values[:-1, :-1] = np.maximum(on, on[0, 0])
        # Beyond the depth the arm is taken to be known.
        known = pays[-1] / (1 - discount), pays[:, -1] / (1 - discount)
        values[-1, :-1], values[:-1, -1] = np.maximum(known[0], on[0, 0]), np.maximum(known[1], on[0, 0])
    return (1 - discount) * values[0, 0]


def test_another_algorithm():
    """Catches a table that is right at its first entries only, or rows and columns that are mixed up."""
    table = gittins_indices(0.8, 6, rewards=2048)
    for successes, failures in ((0, 0), (3, 1), (1, 3), (6, 0), (0, 6), (2, 4)):
        expected = restarting(successes + 1, failures + 1, 0.8, 60)
        assert table[successes, failures].item() == pytest.approx(expected, abs=1e-6)


def test_is_the_best_there_is():
    """Catches an index by which to play is not optimal: two arms, all that they can come to, played out exactly."""
    discount, depth = 0.5, 18
    table = gittins_indices(discount, depth, rewards=2048).numpy()

    @functools.cache
    def values(a: int, b: int, c: int, d: int) -> tuple[float, float]:
        """Of the best there is and of playing by the index, where the arms had (a, b) and (c, d)."""
        if a + b + c + d == depth:
            return 0.0, 0.0
        p, q = (a + 1) / (a + b + 2), (c + 1) / (c + d + 2)
        first, second = (
            (values(a + 1, b, c, d), values(a, b + 1, c, d)),
            (values(a, b, c + 1, d), values(a, b, c, d + 1)),
        )
        of = [
            [pays * (1 + discount * up[k]) + (1 - pays) * discount * down[k] for k in range(2)]
            for pays, (up, down) in ((p, first), (q, second))
        ]
        return max(of[0][0], of[1][0]), of[int(table[c, d] > table[a, b])][1]

    best, by_index = values(0, 0, 0, 0)
    assert best - by_index < 2 * discount**depth
    assert best > 1.05 * 0.5 * (1 - discount**depth) / (1 - discount)  # than any arm for ever


def test_without_a_future_the_mean_is_all():
    """Catches a discount of 0 that divides by it, and an index that forgets the last pulls of the table."""
    table = gittins_indices(0.0, 5)
    for successes in range(6):
        for failures in range(6 - successes):
            expected = (successes + 1) / (successes + failures + 2)
            assert table[successes, failures].item() == pytest.approx(expected, abs=1e-12)
