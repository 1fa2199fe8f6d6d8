"""Few-shot regression: the points lie on the functions that ``Episodes.task`` names, and both are drawn as stated."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

import app  # noqa: F401  before anything imports pytorch_lightning
from datamodules.regression.functions import (
    FAMILIES,
    FiveFamily,
    FourFamily,
    HarderSinusoid,
    Linear,
    RegressionDataModule,
    Sinusoid,
)

TASKS = 4000
KS_LIMIT = 1.95 / math.sqrt(TASKS)  # Kolmogorov's distance that a right sample exceeds once in a thousand


def ks_uniform(values: torch.Tensor, low: float, high: float) -> float:
    """Kolmogorov's distance between the sample and the uniform distribution on [low, high]."""
    u = np.sort((values.double().numpy().ravel() - low) / (high - low))
    steps = np.arange(len(u) + 1) / len(u)
    return float(max(np.abs(u - steps[:-1]).max(), np.abs(u - steps[1:]).max()))


def ks_normal(values: torch.Tensor) -> float:
    """Kolmogorov's distance between the sample and the standard normal distribution."""
    return ks_uniform(0.5 * (1 + torch.erf(values.double() / math.sqrt(2))), 0.0, 1.0)


def both(episodes) -> tuple[np.ndarray, np.ndarray]:
    """All points of all tasks, support then query, float64."""
    x = torch.cat([episodes.support_x, episodes.query_x], 1)
    y = torch.cat([episodes.support_y, episodes.query_y], 1)
    return x.double().numpy(), y.double().numpy()


def test_sinusoid_targets_recomputed_with_numpy():
    """Would catch a wrong sign of the phase, a phase or amplitude of another task, or x and y out of step."""
    episodes = Sinusoid().distribution("test").sample(range(300))
    x, y = both(episodes)
    for t in range(300):
        expected = float(episodes.task["amplitude"][t]) * np.sin(x[t] - float(episodes.task["phase"][t]))
        np.testing.assert_allclose(y[t], expected, atol=1e-5)


def test_shapes_types_and_settings():
    """Would catch targets without their last dimension, float64 that no network takes, or train settings ignored."""
    data = Sinusoid(shots=7, queries=20, train_shots=3, train_queries=4)
    for split, shots, queries in (("train", 3, 4), ("val", 7, 20), ("test", 7, 20)):
        episodes = data.distribution(split).sample([5, 9])
        assert episodes.support_x.shape == episodes.support_y.shape == (2, shots, 1)
        assert episodes.query_x.shape == episodes.query_y.shape == (2, queries, 1)
        assert {t.dtype for t in (episodes.support_x, episodes.support_y, *episodes.task.values())} == {torch.float32}
        assert all(value.shape == (2,) for value in episodes.task.values())
        assert episodes.index.tolist() == [5, 9]
        assert episodes.ways == 0
    assert data.kind == "regression"


@pytest.mark.parametrize(
    ("data", "ranges"),
    [
        (Sinusoid(), {"amplitude": (0.1, 5.0), "phase": (0.0, math.pi)}),
        (HarderSinusoid(), {"amplitude": (0.1, 5.0), "phase": (0.0, 2 * math.pi), "frequency": (0.5, 2.0)}),
        (Sinusoid(amplitude=(5.0, 9.0)), {"amplitude": (5.0, 9.0)}),
    ],
    ids=["maml", "bmaml", "extrapolation"],
)
def test_parameters_are_uniform_in_their_ranges(data: Sinusoid, ranges: dict):
    """Would catch a wrong range, degrees for radians, or parameters and points made of the same random numbers."""
    task = data.distribution("test").sample(range(TASKS))
    for name, (low, high) in ranges.items():
        values = task.task[name]
        assert low <= values.min()
        assert values.max() <= high
        assert ks_uniform(values, low, high) < KS_LIMIT, name
    columns = torch.stack([*(task.task[n] for n in ranges), task.support_x[:, 0, 0], task.query_x[:, 0, 0]])
    off_diagonal = torch.corrcoef(columns) - torch.eye(len(columns))
    assert off_diagonal.abs().max() < 4 / math.sqrt(TASKS)


