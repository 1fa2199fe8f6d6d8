"""Metrics per task and over tasks, against torchmetrics, NumPy and a simulation."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

import models
from datamodules.core.metric import Metric
from models import MLP, ProtoNet
from models.core.metrics import (
    LEVELS,
    TaskMetrics,
    classification_metrics,
    coverage_error,
    interval,
    mutual_information,
    regression_metrics,
)
from models.core.predictions import Mixture
from models.core.task_kinds import KINDS

DECLARED = (
    KINDS["regression"].metrics
    | KINDS["classification"].metrics
    | {"kl": Metric(), "families": Metric("higher", pooled="nmi")}
)


def collected(values: torch.Tensor, index: torch.Tensor | None = None) -> TaskMetrics:
    metrics = TaskMetrics(DECLARED)
    index = torch.arange(len(values)) if index is None else index
    for i, v in zip(index.split(7), values.split(7), strict=True):
        metrics.update(i, {"accuracy": v})
    return metrics


def test_calibration_equals_torchmetrics_and_nll_equals_cross_entropy():
    """Catches bins closed on the wrong side or another number of them, a mean over bins, and logits taken for
    log-probabilities. Targets are as likely as the logits say, so that bins err to both sides."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(20, 30, 5)
    target = torch.distributions.Categorical(logits=logits).sample()
    table = classification_metrics(logits, target)
    metrics = TaskMetrics(DECLARED)
    metrics.update(torch.arange(20), table)
    result = metrics.compute()
    expected = multiclass_calibration_error(logits.flatten(0, 1).softmax(-1), target.flatten(), 5, n_bins=15, norm="l1")
    assert result["ece"] == pytest.approx(expected.item(), rel=1e-5)
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()).item()
    assert result["nll"] == pytest.approx(nll, rel=1e-5)
    assert result["accuracy"] == pytest.approx((logits.argmax(-1) == target).float().mean().item())
    assert result["ece_ci95"] > 0


def test_what_is_no_number_predicts_no_class():
    """Catches predictions that are not finite and count as the first class: chance, and trusted."""
    logits = torch.tensor([[[0.0, 1.0], [torch.nan, torch.nan]], [[0.0, 1.0], [3.0, 1.0]]])
    found = classification_metrics(logits, torch.tensor([[1, 0], [1, 0]]))
    assert found["accuracy"].isnan().tolist() == found["nll"].isnan().tolist() == [True, False]


def test_mixed_precision_rounds_no_metric():
    """Catches the sums of confidences that calibration is made of, multiplied in bfloat16."""
    logits, target = torch.randn(3, 75, 5).bfloat16(), torch.randint(5, (3, 75))
    learner = ProtoNet(MLP(1))
    expected = learner.per_task(logits, target)
    metric = TaskMetrics(DECLARED)
    with torch.autocast("cpu", torch.bfloat16):
        metrics = learner.per_task(logits, target)
        metric.update(torch.arange(3), metrics | {"kl": logits[:, 0, 0]})
    for name, value in expected.items():
        assert value.dtype == torch.float32 and torch.equal(metrics[name], value), name
    assert metric.table()["kl"].dtype == torch.float32


def test_interval_covers_the_mean_as_often_as_it_says():
    """Catches an interval over batches, of a standard deviation, or with a wrong factor: 95 % of 2000 simulations."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        mean, half = interval(torch.from_numpy(rng.binomial(75, 0.9, 200) / 75))
        inside += abs(mean - 0.9) <= half
    assert 0.935 <= inside / 2000 <= 0.965


def test_worst_decile_by_direction():
    """Catches the best decile reported as the worst."""
    values = torch.linspace(0, 1, 100)[torch.randperm(100)]
    assert collected(values).compute()["accuracy_worst_decile"] == pytest.approx(np.linspace(0, 1, 100)[:10].mean())
    metrics = TaskMetrics(DECLARED)
    metrics.update(torch.arange(100), {"mse": values})
    assert metrics.compute()["mse_worst_decile"] == pytest.approx(np.linspace(0, 1, 100)[-10:].mean())


def test_a_repeated_task_counts_once():
    """Catches tasks that DDP samplers repeat to fill a batch, which narrow the interval and bias the mean."""
    values = torch.rand(10)
    once = collected(values).compute()
    twice = collected(torch.cat([values, values[:5]]), torch.cat([torch.arange(10), torch.arange(5)])).compute()
    assert twice == once
    assert twice["tasks"] == 10


def test_regression_is_per_task():
    """Catches a mean over all points where tasks are asked for."""
    prediction, target = torch.randn(4, 6, 2), torch.randn(4, 6, 2)
    expected = [((prediction[t] - target[t]) ** 2).mean().item() for t in range(4)]
    assert regression_metrics(prediction, target)["mse"].tolist() == pytest.approx(expected)


def test_one_task_has_no_interval():
    """Catches an interval of zero, which would claim certainty."""
    assert np.isnan(collected(torch.rand(1)).compute()["accuracy_ci95"])


def parts(*gaussians: tuple[float, float], values: int = 1) -> Mixture:
    """A distribution of so many queries' values, all alike, by the mean and deviation of each part; one task."""
    mean, deviation = (torch.tensor(column, dtype=torch.float64) for column in zip(*gaussians, strict=True))
    return Mixture(*(t[None, :, None, None].expand(1, -1, values, 1) for t in (mean, deviation)))


