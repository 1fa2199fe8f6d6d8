"""The benchmark of environments: it times the same work on both sides, and parts that make up the whole."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.environments import FAMILIES, PARTS, PROFILES, Clock, compare, profile


@pytest.mark.parametrize("name", FAMILIES)
def test_both_sides_live_through_the_same_trials(name, capsys):
    """Catches a plain environment that is another task than ours, or a comparison that lets one pass."""
    compare(name, FAMILIES[name])
    assert "trajectories agree" in capsys.readouterr().out
    plain: Any = FAMILIES[name].plain

    class Other(plain):
        def step(self, action):
            observation, reward, *rest = super().step(action)
            self.count = getattr(self, "count", 0) + 1
            return observation, reward + 1e-6 * (self.count == 7), *rest

    with pytest.raises(AssertionError, match="rewards differ by 1"):
        compare(name, replace(FAMILIES[name], plain=Other))


def test_observations_are_compared():
    """Catches a comparison of rewards alone."""
    plain: Any = FAMILIES["point robot"].plain

    class Other(plain):
        def step(self, action):
            observation, *rest = super().step(action)
            return observation + np.array([0.0, 1e-6]), *rest

    with pytest.raises(AssertionError, match="observations differ"):
        compare("point robot", replace(FAMILIES["point robot"], plain=Other))


def test_a_clock_counts_what_fails_too_and_by_name():
    """Catches seconds under another's name, and those of a call that raised."""
    clock = Clock()

    def fail() -> None:
        time.sleep(0.02)
        raise KeyError

    with pytest.raises(KeyError):
        clock.of("one", fail)()
    assert clock.of("two", lambda a, b: a + b)(1, b=2) == 3
    assert clock.seconds["one"] >= 0.02 > clock.seconds["two"] >= 0


@pytest.mark.parametrize("name", ["bandit, 10 pulls", "half-cheetah"])
def test_the_parts_make_up_an_iteration(name):
    """Catches a part that is counted twice or not at all, and time under another part's name."""
    flags = [*PROFILES[name], "--model.init_args.hidden", "4", "--model.init_args.epochs", "1"]
    if name == "half-cheetah":
        flags += ["--data.init_args.horizon", "5", "--data.init_args.processes", "0"]
    times = profile(flags, quick=True, seconds=0)
    assert set(times) == {*PARTS, "iteration"}
    whole = times.pop("iteration")
    for k, seconds in enumerate(whole):
        parts = {name: times[name][k] for name in PARTS}
        assert min(parts.values()) > 0
        assert sum(parts.values()) == pytest.approx(seconds, rel=1e-6)