def test_points_are_uniform_and_the_support_is_not_the_query():
    """Would catch points outside [-5, 5], sorted, on a grid, or a query set that repeats the support set."""
    episodes = Sinusoid(shots=5, queries=5).distribution("val").sample(range(TASKS))
    for place in range(5):
        assert ks_uniform(episodes.support_x[:, place], -5.0, 5.0) < KS_LIMIT
        assert ks_uniform(episodes.query_x[:, place], -5.0, 5.0) < KS_LIMIT
    assert not (episodes.support_x[:, :, None, 0] == episodes.query_x[:, None, :, 0]).any()


def test_queries_of_evaluation_lie_on_a_grid_where_asked_for():
    """Would catch a grid in meta-training, one without its ends, targets of the points that were drawn instead, and
    support sets that change with it."""
    settings = {"shots": 6, "queries": 101, "train_queries": 9, "x_range": (-5.0, 5.0)}
    plain, grid = Sinusoid(**settings), Sinusoid(**settings, grid=True)
    for split in ("val", "test"):
        drawn, even = (data.distribution(split).sample([4, 7]) for data in (plain, grid))
        torch.testing.assert_close(even.query_x, torch.arange(-50, 51).view(-1, 1).expand(2, -1, 1) / 10)
        a, phase = (even.task[n].double().numpy()[:, None, None] for n in ("amplitude", "phase"))
        np.testing.assert_allclose(even.query_y, a * np.sin(even.query_x.double().numpy() - phase), atol=1e-5)
        assert torch.equal(even.support_x, drawn.support_x) and torch.equal(even.support_y, drawn.support_y)
        assert (even.fingerprint() != drawn.fingerprint()).all()
    both_ways = (data.distribution("train").sample([4, 7]) for data in (plain, grid))
    assert torch.equal(*(episodes.query_x for episodes in both_ways))


def test_noise_of_the_harder_sinusoid_is_a_hundredth_of_the_amplitude():
    """Would catch absent noise, a variance used as a deviation, or noise that does not grow with the amplitude."""
    episodes = HarderSinusoid(queries=2).distribution("test").sample(range(TASKS))
    x, y = both(episodes)
    a, phase, w = (episodes.task[n].double().numpy()[:, None, None] for n in ("amplitude", "phase", "frequency"))
    standardised = torch.from_numpy((y - a * np.sin(w * x - phase)) / (0.01 * a))
    assert ks_normal(standardised[:, 0]) < KS_LIMIT  # support
    assert ks_normal(standardised[:, -1]) < KS_LIMIT  # query
    assert abs(float(standardised[:, 0].flatten() @ standardised[:, 1].flatten()) / TASKS) < 4 / math.sqrt(TASKS)


def test_linear_parameters_are_standard_normal_and_independent():
    """Would catch a uniform slope, an intercept equal to the slope, or noise although none was asked for."""
    episodes = Linear().distribution("test").sample(range(TASKS))
    slope, intercept = episodes.task["slope"], episodes.task["intercept"]
    assert ks_normal(slope) < KS_LIMIT
    assert ks_normal(intercept) < KS_LIMIT
    assert abs(float(slope @ intercept) / TASKS) < 4 / math.sqrt(TASKS)
    x, y = both(episodes)
    expected = slope.double().numpy()[:, None, None] * x + intercept.double().numpy()[:, None, None]
    np.testing.assert_allclose(y, expected, atol=1e-5)
    noisy = Linear(noise=0.5, queries=2).distribution("test").sample(range(TASKS))
    residual = (
        noisy.query_y - noisy.task["slope"][:, None, None] * noisy.query_x - noisy.task["intercept"][:, None, None]
    )
    assert ks_normal(residual[:, 0] / 0.5) < KS_LIMIT


RANGES = {  # by family, in the order in which the formulas below take them
    "sinusoid": {"amplitude": (0.1, 5), "frequency": (0.8, 1.2), "phase": (0, 2 * math.pi)},
    "line": {"slope": (-3, 3), "intercept": (-3, 3)},
    "quadratic": {"square": (-0.2, 0.2), "slope": (-2, 2), "intercept": (-3, 3)},
    "cubic": {"cube": (-0.1, 0.1), "square": (-0.2, 0.2), "slope": (-2, 2), "intercept": (-3, 3)},
}
FORMULAS = {
    "sinusoid": lambda x, a, w, p: a * math.sin(w * x) + p,
    "line": lambda x, a, b: a * x + b,
    "quadratic": lambda x, a, b, c: a * x**2 + b * x + c,
    "cubic": lambda x, a, b, c, d: a * x**3 + b * x**2 + c * x + d,
}