def test_a_gaussian_is_measured_as_in_closed_form():
    """Catches a density in other units, an interval of another probability, or the half of it for the whole."""
    targets = [-2.9, 0.4, 1.0, 2.5, 4.9, 5.1]
    metrics = regression_metrics(parts((1.0, 2.0), values=6), torch.tensor(targets, dtype=torch.float64)[None, :, None])
    known = NormalDist(1.0, 2.0)
    assert metrics["nll"].item() == pytest.approx(-np.mean([np.log(known.pdf(t)) for t in targets]))
    assert metrics["width"].item() == pytest.approx(known.inv_cdf(0.975) - known.inv_cdf(0.025))
    assert metrics["mse"].item() == pytest.approx(np.mean([(t - 1.0) ** 2 for t in targets]))
    assert metrics["coverage"].item() == pytest.approx(5 / 6)  # the last one is 2.05 deviations away
    expected = np.histogram([abs(2 * known.cdf(t) - 1) for t in targets], LEVELS, (0, 1))[0]
    assert metrics["levels"][0].tolist() == expected.tolist()


def test_a_mixture_is_measured_as_by_integration():
    """Catches parts of other weights, the quantiles of the parts for those of the mixture, or a Gaussian fit to it."""
    gaussians = [(-2.0, 0.3), (0.5, 1.0), (3.0, 0.1)]
    x = np.linspace(-8, 8, 400_001)
    density = np.mean([np.exp(-0.5 * ((x - m) / s) ** 2) / (s * np.sqrt(2 * np.pi)) for m, s in gaussians], 0)
    below = np.cumsum(density) * (x[1] - x[0])
    targets = [-2.9, -2.0, 0.0, 2.8, 3.1, 3.3]
    metrics = regression_metrics(parts(*gaussians, values=6), torch.tensor(targets, dtype=torch.float64)[None, :, None])
    at = np.interp(targets, x, below)
    assert metrics["nll"].item() == pytest.approx(-np.log(np.interp(targets, x, density)).mean(), abs=1e-6)
    low, high = np.interp([0.025, 0.975], below, x)
    assert metrics["width"].item() == pytest.approx(high - low, abs=1e-3)
    assert metrics["coverage"].item() == pytest.approx(np.mean([low <= t <= high for t in targets]))
    assert metrics["levels"][0].tolist() == np.histogram(np.abs(2 * at - 1), LEVELS, (0, 1))[0].tolist()
    mean = np.mean([m for m, _ in gaussians])
    assert metrics["mse"].item() == pytest.approx(np.mean([(t - mean) ** 2 for t in targets]))


