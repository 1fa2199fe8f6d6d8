"""Pictures of reinforcement learning show what their data say, read back from the figures' own objects."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Circle

from app.plots import adaptation, results
from app.plots import reinforcement as rl
from models.core.task_kinds import KINDS
from tests.support.drawing import drawn, labels

RETURN = KINDS["reinforcement"].metrics["return"]


def draws(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def band(axes: Axes, place: int = 0) -> np.ndarray:
    """Lower and upper edge of a band by its x, (2, N)."""
    points = axes.collections[place].get_paths()[0].vertices
    return np.array([[f(points[points[:, 0] == x, 1]) for x in np.unique(points[:, 0])] for f in (np.min, np.max)])


def interval(values: np.ndarray) -> np.ndarray:
    """Ends of the 95 % interval of the mean, by the formula, (2, N)."""
    mean = values.sum(0) / len(values)
    error = (((values - mean) ** 2).sum(0) / (len(values) - 1) / len(values)) ** 0.5
    return np.stack([mean - 1.96 * error, mean + 1.96 * error])


def slowly_smoothed(values: np.ndarray, half: int) -> np.ndarray:
    out = np.empty_like(values)
    for t in range(values.shape[1]):
        before = min(half, t)
        out[:, t] = np.mean([values[:, k] for k in range(t - before, t + before + 1) if k < values.shape[1]], 0)
    return out


@pytest.mark.parametrize(("episodes", "half"), [(1, 0), (10, 0), (40, 0), (41, 0), (100, 2), (1000, 20)])
def test_long_trials_are_averaged_over_neighbouring_episodes(episodes: int, half: int):
    """Catches a window off by one, one that blurs the first episodes, and short trials that are smoothed."""
    values = draws(3, episodes)
    assert rl.half_width(episodes) == half
    assert np.allclose(rl.smoothed(values), slowly_smoothed(values, half))
    assert np.allclose(rl.smoothed(values)[:, 0], values[:, 0])


def test_returns_are_means_over_tasks_beside_the_best_policy():
    """Catches means over episodes, episodes counted from 0, a band of deviations, another best policy."""
    values, optimum = 5 + draws(7, 4), np.arange(7) + 5.0
    figure = rl.returns(values, optimum)
    axes = figure.axes[0]
    curve, best = axes.lines
    assert list(curve.get_xdata()) == [1, 2, 3, 4]
    assert np.allclose(curve.get_ydata(), values.mean(0))
    assert curve.get_marker() == "o"
    assert np.allclose(band(axes), interval(values))
    assert np.allclose(best.get_ydata(), 8)
    assert labels(axes) == ["mean of 7 tasks, 95 % interval", "best policy: 8"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("episode of the trial", "return of an episode")
    (share,) = axes.child_axes
    drawn(figure)  # by which the scale beside follows
    assert np.allclose(np.array(share.get_ylim()) * 8, axes.get_ylim())
    assert {t.get_text() for t in axes.texts} == {f"{values.mean(0)[k]:.3g}" for k in (0, 3)}


def test_returns_of_long_trials_have_no_marks():
    """Catches a hundred marks in a row, and a curve or a band that is not that of the moving average it says."""
    values = draws(5, 100)
    axes = rl.returns(values, unit="pull").axes[0]
    assert axes.lines[0].get_marker() in ("", "None", None)
    moving = slowly_smoothed(values, 2)
    assert np.allclose(axes.lines[0].get_ydata(), moving.mean(0))
    assert np.allclose(band(axes), interval(moving))
    assert labels(axes) == ["mean of 5 tasks, 95 % interval, moving average of 5"]
    assert axes.get_xlabel() == "pull of the trial"


def test_a_best_policy_that_gets_less_than_nothing_has_no_shares():
    """Catches a scale upside down, or a division by zero, where returns are costs."""
    for best in (-3.0, 0.0):
        figure = rl.returns(draws(4, 3), np.full(4, best))
        assert not figure.axes[0].child_axes
        drawn(figure)


def test_context_is_counted_in_transitions_seen_before():
    """Catches the episode that is measured counted as context."""
    axes = rl.returns(draws(4, 3), horizon=20).axes[0]
    assert list(axes.lines[0].get_xdata()) == [0, 20, 40]
    assert axes.get_xlabel() == "transitions seen before the episode"


def test_regret_is_cumulated_from_zero():
    """Catches regret of one episode, of the mean optimum, or without the first episode."""
    values, optimum, chance = draws(6, 5), np.linspace(1, 3, 6), np.linspace(0, 0.5, 6)
    figure = rl.regret(values, optimum, chance, unit="pull")
    axes = figure.axes[0]
    slow = np.array([[sum(o - r for r in row[:k]) for k in range(6)] for o, row in zip(optimum, values, strict=True)])
    assert np.allclose(axes.lines[0].get_ydata(), slow.mean(0))
    assert np.allclose(band(axes), interval(slow), atol=1e-12)
    assert list(axes.lines[0].get_xdata()) == list(range(6))
    assert np.allclose(axes.lines[1].get_ydata(), 1.75 * np.arange(6))
    assert labels(axes)[1] == "random actions: 8.75 in the end"
    assert len(rl.regret(values, optimum).axes[0].lines) == 1
    drawn(figure)


def test_several_learners_have_a_line_and_an_interval_each():
    """Catches lines under another's name, regret from another's returns, and a mean over learners."""
    learners = [("a", draws(6, 3)), ("b", 2 + draws(6, 3, seed=1))]
    optimum = np.linspace(2, 4, 6)
    figure = rl.returns_of_several(learners, optimum, "Bandits")
    returns, regret = figure.axes
    for place, (name, values) in enumerate(learners):
        line = next(x for x in returns.lines if x.get_label() == name)
        assert np.allclose(line.get_ydata(), values.mean(0))
        assert list(line.get_xdata()) == [1, 2, 3]
        assert np.allclose(band(returns, place), interval(values))
        missed = np.array([[0, *np.cumsum(o - row)] for o, row in zip(optimum, values, strict=True)])
        assert np.allclose(regret.lines[place].get_ydata(), missed.mean(0))
        assert np.allclose(band(regret, place), interval(missed), atol=1e-12)
        assert line.get_color() == regret.lines[place].get_color()
    assert labels(returns) == ["a", "b", "best policy: 3"]
    drawn(figure)
    alone = rl.returns_of_several(learners, None, "Bandits")
    assert len(alone.axes) == 1
    assert labels(alone.axes[0]) == ["a", "b"]
    drawn(alone)


def test_a_dozen_learners_are_told_apart():
    """Catches an eleventh learner that looks like the first."""
    figure = rl.returns_of_several([(str(k), draws(3, 60, seed=k)) for k in range(12)], None, "MDPs")
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == 12
    assert figure.axes[0].get_title(loc="left") == "Return, moving average of 3 episodes"
    drawn(figure)


def brightness(colour: Any) -> float:
    return float(sum(to_rgb(colour)))


def test_trajectories_are_drawn_from_light_to_dark_about_their_goal():
    """Catches tasks or episodes mixed up, x and y swapped, and a goal, a radius or a return of another task."""
    positions, goals = draws(2, 3, 5, 2), np.array([[1.0, 0.5], [-4.0, 0.25]])
    returns = np.arange(6.0).reshape(2, 3)
    figure = rl.trajectories(positions, goals, returns, [4, 7], 0.2, "Trajectories")
    for i, axes in enumerate(figure.axes):
        paths = [x for x in axes.lines if str(x.get_label()).startswith("episode")]
        assert [x.get_label() for x in paths] == ["episode 1", "episode 2", "episode 3"]
        for k, path in enumerate(paths):
            assert np.allclose(path.get_xydata(), positions[i, k])
        shades = [brightness(x.get_color()) for x in paths]
        assert shades == sorted(shades, reverse=True)
        assert len(set(shades)) == 3
        (star,) = (x for x in axes.lines if x.get_label() == "goal")
        assert np.allclose(star.get_xydata(), goals[i])
        (circle,) = (p for p in axes.patches if isinstance(p, Circle))
        assert (circle.center, circle.radius) == (tuple(goals[i]), 0.2)
        assert (axes.get_xlim(), axes.get_ylim()) == (figure.axes[0].get_xlim(), figure.axes[0].get_ylim())
        low, high = np.array([axes.get_xlim(), axes.get_ylim()]).T
        assert (low < positions[i]).all()
        assert (positions[i] < high).all()
        assert (low < goals[i] - 0.2).all()
        assert np.isclose(*(high - low))  # of one scale
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["task 4: return 0 → 2", "task 7: return 3 → 5"]
    drawn(figure)


def test_of_many_episodes_the_first_and_the_last_are_drawn():
    """Catches a hundred paths on one picture, or the last episode left out."""
    figure = rl.trajectories(draws(1, 100, 4, 2), np.zeros((1, 2)), np.zeros((1, 100)), [0], None, "Trajectories")
    names = [n for n in labels(figure.axes[0]) if n.startswith("episode")]
    assert len(names) == 6
    assert (names[0], names[-1]) == ("episode 1", "episode 100")
    assert not figure.axes[0].patches
    drawn(figure)
    drawn(rl.trajectories(draws(4, 1, 4, 2), np.zeros((4, 2)), np.zeros((4, 1)), range(4), None, "One episode each"))


def slow_shares(probabilities: np.ndarray, pulls: np.ndarray, width: int) -> np.ndarray:
    tasks, arms = probabilities.shape
    columns = [range(s, min(s + width, pulls.shape[1])) for s in range(0, pulls.shape[1], width)]
    out = np.zeros((tasks, arms, len(columns)))
    for i in range(tasks):
        best_first = sorted(range(arms), key=lambda a, i=i: -probabilities[i, a])
        for row, arm in enumerate(best_first):
            for c, times in enumerate(columns):
                out[i, row, c] = sum(pulls[i, t] == arm for t in times) / len(times)
    return out


@pytest.mark.parametrize(("arms", "total", "width"), [(5, 10, 1), (3, 60, 1), (15, 130, 3)])
def test_pulls_are_shares_of_arms_from_the_best_down(arms: int, total: int, width: int):
    """Catches arms in the order of their numbers, the worst on top, columns that mix times, a mean of one task."""
    rng = np.random.default_rng(0)
    probabilities, pulls = rng.uniform(size=(7, arms)), rng.integers(arms, size=(7, total))
    figure = rl.pulls(probabilities, pulls, range(10, 17), "Arms")
    shares = slow_shares(probabilities, pulls, width)
    shown = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(shown) == 6
    assert np.allclose(shown[0].get_array(), shares.mean(0))
    assert all(np.allclose(image.get_array(), shares[i]) for i, image in enumerate(shown[1:]))
    columns = shares.shape[2]
    assert all(image.get_extent() == [0.5, columns * width + 0.5, arms - 0.5, -0.5] for image in shown)
    assert all(image.axes.get_xlim() == (0.5, total + 0.5) for image in shown)
    drawn(figure)
    rows = [t.get_text() for t in shown[1].axes.get_yticklabels()]
    assert (rows[0], rows[-1]) == (f"{probabilities[0].max():.2f}", f"{probabilities[0].min():.2f}")
    assert [t.get_text() for t in shown[0].axes.get_yticklabels()][::50] == ["best"]
    assert shown[1].axes.get_title(loc="left") == "task 10"
    told = [t.get_text() for t in shown[0].axes.texts]
    assert told == ([f"{100 * s:.0f}" for s in shares.mean(0).ravel()] if arms * total <= 100 else [])


def test_few_bandits_and_one_arm_are_drawn_too():
    """Catches a split of few test tasks, or the smallest bandits, that break the grid."""
    drawn(rl.pulls([[0.5]], [[0, 0, 0]], [0], "Arms"))
    drawn(rl.pulls([[0.5, 0.2]] * 2, [[0, 1, 1]] * 2, [0, 1], "Arms"))


def test_latents_keep_their_distances_and_tell_their_variance():
    """Catches components that are not principal, variance of deviations, and colours of other tasks."""
    latents, goals = draws(30, 4) * [3, 1e-6, 2, 1e-6], np.random.default_rng(1).uniform(-1, 1, (30, 2))
    figure = rl.latents(latents, goals, ["goal 1", "goal 2"], "Latents")
    axes, beside = figure.axes
    points, places = axes.collections[0], beside.collections[0]
    shown = points.get_offsets()
    apart = np.linalg.norm(latents[:, None] - latents[None], axis=-1)
    assert np.allclose(np.linalg.norm(shown[:, None] - shown[None], axis=-1), apart, atol=1e-4)
    spread = np.sort(np.linalg.eigvalsh(np.cov(latents.T)))[::-1]
    assert axes.get_xlabel() == f"1st component ({spread[0] / spread.sum():.0%} of variance)"
    assert axes.get_ylabel() == f"2nd component ({spread[1] / spread.sum():.0%} of variance)"
    assert np.allclose(places.get_offsets(), goals)
    assert np.allclose(points.get_facecolors(), places.get_facecolors())
    assert (beside.get_xlabel(), beside.get_ylabel()) == ("goal 1", "goal 2")
    drawn(figure)


def test_latents_by_one_number_have_its_scale():
    """Catches a scale that does not belong to the colours, or colours that go down as the number goes up."""
    speeds = np.linspace(0, 3, 9)[:, None]
    figure = rl.latents(draws(9, 1), speeds, ["velocity"], "Latents")
    axes, bar = figure.axes
    colours = axes.collections[0].get_facecolors()[:, :3]
    brightness = colours.sum(1)
    assert (np.diff(brightness) > 0).all()
    assert bar.get_ylabel() == "velocity"
    drawn(figure)
    assert bar.get_ylim() == (0, 3)
    assert axes.get_ylabel() == "2nd component (0% of variance)"  # there is one only
    drawn(rl.latents(np.zeros((1, 3)), [[2.0]], ["velocity"], "One task"))
    drawn(rl.latents(np.zeros((3, 3)), [[2.0, 1.0]] * 3, ["x", "y"], "Three alike"))


def test_places_far_apart_have_colours_far_apart():
    """Catches a scale on which opposite goals look alike, or neighbours look different."""
    angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    for facts in (np.stack([np.cos(angle), np.sin(angle)], 1), np.stack([3 + 5 * np.cos(angle), np.sin(angle)], 1)):
        colours = rl.plane_colours(facts)
        opposite = np.abs(colours - np.roll(colours, 36, 0)).sum(1)
        near = np.abs(colours - np.roll(colours, 1, 0)).sum(1)
        assert opposite.min() > 1.0
        assert near.max() < 0.3
    middle = rl.plane_colours([[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0]])[1]
    assert np.ptp(middle) < 0.1  # pale


def test_low_returns_are_the_worst_ones():
    """Catches the best tenth marked as the worst, returns below zero left out, whole returns in a comb of bars."""
    values = np.arange(-60.0, 40.0)
    figure = results.histogram(values, RETURN, RETURN.label)
    axes = figure.axes[0]
    assert sum(bar.get_height() for bar in axes.containers[0]) == 100
    marked = next(t for t in labels(axes) if t.startswith("worst tenth"))
    assert marked == "worst tenth: mean -55.5"
    assert axes.get_xlabel() == "return over the trial of a task"
    drawn(figure)
    whole = results.histogram([0.0, 1, 1, 2, 3, 3, 5, 10], RETURN, RETURN.label)
    heights = [bar.get_height() for bar in whole.axes[0].containers[0]]
    assert heights[:6] == [1, 2, 1, 2, 0, 1]
    assert heights[10] == 1


def test_the_best_validation_is_that_of_the_highest_return():
    """Catches the lowest return marked as the best, and an axis that begins at zero where returns are below."""
    figure = adaptation.training([[100, -30, 1], [200, -10, 2], [300, -20, 1]], RETURN, RETURN.label)
    axes = figure.axes[0]
    assert list(axes.lines[1].get_xdata()) == [200]
    assert labels(axes)[-1] == "best -10"
    assert axes.get_ylim()[1] < 0
    assert axes.get_ylabel() == "return over the trial"
    drawn(figure)


def test_beliefs_are_means_over_latents_and_tasks_by_step():
    """Catches latents, steps and tasks mixed up, errors of steps that never happened in the mean, an interval of them,
    and episodes parted in the wrong places."""
    deviations = np.abs(draws(9, 12, 3)) + 0.1
    errors = draws(9, 12) ** 2
    errors[4, 3] = errors[5, 3] = np.nan
    errors[:, 11] = np.nan  # all had ended
    figure = rl.beliefs(deviations, errors, 3, "Beliefs")
    axes, beside = figure.axes
    of_latents, (mean, *dotted) = axes.lines[:3], axes.lines[3:]
    for k, line in enumerate(of_latents):
        assert np.allclose(line.get_ydata(), deviations[:, :, k].mean(0))
    assert list(mean.get_xdata()) == list(range(12))
    assert np.allclose(mean.get_ydata(), deviations.mean((0, 2)))
    assert np.allclose(band(axes), interval(deviations.mean(2)))
    assert [line.get_xdata()[0] for line in dotted] == [4, 8]
    told = beside.lines[0].get_ydata()
    assert np.allclose(told[:11], np.nanmean(errors[:, :11], 0)) and np.isnan(told[11])
    low, high = interval(errors[[0, 1, 2, 3, 6, 7, 8], 3])
    points = beside.collections[0].get_paths()[0].vertices
    assert np.allclose(points[points[:, 0] == 3, 1].max(), high) and max(low, 0) >= 0
    assert labels(axes) == ["each latent", "mean over latents and 9 tasks, 95 % interval"]
    drawn(figure)
    assert len(rl.beliefs(deviations, None, 12, "Bandits").axes[0].lines) == 4  # each pull is an episode
    drawn(rl.beliefs(deviations[:1, :1], None, 1, "One step of one task"))
    drawn(rl.beliefs(deviations[:1], errors[:1], 3, "One task"))
