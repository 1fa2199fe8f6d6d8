"""CAML: its codes in closed form, its transformer against loops, what it is invariant and equivariant to."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.special import erf
from scipy.special import softmax as scipy_softmax

from datamodules.core.episodes import Support
from datamodules.core.errors import DataError
from models import CAML, Conv4
from models.conditioning.caml import simplex_codes
from models.core.deterministic_order import shuffled_labels
from models.networks.batch_norm import normalize_by
from tests.support.gradients import assert_equals_finite_differences, episodes
from tests.support.toy import ToyImages

DOUBLE = torch.float64


def small(max_ways: int = 3, **settings) -> CAML:
    torch.manual_seed(6)
    sizes = {"code_size": 6, "layers": 2, "heads": 2, "dense": 7, "chunk": 1}
    learner = CAML(Conv4(hidden=4, image_size=8), max_ways, **(sizes | settings)).double()
    with torch.no_grad():
        learner.unknown.normal_()
        learner.length.fill_(1.7)
        for name, p in learner.blocks.named_parameters():
            if name.endswith("bias") or "before" in name:
                p.normal_()
    return learner


@pytest.mark.parametrize(("labels", "size"), [(2, 2), (5, 5), (5, 256), (20, 64)])
def test_codes_are_corners_of_a_regular_simplex(labels, size):
    """Catches codes that are orthogonal or random: length 1, all cosines -1 / (N - 1), sum 0."""
    codes = simplex_codes(labels, size).numpy()
    expected = np.full((labels, labels), -1 / (labels - 1))
    np.fill_diagonal(expected, 1.0)
    np.testing.assert_allclose(codes @ codes.T, expected, rtol=0, atol=1e-14)
    np.testing.assert_allclose(codes.sum(0), 0, atol=1e-14)
    assert codes.shape == (labels, size)
    assert torch.equal(simplex_codes(labels, size), torch.from_numpy(codes))


def test_predictions_are_a_transformers_by_loops():
    """Catches attention over queries, heads that are mixed up, scores that are not divided by √size, a norm after the
    sum, a query's code on the support set, labels that are not turned back to classes, and a sequence that is shared by
    queries: against a token at a time in numpy; unequal shots, more labels than classes."""
    learner = small(4).eval()
    g = torch.Generator().manual_seed(0)
    x, q = (torch.rand(n, 1, 8, 8, generator=g, dtype=DOUBLE) for n in (5, 3))
    support = Support(x, torch.tensor([2, 0, 1, 2, 2]), 3)
    w = {n: p.detach().numpy() for n, p in learner.named_parameters()}
    with torch.no_grad(), normalize_by("running"):
        got = learner.predict(learner.adapt(support), q).numpy()
        z, zq = learner.embed(x).numpy(), learner.embed(q).numpy()
    labels = shuffled_labels(support, 4).numpy()
    codes = 1.7 * learner.codes.numpy()

    def norm(name: str, t: np.ndarray) -> np.ndarray:
        return (t - t.mean()) / np.sqrt(t.var() + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(name: str, t: np.ndarray) -> np.ndarray:
        return w[f"{name}.weight"] @ t + w[f"{name}.bias"]

    def block(name: str, tokens: list[np.ndarray]) -> list[np.ndarray]:
        three = [linear(f"{name}.keys", norm(f"{name}.before_attention", t)).reshape(3, 2, 5) for t in tokens]
        out = []
        for t, (query, _, _) in zip(tokens, three, strict=True):
            seen = []
            for head in range(2):
                weights = scipy_softmax([query[head] @ key[head] / np.sqrt(5) for _, key, _ in three])
                seen.append(sum(a * value[head] for a, (_, _, value) in zip(weights, three, strict=True)))
            t = t + linear(f"{name}.mixed", np.concatenate(seen))
            h = linear(f"{name}.dense.0", norm(f"{name}.before_dense", t))
            out.append(t + linear(f"{name}.dense.2", h * (1 + erf(h / np.sqrt(2))) / 2))
        return out

    for i in range(3):
        tokens = [np.concatenate([z[s], codes[labels[k]]]) for s, k in enumerate(support.y.tolist())]
        tokens.append(np.concatenate([zq[i], w["unknown"]]))
        for k in range(2):
            tokens = block(f"blocks.{k}", tokens)
        logits = w["readout.weight"] @ norm("norm", tokens[-1])
        np.testing.assert_allclose(got[i], logits[labels], rtol=1e-8)


def test_support_is_a_set_and_queries_do_not_see_each_other():
    """Catches positions, and one sequence for several queries, in training too."""
    learner = small(batch_norm="none").train()
    task = episodes(tasks=1)[0]
    turn = torch.tensor([4, 1, 0, 5, 2, 3])
    again = dataclasses.replace(task.support, x=task.support.x[turn], y=task.support.y[turn])
    with torch.no_grad():
        expected = learner.predict(learner.adapt(task.support), task.query_x)
        torch.testing.assert_close(learner.predict(learner.adapt(again), task.query_x), expected)
        changed = task.query_x.clone()
        changed[1:] = changed[1:].flip(-1)
        got = learner.predict(learner.adapt(task.support), changed)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(got[1:], expected[1:])


def test_labels_are_equivariant_up_to_the_rows_of_codes_and_readout():
    """Catches labels that enter by more than codes and readout: with the rows of both permuted, which label stands for
    a class does not matter; and a permuted set of codes is the same simplex turned, which no permutation of codes alone
    makes up for in the learned weights."""
    learner, order = small(batch_norm="none").eval(), torch.tensor([2, 0, 1])
    task = episodes(tasks=1)[0]
    z, zq = learner.embed(task.support.x), learner.embed(task.query_x)
    with torch.no_grad():
        context = learner.summarize(z, task.support)
        expected = learner.compare(context, zq)
        renamed = dataclasses.replace(task.support, y=order[task.support.y])
        got = learner.compare(learner.summarize(z, renamed), zq)
        torch.testing.assert_close(got[:, order], expected)  # names of classes: exactly
        old = learner.codes.clone()
        learner.codes[order] = old
        only_codes = learner.compare(learner.summarize(z, task.support), zq)
        learner.readout.weight[order] = learner.readout.weight.clone()
        both = learner.compare(learner.summarize(z, task.support), zq)
    # The label that stood for a class now has another's code and row: logits are those of classes with turned labels.
    turned = order.argsort()[context.labels]
    tokens = torch.cat([z, 1.7 * old[turned][task.support.y]], -1)
    with torch.no_grad():
        expected = learner.compare(context._replace(tokens=tokens), zq)
    torch.testing.assert_close(both, expected)
    assert not torch.allclose(only_codes, both)
    np.testing.assert_allclose(learner.codes @ learner.codes.T, old @ old.T, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"max_ways": 5, "chunk": 2}])
def test_meta_gradient_equals_finite_differences(settings):
    """Catches a code's length, the unknown code or features that the gradient does not pass through; mapped over tasks
    too."""
    assert_equals_finite_differences(small(**settings).train(), episodes(tasks=2))


def test_fewer_ways_are_served_and_more_refused():
    """Catches classes that share a code, logits of labels that the task has not, and a refusal that comes late."""
    learner = small(4).eval()
    for ways in (2, 3, 4):
        task = episodes(tasks=1, ways=ways)[0]
        with torch.no_grad():
            state = learner.adapt(task.support)
            assert learner.predict(state, task.query_x).shape == (2 * ways, ways)
        assert len(set(state.summary.labels.tolist())) == ways
    with pytest.raises(DataError, match="5 ways but the model only 4 codes of labels"):
        learner.adapt(episodes(tasks=1, ways=5)[0].support)
    assert learner.check(ToyImages(ways=4)) is None
    assert "6 ways" in (learner.check(ToyImages(ways=3, train_ways=6)) or "")
    with pytest.raises(ValueError, match="heads is 3, which does not divide"):
        small(heads=3)