@pytest.mark.parametrize(("stretch", "coverage"), [(1.0, 0.95), (0.5, 0.6729), (2.0, 0.9999)])
def test_coverage_is_nominal_for_a_calibrated_prediction_alone(stretch: float, coverage: float):
    """Catches coverage that is always nominal, an error that does not tell too narrow from right, or no interval."""
    tasks, queries = 200, 50
    scale = 0.5 + torch.rand(tasks, 1, queries, 1)
    target = (3 * scale * torch.randn(tasks, 1, queries, 1))[:, 0]
    prediction = Mixture(torch.zeros(tasks, 4, queries, 1), (3 * stretch * scale).expand(-1, 4, -1, -1))
    metrics = TaskMetrics(DECLARED)
    metrics.update(torch.arange(tasks), regression_metrics(prediction, target))
    result = metrics.compute()
    assert result["coverage"] == pytest.approx(coverage, abs=0.008)
    exact = [abs(2 * NormalDist().cdf(stretch * NormalDist().inv_cdf(0.5 + k / 40)) - 1 - k / 20) for k in range(1, 20)]
    assert result["coverage_error"] == pytest.approx(np.mean(exact), abs=0.01)
    assert 0 < result["coverage_error_ci95"] < 0.01
    assert not {"coverage_worst_decile", "width_worst_decile", "coverage_error_worst_decile"} & result.keys()
    values = metrics.all_tasks["nll"].sort().values
    assert result["nll_worst_decile"] == pytest.approx(values[-tasks // 10 :].mean().item(), rel=1e-5)


def test_the_coverage_error_is_zero_for_exact_levels_and_bounded():
    """Catches counts that are not accumulated, or the trivial level of 100 % in the mean."""
    assert coverage_error(torch.full((LEVELS,), 7.0)).item() == pytest.approx(0, abs=1e-7)
    always, never = torch.zeros(2, LEVELS, dtype=torch.float64)
    always[0], never[-1] = 1, 1
    assert coverage_error(torch.stack([always, never])).tolist() == pytest.approx([0.5, 0.5])


def test_a_diverged_distribution_covers_nothing():
    """Catches what is not a number counted into the narrowest interval."""
    metrics = regression_metrics(parts((float("nan"), 1.0), values=3), torch.zeros(1, 3, 1))
    assert metrics["coverage"].item() == 0
    assert metrics["levels"][0].tolist() == [0.0] * (LEVELS - 1) + [3.0]


def test_mutual_information_by_hand():
    """Catches a normalisation by one labelling alone, logarithms of 0, and names of clusters that matter."""
    same, coarse = torch.eye(4)[[2, 0, 3, 1]] * 5, torch.tensor([[6.0, 0, 0, 0]] * 3 + [[0, 0, 6.0, 0]])
    tables = torch.stack([same, torch.ones(4, 4), torch.eye(4)[[0] * 4], coarse, coarse.T])
    told = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    expected = [1, 0, 0, 2 * told / (told + math.log(4)), 2 * told / (told + math.log(4))]
    assert mutual_information(tables).tolist() == pytest.approx(expected, abs=1e-6)


def test_families_and_clusters_are_counted_over_tasks():
    """Catches a mean of what single tasks tell, and a table of metrics of other tasks."""
    metrics = TaskMetrics(DECLARED)
    of, to = torch.tensor([0, 0, 1, 1, 2, 2] * 5), torch.tensor([1, 1, 0, 0, 2, 0] * 5)
    metrics.update(torch.arange(30), {"families": torch.nn.functional.one_hot(3 * of + to, 9).view(30, 3, 3).float()})
    # Two families of a cluster each, half of the third in one of its own.
    clusters = -(math.log(1 / 2) / 2 + math.log(1 / 3) / 3 + math.log(1 / 6) / 6)
    told = clusters - math.log(2) / 3
    result = metrics.compute()
    assert result["nmi"] == pytest.approx(2 * told / (clusters + math.log(3)), rel=1e-5)
    assert 0 < result["nmi_ci95"] < 0.5


def test_the_interval_of_a_pooled_metric_is_that_of_repeated_draws_of_tasks():
    """Catches resamples of queries instead of tasks, whose interval is far too narrow: tasks differ here."""
    rng = np.random.default_rng(0)

    def draw() -> TaskMetrics:
        tasks, queries = 100, 20
        biased = torch.from_numpy(rng.normal(0, 1.5, (tasks, 1, 1))).float()  # of a whole task, which nothing predicts
        target = biased + torch.from_numpy(rng.normal(0, 1, (tasks, queries, 1))).float()
        ones = torch.ones(tasks, 1, queries, 1)
        metrics = TaskMetrics(DECLARED)
        metrics.update(torch.arange(tasks), regression_metrics(Mixture(0 * ones, ones), target, width=False))
        return metrics

    several = [draw().compute() for _ in range(150)]
    spread = 1.96 * np.std([result["coverage_error"] for result in several])
    assert np.mean([result["coverage_error_ci95"] for result in several]) == pytest.approx(spread, rel=0.2)


def test_a_metric_that_nobody_declared_is_an_error():
    """Catches a metric whose direction is guessed: a worst decile of the best tasks."""
    with pytest.raises(ValueError, match="'surprise' is not declared"):
        TaskMetrics(DECLARED).update(torch.arange(2), {"surprise": torch.zeros(2)})


@pytest.mark.parametrize(
    ("learner", "name", "worst"),
    [("MetaGAN", "supervised_loss", 0.95), ("LEO", "encoder_penalty", 0.95), ("MAML", "accuracy", 0.05)],
)
def test_the_worst_decile_is_on_the_side_that_the_learner_declares(learner, name, worst):
    """Catches losses of a learner's own whose worst decile averages the best tenth of the tasks."""
    metrics = TaskMetrics(getattr(models, learner).declared_metrics())
    metrics.update(torch.arange(10), {name: torch.arange(10) / 10 + 0.05})
    assert metrics.compute()[f"{name}_worst_decile"] == pytest.approx(worst)


def test_a_metric_without_a_direction_has_no_worst_decile():
    """Catches a worst decile of what is neither good nor bad."""
    metrics = TaskMetrics({"kl": Metric()})
    metrics.update(torch.arange(10), {"kl": torch.rand(10)})
    assert set(metrics.compute()) == {"tasks", "kl", "kl_ci95"}


def test_intervals_of_few_tasks():
    """Catches an interval of one task, and none of two."""
    assert math.isnan(interval(torch.tensor([0.5]))[1])
    mean, half = interval(torch.tensor([0.25, 0.75]))
    assert mean == 0.5 and half == pytest.approx(0.49)
