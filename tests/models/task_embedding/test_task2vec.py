"""Task2Vec's Fisher information against closed forms and loops of autograd, its heads against scikit-learn's."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn

from datamodules.core.episodes import Support, Task
from models import MLP, Conv4, Task2Vec
from models.networks.batch_norm import normalize_by
from models.task_embedding.task2vec import diagonal_fisher
from tests.support.gradients import assert_equals_finite_differences, episodes


def small(**settings) -> Task2Vec:
    """With running averages that are not those it starts from."""
    torch.manual_seed(0)
    learner = Task2Vec(Conv4(hidden=4, image_size=8), **settings).double()
    for name, buffer in learner.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand_like(buffer) + 0.5 if "var" in name else -torch.rand_like(buffer))
    return learner.eval()


def task(shots: int = 2, seed: int = 1) -> Task:
    return episodes(tasks=1, shots=shots, seed=seed)[0]


# The Fisher information -----------------------------------------------------------------------------------------------


def softmax_regression() -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Weights (4, 6), inputs (9, 6), and the diagonal Fisher information of the weights in closed form."""
    g = torch.Generator().manual_seed(0)
    w, x = (torch.randn(n, 6, generator=g, dtype=torch.float64) for n in (4, 9))
    p = (x @ w.T).softmax(-1)
    return {"w": w}, x, torch.einsum("nk,nj->nkj", p * (1 - p), x.square()).mean(0)


def linear(parameters, x):
    return x @ parameters["w"].T


def test_fisher_of_softmax_regression_has_its_closed_form():
    """Catches labels of the data for the model's, and squares of a mean gradient: F_kj = E p_k (1 - p_k) x_j²."""
    parameters, x, expected = softmax_regression()
    torch.testing.assert_close(diagonal_fisher(linear, parameters, x, True)["w"], expected)


