"""The random streams of tasks: each a function of (seed, split, index) alone, and of the distribution it claims."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from datamodules.core.streams import SPLITS, TaskStreams

TASKS = 20_000
KS_LIMIT = 1.95 / math.sqrt(TASKS)  # Kolmogorov's distance that a right sample exceeds once in a thousand
MASK = 2**64 - 1

DRAWS: dict[str, Callable[[TaskStreams], np.ndarray]] = {
    "bits": lambda s: s.bits(3, 2),
    "uniform": lambda s: s.uniform(-2.0, 5.0, 4),
    "normal": lambda s: s.normal(4),
    "integers": lambda s: s.integers(17, 4),
    "choice": lambda s: s.choice(9, 4, 2),
}


def streams(count: int = TASKS, seed: int = 0, split: str = "train") -> TaskStreams:
    return TaskStreams(seed, split, np.arange(count))


def chi_square_is_plausible(values: np.ndarray, cells: int) -> bool:
    """Whether counts of integers in [0, cells) fit the uniform distribution (fails by chance once in 10,000)."""
    counts = np.bincount(values.ravel(), minlength=cells)
    assert len(counts) == cells
    expected = values.size / cells
    assert expected >= 5
    statistic, dof = ((counts - expected) ** 2 / expected).sum(), cells - 1
    # Wilson and Hilferty's normal approximation of the chi-square quantile, at z = 3.72.
    return statistic < dof * (1 - 2 / (9 * dof) + 3.72 * math.sqrt(2 / (9 * dof))) ** 3


def ks_uniform(values: np.ndarray) -> float:
    """Kolmogorov's distance between the sample and the uniform distribution on [0, 1)."""
    u, steps = np.sort(values), np.arange(len(values) + 1) / len(values)
    return float(max(np.abs(u - steps[:-1]).max(), np.abs(u - steps[1:]).max()))


def mix(x: int) -> int:
    """SplitMix64's finaliser on Python's integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_words_are_those_of_the_published_splitmix64():
    """Would catch a wrong constant or shift: the first outputs of the reference C program for state 1234567."""
    stream = streams(1)
    stream._key = np.array([1234567], np.uint64)
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert stream.bits(4).tolist() == [published]


@pytest.mark.parametrize(("seed", "split", "index"), [(0, "train", 0), (-1, "test", 5), (2**63 + 1, "val", 2**40)])
def test_streams_stay_what_they_are(seed: int, split: str, index: int):
    """Would catch a change of the key's derivation, which would silently give every user other tasks."""
    key = 0
    for word in (seed & MASK, {"train": 0, "val": 1, "test": 2}[split], index):
        key = mix(((key ^ word) + 0x9E3779B97F4A7C15) & MASK)
    expected = [mix((key + n * 0x9E3779B97F4A7C15) & MASK) for n in (1, 2, 3)]
    assert TaskStreams(seed, split, [index]).bits(3).tolist() == [expected]


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_stream_does_not_depend_on_the_batch(draw: Callable):
    """Would catch a generator shared by the tasks of a batch: index 7 alone, among others and in another order."""
    alone = draw(TaskStreams(3, "val", [7]))
    for indices in ([7, 8], [100, 7, 3], [7, 7], list(range(50))):
        at = indices.index(7)
        stream = TaskStreams(3, "val", indices)
        assert np.array_equal(draw(stream)[at], alone[0])
    stream, whole = TaskStreams(3, "val", [7]), TaskStreams(3, "val", [2, 7])
    draw(stream), draw(whole)
    assert np.array_equal(draw(stream)[0], draw(whole)[1])  # the second draw too


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_consecutive_draws_differ(draw: Callable):
    """Would catch a counter that does not advance, so that support and query would be drawn alike."""
    stream = streams(100)
    assert not np.array_equal(draw(stream), draw(stream))


def test_seeds_splits_and_indices_have_streams_of_their_own():
    """Would catch validation tasks among the training tasks, or seed 1 index 0 being seed 0 index 1."""
    indices = np.arange(200)
    words = [TaskStreams(s, split, indices).bits(5) for s in range(-3, 4) for split in SPLITS]
    assert len(np.unique(np.concatenate(words))) == 7 * 3 * 200 * 5


def test_a_split_that_does_not_exist_is_refused():
    """Would catch "validation" silently drawing some other split's tasks."""
    with pytest.raises(ValueError, match="tuple"):
        TaskStreams(0, "validation", [0])


def test_neighbouring_tasks_and_draws_are_uncorrelated():
    """Would catch keys that differ in their low bits alone: consecutive indices or seeds with similar streams."""
    u, other = streams().uniform(0.0, 1.0, 4), streams(seed=1).uniform(0.0, 1.0, 4)
    pairs = [(u[:-1, 0], u[1:, 0]), (u[:, 0], u[:, 1]), (u[:, 0], other[:, 0]), (u[:-1, 1], u[1:, 0])]
    for a, b in pairs:
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(len(a))
    bits = streams().bits()
    for shift in (0, 1, 31, 32, 62, 63):  # every bit of a word serves: low ones too
        assert chi_square_is_plausible(((bits >> np.uint64(shift)) & np.uint64(1)).astype(np.int64), 2)


def test_uniform_fills_its_range_evenly():
    """Would catch a range off by a factor, or draws that cluster, over tasks and within one task."""
    across, within = streams().uniform(-2.0, 5.0), TaskStreams(0, "test", [11]).uniform(-2.0, 5.0, TASKS)[0]
    for values in (across, within):
        assert values.min() >= -2.0
        assert values.max() < 5.0
        assert ks_uniform((values + 2.0) / 7.0) < KS_LIMIT


