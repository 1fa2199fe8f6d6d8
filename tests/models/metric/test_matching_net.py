"""Matching networks against restatements in plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.core.episodes import Support
from models import Conv4, MatchingNet
from models.core.deterministic_order import shuffled
from models.networks.batch_norm import normalize_by
from tests.support.gradients import assert_equals_finite_differences, episodes


def small(**settings) -> MatchingNet:
    torch.manual_seed(3)
    return MatchingNet(Conv4(hidden=4, image_size=8), **settings).double()


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def softmax(values: np.ndarray) -> np.ndarray:
    raised = np.exp(values - values.max())
    return raised / raised.sum()


def lstm(cell, x, fed_back, memory):
    """One step, gate by gate."""
    w, u, b = (numbers(p) for p in (cell.weight_ih, cell.weight_hh, cell.bias))
    size = len(b) // 4
    i, f, g, o = (w[k : k + size] @ x + u[k : k + size] @ fed_back + b[k : k + size] for k in range(0, 4 * size, size))
    squash = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    memory = squash(f) * memory + squash(i) * np.tanh(g)
    return squash(o) * np.tanh(memory), memory


def in_context(learner: MatchingNet, z: np.ndarray) -> np.ndarray:
    """g of a sequence: its two LSTMs one after the other."""
    size = z.shape[1]
    g = z.copy()
    for cell, order in ((learner.forth, range(len(z))), (learner.back, reversed(range(len(z))))):
        h = c = np.zeros(size)
        for i in order:
            h, c = lstm(cell, z[i], h, c)
            g[i] += h
    return g


def read(learner: MatchingNet, z: np.ndarray, g: np.ndarray) -> np.ndarray:
    """f of one query: h_k = LSTM(z, [h_{k-1}, r_{k-1}], c_{k-1}) + z, with r the read of the support set by h."""
    h = c = np.zeros_like(z)
    for _ in range(learner.reads):
        weights = softmax(np.array([h @ one for one in g]))
        r = sum(w * one for w, one in zip(weights, g, strict=True))
        h, c = lstm(learner.reader, z, np.concatenate([h, r]), c)
        h = h + z
    return h


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return a @ b / np.sqrt((a @ a) * (b @ b))


@pytest.mark.parametrize("full_context", [False, True])
@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_probabilities_are_attention_on_support_labels(full_context, scale):
    """Catches an LSTM, skip connection, read or direction that is missing, attention by other than the cosine or over
    queries, and shares by class that are means or maxima: shots are unequal."""
    learner = small(full_context=full_context, scale=scale, reads=3, shots_count=True).eval()
    y = torch.tensor([2, 0, 0, 1, 2, 2])
    x, q = torch.rand(6, 1, 8, 8, dtype=torch.float64), torch.rand(4, 1, 8, 8, dtype=torch.float64)
    support = Support(x, y, 3)
    with torch.no_grad(), normalize_by("running"):
        p = numbers(learner.predict(learner.adapt(support), q).exp())
        z, zq = numbers(learner.embed(x)), numbers(learner.embed(q))
    order = shuffled(support).numpy() if full_context else np.arange(6)
    z, labels = z[order], y.numpy()[order]
    g = in_context(learner, z) if full_context else z
    for i in range(4):
        f = read(learner, zq[i], g) if full_context else zq[i]
        attention = softmax(np.array([scale * cosine(f, one) for one in g]))
        expected = np.zeros(3)
        for a, label in zip(attention, labels, strict=True):
            expected[label] += a
        np.testing.assert_allclose(p[i], expected, rtol=1e-10)


def test_training_embeds_together_and_takes_the_logarithm_of_the_probability():
    """Catches batch statistics of the queries alone, and a loss that is not -log of the attended label's share."""
    learner = small().train()
    task = episodes(tasks=1)[0]
    loss, _ = learner.objective(task)
    with torch.no_grad(), normalize_by("batch"):
        z = numbers(learner.embed(torch.cat([task.support.x, task.query_x])))
    order = shuffled(task.support).numpy()
    g, labels = in_context(learner, z[:6][order]), task.support.y.numpy()[order]
    surprise = []
    for one, label in zip(z[6:], task.query_y.numpy(), strict=True):
        f = read(learner, one, g)
        attention = softmax(np.array([cosine(f, other) for other in g]))
        surprise.append(-np.log(attention[labels == label].sum()))
    assert loss.item() == pytest.approx(np.mean(surprise), rel=1e-10)


@pytest.mark.parametrize(("full_context", "chunk"), [(True, 1), (True, 2), (False, 1)])
def test_gradient_equals_finite_differences(full_context, chunk):
    """Catches attention, reads, or a scale that the gradient does not pass through; mapped over tasks too."""
    assert_equals_finite_differences(small(full_context=full_context, scale=None, chunk=chunk).train(), episodes())


def test_scale_is_fixed_as_published_or_learned():
    """Catches a published temperature that is trained, or a learned one that is not."""
    assert "scale" not in dict(small().named_parameters())
    assert dict(small(scale=None).named_parameters())["scale"].item() == 10.0


def test_every_image_has_its_own_context_whatever_the_order_it_comes_in():
    """Catches an order of the sequence that depends on the order of the support set, or one that is always the same
    by class: the prediction stays, though another sequence would give another."""
    learner = small(scale=10.0).eval()
    task = episodes(tasks=1)[0]
    turn = torch.randperm(6)
    again = Support(task.support.x[turn], task.support.y[turn], 3)
    with torch.no_grad(), normalize_by("running"):
        expected = learner.predict(learner.adapt(task.support), task.query_x)
        torch.testing.assert_close(learner.predict(learner.adapt(again), task.query_x), expected, rtol=1e-9, atol=1e-9)
        z = learner.embed(task.support.x)
        order = shuffled(task.support)
        assert not torch.allclose(learner.in_sequence(z[order.flip(0)]).flip(0), learner.in_sequence(z[order]), 1e-4)


def test_examples_that_are_there_twice_count_once_unless_shots_are_to_count():
    """Catches a class that is the likelier for having more examples: one is repeated here, which tells nothing new."""
    x, q = torch.rand(3, 1, 8, 8, dtype=torch.float64), torch.rand(4, 1, 8, 8, dtype=torch.float64)
    once, thrice = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0, 1, 2])
    for shots_count in (False, True):
        learner = small(full_context=False, shots_count=shots_count).eval()
        with torch.no_grad():
            alone, repeated = (learner.predict(learner.adapt(Support(x[y], y, 3)), q) for y in (once, thrice))
        if shots_count:
            assert (repeated.softmax(-1)[:, 0] > alone.softmax(-1)[:, 0] + 0.05).all()
        else:
            torch.testing.assert_close(repeated, alone)
