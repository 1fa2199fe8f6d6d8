"""Functions from Gaussian processes against scikit-learn's kernels, and sizes that are a block's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.gaussian_process.kernels import RBF, ExpSineSquared, Kernel, Matern

import app  # noqa: F401  before anything imports pytorch_lightning
from datamodules import GaussianProcesses
from datamodules.core.episodes import EvaluationGroups
from datamodules.regression.gaussian_processes import KERNELS, covariance
from tests.support.image_tasks import chi_square_is_plausible, same


def of_sklearn(kernel: str, lengthscale: float, period: float) -> Kernel:
    match kernel:
        case "rbf":
            return RBF(lengthscale)
        case "matern52":
            return Matern(lengthscale, nu=2.5)
        case _:
            return ExpSineSquared(lengthscale, period)


@pytest.mark.parametrize("kernel", KERNELS)
def test_covariances_are_scikit_learns(kernel):
    """Catches a wrong formula: 2ℓ² for ℓ², a variance for a deviation, a period of 2p, a kernel under another's
    number; and hyperparameters that depend on how tasks are mapped over."""
    tasks = GaussianProcesses(kernel=kernel, shots=3, queries=2).distribution("val").sample(range(5))
    x = tasks.support_x.double(), tasks.query_x.double()
    mapped = torch.vmap(covariance)(tasks.task, *x)
    assert tasks.task["kernel"].unique().tolist() == [list(KERNELS).index(kernel)]
    for i in range(5):
        facts = {name: float(values[i]) for name, values in tasks.task.items()}
        expected = facts["scale"] ** 2 * of_sklearn(kernel, facts["lengthscale"], facts["period"])(x[0][i], x[1][i])
        np.testing.assert_allclose(mapped[i], expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(covariance({n: v[i] for n, v in tasks.task.items()}, x[0][i], x[1][i]), mapped[i])


@pytest.mark.parametrize("kernel", KERNELS)
def test_functions_have_the_covariance_of_their_kernel(kernel):
    """Catches noise that is missing, added twice or only to the queries, and hyperparameters other than those told:
    values of 4,096 functions, freed of scikit-learn's covariance with noise, are independent and standard normal."""
    data = GaussianProcesses(kernel=kernel, shots=3, queries=3, noise=0.1, lengthscale=(0.3, 0.6))
    tasks = data.distribution("val")
    free = []
    for start in range(0, 4096, 16):
        batch = tasks.sample(range(start, start + 16))
        x = torch.cat([batch.support_x, batch.query_x], 1).double().numpy()
        y = torch.cat([batch.support_y, batch.query_y], 1).double().numpy()
        scale, lengthscale, period = (batch.task[n].tolist() for n in ("scale", "lengthscale", "period"))
        for i in range(16):
            own = of_sklearn(kernel, lengthscale[i], period[i])(x[i])
            factor = np.linalg.cholesky(scale[i] ** 2 * own + 0.1**2 * np.eye(6))
            free.append(np.linalg.solve(factor, y[i, :, 0]))
    products = np.array(free)[:, :, None] * np.array(free)[:, None]
    error = products.std(0) / np.sqrt(len(products))
    assert (np.abs(products.mean(0) - np.eye(6)) < 4.5 * error).all()
    assert (np.abs(np.mean(free, 0)) < 4.5 / np.sqrt(len(free))).all()


def test_hyperparameters_and_points_are_drawn_from_their_ranges():
    """Catches a range of another parameter, points outside of theirs, and tasks with hyperparameters in common."""
    data = GaussianProcesses(x_range=(-2, 2), lengthscale=(0.1, 0.6), scale=(0.1, 1.0), period=(0.1, 0.5))
    tasks = [data.distribution("train").sample(range(16 * i, 16 * i + 16)) for i in range(250)]
    for name, low, high in (("lengthscale", 0.1, 0.6), ("scale", 0.1, 1.0), ("period", 0.1, 0.5)):
        drawn = torch.cat([t.task[name] for t in tasks]).double().numpy()
        assert len(np.unique(drawn)) > 3990
        assert chi_square_is_plausible(((drawn - low) / (high - low) * 20).astype(int), 20)
    x = torch.cat([torch.cat([t.support_x, t.query_x], 1).flatten() for t in tasks]).double().numpy()
    assert chi_square_is_plausible(((x + 2) / 4 * 20).astype(int), 20)


def test_sizes_are_those_of_the_protocol():
    """Catches shots of 3 to 47 or queries of 3 to 50 - shots, and sizes that are not uniform."""
    shots, queries = GaussianProcesses().distribution("test").sizes(range(20_000)).T
    assert (shots.min(), shots.max()) == (3, 46)
    assert chi_square_is_plausible(shots - 3, 44)
    for n in (3, 20, 40):
        of_these = queries[shots == n]
        assert (of_these.min(), of_these.max()) == (3, 49 - n)
        assert chi_square_is_plausible(of_these - 3, 47 - n)
    assert (queries[shots == 46] == 3).all()