@pytest.mark.parametrize("phase", ["outside", "inside"])
def test_four_families_recomputed_point_by_point(phase: str):
    """Would catch a family with another's formula or coefficients, powers mixed up, and a phase on the wrong side."""
    inside = {**FORMULAS, "sinusoid": lambda x, a, w, p: a * math.sin(w * x - p)}
    data = FourFamily(phase=phase)
    assert FourFamily().family.phase == "outside"
    episodes = data.distribution("test").sample(range(200))
    assert episodes.task["family"].dtype == torch.int64
    assert set(episodes.task["family"].tolist()) == {0, 1, 2, 3}
    x, y = both(episodes)
    for t, number in enumerate(episodes.task["family"].tolist()):
        family = FAMILIES[number]
        own = [float(episodes.task[name][t]) for name in RANGES[family]]
        formula = (FORMULAS if phase == "outside" else inside)[family]
        np.testing.assert_allclose(y[t, :, 0], [formula(v, *own) for v in x[t, :, 0].tolist()], atol=2e-5)
        others = set(episodes.task) - set(RANGES[family]) - {"family"}
        assert all(episodes.task[name][t] == 0 for name in others)


def test_four_families_are_drawn_alike_with_uniform_coefficients():
    """Would catch a family that prevails, a wrong range, and coefficients that are tied to the family or each other."""
    task = FourFamily().distribution("train").sample(range(4 * TASKS)).task
    counts = torch.bincount(task["family"], minlength=4)
    assert ((counts - TASKS) ** 2 / TASKS).sum() < 16.3  # χ² with 3 degrees of freedom, once in a thousand
    for number, (family, ranges) in enumerate(RANGES.items()):
        of_family = {name: task[name][task["family"] == number] for name in ranges}
        for name, (low, high) in ranges.items():
            assert ks_uniform(of_family[name], low, high) < 1.95 / math.sqrt(counts[number]), (family, name)
        off_diagonal = torch.corrcoef(torch.stack(list(of_family.values()))) - torch.eye(len(ranges))
        assert off_diagonal.abs().max() < 4 / math.sqrt(counts[number])


def test_four_families_can_be_fewer_and_noisy():
    """Would catch a family's number that depends on which others are drawn, and noise of another size."""
    episodes = FourFamily(families=["cubic", "line"], noise=0.3, queries=2).distribution("val").sample(range(TASKS))
    assert set(episodes.task["family"].tolist()) == {1, 3}
    quiet = FourFamily(families=["cubic", "line"], queries=2).distribution("val").sample(range(TASKS))
    assert ks_normal((episodes.query_y - quiet.query_y)[:, 0] / 0.3) < KS_LIMIT
    with pytest.raises(ValueError, match="each once"):
        FourFamily(families=["line", "line"])


def test_finite_training_tasks_come_back_at_fresh_points():
    """Would catch more functions than asked for, points that repeat with the function, or a limit on test tasks."""
    data = HarderSinusoid(train_tasks=100)
    first, again = (data.distribution("train").sample(range(start, start + 100)) for start in (0, 300))
    for name in first.task:
        assert torch.equal(first.task[name], again.task[name])
        assert len(first.task[name].unique()) == 100
    assert not (first.support_x[:, :, None] == again.support_x[:, None]).any()
    tested = data.distribution("test").sample(range(1000))
    assert len(tested.task["amplitude"].unique()) == 1000
    # A limit that is not reached changes nothing.
    unlimited = HarderSinusoid(train_tasks=None).distribution("train").sample(range(100))
    assert torch.equal(unlimited.support_y, first.support_y)


@pytest.mark.parametrize(
    "data",
    [Sinusoid(), HarderSinusoid(train_tasks=10), Linear(noise=0.1), FourFamily(noise=0.3)],
    ids=lambda d: type(d).__name__,
)
def test_an_episode_depends_on_its_index_alone(data: RegressionDataModule):
    """Would catch episodes that change with the batch they are drawn in, and splits or seeds that share tasks."""
    alone = data.distribution("train").sample([7])
    among = data.distribution("train").sample([90, 7, 3])
    for field in ("support_x", "support_y", "query_x", "query_y"):
        assert torch.equal(getattr(alone, field)[0], getattr(among, field)[1])
    assert not torch.equal(
        alone.support_x, data.distribution("test").sample([7]).support_x[:, : alone.support_x.shape[1]]
    )
    assert not torch.equal(alone.support_x, type(data)(seed=1).distribution("train").sample([7]).support_x)


