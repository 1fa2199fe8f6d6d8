"""Decisions on matrices for which the best learner of every task is known, and the thinning that judges them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from models.task_embedding.collaborative_filtering import GPLVM, Belief, MatrixFactorization
from models.task_embedding.recommendation import error_of_measuring, halves, nearest_tasks, probe, try_out


def two_kinds(first: int, second: int) -> Tensor:
    """Six learners, three of which answer everything of one kind of task and nothing of the other, for certain."""
    right = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3)
    return torch.cat([right[:, :1].expand(-1, first), right[:, 1:].expand(-1, second)], 1).double()


def test_regrets_on_a_matrix_whose_answer_is_known():
    """Catches a regret of the wrong sign, a way to decide that sees what judges it, and a best on average of the new
    tasks: one probe tells the kind of a task, and with it all there is to know."""
    known, new = two_kinds(30, 20), two_kinds(6, 14)
    models = {"factors": MatrixFactorization(1, 0.1).fit(known), "latents": GPLVM(1).fit(known)}
    trial = try_out(known, new, 20, models, probes=1)
    mean = {name: values.mean().item() for name, values in trial.accuracy.items()}
    assert mean["oracle"] == mean["every learner measured"] == mean["factors"] == mean["latents"] == 1
    assert mean["5 nearest tasks"] == 1
    assert mean["best on average"] == pytest.approx(6 / 20)  # the kind that is more frequent among known tasks
    assert mean["random learner"] == pytest.approx(0.5)
    # One learner was measured, and half of all answer nothing.
    assert mean["best of the probes of factors"] < 1
    assert set(trial.accuracy["best of 1 random learners"].tolist()) == {0.0, 1.0}
    assert all(values.shape == (20,) for values in trial.accuracy.values())
    assert [count.sum().item() for count in trial.probed.values()] == [20, 20]
    assert trial.errors["factors"].abs().max() < 0.1
    assert len(trial.errors["factors"]) == 5 * 20


def test_learners_that_predicted_nothing_are_neither_measured_nor_taken():
    """Catches a missing entry that counts as the best, or as none right."""
    known, new = two_kinds(30, 20), two_kinds(5, 5)
    new[0, :5], new[5, 5:] = torch.nan, torch.nan
    trial = try_out(known, new, 20, {"factors": MatrixFactorization(1, 0.1).fit(known)}, probes=2)
    assert all(values.isfinite().all() for values in trial.accuracy.values())
    assert trial.accuracy["factors"].mean() == 1
    assert trial.accuracy["random learner"].tolist() == pytest.approx([0.4] * 5 + [0.4] * 5)


def test_halves_are_of_the_same_queries_and_independent():
    """Catches halves that share queries, which makes luck count as skill, or that lose some: of binomial counts, halves
    are independent binomials."""
    rng, queries = np.random.default_rng(0), 15
    share = rng.uniform(0.2, 0.9, (40, 1))
    right = torch.from_numpy(rng.binomial(queries, np.broadcast_to(share, (40, 3000))))
    one, other = halves(right / queries, queries, seed=3)
    torch.testing.assert_close(one * 7 + other * 8, right.double())
    of_each = torch.stack([one, other]) - torch.from_numpy(share)
    error = of_each.mean(-1).abs().max()
    assert error < 0.015
    covariance = (of_each[0] * of_each[1]).mean(-1)
    spread = torch.from_numpy((share * (1 - share))[:, 0])
    assert (covariance / (spread / 56**0.5)).abs().max() < 4 / 3000**0.5
    torch.testing.assert_close(of_each[0].var(-1), spread / 7, rtol=0.12, atol=0)
    assert not torch.equal(one, halves(right / queries, queries, seed=4)[0])
    gap = halves(torch.tensor([[0.5, torch.nan]]), 4)
    assert torch.stack(gap).isnan().tolist() == [[[False, True]]] * 2


def test_the_error_of_a_share_is_binomial():
    """Catches the error of none or all right, which is not zero."""
    value = error_of_measuring(torch.tensor([0.6]), 1000).item()
    assert value == pytest.approx(0.6 * 0.4 / 1000, rel=0.01)
    assert error_of_measuring(torch.tensor([1.0]), 8).item() == pytest.approx(9 / 10 * 1 / 10 / 8)


def test_probes_are_measured_one_after_the_other_and_once():
    """Catches a second measurement of one learner, probes that do not heed what those before told, or an order that
    is lost."""
    # Learners 0 and 1 are alike, and so are 2 and 3; what 0 shows decides between asking 1 and asking 2.
    covariance = torch.eye(4, dtype=torch.float64) * 0.01
    covariance[0, 1] = covariance[1, 0] = covariance[2, 3] = covariance[3, 2] = 0.008
    belief = Belief(torch.tensor([0.62, 0.61, 0.6, 0.59], dtype=torch.float64), covariance)
    orders = {}
    for shown in (0.1, 0.9):
        found, after = probe(belief, 3, lambda row, s=shown: (s if row == 0 else 0.6, 1e-6), range(4), 1e-6)
        assert len(found) == 3
        orders[shown] = list(found)
        expected = belief.given(list(found), torch.tensor([v for v, _ in found.values()], dtype=torch.float64), 1e-6)
        torch.testing.assert_close(after.mean, expected.mean)
    assert len(probe(belief, 9, lambda row: (0.5, 1e-6), [1, 3], 1e-6)[0]) == 2
    assert orders[0.1] != orders[0.9] or 0 not in orders[0.1]


def test_the_nearest_tasks_are_by_the_probes_alone():
    """Catches distances over learners that were not measured, or that a missing entry makes near."""
    known = torch.tensor([[0.1, 0.5, 0.9, 0.5], [0.9, 0.5, 0.1, 0.5], [0.0, 0.0, 0.0, 1.0]]).double()
    assert nearest_tasks(known, [0, 1], torch.tensor([0.85, 0.2]).double(), 2).tolist()[0] == 2
    known[:2, 2] = torch.nan
    assert 2 not in nearest_tasks(known, [0, 1], torch.tensor([0.85, 0.2]).double(), 3)
