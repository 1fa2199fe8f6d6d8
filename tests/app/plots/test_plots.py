"""Pictures show what their data say; what is looked for is in the figure's own objects, not in pixels."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.patches import Rectangle
from scipy.stats import binomtest

from app.plots import adaptation, calibration, confusion, embeddings, episodes, results, style
from datamodules.core.metric import Metric
from models.core.metrics import calibration_error, coverage_error
from tests.support.drawing import drawn, labels

METRICS = {
    "accuracy": Metric("higher", share=True),
    "mse": Metric("lower"),
    "loss": Metric("lower"),
    "nll": Metric("lower"),
    "return": Metric("higher"),
}


def episode_data(ways: int, shots: int, queries: int, size: int = 8) -> tuple:
    """Random pictures; probabilities by which every query is right."""
    rng = np.random.default_rng(0)
    support_y, query_y = np.arange(ways).repeat(shots), np.arange(ways).repeat(queries)
    support_x, query_x = (rng.integers(0, 256, (len(y), 1, size, size), np.uint8) for y in (support_y, query_y))
    probabilities = np.full((len(query_y), ways), 0.1 / (ways - 1))
    probabilities[np.arange(len(query_y)), query_y] = 0.9
    return support_x, support_y, query_x, query_y, probabilities


def test_an_episode_marks_the_mistaken_queries_and_no_others():
    """Would catch: frames on the wrong tiles, or the class that a query was taken for not told."""
    data = episode_data(3, 1, 4)
    data[-1][5] = [0.2, 0.1, 0.7]  # the second class's second query, taken for the third
    figure = episodes.episode(*data, ["a", "b", "c"], "Task 7")
    axes = figure.axes[0]
    frames = [p for p in axes.patches if isinstance(p, Rectangle)]
    texts = [t.get_text() for t in axes.texts]
    assert len(frames) == 1
    assert texts.count("→2 70%") == 1
    assert texts.count("90%") == 11
    image = axes.images[0].get_array()
    x, y = (round(float(v) + 0.5) for v in frames[0].get_xy())
    assert np.allclose(image[y : y + 8, x : x + 8, 0], data[2][5, 0] / 255)
    assert figure._suptitle.get_text() == "Task 7: 11 of 12 queries right"
    drawn(figure)


def test_an_episode_of_many_classes_says_what_it_leaves_out():
    """Would catch: a picture metres high, or one that seems to show all of a 60-way task."""
    figure = episodes.episode(*episode_data(60, 1, 1), [], "Task 0")
    assert "the first 20 of 60 classes" in figure._suptitle.get_text()
    assert figure.get_size_inches()[1] < 16


def test_generated_images_are_beside_their_own_task():
    """Would catch: rows that are mixed up, or images scaled to hide how dull they are."""
    rng = np.random.default_rng(0)
    tasks = [(rng.integers(0, 256, (2, 1, 8, 8), np.uint8), rng.integers(0, 100, (3, 1, 8, 8), np.uint8)) for _ in "ab"]
    figure = episodes.generated(tasks, "Images")
    image = figure.axes[0].images[0].get_array()
    assert image.shape[:2] == (18, 49)  # two rows of 9; five columns of 9 and a gap of 4
    for row, (support, made) in enumerate(tasks):
        y = 9 * row
        assert np.allclose(image[y : y + 8, 9:17, 0], support[1, 0] / 255)
        assert np.allclose(image[y : y + 8, 40:48, 0], made[2, 0] / 255)
    drawn(figure)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pixels_are_rgb_in_range(channels: int):
    """Would catch: images of two or four channels, or normalised ones, that matplotlib refuses."""
    for images in (
        torch.randint(0, 256, (2, channels, 5, 4), dtype=torch.uint8),
        torch.randn(2, channels, 5, 4),
        torch.zeros(2, channels, 5, 4),
    ):
        out = episodes.pixels(images)
        assert out.shape == (2, 5, 4, 3)
        assert out.min() >= 0
        assert out.max() <= 1


def test_names_of_any_script_and_sign_are_drawn():
    """Would catch: a class called "$x" read as mathematics, and a warning per missing glyph."""
    names = ["$x_^", "漢字/字", "a" * 80]
    drawn(episodes.episode(*episode_data(3, 1, 2), names, "Task 0"))
    z = np.random.default_rng(0).normal(size=(6, 4))
    drawn(embeddings.embedding(z, [0, 0, 1, 1, 2, 2], z[::2], [0, 1, 2], names, "Embedding"))


def test_shortened_names_keep_both_ends():
    """Would catch: characters of one alphabet all shortened to the same name."""
    short = style.shorten("Old_Church_Slavonic_(Cyrillic)/character04@90")
    assert len(short) == 24
    assert short.startswith("Old")
    assert short.endswith("character04@90")
    assert style.shorten("Greek/alpha") == "Greek/alpha"


def test_the_adaptation_curve_is_the_mean_over_tasks_at_each_step():
    """Would catch: an average over the steps, or a band of standard deviations."""
    values = np.array([[0.2, 0.6, 0.8], [0.2, 0.8, 1.0], [0.2, 0.7, 0.6]])
    figure = adaptation.adaptation(values, Metric("higher", share=True), "accuracy")
    line = figure.axes[0].lines[0]
    assert np.allclose(line.get_xdata(), [0, 1, 2])
    assert np.allclose(line.get_ydata(), [0.2, 0.7, 0.8])
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert np.isclose(band[:, 1].max(), 0.8 + 1.96 * 0.2 / 3**0.5)
    assert figure.axes[0].get_xlabel() == "inner steps taken"
    drawn(figure)


@pytest.mark.parametrize("states", [1, 2, 11])
def test_a_fit_shows_the_first_and_the_last_state(states: int):
    """Would catch: the adapted function left out where there are many steps, or none."""
    grid = np.linspace(-1, 1, 9)
    predictions = np.stack([np.full(9, float(k)) for k in range(states)])
    figure = adaptation.fits(grid, grid[None], np.zeros((1, 3)), np.zeros((1, 3)), predictions[None])
    heights = {float(line.get_ydata()[0]) for line in figure.axes[0].lines if len(set(line.get_ydata())) == 1}
    assert {0.0, float(states - 1)} <= heights
    assert labels(figure.axes[0])[-2] == ("prediction" if states == 1 else f"after step {states - 1}")
    drawn(figure)


def test_several_fits_without_a_known_function_are_drawn():
    """Would catch: an odd number of tasks, or data without a true function, that breaks the grid."""
    drawn(adaptation.fits(np.arange(5.0), None, np.zeros((3, 2)), np.zeros((3, 2)), np.zeros((3, 2, 5))))


@pytest.mark.parametrize(("states", "steps"), [(1, [0]), (3, [0, 1, 2]), (8, [0, 1, 5, 7]), (11, [0, 1, 5, 10])])
def test_predictive_fits_show_each_steps_own_interval(states: int, steps: list[int]):
    """Would catch: the last step's interval at every step, a column of another step than it says, tasks mixed up."""
    grid = np.linspace(-1, 1, 9)
    middle = np.arange(2)[:, None] + np.arange(states) / 10  # of each task and state
    predictions = middle[..., None] + 0 * grid
    bands = np.stack([predictions - 0.25, predictions + 0.25], 2)
    points = np.zeros((2, 3))
    figure = adaptation.predictive_fits(grid, predictions[:, -1], points, points, predictions, bands)
    panels = np.array(figure.axes).reshape(2, len(steps))
    for (task, column), axes in np.ndenumerate(panels):
        shown = middle[task, steps[column]]
        band = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert (band.min(), band.max()) == pytest.approx((shown - 0.25, shown + 0.25))
        line = next(x for x in axes.lines if x.get_label() == "prediction")
        assert line.get_ydata() == pytest.approx(shown + 0 * grid)
    titles = [axes.get_title(loc="left") for axes in panels[0]]
    assert titles == ([""] if states == 1 else ["before adaptation", *(f"after step {k}" for k in steps[1:])])
    drawn(figure)


