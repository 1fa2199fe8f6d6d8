"""Baselines against torch's own optimizer, scipy's minimum and prototypes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import nn

from app.cli.builder import main
from models import Baseline, Conv4, ProtoNet
from models.core.embedding_learner import EmbeddingLearner
from models.networks.batch_norm import normalize_by
from tests.support.gradients import episodes
from tests.support.toy import command


def small(**settings) -> Baseline:
    """With running averages that are not those it starts from."""
    torch.manual_seed(0)
    learner = Baseline(Conv4(hidden=4, image_size=8), classes=7, **settings).double()
    for name, buffer in learner.named_buffers():
        if "running" in name:  # few features are zero
            buffer.copy_(torch.rand_like(buffer) + 0.5 if "var" in name else -torch.rand_like(buffer))
    return learner.eval()


def trained_by_torch(learner: Baseline, task, whole: bool) -> torch.Tensor:
    """Logits for the queries after torch.optim.SGD has trained a head, and the backbone, on the support set."""
    support, backbone = task.support, copy.deepcopy(learner.backbone)
    with normalize_by("running"):
        z = backbone(support.x).detach()
        cosine = learner.kind == "cosine"
        head = nn.Linear(z.shape[1], support.ways, bias=not cosine).double()
        with torch.no_grad():
            if cosine:
                unit = z / z.norm(dim=1, keepdim=True)
                head.weight.copy_(torch.stack([unit[support.y == k].mean(0) for k in range(support.ways)]))
            else:
                head.weight.zero_()
                head.bias.zero_()

        def outputs(z: torch.Tensor) -> torch.Tensor:
            return 2 * torch.cosine_similarity(z[:, None], head.weight[None], dim=-1) if cosine else head(z)

        parameters = [*head.parameters(), *(backbone.parameters() if whole else ())]
        optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9, dampening=0.9, weight_decay=0.001)
        generator = torch.Generator().manual_seed(0)
        steps = [
            order.split(4) for order in (torch.rand(len(support.y), generator=generator).argsort() for _ in range(3))
        ]
        assert len(support.y) % 4 and len(steps[0][-1]) == len(support.y) % 4
        for rows in (rows for of_pass in steps for rows in of_pass):
            optimizer.zero_grad()
            seen = backbone(support.x[rows]) if whole else z[rows]
            F.cross_entropy(outputs(seen), support.y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            return outputs(backbone(task.query_x))


@pytest.mark.parametrize("head", ["linear", "cosine"])
@pytest.mark.parametrize("adaptation", ["head", "all"])
def test_a_task_is_trained_as_torch_trains(head, adaptation):
    """Catches momentum damped from the first step on or never, decay left out, other mini-batches, steps for passes, a
    backbone that moves or does not, and statistics of a mini-batch in place of the running ones."""
    learner, task = small(head=head, adaptation=adaptation, passes=3, rate=0.05), episodes(tasks=1)[0]
    with torch.no_grad():
        found = learner.predict(learner.adapt(task.support), task.query_x)
    expected = trained_by_torch(learner, task, adaptation == "all")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_logistic_regression_is_at_its_minimum():
    """Catches a descent that is not done, a penalised bias, and another weight of the prior: scipy finds the same."""
    learner, task = small(adaptation="logistic"), episodes(tasks=1)[0]
    with torch.no_grad():
        z = learner.embed(task.support.x)
        head = learner.logistic_regression(z, task.support)
    x, y = (z / z.norm(dim=1, keepdim=True)).numpy(), task.support.y.numpy()
    ways, size = task.support.ways, x.shape[1]

    def objective(flat: np.ndarray) -> float:
        w, b = flat[: ways * size].reshape(ways, size), flat[ways * size :]
        scores = x @ w.T + b
        log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        return -log_p[np.arange(len(y)), y].sum() + 0.5 * (w**2).sum()

    best = minimize(objective, np.zeros(ways * (size + 1)), method="BFGS", options={"gtol": 1e-6})
    found = np.concatenate([head["weight"].numpy().ravel(), head["bias"].numpy()])
    assert objective(found) <= best.fun + 1e-9
    assert np.abs(found[: ways * size] - best.x[: ways * size]).max() < 1e-4


def test_centroids_are_prototypes():
    """Catches a lost square of the norm: the nearest mean is what a prototypical network of this backbone says."""
    learner, task = small(adaptation="centroid"), episodes(tasks=1)[0]
    prototypes = ProtoNet(learner.backbone).eval()
    with torch.no_grad():
        found = learner.predict(learner.adapt(task.support), task.query_x)
        expected = prototypes.predict(prototypes.adapt(task.support), task.query_x)
    torch.testing.assert_close(found.log_softmax(1), expected.log_softmax(1), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_training_tells_all_classes_apart(head, monkeypatch):
    """Catches labels of the task for those of the class, and a loss of queries alone."""
    learner, batch = small(head=head).train(), episodes(tasks=2)
    batch.task["classes"] = torch.tensor([[6, 0, 3], [2, 3, 5]])
    given = []
    monkeypatch.setattr(EmbeddingLearner, "training_step", lambda self, batch, _: given.append(batch))
    learner.training_step(batch, 0)
    for i, classes in enumerate([[6, 0, 3], [2, 3, 5]]):
        loss, outputs = learner.objective(given[0][i])
        x = torch.cat([batch.support_x[i], batch.query_x[i]])
        y = [classes[k] for k in [*batch.support_y[i].tolist(), *batch.query_y[i].tolist()]]
        with normalize_by("batch"):
            z, weight = learner.backbone(x), learner.classifier.weight
        scores = z @ weight.T + learner.classifier.bias if head == "linear" else None
        if scores is None:
            scores = 10 * (z / z.norm(dim=1, keepdim=True)) @ (weight / weight.norm(dim=1, keepdim=True)).T
        log_p = scores - scores.logsumexp(1, keepdim=True)
        expected = -torch.stack([log_p[j, k] for j, k in enumerate(y)]).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(outputs, scores[len(batch.support_y[i]) :])


def test_refuses_another_number_of_classes(tmp_path, capsys):
    """Catches a head with fewer rows than classes, or rows that nothing trains: an error that names the number."""
    with pytest.raises(SystemExit):
        main([*command("Baseline", tmp_path), "--model.classes", "11"])
    assert "--model.init_args.classes 12" in capsys.readouterr().err
