"""Figures of task embeddings show what their data say."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex
from scipy.stats import spearmanr
from sklearn.metrics import pairwise_distances

from app.plots import task_embeddings as plots
from app.plots.style import ACCENT, CLASSES
from datamodules.core.metric import Metric
from tests.support.drawing import drawn

ACCURACY = Metric("higher", share=True)


def groups_of_points(count: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Points (count, 5) in three groups far apart, and their groups."""
    rng = np.random.default_rng(0)
    numbers = np.arange(count) % 3
    return 20 * np.eye(3, 5)[numbers] + rng.normal(size=(count, 5)), numbers


def test_tasks_have_the_colour_and_the_name_of_their_group():
    """Would catch: colours by order of appearance, names of other groups, and a legend of groups that are not there."""
    points, numbers = groups_of_points()
    names = ("a", "never", "b", "c")
    numbers = np.array([0, 2, 3])[numbers]
    figure = plots.planes(points, pairwise_distances(points), (numbers, names), None, "", 2.5, "Tasks")
    left, right = figure.axes
    for axes in (left, right):
        found = {c.get_label(): (len(c.get_offsets()), to_hex(c.get_facecolor()[0])) for c in axes.collections}
        assert found == {"a": (10, CLASSES[0]), "b": (10, CLASSES[1]), "c": (10, CLASSES[2])}
    assert figure._suptitle.get_text().endswith("within 2.5")
    drawn(figure)


def test_more_groups_than_colours_stay_apart():
    """Would catch: two alphabets with one look, or one left out: 20 alphabets, and 35 of which the last are grey."""
    rng = np.random.default_rng(0)
    for count in (20, 35):
        numbers = np.arange(35) % count
        points = rng.normal(size=(35, 3))
        figure = plots.planes(
            points, pairwise_distances(points), (numbers, [f"alphabet {k}" for k in range(count)]), None, "", None, "T"
        )
        looks = {
            (to_hex(c.get_facecolor()[0]), c.get_paths()[0].vertices.tobytes())
            for c in figure.axes[0].collections
            if c.get_label() != "others"
        }
        assert len(looks) == min(count, 30)
        assert sum(len(c.get_offsets()) for c in figure.axes[0].collections) == 35
    drawn(figure)


def test_numbers_colour_tasks_where_there_are_no_groups():
    """Would catch: the amplitudes of other tasks, and a scale without its name."""
    points, _ = groups_of_points()
    values = np.linspace(0, 1, 30)
    figure = plots.planes(points, pairwise_distances(points), None, values, "amplitude", None, "Tasks")
    assert np.allclose(figure.axes[1].collections[0].get_array(), values)
    assert "amplitude" in [axes.get_ylabel() for axes in figure.axes]
    drawn(figure)


def test_tsne_is_the_same_each_time_and_keeps_neighbours_together():
    """Would catch: a plane that changes from one look to the next, and one that is of other tasks' distances."""
    points, numbers = groups_of_points(60)
    apart = pairwise_distances(points)
    first, again = (plots.neighbours_plane(points, apart) for _ in range(2))
    assert np.array_equal(first, again)
    on_plane = pairwise_distances(first)
    np.fill_diagonal(on_plane, np.inf)
    assert (numbers[on_plane.argmin(1)] == numbers).all()


def test_neighbours_of_another_group_are_framed():
    """Would catch: frames of the wrong tasks, distances of other pairs, or a row without its own task."""
    apart = np.array([[0.0, 1, 2], [1, 0, 3], [2, 3, 0]])
    seen = []
    figure = plots.nearest(
        [[0, 1, 2], [2, 0, 1]], lambda axes, task: seen.append(task), apart, ([0, 0, 1], ("a", "b")), "Tasks"
    )
    assert seen == [0, 1, 2, 2, 0, 1]
    framed = [
        task
        for task, axes in zip(seen, figure.axes, strict=True)
        if axes.spines["left"].get_visible() and to_hex(axes.spines["left"].get_edgecolor()) == ACCENT
    ]
    assert framed == [2, 0, 1]
    assert [axes.get_title(loc="center") for axes in figure.axes] == ["a", "a\n1", "b\n2", "b", "a\n2", "a\n3"]
    drawn(figure)


def test_a_mosaic_has_every_image_once():
    """Would catch: images that cover one another."""
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * 50 + np.ones((5, 1, 6, 6), np.uint8)
    canvas = plots.mosaic(images)
    for value in (np.arange(5) * 50 + 1) / 255:
        assert np.isclose(canvas[..., 0], value).sum() == 36


@pytest.mark.parametrize("metric", [ACCURACY, Metric("lower")])
def test_distance_is_shown_against_the_metric_with_its_rank_correlation(metric):
    """Would catch: the axes exchanged, Pearson's correlation, and means of other tasks."""
    rng = np.random.default_rng(0)
    far = rng.gamma(2, size=50)
    values = np.exp(-far) + 0.05 * rng.random(50)
    figure = plots.distance(far, values, metric, "accuracy", "Tasks")
    axes = figure.axes[0]
    assert np.allclose(axes.collections[0].get_offsets(), np.stack([far, values], 1))
    assert axes.get_title(loc="left").endswith(f"{spearmanr(far, values).statistic:+.2f}")
    order = far.argsort()
    assert axes.lines[0].get_ydata()[0] == pytest.approx(values[order[:10]].mean(), rel=1e-6)
    assert plots.rank_correlation(np.ones(5), np.arange(5.0)) == 0
    drawn(figure)
