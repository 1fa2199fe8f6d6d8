"""What holds for every size: shares of processes, streams of chance, episodes, splits, weights of classes."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st
from jaxtyping import Bool, Float, Int, UInt8, jaxtyped
from torch import Tensor

from datamodules import FourFamily, HarderSinusoid, Linear, Sinusoid
from datamodules.core.episodes import EvaluationTasks, Support, TrainingTasks
from datamodules.core.errors import DataError
from datamodules.core.streams import TaskStreams
from datamodules.images.tasks import refuse_overlap, shuffled
from tests.support.image_tasks import COUNTS, same, tasks

SIZES = st.integers(1, 40)
NUMBERS = st.integers(0, 2**63 - 1)


def every(*given_strategies: Any, cases: int = 60, **named: Any):
    """A test of so many cases, always the same."""

    def decorate(test):
        quick = settings(max_examples=cases, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        return seed(0)(quick(given(*given_strategies, **named)(test)))

    return decorate


@every(SIZES, st.integers(1, 12), st.integers(0, 10**6), cases=100)
def test_processes_share_training_tasks(meta_batch, world, first):
    """Catches a task of a meta-batch that two processes train on or none, by any number of processes and any start."""
    assume(world <= meta_batch)
    walks = [iter(TrainingTasks(meta_batch, rank, world, lambda: first)) for rank in range(world)]
    for step in range(3):
        shares = [next(walk) for walk in walks]
        start = first + step * meta_batch
        assert sorted(itertools.chain(*shares)) == list(range(start, start + meta_batch))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@every(st.integers(1, 300), SIZES, st.integers(1, 12), cases=200)
def test_processes_share_evaluation_tasks(total, batch, world):
    """Catches a task that is evaluated twice or not at all, and processes with fewer batches, which DDP waits for."""
    assume(world <= total)
    shares = [list(EvaluationTasks(total, batch, rank, world)) for rank in range(world)]
    assert sorted(itertools.chain(*itertools.chain(*shares))) == list(range(total))
    assert len({len(share) for share in shares}) == 1
    assert all(0 < len(b) <= batch + 1 for share in shares for b in share)


@every(st.lists(st.integers(0, 5), min_size=1, max_size=40), cases=100)
def test_classes_weigh_alike(labels):
    """Catches weights by which a class with more examples counts more, or whose mean is not 1."""
    y = torch.tensor(sorted(labels))
    y = torch.unique(y, return_inverse=True)[1]  # no class without an example
    ways = int(y.max()) + 1
    shares = Support(torch.zeros(len(y), 1), y, ways).shares()
    assert shares is not None and shares.mean().item() == pytest.approx(1, rel=1e-12)
    of_classes = torch.stack([shares[y == k].sum() for k in range(ways)])
    torch.testing.assert_close(of_classes, of_classes[:1].expand(ways), rtol=1e-12, atol=0)


@every(NUMBERS, st.lists(NUMBERS, min_size=1, max_size=6), st.data())
def test_a_stream_is_a_function_of_its_task(number, indices, data):
    """Catches chance that depends on which other tasks are drawn along, or on how draws are cut into calls."""
    place = data.draw(st.integers(0, len(indices) - 1))
    together, alone = TaskStreams(number, "val", indices), TaskStreams(number, "val", [indices[place]])
    np.testing.assert_array_equal(together.bits(7)[place], np.concatenate([alone.bits(3)[0], alone.bits(4)[0]]))


@every(NUMBERS, st.integers(1, 60), st.data(), cases=100)
def test_chosen_are_distinct_and_within(number, n, data):
    """Catches a number that is drawn twice, or one that is not to be had."""
    k = data.draw(st.integers(1, n))
    chosen = TaskStreams(number, "train", range(20)).choice(n, k)
    assert chosen.shape == (20, k) and (chosen >= 0).all() and (chosen < n).all()
    assert all(len(set(row)) == k for row in chosen.tolist())


@every(
    st.integers(0, 2**64 - 1),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 3),
    st.lists(st.integers(0, 2**40), min_size=1, max_size=5, unique=True),
    st.sampled_from(["none", "random", "classes"]),
    st.booleans(),
)
def test_episodes_of_images(number, ways, shots, queries, indices, rotations, aligned):
    """Catches an image among support and query set at once, a class twice in a task, labels of another class, and a
    task that depends on which others are sampled along."""
    settings: dict[str, Any] = {"seed": number, "rotations": rotations, "aligned": aligned}
    distribution = tasks(ways, shots, queries, **settings)
    batch = distribution.sample(indices)
    with jaxtyped("context"):
        assert isinstance(batch.support_x, UInt8[Tensor, "tasks support 1 size size"])
        assert isinstance(batch.support_y, Int[Tensor, "tasks support"])
        assert isinstance(batch.query_x, UInt8[Tensor, "tasks queries 1 size size"])
        assert isinstance(batch.query_y, Int[Tensor, "tasks queries"])
        assert isinstance(batch.index, Int[Tensor, "tasks"])
        assert isinstance(batch.task["classes"], Int[Tensor, f"tasks {ways}"])
    assert batch.support_rows is not None and batch.query_rows is not None
    assert len(distribution.class_names) == len(distribution.group_names) > int(batch.task["classes"].max())
    ends = np.cumsum(COUNTS)
    for t in range(len(indices)):
        rows = torch.cat([batch.support_rows[t], batch.query_rows[t]]).tolist()
        classes = batch.task["classes"][t].tolist()
        assert len(set(rows)) == len(rows) and len(set(classes)) == ways
        for y, n in ((batch.support_y[t], shots), (batch.query_y[t], queries)):
            assert Counter(y.tolist()) == dict.fromkeys(range(ways), n)
        labels = torch.cat([batch.support_y[t], batch.query_y[t]]).tolist()
        of_rows = np.searchsorted(ends, np.array(rows) % ends[-1], side="right")
        assert [classes[y] % len(COUNTS) for y in labels] == of_rows.tolist()
    last = len(indices) - 1
    assert same(batch, last, distribution.sample([indices[last]]), 0)


@every(
    st.sampled_from([Sinusoid, HarderSinusoid, Linear, FourFamily]),
    st.integers(0, 2**31),
    st.integers(1, 12),
    st.integers(1, 12),
    st.lists(st.integers(0, 2**40), min_size=1, max_size=4, unique=True),
    cases=40,
)
def test_episodes_of_functions(module, number, shots, queries, indices):
    """Catches points of a shape or type that no learner expects, and a task that depends on others."""
    distribution = module(shots=shots, queries=queries, seed=number).distribution("test")
    batch = distribution.sample(indices)
    with jaxtyped("context"):
        assert isinstance(batch.support_x, Float[Tensor, f"tasks {shots} 1"])
        assert isinstance(batch.support_y, Float[Tensor, f"tasks {shots} 1"])
        assert isinstance(batch.query_x, Float[Tensor, f"tasks {queries} 1"])
        assert isinstance(batch.query_y, Float[Tensor, f"tasks {queries} 1"])
    assert batch.ways == 0 and batch.support_x.dtype == torch.float32
    assert same(batch, len(indices) - 1, distribution.sample(indices[-1:]), 0)


@every(st.lists(st.text(min_size=1, max_size=6), min_size=3, max_size=60, unique=True), NUMBERS, st.data())
def test_splits_are_apart_and_a_function_of_the_seed(names, number, data):
    """Catches a class in two splits, one lost, and an order that depends on that of the files."""
    order = shuffled(names, number)
    assert sorted(order) == sorted(names)
    assert order == shuffled(data.draw(st.permutations(names)), number)
    first = data.draw(st.integers(1, len(names) - 2))
    second = data.draw(st.integers(first + 1, len(names) - 1))
    splits = {"train": order[:first], "val": order[first:second], "test": order[second:]}
    refuse_overlap(splits)
    splits["test"] = [*splits["test"], data.draw(st.sampled_from(splits["train"] + splits["val"]))]
    with pytest.raises(DataError):
        refuse_overlap(splits)


@every(st.lists(st.integers(0, 4), min_size=1, max_size=20), cases=40)
def test_members_are_one_class_each(labels):
    """Catches an example of no class, or of two."""
    members = Support(torch.zeros(len(labels), 1), torch.tensor(labels), 5).members()
    assert isinstance(members, Bool[Tensor, f"{len(labels)} 5"])
    assert members.sum(1).eq(1).all() and members.int().argmax(1).tolist() == labels