def test_normal_is_standard_normal():
    """Would catch a missing factor in Box and Muller: moments to the fourth, and the distribution function."""
    count = 5 * TASKS
    across, within = streams(count).normal(), TaskStreams(0, "test", [11]).normal(count)[0]
    for z in (across, within):
        assert np.isfinite(z).all()
        for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs((z**power).mean() - moment) < 4 * math.sqrt(variance / count), power
        assert ks_uniform(np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in z])) < 1.95 / math.sqrt(count)


def test_integers_are_uniform_and_below_their_row_s_limit():
    """Would catch a value equal to the limit, a value never drawn, or one limit used for all rows."""
    assert chi_square_is_plausible(streams().integers(7), 7)
    assert chi_square_is_plausible(streams().integers(3, 5), 3)
    limits = np.array([1, 2, 5, 1000])[np.arange(TASKS) % 4]
    drawn = streams().integers(limits)
    for limit in (1, 2, 5):
        assert chi_square_is_plausible(drawn[limits == limit], limit) if limit > 1 else not drawn[limits == 1].any()
    assert 900 < drawn[limits == 1000].max() < 1000
    assert drawn.dtype == np.int64


def test_choice_is_uniform_over_sets_and_orders():
    """Would catch Floyd's algorithm without its shuffle: sets come out evenly then, but their orders do not."""
    drawn = streams(60_000).choice(5, 3)
    cells = {outcome: i for i, outcome in enumerate(itertools.permutations(range(5), 3))}
    assert chi_square_is_plausible(np.array([cells[tuple(row)] for row in drawn.tolist()]), len(cells))


@pytest.mark.parametrize(("n", "k"), [(5, 5), (20, 7), (1623, 20), (1, 1)])
def test_choice_is_without_replacement(n: int, k: int):
    """Would catch a class twice in one task, an image in support and query, or a number outside [0, n)."""
    drawn = streams(2000).choice(n, k, 2)
    assert drawn.shape == (2000, 2, k)
    ordered = np.sort(drawn, -1)
    assert (np.diff(ordered, axis=-1) > 0).all()
    assert ordered[..., 0].min() >= 0
    assert ordered[..., -1].max() <= n - 1
    assert chi_square_is_plausible(drawn, n) if n > 1 else not drawn.any()


def test_choice_takes_a_limit_for_every_row():
    """Would catch classes of different sizes being drawn from as though all had the size of one."""
    n = np.stack([np.full(TASKS, 4), np.full(TASKS, 9), 2 + np.arange(TASKS) % 3], -1)
    drawn = streams().choice(n, 2, 3)
    assert (drawn < n[..., None]).all()
    assert (drawn[..., 0] != drawn[..., 1]).all()
    for column, size in ((0, 4), (1, 9)):
        off_diagonal = (
            drawn[:, column, 0] * (size - 1) + drawn[:, column, 1] - (drawn[:, column, 1] > drawn[:, column, 0])
        )
        assert chi_square_is_plausible(off_diagonal, size * (size - 1))
    for size in (2, 3, 4):
        assert chi_square_is_plausible(drawn[n[:, 2] == size, 2], size)


def test_further_words_are_streams_of_their_own():
    """Would catch starts, moves and choices of one task drawn from the same numbers, or from those of another task:
    further words that are ignored, added up, or taken in any order."""
    indices = np.arange(300)
    keys = [(), *((k,) for k in range(6)), *itertools.product(range(3), range(3))]
    words = [TaskStreams(0, split, indices, *more).bits(5) for split in SPLITS for more in keys]
    assert len(np.unique(np.concatenate(words))) == 3 * len(keys) * 300 * 5


def test_a_further_word_may_differ_by_task():
    """Would catch the first task's word used for all, and a stream that depends on the words of the others."""
    by_task = TaskStreams(3, "val", [7, 7, 9], [0, 4, 4]).uniform(0.0, 1.0, 4)
    for k, (index, word) in enumerate(((7, 0), (7, 4), (9, 4))):
        assert np.array_equal(by_task[k], TaskStreams(3, "val", [index], word).uniform(0.0, 1.0, 4)[0])


def test_streams_of_further_words_are_uniform_and_uncorrelated():
    """Would catch a derived key that leaves a trace: the streams of a task's purposes, and of neighbouring tasks."""
    u = np.stack(
        [TaskStreams(0, "train", np.arange(TASKS), *more).uniform() for more in ((), (0,), (1,), (2,), (1, 0))]
    )
    for values in u:
        assert ks_uniform(values) < KS_LIMIT
    shifted = np.concatenate([u[:, :-1], u[:, 1:]])
    assert np.abs(np.corrcoef(shifted) - np.eye(10)).max() < 4.5 / math.sqrt(TASKS)


def test_further_words_stay_what_they_are():
    """Would catch a change of their derivation, which would give every user other environments' chance."""
    key = 0
    for word in (5, SPLITS.index("test"), 12, 3, 8):
        key = mix(((key ^ word) + 0x9E3779B97F4A7C15) & MASK)
    expected = [mix((key + n * 0x9E3779B97F4A7C15) & MASK) for n in (1, 2)]
    assert TaskStreams(5, "test", [12], 3, 8).bits(2).tolist() == [expected]


def test_normal_numbers_are_box_and_mullers():
    """Catches another angle or radius, which leaves the distribution almost as it is: from the same uniform numbers."""
    first = streams(50).uniform(0.0, 1.0, 8)
    radius, angle = first[:, :4], first[:, 4:]
    expected = [
        [math.sqrt(-2 * math.log1p(-r)) * math.cos(2 * math.pi * a) for r, a in zip(rs, angles, strict=True)]
        for rs, angles in zip(radius, angle, strict=True)
    ]
    np.testing.assert_allclose(streams(50).normal(4), expected, rtol=1e-12, atol=1e-14)
