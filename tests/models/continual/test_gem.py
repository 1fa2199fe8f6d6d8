"""Gradient episodic memory."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from torch.func import functional_call, vmap

from models import AGEM, GEM, MLP
from models.continual.gem import projected
from models.core.chance import Chance
from tests.models.continual.test_online_sgd import KEY, experiences

RNG = np.random.default_rng(0)


def by_active_sets(g: np.ndarray, others: np.ndarray, margin: float) -> np.ndarray:
    """The same by Lawson's and Hanson's method: min ‖Gᵀ v + g‖ over v ≥ margin."""
    if not (others @ g < 0).any():
        return g
    start = g + margin * others.sum(0)
    return start + others.T @ nnls(others.T, -start)[0]


CASES = {
    "few": (5, 40),
    "one": (1, 12),
    "many": (19, 30),
    "more than dimensions": (19, 6),
    "far apart": (6, 20),
    "alike": (8, 20),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_projection_is_that_of_an_active_set_method(case, margin):
    """Catches a solution that is not optimal (too few steps), infeasible, or moves what need not be moved."""
    k, n = CASES[case]
    g, others = RNG.normal(size=(50, n)), RNG.normal(size=(50, k, n)) + 0.3 * RNG.normal(size=(50, 1, n))
    if case == "far apart":
        others = others * 10.0 ** RNG.uniform(-2, 2, (50, k, 1))
    if case == "alike":
        others = others[:, :1] + 1e-3 * others
    expected = np.stack([by_active_sets(*row, margin) for row in zip(g, others, strict=True)])
    there = torch.ones(k, dtype=torch.bool)
    found = vmap(lambda a, b: projected(a, b, there, margin))(torch.from_numpy(g), torch.from_numpy(others)).numpy()
    size = np.abs(expected).max(1, keepdims=True) + np.abs(g).max(1, keepdims=True)
    assert np.abs((found - expected) / size).max() < 1e-6
    assert 0 < (found == g).all(1).sum() < 50 or case not in ("few", "one")


def test_memories_that_are_not_there_do_not_count():
    """Catches constraints by the current experience's own memory, and rows of zeros that make the problem singular."""
    g, others = torch.from_numpy(RNG.normal(size=10)), torch.from_numpy(RNG.normal(size=(6, 10)))
    there = torch.tensor([True, False, True, False, False, False])
    expected = by_active_sets(g.numpy(), others[there].numpy(), 0.0)
    np.testing.assert_allclose(projected(g, others, there).numpy(), expected, atol=1e-8)
    assert torch.equal(projected(g, others, there & False), g)
    single = projected(g.float(), others.float(), there)
    np.testing.assert_allclose(single.numpy(), expected, atol=1e-5)


def last_of_each(parts, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(p.x[-count:], p.y[-count:]) for p in parts]


def gradient(learner, weights, x, y) -> np.ndarray:
    weights = {n: w.detach().requires_grad_() for n, w in weights.items()}
    loss = F.cross_entropy(functional_call(learner.base, weights, (x,)), y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(weights.values()))]).numpy()


@pytest.mark.parametrize("algorithm", [GEM, AGEM])
def test_a_step_is_the_projected_one(algorithm):
    """Catches memories of the wrong experience, of its first examples, or of the batch itself: against autograd.

    The third experience is one batch; A-GEM looks at all that is kept.
    """
    settings = {"replay": 8} if algorithm is AGEM else {"margin": 0.2}
    learner = algorithm(MLP(3, (5,)), experiences=4, memory=2, rate=0.5, batch=7, **settings).double().eval()
    parts = experiences(3)
    state = learner.begin(4, Chance.of(KEY))
    projections = 0
    for flip in range(20):
        state = learner.begin(4, Chance.of(torch.tensor(flip)))
        for part in parts[:2]:
            state = learner.update(state, part)
        weights = state.parameters
        g = gradient(learner, weights, parts[2].x, parts[2].y)
        kept = last_of_each(parts[:2], 2)
        if algorithm is GEM:
            expected = by_active_sets(g, np.stack([gradient(learner, weights, *one) for one in kept]), 0.2)
        else:
            other = gradient(learner, weights, *(torch.cat(v) for v in zip(*kept, strict=True)))
            expected = g - min(0.0, g @ other) / (other @ other) * other
        projections += not np.array_equal(expected, g)
        after = learner.update(state, parts[2]).parameters
        moved = torch.cat([((weights[n] - after[n]) / 0.5).flatten() for n in weights]).numpy()
        np.testing.assert_allclose(moved, expected, atol=1e-7)
    assert projections > 3  # or nothing was tested


def test_a_stream_of_more_experiences_is_refused():
    """Catches experiences beyond the memory, which would silently have none."""
    from datamodules import TransformedStreams
    from tests.support.toy import ToyImages

    learner = GEM(MLP(256, (5,)), experiences=4)
    words = learner.check(TransformedStreams(ToyImages(), experiences=5))
    assert words is not None and "--model.init_args.experiences 5" in words
    assert learner.check(TransformedStreams(ToyImages(), experiences=4)) is None