def test_an_interval_before_adaptation_does_not_hide_the_others():
    """Would catch: axes as wide as an interval of thousands, on which the adapted one is a line."""
    grid = np.linspace(-1, 1, 9)
    bands = np.stack([[[grid - 1e4, grid + 1e4], [grid - 1, grid + 1]]])
    figure = adaptation.predictive_fits(grid, None, np.zeros((1, 2)), np.ones((1, 2)), np.zeros((1, 2, 9)), bands)
    assert np.abs(figure.axes[0].get_ylim()).max() < 10
    drawn(figure)


def test_the_coverage_diagram_is_that_of_its_levels():
    """Would catch: another error in the picture than in the results, or coverage against the wrong probability."""
    levels = torch.tensor([0.0, 4.0, *[1.0] * 17, 9.0], dtype=torch.float64)
    figure = calibration.coverage(levels)
    measured = next(x for x in figure.axes[0].lines if str(x.get_label()).startswith("measured"))
    assert np.allclose(measured.get_xdata(), np.arange(21) / 20)
    assert measured.get_ydata()[[0, 1, 2, 19, 20]] == pytest.approx([0, 0, 4 / 30, 21 / 30, 1])
    assert f"measured, {100 * coverage_error(levels):.2f} % off on average" in labels(figure.axes[0])
    drawn(figure)