def test_sampled_labels_converge_to_it_at_the_rate_of_monte_carlo():
    """Catches labels that are not the model's own, and draws that are not independent: the error falls as draws^-½."""
    parameters, x, expected = softmax_regression()
    g = torch.Generator().manual_seed(1)
    counts, errors = (4, 16, 64, 256, 1024), []
    for draws in counts:
        luck = torch.rand(max(2, 2048 // draws), len(x), draws, generator=g, dtype=torch.float64)[:40]
        # The mean over labels by a loop over draws is what takes time: a few repetitions of the longest.
        found = torch.stack([diagonal_fisher(linear, parameters, x, True, u)["w"] for u in luck])
        errors.append((found - expected).square().mean().sqrt().item())
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -0.6 < slope < -0.4, (slope, errors)


def test_fisher_of_a_gaussian_is_the_sum_over_outputs():
    """Catches a Fisher information that depends on targets: of means with variance 1 it is E Σ_o (∂f_o / ∂θ)²."""
    parameters, x, _ = softmax_regression()
    expected = x.square().mean(0).expand(4, 6)
    torch.testing.assert_close(diagonal_fisher(linear, parameters, x, False)["w"], expected)


def by_loops(learner: Task2Vec, support: Support) -> torch.Tensor:
    """The embedding of classes by a loop over examples, labels and filters."""
    backbone = copy.deepcopy(learner.backbone)
    weights = {n: p for n, p in backbone.named_parameters() if n.endswith("weight")}
    total = {n: torch.zeros_like(p) for n, p in weights.items()}
    with normalize_by("running"):
        weight, bias = (t.detach() for t in learner.summarize(learner.backbone(support.x).detach(), support))
        for x in support.x:
            for label in range(support.ways):
                log_p = torch.log_softmax(weight @ backbone(x[None])[0] + bias, -1)
                gradient = torch.autograd.grad(log_p[label], list(weights.values()))
                for n, g in zip(weights, gradient, strict=True):
                    total[n] += log_p[label].exp().detach() * g**2 / len(support.x)
    return torch.stack([filter_.mean() for f in total.values() for filter_ in f])


def test_embedding_is_the_filter_means_of_each_examples_own_squares():
    """Catches a head or biases in the embedding, batch statistics, means over input channels, and a missing norm."""
    learner, support = small(), task().support
    with torch.inference_mode():
        found = learner.embed_task(support)
    assert found.shape == (learner.embedding_size,) == (4 * 8,)
    torch.testing.assert_close(found, by_loops(learner, support), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("shots", [1, 3])
def test_names_and_order_of_classes_do_not_matter(shots):
    """Catches an embedding that knows labels by name, or reads the support set as a sequence."""
    learner, support = small(), task(shots).support
    first = learner.embed_task(support)
    renamed = Support(support.x, torch.tensor([2, 0, 1])[support.y], 3)
    torch.testing.assert_close(learner.embed_task(renamed), first, rtol=1e-8, atol=1e-14)
    order = torch.randperm(len(support.y), generator=torch.Generator().manual_seed(0))
    turned = Support(support.x[order], support.y[order], 3)
    torch.testing.assert_close(learner.embed_task(turned), first, rtol=1e-8, atol=1e-14)


def test_each_example_twice_is_the_same_task():
    """Catches F / batch: a batch's mean gradient squared halves where every example is there twice."""
    learner, support = small(), task().support
    twice = Support(support.x.repeat(2, 1, 1, 1), support.y.repeat(2), 3)
    torch.testing.assert_close(learner.embed_task(twice), learner.embed_task(support), rtol=1e-8, atol=1e-14)


def test_sampled_labels_are_near_the_exact_embedding():
    """Catches a setting that does nothing, and draws by which labels are not the model's: 400 of each example."""
    learner, support = small(ridge=0.05), task().support
    exact = learner.embed_task(support)
    learner.labels, learner.samples = "sampled", 400
    sampled = learner.embed_task(support)
    assert not torch.equal(sampled, exact)
    assert (sampled - exact).norm() < 0.15 * exact.norm()


def test_tasks_are_embedded_together_as_one_by_one():
    """Catches a map within the map that mixes tasks up."""
    learner, batch = small(), episodes(tasks=3)
    one = torch.stack([learner.embed_task(batch[i].support) for i in range(3)])
    learner.chunk = 3
    with torch.inference_mode():
        torch.testing.assert_close(learner.map(lambda t: learner.embed_task(t.support), batch), one)
    assert (one[0] - one[1]).norm() > 0.01 * one[0].norm()


# The head -------------------------------------------------------------------------------------------------------------


def unequal(seed: int = 0) -> tuple[torch.Tensor, Support]:
    """Features (9, 5) of five, three and one example."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(9, 5, generator=g, dtype=torch.float64) + 1
    return z, Support(z, torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2]), 3)


@pytest.mark.parametrize("ridge", [0.003, 0.1])
def test_convex_head_is_scikit_learns_logistic_regression(ridge):
    """Catches a fit that stops early, a ridge on biases or one that depends on the features' scale, and a prior of
    shots."""
    z, support = unequal()
    learner = small(ridge=ridge)
    with torch.no_grad():
        weight, bias = learner.summarize(z, support)
        scaled = learner.summarize(10 * z, support)
    c = 1 / (ridge * z.square().sum(1).mean().item() * len(z))
    theirs = LogisticRegression(C=c, tol=1e-12, max_iter=10_000)
    theirs.fit(z.numpy(), support.y.numpy(), support.shares().numpy())
    ours = z @ weight.T + bias
    torch.testing.assert_close(ours.softmax(-1).numpy(), theirs.predict_proba(z.numpy()), rtol=0, atol=1e-5)
    torch.testing.assert_close((10 * z) @ scaled[0].T + scaled[1], ours, rtol=1e-6, atol=1e-8)


def test_convex_head_of_values_is_ridge_regression():
    """Catches a ridge on the bias, or sums where there are means."""
    z, _ = unequal()
    y = torch.randn(9, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        weight, bias = small(ridge=0.05).summarize(z, Support(z, y, 0))
    theirs = Ridge(0.05 * z.square().sum(1).mean().item() * len(z)).fit(z.numpy(), y.numpy())
    np.testing.assert_allclose(weight.numpy(), theirs.coef_, rtol=1e-6)
    np.testing.assert_allclose(bias.numpy(), theirs.intercept_, rtol=1e-6)


def test_adam_head_is_torchs_adam():
    """Catches a moment without its correction, a decoupled weight decay, or classes that are drawn by their shots."""
    z, support = unequal()
    learner = small(head="adam", passes=3, draws=40, batch=8, rate=0.05, weight_decay=0.1)
    with torch.no_grad():
        weight, bias = learner.summarize(z, support)
    head = nn.Linear(5, 3).double()
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    optimizer = torch.optim.Adam(head.parameters(), 0.05, weight_decay=0.1)
    g = torch.Generator().manual_seed(0)
    ends = np.cumsum([1 / 15] * 5 + [1 / 9] * 3 + [1 / 3])  # every class a third
    for _ in range(15):
        luck = torch.rand(8, generator=g, dtype=torch.float64)
        rows = torch.from_numpy(np.searchsorted(ends[:-1], luck.numpy()))
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(z[rows]), support.y[rows]).backward()
        optimizer.step()
    torch.testing.assert_close(weight, head.weight.detach(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(bias, head.bias.detach(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("batch_norm", ["running", "support"])
def test_meta_gradient_equals_finite_differences(batch_norm):
    """Catches a fit whose end the ridge, or a backbone that is trained along, has no gradient through."""
    learner = small(batch_norm=batch_norm, iterations=60).train()
    assert_equals_finite_differences(learner, episodes(tasks=2))


def test_embeds_functions_too():
    """Catches a regression task without an embedding: by hand for a network whose last layer alone is fitted."""
    torch.manual_seed(0)
    learner = Task2Vec(MLP(in_features=1, hidden=(4,))).double().eval()
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None]
    support = Support(x, x.sin(), 0)
    (layer,) = [m for m in learner.backbone.modules() if isinstance(m, nn.Linear)]
    weight, _ = learner.summarize(learner.backbone(x), support)
    alive = (layer(x) > 0).double()
    expected = (alive * weight[0] * x).square().mean(0)
    torch.testing.assert_close(learner.embed_task(support), expected, rtol=1e-8, atol=1e-14)