def test_function_is_the_truth_for_one_task_and_for_many():
    """Would catch a plot of the wrong curve: a shape that broadcasts tasks against points, or noise in the truth."""
    for data in (Sinusoid(), Linear(), FourFamily()):
        distribution = data.distribution("val")
        episodes = distribution.sample(range(3))
        assert torch.equal(distribution.function(episodes.task, episodes.query_x), episodes.query_y)
        one = {name: value[2] for name, value in episodes.task.items()}
        assert torch.equal(distribution.function(one, episodes.query_x[2]), episodes.query_y[2])
        grid = torch.linspace(-5, 5, 11)[:, None]
        curves = distribution.function(episodes.task, grid)
        assert curves.shape == (3, 11, 1)
        assert torch.allclose(curves[2], distribution.function(one, grid))


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"shots": 0}, "shots"), ({"amplitude": (5.0, 0.1)}, "amplitude"), ({"noise": -1.0}, "noise")],
)
def test_impossible_settings_are_refused_by_name(settings: dict, named: str):
    """Would catch an empty support set, a reversed range or a negative deviation that only shows as a bad result."""
    with pytest.raises(ValueError, match=named):
        Sinusoid(**settings)


def test_configuration_reaches_every_setting():
    """Would catch a setting that a YAML cannot give, because ``common`` hides it from the command line's parser."""
    parser = ArgumentParser()
    parser.add_argument("--data", type=RegressionDataModule)
    settings = {"train_tasks": 100, "shots": 5, "x_range": [-1, 1], "phase": [0, 1], "seed": 3, "meta_batch_size": 10}
    parsed = parser.parse_object({"data": {"class_path": "datamodules.HarderSinusoid", "init_args": settings}})
    data = parser.instantiate(parsed).data
    assert isinstance(data, HarderSinusoid)
    assert (data.train_tasks, data.shots, data.x_range, data.seed, data.meta_batch_size) == (100, 5, (-1, 1), 3, 10)
    assert data.family.phase == (0, 1)


def test_five_families_follow_their_law():
    """Catches a kind with another's formula, a range that is off, a quadratic of one sign and noise on support alone:
    every task by the formula of its kind, written out."""
    data = FiveFamily(shots=10, queries=40, test_tasks=10)
    tasks = data.distribution("test")
    batch = tasks.sample(range(4000))
    kind, a, c, b = (batch.task[name].double() for name in ("family", "scale", "centre", "offset"))
    formulas = {
        0: lambda x, a, c, b: a * torch.sin(x - c),
        1: lambda x, a, c, b: a * x + b,
        2: lambda x, a, c, b: a * (x - c) ** 2 + b,
        3: lambda x, a, c, b: a * (2 / (1 + torch.exp(-2 * (x - c))) - 1) + b,
        4: lambda x, a, c, b: a * torch.maximum(x - c, c - x) + b,
    }
    x, y = batch.query_x.double(), batch.query_y.double()
    for number, formula in formulas.items():
        of = kind == number
        assert 0.17 < of.double().mean() < 0.23
        noise = y[of] - formula(x[of], *(v[of][:, None, None] for v in (a, c, b)))
        assert abs(noise.mean()) < 0.01 and noise.std() == pytest.approx(0.3, rel=0.02)
    support_noise = batch.support_y - tasks.function(batch.task, batch.support_x)
    assert support_noise.std().item() == pytest.approx(0.3, rel=0.02)
    for number, (low, high) in {0: (0.1, 5), 1: (-3, 3), 2: (0.02, 0.15), 3: (-3, 3), 4: (-3, 3)}.items():
        found = a[kind == number].abs() if number == 2 else a[kind == number]
        assert low <= found.min() < low + 0.05 * (high - low) and high - 0.05 * (high - low) < found.max() <= high
    quadratic = a[kind == 2]
    assert 0.4 < (quadratic > 0).double().mean() < 0.6
    assert c[kind == 0].min() >= 0 and c[kind == 0].max() <= math.pi and not b[kind == 0].any()
