"""Functions from Gaussian processes against scikit-learn's kernels, and sizes that are a block's own."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.gaussian_process.kernels import RBF, ExpSineSquared, Kernel, Matern

import app  # noqa: F401  before anything imports pytorch_lightning
from datamodules import GaussianProcesses
from datamodules.core.episodes import EvaluationTasks
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
    tasks = GaussianProcesses(kernel=kernel).distribution("val").sample(range(5))
    x = tasks.support_x.double()[:, :3], tasks.query_x.double()[:, :2]
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
    tasks = GaussianProcesses().distribution("train")
    sizes = np.array([tasks.sizes([16 * i]) for i in range(8_000)])
    shots, queries = sizes.T
    assert (shots.min(), shots.max()) == (3, 46)
    assert chi_square_is_plausible(shots - 3, 44)
    for n in (3, 20, 40):
        of_these = queries[shots == n]
        assert (of_these.min(), of_these.max()) == (3, 49 - n)
        assert chi_square_is_plausible(of_these - 3, 47 - n)
    assert (queries[shots == 46] == 3).all()


@pytest.mark.parametrize(("split", "block"), [("train", 5), ("val", 16), ("test", 16)])
def test_sizes_are_a_blocks(split, block):
    """Catches a meta-batch of tasks that do not go into one tensor, sizes by the batch of evaluation, and a task that
    depends on which others are sampled along."""
    tasks = GaussianProcesses(meta_batch_size=5, eval_batch_size=3).distribution(split)
    assert tasks.block == block
    for start in (0, 7 * block):
        together = tasks.sample(range(start, start + block))
        assert same(together, 3, tasks.sample([start + 4, start + 3]), 1)
    assert len({tasks.sizes([block * i]) for i in range(50)}) > 40
    with pytest.raises(ValueError, match="one block"):
        tasks.sample([block - 1, block])


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


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("total", "batch"), [(40, 16), (40, 5), (33, 16), (48, 100), (49, 4)])
def test_blocks_are_evaluated_once_by_all_processes_together(world, total, batch):
    """Catches a batch across two blocks, a task that is left out, processes with fewer batches, which DDP waits for,
    and a repeated task where each process has one of its own."""
    shares = [list(EvaluationTasks(total, batch, rank, world, block=16)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    for batches in zip(*shares, strict=True):
        assert all(0 < len(b) <= batch + 1 and len({i // 16 for i in b}) == 1 for b in batches)
        assert len({i // 16 for b in batches for i in b}) == 1
    counted = Counter(i for share in shares for b in share for i in b)
    assert set(counted) == set(range(total))
    repeated = {i for i, n in counted.items() if n > 1}
    assert all(i // 16 == total // 16 and total % 16 < world for i in repeated)


def test_evaluation_loads_every_task_once():
    """Catches a loader that cuts batches without asking for blocks."""
    data = GaussianProcesses(val_tasks=40, eval_batch_size=10)
    batches = list(data.val_dataloader())
    assert torch.equal(torch.cat([b.index for b in batches]), torch.arange(40))
    assert len({b.support_x.shape[1] for b in batches}) == 3


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
