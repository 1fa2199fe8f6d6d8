"""The exact Gaussian process against scikit-learn, GPyTorch and SciPy."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, ExpSineSquared, Matern

from app.cli.builder import main
from app.dashboard import few_shot
from app.runs.probe import Probe
from datamodules import GaussianProcesses
from models import CNP, GaussianProcess
from tests.support.toy import evaluation

KERNELS = ("rbf", "matern52", "periodic")


def tasks(kernel: str, first: int = 0):
    """16 tasks in float64, whose y are exactly those that the reference gets."""
    data = GaussianProcesses(test_kernel=kernel, shots=12, queries=6)
    batch = data.distribution("test").sample(range(first, first + 16))
    return batch.apply(lambda t: t.double() if t.is_floating_point() else t)


def regressor(kernel: str, facts: dict[str, float]) -> GaussianProcessRegressor:
    of = {
        "rbf": lambda: RBF(facts["lengthscale"]),
        "matern52": lambda: Matern(facts["lengthscale"], nu=2.5),
        "periodic": lambda: ExpSineSquared(facts["lengthscale"], facts["period"]),
    }[kernel]()
    kernel_with_scale = ConstantKernel(facts["scale"] ** 2) * of
    return GaussianProcessRegressor(kernel_with_scale, alpha=facts["noise"] ** 2, optimizer=None)


@pytest.mark.parametrize("kernel", KERNELS)
def test_predictions_and_densities_are_scikit_learns(kernel):
    """Catches a predictive variance without the noise of an observation, queries that do not covary, a sum for a mean
    over queries, and a joint density of the marginals."""
    learner, batch = GaussianProcess().eval(), tasks(kernel)
    prediction, measured = learner.predictions(batch), learner.task_metrics(batch)
    by_points = learner.per_task(prediction, batch.query_y)["nll"]
    for i in range(16):
        facts = {name: float(values[i]) for name, values in batch.task.items()}
        fitted = regressor(kernel, facts).fit(batch.support_x[i], batch.support_y[i, :, 0])
        mean, of_function = fitted.predict(batch.query_x[i], return_cov=True)
        observed = of_function + facts["noise"] ** 2 * np.eye(len(mean))
        y, deviation = batch.query_y[i, :, 0].numpy(), np.sqrt(np.diag(observed))
        np.testing.assert_allclose(prediction.mean[i, 0, :, 0], mean, rtol=0, atol=1e-9)
        np.testing.assert_allclose(prediction.deviation[i, 0, :, 0], deviation, rtol=1e-8)
        marginal = norm.logpdf(y, mean, deviation).mean()
        joint = multivariate_normal.logpdf(y, mean, observed) / len(y)
        assert float(measured["marginal"][i]) == pytest.approx(marginal, abs=1e-8)
        assert float(measured["joint"][i]) == pytest.approx(joint, abs=1e-8)
        assert float(by_points[i]) == pytest.approx(-marginal, abs=1e-6)


def test_predictions_are_gpytorchs():
    """Catches what the reference above shares with it: the same posterior by another library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own use of what torch has deprecated
        import gpytorch

    batch, learner = tasks("rbf", first=32), GaussianProcess().eval()
    prediction = learner.predictions(batch)

    class Exact(gpytorch.models.ExactGP):
        def __init__(self, x, y, likelihood):
            super().__init__(x, y, likelihood)
            self.mean_module = gpytorch.means.ZeroMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    for i in range(3):
        likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
        model = Exact(batch.support_x[i], batch.support_y[i, :, 0], likelihood).double().eval()
        model.covar_module.outputscale = batch.task["scale"][i] ** 2
        model.covar_module.base_kernel.lengthscale = batch.task["lengthscale"][i]
        likelihood.noise = batch.task["noise"][i] ** 2
        with torch.no_grad():
            expected = likelihood.eval()(model(batch.query_x[i]))
            joint = expected.log_prob(batch.query_y[i, :, 0]) / batch.query_y.shape[1]
        torch.testing.assert_close(prediction.mean[i, 0, :, 0], expected.mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(prediction.deviation[i, 0, :, 0], expected.stddev, rtol=1e-4, atol=0)
        assert float(learner.task_metrics(batch)["joint"][i]) == pytest.approx(float(joint), abs=1e-4)


def test_what_it_is_told_is_what_functions_were_drawn_by():
    """Catches facts of other tasks than those they stand beside, after which no interval holds what it says: what
    queries are apart from their means, in units of their covariance, has mean square 1."""
    learner, squares, count = GaussianProcess().eval(), 0.0, 0
    for block in range(40):
        batch = tasks("periodic", first=16 * block)

        def apart(task):
            mean, covariance = learner.joint(learner.adapt(task.support), task.query_x)
            factor = torch.linalg.cholesky(covariance)
            return torch.linalg.solve_triangular(factor, task.query_y - mean, upper=False).square().sum()

        squares += learner.map(apart, batch).sum().item()
        count += batch.query_y.numel()
    assert abs(squares / count - 1) < 4 * np.sqrt(2 / count)


def test_only_the_oracle_is_told():
    """Catches hyperparameters in the support set of a learner that has to find them out."""
    batch = tasks("rbf").apply(lambda t: t.float() if t.is_floating_point() else t)
    seen = []
    for learner in (GaussianProcess(), CNP(hidden=4)):
        learner.map(lambda task: seen.append(task.support.facts) or task.query_x, batch)
    assert seen[0].keys() == batch.task.keys() and seen[1] is None


def test_the_command_reports_both_densities(tmp_path):
    """Catches metrics by the batch of evaluation, the joint density of the marginals in results, and facts in an order
    other than that of the tasks."""
    results = []
    for size in ("16", "5"):
        main(evaluation("GaussianProcess", tmp_path / size, "--data.eval_batch_size", size, "--data.test_tasks", "40"))
        folder = tmp_path / size / "gaussianprocess"
        results.append(json.loads((folder / "results.json").read_text())["metrics"])
        with np.load(folder / "test_tasks.npz") as content:
            assert (content["index"] == np.arange(40)).all()
            assert {"lengthscale", "scale", "period", "kernel", "noise"} <= set(content.files)
    own = GaussianProcesses().distribution("test")
    expected = [GaussianProcess().task_metrics(own.sample(some)) for some in own.alike(range(40))]
    assert len(expected) > 30
    for name in ("marginal", "joint"):
        mean = float(torch.cat([e[name] for e in expected]).mean())
        assert results[0][name]["mean"] == pytest.approx(mean, abs=1e-5)
        assert results[1][name]["mean"] == pytest.approx(results[0][name]["mean"], abs=1e-6)
    assert results[0]["joint"]["mean"] > results[0]["marginal"]["mean"] + 0.1


def test_other_functions_are_refused(tmp_path, capsys):
    """Catches a failure in the middle of a test, of a kernel that sinusoids do not have."""
    with pytest.raises(SystemExit):
        main(evaluation("GaussianProcess", tmp_path, "--data", "datamodules.Sinusoid"))
    error = capsys.readouterr().err
    assert "datamodules.GaussianProcesses" in error and error.count("\n") == 1


def test_figures_look_at_it_as_at_any_learner():
    """Catches a prediction that needs more than its support set, and a look at several sizes of tasks at once."""
    probe = Probe(GaussianProcess().eval(), GaussianProcesses(), "test")
    grid, truth, support_x, support_y, predictions, bands = few_shot.fitted(probe, 4)
    assert truth is None and len({len(x) for x in support_x}) > 1
    for i in range(4):
        task = probe.tasks.sample([i])
        assert torch.equal(support_x[i], task.support_x[0, :, 0])
        assert torch.equal(support_y[i], task.support_y[0, :, 0])
        learner = GaussianProcess().eval()
        expected = learner.predict(learner.adapt(task[0].support), grid[:, None])
        torch.testing.assert_close(predictions[i, 0], expected.mean[0, :, 0].float())
        assert (bands[i, 0, 1] - bands[i, 0, 0] > 3.9 * 0.02).all()
    assert probe.adaptation(40) is None  # one state: there is no curve
