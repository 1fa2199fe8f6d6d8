"""Sets of scalars: moments in closed form, and what linear probes find in a context."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from benchmarks.scalar_sets import FAMILIES, probe, scalar_sets

DISTRIBUTIONS = (stats.expon, stats.norm, stats.uniform, stats.laplace)


@pytest.mark.parametrize("number", range(4), ids=FAMILIES)
def test_a_set_has_its_family_mean_and_variance(number):
    """Catches a scale that is taken for a variance in some of the families, and a family under another's number: every
    set, standardised by its own mean and variance, has the family's distribution function and none of the others'."""
    x, facts = scalar_sets(40, np.random.default_rng(0), 2000)
    of = facts["family"] == number
    assert of.sum() > 3
    assert np.abs(facts["mean"]).max() <= 1 and 0.5 <= facts["variance"].min() <= facts["variance"].max() <= 2
    standard = (x.view(40, 2000).double().numpy() - facts["mean"][:, None]) / facts["variance"][:, None] ** 0.5
    for other, distribution in enumerate(DISTRIBUTIONS):
        mean, variance = distribution.stats()
        distances = [stats.kstest(s * variance**0.5 + mean, distribution.cdf).statistic for s in standard[of]]
        assert (np.mean(distances) < 0.03) == (other == number)


def test_probes_find_what_is_linear_and_nothing_else():
    """Catches a probe that is scored on what it was fitted on, or on another fact."""
    rng = np.random.default_rng(0)
    facts, too = (scalar_sets(400, rng, 2)[1] for _ in range(2))

    def codes(of: dict[str, np.ndarray]) -> np.ndarray:
        return np.stack([of["mean"], rng.normal(size=400), 5.0 * (of["family"] == 2)], 1)

    found = probe(codes(facts), facts, codes(too), too)
    assert found["mean"] == pytest.approx(1) and found["variance"] < 0.1
    assert 0.4 < found["family"] < 0.6  # one of four for sure, and a third of the others
