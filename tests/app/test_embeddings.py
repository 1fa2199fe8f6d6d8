"""R² of facts of tasks by their embeddings: against scikit-learn, and from the record that a test leaves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from torch import Tensor

from app import compare, embeddings
from app.embeddings import explained, explained_variance, told_kinds, value_of
from app.runs.evaluation_record import Evaluation
from datamodules.core.errors import ConfigError
from models.core.metrics import EMBEDDING, TaskMetrics
from models.core.task_kinds import KINDS
from tests.support.processes import build
from tests.support.toy import QUIET

FLAGS = [
    *("--model", "models.CAVIA", "--model.backbone", "models.MLP", "--model.backbone.in_features", "4"),
    *("--model.context_size", "3", "--data", "datamodules.Sinusoid", "--data.queries", "4", "--stage", "test"),
    *("--data.test_tasks", "40", "--data.eval_batch_size", "7", "--trainer.accelerator", "cpu", *QUIET),
    *("--trainer.enable_progress_bar", "false"),
]


@pytest.fixture(scope="module")
def tested(tmp_path_factory) -> Path:
    """A run of a learner with embeddings, tested and not trained."""
    runs = tmp_path_factory.mktemp("runs")
    cli = build(*FLAGS, "--runs", str(runs), "--name", "cavia")
    torch.manual_seed(0)
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    batch = cli.datamodule.distribution("test").sample(range(40))
    torch.save(torch.stack([cli.model.embed_task(batch[i].support).detach() for i in range(40)]), runs / "expected.pt")
    return runs / "cavia"


def expected(run: Path) -> Tensor:
    return torch.load(run.parent / "expected.pt", weights_only=True)


def test_a_test_records_the_embedding_of_every_task(tested):
    """Catches embeddings of other tasks or in another order, and ones that become metrics or facts."""
    found = Evaluation.load(tested)
    torch.testing.assert_close(found.embedding, expected(tested), rtol=1e-5, atol=1e-6)
    assert EMBEDDING not in found.facts and EMBEDDING not in found.metrics and EMBEDDING not in found.declared
    header = (tested / "test_tasks.csv").read_text().splitlines()[0]
    assert EMBEDDING not in header and "amplitude" in header


def test_learners_with_other_embeddings_are_compared_on_the_same_tasks(tested, tmp_path):
    """Catches embeddings taken for what tells tasks apart, by which no two learners would have the same ones."""
    first = Evaluation.load(tested)
    for embedding in (None, 2 * expected(tested)):
        other = dataclasses.replace(first, folder=tmp_path / "other", embedding=embedding)
        assert compare.compare([first, other])["tasks"] == 40


def test_what_is_kept_is_no_metric():
    """Catches embeddings among the means of results.json, and a task that two processes have counted twice."""
    metric = TaskMetrics(KINDS["regression"].metrics)
    kept = {EMBEDDING: torch.arange(6.0).view(3, 2)}
    metric.update(torch.tensor([2, 0, 2]), {"mse": torch.tensor([1.0, 3.0, 1.0])}, {}, kept)
    assert metric.compute().keys() == {"tasks", "mse", "mse_ci95", "mse_worst_decile"}
    assert metric.all_tasks[EMBEDDING].tolist() == [[2.0, 3.0], [0.0, 1.0]]
    assert metric.facts == []


@pytest.mark.parametrize("noise", [0.0, 0.5, 3.0])
def test_explained_variance_is_that_of_the_other_half_of_the_tasks(noise):
    """Catches a fit without an intercept, one that is measured on what it was fitted on, and a share of variances in
    place of errors: against scikit-learn."""
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(81, 4))
    fact = embedding @ [1.0, -2.0, 0.0, 0.5] + 7.0 + noise * rng.normal(size=81)
    model = LinearRegression().fit(embedding[::2], fact[::2])
    assert explained_variance(embedding, fact) == pytest.approx(model.score(embedding[1::2], fact[1::2]))
    if not noise:
        assert explained_variance(embedding, fact) == pytest.approx(1.0)
    assert explained_variance(rng.normal(size=(81, 4)), fact) < 0.2
    assert np.isnan(explained_variance(embedding, np.ones(81)))
    # Embeddings with a part that never varies, as filters that are dead, are not singular.
    padded = np.column_stack([embedding, np.zeros(81), embedding[:, 0]])
    assert explained_variance(padded, fact) == pytest.approx(explained_variance(embedding, fact))


def test_a_kind_is_told_by_a_probe_of_the_other_half_of_the_tasks():
    """Catches kinds that are regressed as if their numbers were quantities, or a probe measured on what it learned.

    Three kinds whose numbers are in another order than their places on a line; of noise a probe knows no more than how
    often each kind is.
    """
    rng = np.random.default_rng(0)
    kind = rng.integers(3, size=400)
    place = np.array([0.0, 2.0, 1.0])[kind][:, None] + 0.1 * rng.normal(size=(400, 1))
    assert told_kinds(np.hstack([place, place**2]), kind)[0] > 0.98
    assert explained_variance(place, kind) < 0.7
    accuracy, commonest = told_kinds(rng.normal(size=(400, 30)), kind)
    assert accuracy < 0.45 and 0.25 < commonest < 0.45
    assert told_kinds(place, np.zeros(400, int)) == (1.0, 1.0)


def test_expressions_of_facts():
    """Catches an expression that is computed of something else, and names that nobody knows."""
    facts = {"amplitude": np.array([1.0, 2.0]), "phase": np.array([0.0, np.pi])}
    np.testing.assert_allclose(value_of("amplitude * cos(phase) + pi", facts), [1 + np.pi, -2 + np.pi])
    np.testing.assert_allclose(value_of("2", facts), [2, 2])
    for wrong, what in (("slope", "is of slope"), ("().__class__", "__class__"), ("amplitude *", "no expression")):
        with pytest.raises(ConfigError, match=what):
            value_of(wrong, facts)


def test_the_command_tells_what_the_record_has(tested, tmp_path, capsys):
    """Catches embeddings and facts out of step, facts that never vary, and a run without embeddings that passes."""
    out = tmp_path / "found.json"
    embeddings.main([str(tested), "--out", str(out)])
    shown = capsys.readouterr().out
    assert "phase" in shown and "frequency" not in shown
    found = Evaluation.load(tested)
    phase = explained_variance(expected(tested).numpy(), found.facts["phase"].numpy())
    assert json.loads(out.read_text())[str(tested)]["phase"]["R²"] == pytest.approx(phase, rel=1e-4)
    text = "amplitude * sin(phase)"
    assert explained(found, [text]).keys() == {text}
    with pytest.raises(ConfigError, match="has no embeddings of the tasks"):
        explained(dataclasses.replace(found, embedding=None))