def test_entropies_inside_and_outside_are_drawn_as_shares():
    """Would catch: the two swapped, shares of more than there are, or the AUROC missing from the title."""
    rng = np.random.default_rng(0)
    inside, outside = rng.uniform(0, 0.5, (4, 5)), rng.uniform(0.5, 1.0, 13)
    figure = calibration.open_set(inside, outside, 3, 0.9876, 0.0123, "4 tasks")
    own, other = figure.axes[0].lines[:2]
    assert np.interp(np.median(inside), own.get_xdata(), own.get_ydata()) == pytest.approx(0.5, abs=0.06)
    assert own.get_xdata()[-1] == inside.max()
    assert other.get_xdata()[-1] == outside.max()
    assert "classes of the task" in str(own.get_label())
    assert figure.axes[0].get_title(loc="left") == "Queries of other classes: AUROC 0.988 ± 0.012, 4 tasks"
    drawn(figure)


def test_a_logarithmic_histogram_has_numbers_for_labels():
    """Would catch: matplotlib's source of powers of ten, where mathematics is not parsed."""
    figure = results.histogram([1e-3, 1e-2, 1e-2, 1.0, 30.0], Metric("lower"), "mse")
    drawn(figure)
    texts = [t.get_text() for t in figure.axes[0].get_xticklabels(which="both")]
    assert any(texts)
    assert not any("$" in t for t in texts)


def test_the_embedding_puts_prototypes_at_the_mean_of_their_support():
    """Would catch: prototypes projected about another centre than the queries."""
    rng = np.random.default_rng(0)
    support_z, support_y = rng.normal(size=(6, 5)) * [9, 3, 1e-3, 1e-3, 1e-3], np.arange(3).repeat(2)
    figure = embeddings.embedding(support_z, support_y, support_z, support_y, ["a", "b", "c"], "Embedding")
    clouds = figure.axes[0].collections
    for points, star in zip(clouds[0:6:2], clouds[1:6:2], strict=True):
        assert np.allclose(points.get_offsets().mean(0), star.get_offsets()[0])
    spread = np.linalg.svd(support_z - support_z.mean(0), compute_uv=False) ** 2
    assert f"({spread[0] / spread.sum():.0%} of variance)" in figure.axes[0].get_xlabel()
    drawn(figure)


def test_confusion_is_a_share_of_those_who_met():
    """Would catch: counts in place of shares, true and predicted swapped, zero where two classes never met."""
    wrong, asked = np.array([[0, 3], [1, 0]]), np.array([[0, 10], [20, 0]])
    figure = confusion.confusion(wrong, asked, ["a", "b"], "Confusion")
    shares = figure.axes[0].images[0].get_array()
    assert np.isclose(shares[0, 1], 0.3)
    assert np.isclose(shares[1, 0], 0.05)
    assert np.ma.getmaskarray(np.ma.masked_invalid(shares))[[0, 1], [0, 1]].all()
    assert {t.get_text() for t in figure.axes[0].texts} == {"30.0", "5.0"}
    drawn(figure)


@pytest.mark.parametrize("count", [1, 5])
def test_confused_pairs_tell_names_and_numbers(count: int):
    """Would catch: names beside the images of another pair."""
    images = [np.full((1, 6, 6), i, np.uint8) for i in range(2 * count)]
    pairs = [(f"one{i}", f"other{i}", images[2 * i], images[2 * i + 1], i, 30) for i in range(count)]
    figure = confusion.confused_pairs(pairs, "Pairs")
    told = [[t.get_text() for t in axes.texts] for axes in figure.axes if axes.texts]
    assert sorted(told) == [[f"one{i}", f"other{i}", f"{i} of 30 mistaken"] for i in range(count)]
    drawn(figure)


@pytest.mark.parametrize(("name", "worst"), [("accuracy", 0.05), ("mse", 0.95)])
def test_the_histogram_holds_all_tasks_and_marks_the_worst_tenth(name: str, worst: float):
    """Would catch: tasks outside of the edges, or the best tenth marked for a metric that should be low."""
    values = np.arange(100) / 100
    figure = results.histogram(values, METRICS[name], name)
    heights = [[bar.get_height() for bar in container] for container in figure.axes[0].containers]
    assert sum(heights[0]) == 100
    assert sum(heights[1]) == 10
    marked = next(t for t in labels(figure.axes[0]) if t.startswith("worst tenth"))
    mean = values[:10].mean() if name == "accuracy" else values[-10:].mean()
    assert abs(mean - worst) < 0.01
    assert (f"{100 * mean:.2f} %" if name == "accuracy" else f"{mean:.3g}") in marked
    drawn(figure)


