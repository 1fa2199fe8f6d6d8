"""Prototypical networks against a plain restatement."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.core.episodes import Support
from models import Conv4, ProtoNet
from models.networks.batch_norm import normalize_by
from tests.support.gradients import assert_equals_finite_differences, episodes


def small(**settings) -> ProtoNet:
    torch.manual_seed(0)
    return ProtoNet(Conv4(hidden=4, image_size=8), **settings).double()


def test_logits_are_negative_squared_distances_to_class_means():
    """Catches a distance that is not squared, a wrong sign, and a mean over the wrong images; shots are unequal."""
    learner = small().eval()
    y = torch.tensor([2, 0, 0, 1, 2, 2])
    x, q = torch.rand(6, 1, 8, 8, dtype=torch.float64), torch.rand(4, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad(), normalize_by("running"):
        logits = learner.predict(learner.adapt(Support(x, y, 3)), q).numpy()
        z, zq = learner.embed(x).numpy(), learner.embed(q).numpy()
    for i in range(4):
        for k in range(3):
            mean = z[y.numpy() == k].mean(0)
            assert logits[i, k] == pytest.approx(-np.sum((zq[i] - mean) ** 2), rel=1e-10)


def test_linear_layer_identity():
    """Catches a prototype that depends on the query: -‖z-c‖² = 2c·z - ‖c‖² up to a constant (section 2.3)."""
    learner = small().eval()
    batch = episodes(tasks=1)[0]
    with torch.no_grad(), normalize_by("running"):
        state = learner.adapt(batch.support)
        prototypes = state.summary
        z = learner.embed(batch.query_x)
        linear = 2 * z @ prototypes.T - prototypes.square().sum(1)
        torch.testing.assert_close(
            learner.predict(state, batch.query_x).softmax(-1), linear.softmax(-1), rtol=1e-9, atol=1e-12
        )


def test_cosine_is_scaled_similarity_of_unit_vectors():
    """Catches unnormalised prototypes, and a fixed scale that is learnt or a learnt one that is fixed."""
    learner = small(distance="cosine", scale=7.0).eval()
    batch = episodes(tasks=1)[0]
    with torch.no_grad(), normalize_by("running"):
        z, q = learner.backbone(batch.support.x), learner.backbone(batch.query_x)
        z = z / z.norm(dim=1, keepdim=True)
        mean = torch.stack([z[batch.support.y == k].mean(0) for k in range(3)])
        expected = 7.0 * torch.cosine_similarity(q[:, None], mean[None], dim=-1)
        torch.testing.assert_close(learner.predict(learner.adapt(batch.support), batch.query_x), expected)
    assert "scale" not in dict(learner.named_parameters())
    assert dict(small(distance="cosine").named_parameters())["scale"].item() == 10.0


def test_training_embeds_support_and_queries_together():
    """Catches batch statistics of the queries alone: the reference code passes both at once."""
    learner = small().train()
    task = episodes(tasks=1)[0]
    loss, prediction = learner.objective(task)
    with normalize_by("batch"):
        z = learner.backbone(torch.cat([task.support.x, task.query_x]))
    mean = torch.stack([z[:6][task.support.y == k].mean(0) for k in range(3)])
    expected = -torch.cdist(z[6:], mean).square()
    torch.testing.assert_close(prediction, expected)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(expected, task.query_y))


def test_gradient_equals_finite_differences():
    """Catches a prototype that the gradient does not pass through."""
    assert_equals_finite_differences(small().train(), episodes(tasks=2))