def test_a_meta_batch_has_one_size():
    """Catches a meta-batch of tasks that do not go into one tensor, meta-batches that are all of one size, and a task
    that depends on which others are sampled along."""
    tasks = GaussianProcesses(meta_batch_size=5).distribution("train")
    assert (tasks.sizes(range(100)).reshape(20, 5, 2) == tasks.sizes(range(0, 100, 5))[:, None]).all()
    assert len(np.unique(tasks.sizes(range(0, 250, 5)), axis=0)) > 40
    for start in (0, 35):
        together = tasks.sample(range(start, start + 5))
        assert same(together, 3, tasks.sample([start + 4, start + 3]), 1)
    with pytest.raises(ValueError, match="differ in size"):
        tasks.sample([4, 5])


def test_tasks_of_evaluation_have_sizes_of_their_own():
    """Catches tasks that share their sizes, as in the published test: a mean of them varies three times as much as
    its interval, which takes them to be independent, says. And tasks of other sizes, or none, in a group."""
    tasks = GaussianProcesses().distribution("test")
    sizes = tasks.sizes(range(4000)).astype(float)
    assert np.abs([np.corrcoef(s[:-1], s[1:])[0, 1] for s in sizes.T]).max() < 4 / np.sqrt(4000)
    published = GaussianProcesses(same_size=16).distribution("test").sizes(range(4000)).reshape(250, 16, 2)
    assert (published == published[:, :1]).all() and len(np.unique(published[:, 0], axis=0)) > 200
    groups = tasks.alike(range(300))
    assert sorted(i for group in groups for i in group) == list(range(300)) and len(groups) < 290
    for group in groups:
        batch = tasks.sample(group)
        assert batch.index.tolist() == group and [batch.support_x.shape[1], batch.query_x.shape[1]] == [
            *tasks.sizes(group[-1:])[0]
        ]
        assert same(batch, len(group) - 1, tasks.sample(group[-1:]), 0)
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)


def test_the_kernel_of_the_tests_is_another():
    """Catches a checkpoint that is chosen by the functions of the test, and a test on those of the training."""
    data = GaussianProcesses(kernel="rbf", test_kernel="periodic")
    numbers = {s: int(data.distribution(s).sample([0]).task["kernel"][0]) for s in ("train", "val", "test")}
    assert numbers == {"train": 0, "val": 0, "test": 2}
    assert data.identity != GaussianProcesses(kernel="rbf").identity
    # Only the functions are others: a comparison across kernels has the same points.
    one, other = (GaussianProcesses(test_kernel=k).distribution("test").sample([3]) for k in ("rbf", "matern52"))
    assert torch.equal(one.support_x, other.support_x) and torch.equal(one.task["scale"], other.task["scale"])
    assert not torch.allclose(one.support_y, other.support_y)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("groups", [[[0, 2, 4, 5, 6], [1], [3]], [[0, 1], [2, 3]], [[0], [1]]])
def test_groups_are_evaluated_by_all_processes_together(world, groups):
    """Catches a batch across two groups, a task that is left out, processes with fewer batches, which DDP waits for,
    and more repeated than fills up the last round."""
    shares = [list(EvaluationGroups(groups, 2, rank, world)) for rank in range(world)]
    (length,) = {len(share) for share in shares}
    every = [b for share in shares for b in share]
    assert all(0 < len(b) <= 2 and any(set(b) <= set(group) for group in groups) for b in every)
    different = {tuple(b) for b in every}
    assert sorted(i for b in different for i in b) == sorted(i for group in groups for i in group)
    assert length == -(-len(different) // world)
    assert world > 1 or len(every) == len(different)


def test_evaluation_loads_every_task_once():
    """Catches a loader that cuts batches without asking what is alike."""
    data = GaussianProcesses(val_tasks=200, eval_batch_size=2)
    batches = list(data.val_dataloader())
    assert sorted(torch.cat([b.index for b in batches]).tolist()) == list(range(200))
    assert {len(b) for b in batches} == {1, 2}
    fixed = list(GaussianProcesses(val_tasks=200, shots=5, queries=4).val_dataloader())
    assert [len(b) for b in fixed] == [100, 100]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"shots": (3, 47)}, "points is 49.*at least 50"),
        ({"shots": (5, 3)}, "shots is .5, 3."),
        ({"shots": 0}, "shots is 0"),
        ({"queries": 0}, "queries is 0"),
        ({"lengthscale": (0.0, 1.0)}, "lengthscale is from 0.0"),
        ({"scale": (1.0, 0.5)}, "scale is"),
        ({"noise": 0.0}, "noise is 0"),
        ({"noise": -1.0}, "noise is -1"),
    ],
)
def test_settings_of_no_process_are_refused(settings, said):
    """Catches settings that would end in a Cholesky factor of not-a-numbers, or a task without queries."""
    with pytest.raises(ValueError, match=said):
        GaussianProcesses(**settings)


def test_fixed_sizes_are_told():
    """Catches sizes that a comparison does not see, and queries that are drawn though they are given."""
    data = GaussianProcesses(shots=10, queries=39)
    assert data.task_shape() == {"shots": 10, "queries": 39} and GaussianProcesses().task_shape() == {}
    batch = data.distribution("test").sample(range(3))
    assert batch.support_x.shape == (3, 10, 1) and batch.query_y.shape == (3, 39, 1)
