"""Pictures of reinforcement learning: returns, regret, trajectories, arms pulled, beliefs and latents of tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from app.plots.embeddings import component_names, principal
from app.plots.style import ACCENT, CLASSES, INK, MAIN, MUTED, SHADES, mean_and_half, shorten, single, styled

MARKED = 40  # episodes of the longest trial that has a mark for each
PATHS = 6  # episodes of a trial that are drawn on the plane at most
COLUMNS = 60  # of a heat map of pulls, about
TOLD = 100  # cells of one that has its numbers written into it, at most
DASHED: Any = (0, (4, 2))


# Returns ------------------------------------------------------------------------------------------------------------


def half_width(episodes: int) -> int:
    """Episodes to either side that the curve of a trial is averaged over: none unless the trial is long."""
    return episodes // 50 if episodes > MARKED else 0


def smoothed(values: Any) -> np.ndarray:
    """Moving averages of returns (T, E), over ``half_width`` episodes to either side.

    The first episodes, where an agent learns fastest, are averaged over as many before as after: the first is as it is.
    The last ones have fewer after them than before.
    """
    values = np.asarray(values, np.float64)
    episodes = values.shape[1]
    place = np.arange(episodes)
    low = place - np.minimum(half_width(episodes), place)
    high = np.minimum(place + (place - low), episodes - 1) + 1
    summed = np.concatenate([np.zeros((len(values), 1)), values.cumsum(1)], 1)
    return (summed[:, high] - summed[:, low]) / (high - low)


def _band(axes: Axes, x: np.ndarray, values: np.ndarray, label: str, colour: str = MAIN, **line: Any) -> np.ndarray:
    """Mean over tasks with its 95 % interval; the mean."""
    mean, half = mean_and_half(values)
    axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.18, lw=0)
    axes.plot(x, mean, color=colour, label=label, **line)
    return mean


def _tasks(returns: np.ndarray) -> str:
    width = 2 * half_width(returns.shape[1]) + 1
    return f"mean of {len(returns):,} tasks, 95 % interval" + (f", moving average of {width}" if width > 1 else "")


def draw_returns(axes: Axes, returns: Any, optimum: Any | None = None, unit: str = "episode", horizon: int = 0) -> None:
    """Mean return against the episode of the trial, with its 95 % interval over tasks.

    Args:
        axes: to draw on.
        returns: of each episode, (T, E).
        optimum: expected return of an episode by each task's best policy, (T,), where it is known.
        unit: what an episode is called.
        horizon: transitions of an episode, to draw the return against those that the agent had seen before it; 0 draws
            it against the number of the episode.
    """
    returns = np.asarray(returns, np.float64)
    episodes = returns.shape[1]
    x = horizon * np.arange(episodes) if horizon else 1 + np.arange(episodes)
    marks: dict[str, Any] = {"marker": "o", "ms": 4.5} if episodes <= MARKED else {}
    mean = _band(axes, x, smoothed(returns), _tasks(returns), **marks)
    above = True
    if optimum is not None:
        best = float(np.mean(np.asarray(optimum, np.float64)))
        axes.axhline(best, color=INK, lw=1.2, ls=DASHED, label=f"best policy: {best:.3g}")
        above = mean[-1] > best
        if best > 0:  # otherwise a share of it says nothing
            scales: Any = (lambda y: y / best, lambda y: y * best)
            share = axes.secondary_yaxis("right", functions=scales)
            share.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            share.set_ylabel("of the best policy's")
            share.spines[:].set_visible(False)
    rises = mean[-1] >= mean[0]
    places = {0: not rises, episodes - 1: rises if optimum is None else above and rises}
    for k, over in places.items():
        offset: Any = {"xytext": (0, 9 if over else -16), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{mean[k]:.3g}", (x[k], mean[k]), fontsize=8.5, **offset)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel(f"transitions seen before the {unit}" if horizon else f"{unit} of the trial")
    axes.set_ylabel(f"return of {_a(unit)}")
    axes.margins(x=0.06, y=0.15)
    low, high = axes.get_ylim()
    room = 0.3 * (high - low)  # for the legend, whatever the curve is like
    below = rises or optimum is not None
    axes.set_ylim(*((low - room, high) if below else (low, high + room)))
    axes.legend(loc="lower right" if below else "upper right")


def _a(unit: str) -> str:
    return f"{'an' if unit[0] in 'aeiou' else 'a'} {unit}"


@styled
def returns(returns: Any, optimum: Any | None = None, title: str = "Returns", **others: Any) -> Figure:
    """Returns along the trial; arguments as ``draw_returns``."""
    figure, axes = single()
    draw_returns(axes, returns, optimum, **others)
    axes.set_title(title)
    return figure


def cumulated_regret(returns: Any, optimum: Any) -> np.ndarray:
    """What the best policy was expected to get more than the agent got, until each episode's end: (T, E + 1), from 0.

    Args:
        returns: of each episode, (T, E).
        optimum: expected return of an episode by each task's best policy, (T,).
    """
    missed = np.asarray(optimum, np.float64)[:, None] - np.asarray(returns, np.float64)
    return np.concatenate([np.zeros((len(missed), 1)), missed.cumsum(1)], 1)


def draw_regret(axes: Axes, returns: Any, optimum: Any, chance: Any | None = None, unit: str = "episode") -> None:
    """Mean cumulated regret along the trial, with its 95 % interval over tasks.

    Args:
        axes: to draw on.
        returns, optimum, unit: see ``draw_returns``.
        chance: expected return of an episode by random actions in each task, (T,), where it is known.
    """
    returns = np.asarray(returns, np.float64)
    x = np.arange(returns.shape[1] + 1)
    mean = _band(axes, x, cumulated_regret(returns, optimum), f"mean of {len(returns):,} tasks, 95 % interval")
    if chance is not None:
        slope = float(np.mean(np.asarray(optimum, np.float64) - np.asarray(chance, np.float64)))
        axes.plot(x, slope * x, color=MUTED, lw=1.2, ls=DASHED, label=f"random actions: {slope * x[-1]:.3g} in the end")
    axes.annotate(f"{mean[-1]:.3g}", (x[-1], mean[-1]), xytext=(4, 0), textcoords="offset points", fontsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlim(0, x[-1] * 1.08)
    axes.set_ylim(bottom=min(0.0, float(mean.min())))
    axes.set_xlabel(f"{unit}s")
    axes.set_ylabel("cumulated regret")
    axes.legend(loc="upper left")


@styled
def regret(returns: Any, optimum: Any, chance: Any | None = None, title: str = "Regret", **others: Any) -> Figure:
    """Regret along the trial; arguments as ``draw_regret``."""
    figure, axes = single()
    draw_regret(axes, returns, optimum, chance, **others)
    axes.set_title(title)
    return figure


@styled
def returns_of_several(learners: Sequence[tuple[str, Any]], optimum: Any | None, over: str) -> Figure:
    """Returns of several learners along the trial; where the best policy is known, their cumulated regret beside.

    Args:
        learners: name and returns (T, E) of each, on the same tasks.
        optimum: expected return of an episode by each task's best policy, (T,), or None.
        over: what they were tested on.
    """
    panels = 1 if optimum is None else 2
    rows = math.ceil(len(learners) / (2 * panels))
    figure = Figure(figsize=(1.2 + 4.6 * panels, 3.7 + 0.2 * rows), layout="constrained")
    axes, *beside = figure.subplots(1, panels, squeeze=False)[0]
    short = any(np.shape(values)[1] <= MARKED for _, values in learners)
    for place, (name, values) in enumerate(learners):
        of_episode = np.asarray(values, np.float64)
        episodes = of_episode.shape[1]
        # Beyond the last colour, the first ones again, dashed.
        line: dict[str, Any] = {"colour": CLASSES[place % len(CLASSES)], "lw": 1.5}
        line["ls"] = DASHED if place >= len(CLASSES) else "-"
        marks = {"marker": "o", "ms": 3.5} if short else {}
        _band(axes, 1 + np.arange(episodes), smoothed(of_episode), shorten(name, 36), **line, **marks)
        if optimum is not None:
            _band(beside[0], np.arange(episodes + 1), cumulated_regret(of_episode, optimum), name, **line)
    most = max(np.shape(values)[1] for _, values in learners)
    width = 2 * half_width(most) + 1
    axes.set_title("Return" + (f", moving average of {width} episodes" if width > 1 else ""))
    axes.set_xlabel("episode of the trial")
    axes.set_ylabel("return of an episode")
    if optimum is not None:
        best = float(np.mean(np.asarray(optimum, np.float64)))
        axes.axhline(best, color=INK, lw=1.2, ls=DASHED, label=f"best policy: {best:.3g}")
        beside[0].set_title("Cumulated regret")
        beside[0].set_xlabel("episodes")
        beside[0].set_xlim(left=0)
        beside[0].set_ylim(bottom=min(0.0, beside[0].get_ylim()[0]))
    for panel in (axes, *beside):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    figure.suptitle(f"{over}: mean and 95 % interval", x=0.01, ha="left", fontsize=12)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 2 * panels))
    return figure


# Trajectories -------------------------------------------------------------------------------------------------------


def _shown(episodes: int) -> list[int]:
    """Of many episodes a few, the first and the last among them."""
    return sorted({int(k) for k in np.linspace(0, episodes - 1, min(episodes, PATHS)).round()})


def _path_colour(k: int, episodes: int) -> Any:
    return SHADES(0.25 + 0.75 * (1.0 if episodes == 1 else k / (episodes - 1)))


def draw_trajectories(axes: Axes, positions: Any, goal: Any, radius: float | None = None) -> None:
    """Where the agent went, from the first episode, light, to the last one, dark.

    Args:
        axes: to draw on.
        positions: on the plane, (E, steps + 1, 2), from the start of each episode; of more than six episodes six are
            drawn, the first and the last among them.
        goal: (2,).
        radius: of the reward about the goal, where there is one.
    """
    positions, goal = np.asarray(positions, np.float64), np.asarray(goal, np.float64)
    if radius is not None:
        axes.add_patch(Circle((goal[0], goal[1]), radius, color=ACCENT, alpha=0.15, lw=0))
    for k in _shown(len(positions)):
        colour = _path_colour(k, len(positions))
        axes.plot(*positions[k].T, color=colour, lw=1.6, marker=".", ms=3, label=f"episode {k + 1}")
        axes.plot(*positions[k, 0], "o", color="white", mec=colour, ms=5, zorder=4)
    axes.plot(*goal, "*", color=ACCENT, ms=13, mec="white", zorder=5, label="goal")
    axes.set_aspect("equal", adjustable="datalim")


def _square(positions: Any, goals: Any, radius: float) -> tuple[np.ndarray, float]:
    """Centre and half the side of the square that everything is in, with a margin."""
    goals = np.asarray(goals, np.float64)
    points = np.concatenate([np.asarray(positions, np.float64).reshape(-1, 2), goals - radius, goals + radius])
    low, high = points.min(0), points.max(0)
    return (low + high) / 2, 0.54 * max(float((high - low).max()), 1e-9)


@styled
def trajectories(
    positions: Any, goals: Any, returns: Any, numbers: Sequence[int], radius: float | None, title: str
) -> Figure:
    """Trajectories of several tasks, with the returns of their first and last episode.

    Args:
        positions: (T, E, steps + 1, 2); see ``draw_trajectories``.
        goals: (T, 2).
        returns: of each episode, (T, E).
        numbers: of the tasks.
        radius: see ``draw_trajectories``.
        title: of the figure.
    """
    tasks, episodes = np.shape(positions)[:2]
    columns = min(tasks, 3)
    rows = math.ceil(tasks / columns)
    figure = Figure(figsize=(0.3 + 3.0 * columns, 0.9 + 3.0 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    centre, half = _square(positions, goals, radius or 0.0)
    for i, axes in enumerate(panels.flat):
        if i >= tasks:
            axes.set_axis_off()
            continue
        draw_trajectories(axes, positions[i], goals[i], radius)
        axes.set_aspect("equal", adjustable="box")  # all of one scale
        axes.set_xlim(centre[0] - half, centre[0] + half)
        axes.set_ylim(centre[1] - half, centre[1] + half)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.label_outer()
        first, last = (f"{float(returns[i][k]):.3g}" for k in (0, -1))
        axes.set_title(f"task {numbers[i]}: return {first}" + (f" → {last}" if episodes > 1 else ""), fontsize=9.5)
    handles, names = panels.flat[0].get_legend_handles_labels()
    handles.append(Line2D([], [], ls="", marker="o", color="white", mec=MUTED, ms=5))
    names.append("start")
    over = ", with the returns of the first and the last episode" if episodes > 1 else ""
    figure.suptitle(f"{title}{over}", x=0.01, ha="left", fontsize=10.5)
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 2 + 2 * columns))
    return figure


# Bandits ------------------------------------------------------------------------------------------------------------


def column_width(pulls: int) -> int:
    """Pulls of a trial that are one column of a heat map."""
    return math.ceil(pulls / COLUMNS)


def pull_shares(probabilities: Any, pulls: Any) -> np.ndarray:
    """How often each arm was pulled, by time.

    Args:
        probabilities: of the arms of each bandit, (T, A).
        pulls: which arm, (T, E).

    Returns:
        Shares (T, A, columns), of the arms from the best one down; the last column may be of fewer pulls.
    """
    probabilities, pulls = np.asarray(probabilities, np.float64), np.asarray(pulls)
    rank = np.argsort(np.argsort(-probabilities, 1, kind="stable"), 1)
    of_pull = np.take_along_axis(rank, pulls, 1)  # 0 for the best arm
    hit = (of_pull[:, None, :] == np.arange(probabilities.shape[1])[:, None]).astype(np.float64)
    counted = np.add.reduceat(hit, np.arange(0, pulls.shape[1], column_width(pulls.shape[1])), 2)
    return counted / counted.sum(1, keepdims=True)


def draw_pulls(axes: Axes, shares: Any, total: int, names: Sequence[str]) -> None:
    """A row for each arm, from the best one down, and time to the right.

    Args:
        axes: to draw on.
        shares: of the pulls, (A, columns).
        total: pulls of the trial.
        names: of the arms.
    """
    shares = np.asarray(shares, np.float64)
    arms, columns = shares.shape
    axes.imshow(
        shares,
        cmap=SHADES,
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, columns * column_width(total) + 0.5, arms - 0.5, -0.5),
    )
    axes.set_xlim(0.5, total + 0.5)
    told = range(arms) if arms <= 12 else sorted({int(k) for k in np.linspace(0, arms - 1, 6).round()})
    axes.set_yticks(list(told), [names[k] for k in told])
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def draw_mean_pulls(axes: Axes, probabilities: Any, pulls: Any) -> None:
    """Arms pulled by time, averaged over bandits; arguments as ``pull_shares``."""
    shares = pull_shares(probabilities, pulls)
    arms = shares.shape[1]
    names = ["best", *(str(k) for k in range(2, arms)), "worst"] if arms > 1 else ["only"]
    mean = shares.mean(0)
    draw_pulls(axes, mean, np.shape(pulls)[1], names)
    if mean.size <= TOLD and column_width(np.shape(pulls)[1]) == 1:
        for (arm, column), share in np.ndenumerate(mean):
            colour = "white" if share > 0.55 else INK
            axes.text(column + 1, arm, f"{100 * share:.0f}", ha="center", va="center", fontsize=7.5, color=colour)
    axes.set_ylabel("arm, by its probability")
    axes.set_xlabel("pull of the trial")


@styled
def pulls(probabilities: Any, pulls: Any, numbers: Sequence[int], title: str) -> Figure:
    """Arms pulled by time: averaged over all bandits, and in each of the first five.

    Args:
        probabilities, pulls: see ``pull_shares``.
        numbers: of the tasks.
        title: of the figure.
    """
    probabilities = np.asarray(probabilities, np.float64)
    shares, total = pull_shares(probabilities, pulls), np.shape(pulls)[1]
    tasks, arms, _ = shares.shape
    count = 1 + min(tasks, 5)
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    height = 1.1 + 0.22 * min(arms, 12)
    figure = Figure(figsize=(1 + 3.2 * columns, 0.6 + height * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    draw_mean_pulls(panels.flat[0], probabilities, pulls)
    panels.flat[0].set_title(f"mean of {tasks:,} tasks")
    for i, axes in enumerate(panels.flat[1:]):
        if i >= count - 1:
            axes.set_axis_off()
            continue
        draw_pulls(axes, shares[i], total, [f"{p:.2f}" for p in np.sort(probabilities[i])[::-1]])
        axes.set_title(f"task {numbers[i]}")
    for axes in panels[-1]:
        axes.set_xlabel("pull of the trial")
    bar = figure.colorbar(panels.flat[0].images[0], ax=panels, aspect=30, format=PercentFormatter(1.0, decimals=None))
    bar.set_label("share of the pulls")
    bar.outline.set_visible(False)
    figure.suptitle(f"{title}: arms from the best one down, with their probabilities", x=0.01, ha="left", fontsize=10.5)
    return figure


# Beliefs ------------------------------------------------------------------------------------------------------------


def draw_beliefs(axes: Axes, deviations: Any, episodes: int) -> None:
    """How wide the belief about a task is before each step of the trial, with its 95 % interval over tasks.

    Args:
        axes: to draw on.
        deviations: of the belief in each latent, (T, steps, L).
        episodes: of the trial.
    """
    deviations = np.asarray(deviations, np.float64)
    x = np.arange(deviations.shape[1])
    for k, of_latent in enumerate(deviations.mean(0).T):
        axes.plot(x, of_latent, color=MUTED, lw=0.8, alpha=0.7, label="each latent" if k == 0 else None)
    mean = _band(axes, x, deviations.mean(2), f"mean over latents and {len(deviations):,} tasks, 95 % interval")
    axes.annotate(f"{mean[-1]:.3g}", (x[-1], mean[-1]), xytext=(4, 0), textcoords="offset points", fontsize=8.5)
    _part(axes, len(x), episodes)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("deviation of the belief")
    axes.legend(loc="best")


def draw_reward_errors(axes: Axes, errors: Any, episodes: int) -> None:
    """How well the belief before each step foresees its reward, with its 95 % interval over tasks.

    Args:
        axes: to draw on.
        errors: squared, (T, steps); not a number where the episode had ended.
        episodes: see ``draw_beliefs``.
    """
    errors = np.asarray(errors, np.float64)
    told = [column[~np.isnan(column)] for column in errors.T]
    intervals = [mean_and_half(column) if len(column) else (np.nan, np.nan) for column in told]
    mean, half = np.array(intervals, np.float64).reshape(-1, 2).T
    x, half = np.arange(len(mean)), np.nan_to_num(half)
    axes.fill_between(x, np.maximum(mean - half, 0), mean + half, color=MAIN, alpha=0.18, lw=0)
    axes.plot(x, mean, color=MAIN)
    _part(axes, len(x), episodes)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("squared error of the next reward")


def _part(axes: Axes, steps: int, episodes: int) -> None:
    """Mark where episodes after the first one begin, unless each is one step."""
    starts = [k * steps / episodes for k in range(1, episodes)] if episodes < steps else []
    for start in starts:
        axes.axvline(start, color=INK, lw=0.8, ls=(0, (1, 2)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlim(0, max(steps - 1, 1) * 1.06)
    axes.set_xlabel("transitions seen" + (" (dotted: a new episode)" if starts else ""))


@styled
def beliefs(deviations: Any, errors: Any | None, episodes: int, title: str = "Beliefs") -> Figure:
    """The belief along the trial, and what it foresees; arguments as ``draw_beliefs`` and ``draw_reward_errors``."""
    panels = 1 if errors is None else 2
    figure = Figure(figsize=(1.2 + 4.6 * panels, 3.7), layout="constrained")
    axes, *beside = figure.subplots(1, panels, squeeze=False)[0]
    draw_beliefs(axes, deviations, episodes)
    if errors is not None:
        draw_reward_errors(beside[0], errors, episodes)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    return figure


# Latents ------------------------------------------------------------------------------------------------------------


def plane_colours(facts: Any) -> np.ndarray:
    """A colour for each place on the plane, (T, 2) to (T, 3): its hue by the direction from the middle, pale there."""
    facts = np.asarray(facts, np.float64)
    low, high = facts.min(0), facts.max(0)
    away = (2 * facts - low - high) / np.maximum(high - low, 1e-9)  # in [-1, 1]²
    hue = np.arctan2(away[:, 1], away[:, 0]) / (2 * math.pi) % 1.0
    saturation = 0.1 + 0.9 * np.minimum(np.hypot(*away.T), 1.0)
    return hsv_to_rgb(np.stack([hue, saturation, np.full(len(facts), 0.85)], 1))


def draw_latents(axes: Axes, latents: Any, colours: Any) -> None:
    """The first two principal components of the tasks' latents.

    Args:
        axes: to draw on.
        latents: (T, L).
        colours: (T, 3).
    """
    flat, share = principal(np.asarray(latents, np.float64))
    axes.scatter(*flat.T, s=26, c=np.asarray(colours), lw=0, alpha=0.9)
    x, y = component_names(share)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_aspect("equal", adjustable="datalim")


def fact_colours(facts: Any) -> np.ndarray:
    """A colour for each task from what tells it apart, (T, 1) or (T, 2) to (T, 3)."""
    facts = np.asarray(facts, np.float64)
    if facts.shape[1] == 2:
        return plane_colours(facts)
    return np.asarray(matplotlib.colormaps["viridis"](Normalize()(facts[:, 0]).filled(0.0)))[:, :3]


@styled
def latents(latents: Any, facts: Any, names: Sequence[str], title: str) -> Figure:
    """Latents of tasks, coloured by what tells the tasks apart; beside them what the colours mean.

    Args:
        latents: (T, L).
        facts: (T, 1) or (T, 2).
        names: of the facts.
        title: of the figure.
    """
    facts = np.asarray(facts, np.float64)
    colours = fact_colours(facts)
    if facts.shape[1] == 1:
        figure, axes = single(5.8, 4.2)
        scale = matplotlib.cm.ScalarMappable(Normalize(facts.min(), facts.max()), "viridis")
        bar = figure.colorbar(scale, ax=axes, aspect=30, label=names[0])
        bar.outline.set_visible(False)
    else:
        figure = Figure(figsize=(8.4, 4.2), layout="constrained")
        axes, beside = figure.subplots(1, 2)
        beside.scatter(*facts.T, s=26, c=colours, lw=0, alpha=0.9)
        beside.set_aspect("equal", adjustable="datalim")
        beside.set_xlabel(names[0])
        beside.set_ylabel(names[1])
        beside.set_title("the tasks themselves")
    draw_latents(axes, latents, colours)
    axes.set_title("latents")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    return figure