@pytest.mark.parametrize("values", [[0.0], [1.0, 1.0], [0.5, float("nan"), 0.7], [1e-6, 1.0, 1e6, 2.0, 3.0]])
@pytest.mark.parametrize("name", ["accuracy", "mse"])
def test_odd_metrics_make_a_histogram_too(values: list[float], name: str):
    """Would catch: no spread, one task, a task that diverged or values over decades that break the edges."""
    figure = results.histogram(values, METRICS[name], name)
    assert sum(bar.get_height() for bar in figure.axes[0].containers[0]) == np.isfinite(values).sum()
    drawn(figure)


@pytest.mark.parametrize(("correct", "count"), [(0, 1), (3, 4), (970, 1000), (5, 5)])
def test_bounds_of_a_share_are_wilsons(correct, count):
    """Catches bounds beyond 0 and 1, and none where all or no queries are right: against scipy's."""
    expected = binomtest(correct, count).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(calibration.wilson(correct, count), [expected.low, expected.high], atol=2e-5)


def test_the_reliability_diagram_is_that_of_its_bins():
    """Would catch: another calibration error in the picture than in the results, or empty bins drawn as 0 %."""
    bins = torch.zeros(3, 15)
    bins[:, 3], bins[:, 14] = torch.tensor([10.0, 1.0, 2.5]), torch.tensor([30.0, 27.0, 29.4])
    figure = calibration.reliability(bins)
    measured = figure.axes[0].lines[1]
    assert np.allclose(measured.get_xdata(), [0.25, 0.98])
    assert np.allclose(measured.get_ydata(), [0.1, 0.9])
    assert f"measured, ECE {100 * calibration_error(bins):.2f} %" in labels(figure.axes[0])
    drawn(figure)


def test_clusters_are_shares_of_their_family():
    """Catches shares of the cluster in place of the family's, and a table drawn on its side."""
    figure = confusion.clusters([[3, 1, 0], [0, 5, 5]], ["line", "cubic"])
    cells = {tuple(map(int, t.get_position())): t.get_text() for t in figure.axes[0].texts}
    assert cells == {(0, 0): "75 %", (1, 0): "25 %", (2, 0): "0 %", (0, 1): "0 %", (1, 1): "50 %", (2, 1): "50 %"}
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["line, 4", "cubic, 10"]


def test_the_training_curve_is_read_from_the_rows_that_validated(tmp_path: Path):
    """Would catch: rows of training taken for validations, or the worst validation marked as the best."""
    path = tmp_path / "metrics.csv"
    path.write_text(
        "step,tasks_seen,train/mse,val/mse,val/mse_ci95\n9,100,5.0,,\n9,100,,3.0,0.5\n19,200,,1.0,\n29,300,,2.0,0.25\n"
    )
    points = adaptation.read_curve(path, "mse")
    assert np.allclose(points, [[100, 3, 0.5], [200, 1, np.nan], [300, 2, 0.25]], equal_nan=True)
    figure = adaptation.training(points, Metric("lower"), "mse")
    assert list(figure.axes[0].lines[1].get_xdata()) == [200]
    drawn(figure)


@pytest.mark.parametrize("panels", [1, 2, 3, 4])
@pytest.mark.parametrize("with_episode", [True, False])
def test_results_hold_every_panel(panels: int, with_episode: bool):
    """Would catch: a panel lost, or the layout broken, for some number of them."""
    data = episode_data(2, 1, 2)
    episode = (lambda axes: episodes.draw_episode(axes, *data, [], most_rows=5)) if with_episode else None
    chosen = [
        (f"Panel {i}", lambda axes: results.draw_histogram(axes, [0.1, 0.2], Metric("lower"), "mse"))
        for i in range(panels)
    ]
    figure = results.results(chosen, episode, "Results")
    assert len(figure.axes) == panels + with_episode
    drawn(figure)


def test_drawing_leaves_no_trace():
    """Would catch: style that leaks into a user's figures, and pyplot's figures, which stay in memory."""
    before = dict(matplotlib.rcParams)
    drawn(results.histogram([0.1, 0.2], Metric("lower"), "mse"))
    assert dict(matplotlib.rcParams) == before
    assert not pyplot.get_fignums()


def test_saving_is_whole_or_not_at_all(tmp_path: Path):
    """Would catch: half a PNG where the folder or the disk fails."""
    figure = results.histogram([0.1, 0.2], Metric("lower"), "mse")
    style.save(figure, tmp_path / "deep" / "one.png")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["one.png"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        style.save(figure, tmp_path / "file" / "one.png")
