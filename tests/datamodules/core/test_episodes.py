"""Episodes of images: what is in a task, and which process sees which task."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules.core.episodes import EvaluationTasks, TrainingTasks, episode_loader
from datamodules.core.errors import DataError
from datamodules.images.tasks import ImageTasks
from tests.support.image_tasks import COUNTS, GROUPS, SIZE, chi_square_is_plausible, classes, same, tasks
from tests.support.toy import ToyImages


def turned(pixels: tuple[int, ...]) -> tuple[int, ...]:
    """A square image, row by row, turned by 90 degrees against the clock: the right column becomes the top row."""
    return tuple(pixels[column * SIZE + SIZE - 1 - row] for row in range(SIZE) for column in range(SIZE))


@cache
def known() -> dict[tuple[int, ...], tuple[int, int, int]]:
    """Every image in every turn, and the class, instance and number of turns that it is."""
    table: dict[tuple[int, ...], tuple[int, int, int]] = {}
    row = 0
    for k, count in enumerate(COUNTS):
        for instance in range(count):
            pixels = tuple(classes().images[row].flatten().tolist())
            for turns in range(4):
                assert pixels not in table
                table[pixels] = (k, instance, turns)
                pixels = turned(pixels)
            row += 1
    return table


def identify(images: Tensor) -> np.ndarray:
    """(T, N, C, H, W) images to (T, N, 3): class, instance, quarter turns."""
    flat = images.flatten(2).tolist()
    return np.array([[known()[tuple(pixels)] for pixels in task] for task in flat])


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_each_meta_batch(world: int, first: int):
    """Would catch processes that train on the same tasks, tasks left out, or a resume that starts again at task 0."""
    meta_batch = 7
    walks = [iter(TrainingTasks(meta_batch, rank, world, lambda: first * meta_batch)) for rank in range(world)]
    for step in range(first, first + 4):
        shares = [next(walk) for walk in walks]
        together = list(itertools.chain(*shares))
        assert len(together) == len(set(together)) == meta_batch
        assert set(together) == set(range(step * meta_batch, (step + 1) * meta_batch))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("total", "batch"), [(3, 1), (7, 2), (10, 3), (10, 50), (601, 50), (600, 100)])
def test_every_evaluation_task_is_seen_once(total: int, batch: int, world: int):
    """Would catch test tasks counted twice (as DistributedSampler pads them), dropped, or more in a batch than fit."""
    samplers = [EvaluationTasks(total, batch, rank, world) for rank in range(world)]
    batches = [b for sampler in samplers for b in sampler]
    assert sorted(itertools.chain(*batches)) == list(range(total))
    # One more than asked for where that spares some processes a batch of nothing.
    assert all(0 < len(b) <= batch + 1 for b in batches)
    assert len({len(s) for s in samplers}) == 1, "DDP waits for the process with most batches"
    assert [len(list(s)) for s in samplers] == [len(s) for s in samplers]
    assert list(samplers[0]) == list(samplers[0])  # a second validation sees the same


def test_a_process_without_a_task_is_refused():
    """Would catch a process that waits for ever, or trains on nothing, in a meta-batch smaller than the world."""
    with pytest.raises(ValueError, match="meta_batch_size is 2 but there are 3 processes"):
        TrainingTasks(2, 0, 3, lambda: 0)
    with pytest.raises(ValueError, match="2 evaluation tasks for 3 processes"):
        EvaluationTasks(2, 1, 0, 3)


def test_ranks_make_up_the_meta_batch_of_one_process():
    """Would catch ranks whose tasks are not those of a run on one process: gradients would not be comparable."""
    distribution = tasks()
    (whole, _), *parts = (
        list(
            itertools.islice(
                episode_loader(distribution, TrainingTasks(5, rank, world, lambda: 5), 5, 0, pin_memory=False), 2
            )
        )
        for rank, world in ((0, 1), (0, 2), (1, 2))
    )
    assert whole.index.tolist() == [5, 6, 7, 8, 9]
    assert [part[0].meta_batch for part in parts] == [5, 5]
    for rank, part in enumerate(parts):
        for j, index in enumerate(part[0].index.tolist()):
            assert index % 2 == (5 + rank) % 2
            assert same(whole, index - 5, part[0], j)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "random turns": {"rotations": "random"},
    "turns as classes": {"rotations": "classes"},
    "within a group": {"within_group": True},
    "turns within a group": {"within_group": True, "rotations": "classes"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_support_and_query_are_other_images_of_the_same_classes(settings: dict):
    """Would catch an image in both sets, a label that means two classes, or support and query turned differently."""
    episodes = tasks(**settings).sample(range(300))
    support, query = identify(episodes.support_x), identify(episodes.query_x)
    for t in range(300):
        meaning = []
        for label in range(3):
            s, q = support[t][episodes.support_y[t] == label], query[t][episodes.query_y[t] == label]
            assert len(s) == 2
            assert len(q) == 3
            drawn = np.concatenate([s, q])
            assert len({tuple(image) for image in drawn.tolist()}) == 5, "an image is there twice"
            kinds = {(k, turns) for k, _, turns in drawn.tolist()}
            assert len(kinds) == 1, "one label, several classes or turns"
            meaning.append(kinds.pop())
        assert len(set(meaning)) == 3
        if settings.get("rotations") != "classes":
            assert len({k for k, _ in meaning}) == 3, "one class under two labels"


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_task_does_not_depend_on_its_batch(settings: dict):
    """Would catch tasks that change with batch size, order or company: comparisons would not be paired."""
    distribution = tasks(**settings)
    alone = distribution.sample([7])
    for indices in ([7, 8], [400, 7, 3], list(range(20))):
        assert same(distribution.sample(indices), indices.index(7), alone, 0)
    assert same(tasks(**settings).sample([7]), 0, alone, 0)  # another process's copy
    assert not same(tasks(seed=1, **settings).sample([7]), 0, alone, 0)
    assert not same(tasks(split="val", **settings).sample([7]), 0, alone, 0)


def test_every_class_gets_every_label_equally_often():
    """Would catch labels in class order: a network could then remember classes instead of adapting."""
    episodes = tasks().sample(range(8000))
    seen, labels = (
        identify(episodes.support_x)[:, ::2, 0],
        episodes.support_y[:, ::2].numpy(),
    )  # one image of each class
    assert chi_square_is_plausible(seen * 3 + labels, 12 * 3)
    # Every pair of classes too: no class prefers another's company.
    pairs = seen[:, 0] * 11 + seen[:, 1] - (seen[:, 1] > seen[:, 0])
    assert chi_square_is_plausible(pairs, 12 * 11)


def test_every_image_is_support_and_query_equally_often():
    """Would catch images of large classes that are never drawn, or a fixed split of a class into support and query."""
    episodes = tasks().sample(range(12_000))
    for images in (episodes.support_x[:, ::2], episodes.query_x[:, ::3]):  # one of each class: independent draws
        seen = identify(images)
        for k, count in enumerate(COUNTS):
            assert chi_square_is_plausible(seen[seen[..., 0] == k][:, 1], count)


def test_without_rotations_nothing_is_turned():
    """Would catch rotations in a protocol that has none."""
    assert not identify(tasks().sample(range(300)).support_x)[..., 2].any()


def test_random_rotations_turn_each_class_of_a_task_by_itself():
    """Would catch one turn for the whole task, uneven turns, or turns that change which class a task says it has."""
    distribution = tasks(rotations="random")
    episodes = distribution.sample(range(3000))
    seen = identify(episodes.support_x)[:, ::2]  # the first image of each class
    assert chi_square_is_plausible(seen[..., 2], 4)
    assert chi_square_is_plausible(seen[:, 0, 2] * 4 + seen[:, 1, 2], 16)  # independent of the next class's
    assert np.array_equal(episodes.task["classes"].numpy(), seen[..., 0])
    assert distribution.class_names == classes().names


def test_rotations_as_classes_make_four_classes_of_each():
    """Would catch a turn that never comes, a class that is named after another turn, or 4 x fewer classes than said."""
    distribution = tasks(rotations="classes")
    episodes = distribution.sample(range(6000))
    seen = identify(episodes.support_x)[:, ::2]
    assert chi_square_is_plausible(seen[..., 2] * 12 + seen[..., 0], 48)
    names = [[distribution.class_names[i] for i in task] for task in episodes.task["classes"].tolist()]
    expected = [[classes().names[k] + (f"@{90 * r}" if r else "") for k, _, r in task] for task in seen.tolist()]
    assert names == expected
    assert len(set(distribution.class_names)) == 48
    together = [len({k for k, _, _ in task}) < 3 for task in seen.tolist()]
    assert any(together)  # two turns of one character may meet in a task, being different classes
    assert (
        ImageTasks(classes(), 48, 1, 1, rotations="classes", seed=0, split="test").sample([0]).support_x.shape[1] == 48
    )


@pytest.mark.parametrize("within", [False, True])
def test_aligned_examples_have_one_number_in_all_classes(within: bool):
    """Would catch support and queries by one drawer, several of them in a row of examples, or some that never come."""
    seen = identify(tasks(aligned=True, within_group=within).sample(range(2000)).support_x)
    drawers = seen.reshape(2000, 3, 2, 3)[..., 1]
    assert (drawers == drawers[:, :1]).all()
    assert (drawers[:, 0, 0] != drawers[:, 0, 1]).all()
    episodes = tasks(ways=12, shots=1, queries=5, aligned=True).sample(range(600))
    support = identify(episodes.support_x).reshape(600, 12, 1, 3)
    drawers = np.concatenate([support, identify(episodes.query_x).reshape(600, 12, 5, 3)], 2)[..., 1]
    assert (drawers == drawers[:, :1]).all()
    assert (np.sort(drawers[:, 0]) == np.arange(6)).all()  # the smallest class has six
    assert chi_square_is_plausible(drawers[:, 0, 0], 6)


@pytest.mark.parametrize("rotations", ["none", "classes"])
def test_within_group_all_classes_come_from_one(rotations: str):
    """Would catch classes of two alphabets in one task, or groups and their members drawn unevenly."""
    distribution = tasks(within_group=True, rotations=rotations)
    seen = identify(distribution.sample(range(6000)).support_x)[:, ::2]
    groups = np.array([ord(g) - ord("a") for g in GROUPS])[seen[..., 0]]
    assert (groups == groups[:, :1]).all()
    assert chi_square_is_plausible(groups[:, 0], 3)
    turns = 4 if rotations == "classes" else 1
    for group in range(3):
        members = [i for i, g in enumerate(GROUPS) if ord(g) - ord("a") == group]
        of_group = seen[groups[:, 0] == group][:, 0]
        kinds = np.array([members.index(k) for k in of_group[:, 0]]) * turns + of_group[:, 2]
        assert chi_square_is_plausible(kinds, len(members) * turns)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": 13}, "has 12 classes but a task needs 13.* lower ways to 12"),
        ({"queries": 5}, "class 'a/0' .* has 6 images but a task needs 2 shots .* 5 queries"),
        ({"ways": 4, "within_group": True}, "group 'c' .* has 3 classes .* needs 4"),
        ({"ways": 13, "within_group": True, "rotations": "classes"}, "group 'c' .* has 12 classes"),
    ],
)
def test_data_that_is_too_small_is_refused_at_once(settings: dict, message: str):
    """Would catch an index error, or repeated images, in the middle of a run instead of a cure before it."""
    with pytest.raises(DataError, match=message):
        tasks(**settings)


def test_episodes_keep_what_they_are_on_every_device():
    """Would catch a tensor left behind, or ways and the size of the meta-batch lost, when a batch is moved."""
    episodes = tasks().sample([3, 4])
    episodes.meta_batch = 8
    moved = episodes.to("meta")
    tensors = [moved.support_x, moved.support_y, moved.query_x, moved.query_y, moved.index, *moved.task.values()]
    assert {t.device.type for t in tensors} == {"meta"}
    assert (moved.ways, moved.meta_batch, len(moved)) == (3, 8, 2)
    assert episodes.support_x.device.type == "cpu"  # a copy
    assert episodes.support_x.dtype == torch.uint8
    one = episodes[1]
    assert torch.equal(one.support.x, episodes.support_x[1])
    assert torch.equal(one.query_y, episodes.query_y[1])
    assert one.support.ways == 3


def test_shots_vary_from_meta_batch_to_meta_batch():
    """Catches shots that differ within a meta-batch or between processes, that follow the order of sampling instead of
    the number of the meta-batch, a range that leaves out an end, and shots that tell the first task's classes."""
    varied = tasks(shots=1, queries=2, max_shots=3, meta_batch=4)
    shots = [varied.sample(range(4 * step, 4 * step + 4)).support_x.shape[1] // 3 for step in range(300)]
    assert chi_square_is_plausible(np.array(shots) - 1, 3)
    again = tasks(shots=1, queries=2, max_shots=3, meta_batch=4)
    for step in (7, 3, 8):
        for rank in range(2):  # each process its share
            share = again.sample(range(4 * step + rank, 4 * step + 4, 2))
            assert (
                share.support_x.shape[1] == share.support_y.shape[1] == share.support_rows.shape[1] == 3 * shots[step]
            )
            assert share.query_x.shape[1] == share.query_rows.shape[1] == 6
            whole = varied.sample(range(4 * step, 4 * step + 4))
            assert same(share, 0, whole, rank)
    for k in (1, 2, 3):
        first = [int(varied.sample([4 * s]).task["classes"][0, 0]) for s, n in enumerate(shots) if n == k]
        assert chi_square_is_plausible(np.array(first), 12)
    other = tasks(shots=1, queries=2, max_shots=3, meta_batch=4, seed=1)
    assert [other.shots_of([4 * step]) for step in range(300)] != shots
    with pytest.raises(ValueError, match="one at a time"):
        varied.sample([3, 4])
    with pytest.raises(DataError, match="5 shots"):
        tasks(shots=1, queries=2, max_shots=5)


def test_training_alone_varies_its_shots():
    """Catches validation and test tasks of varying shots, and a meta-batch of another size than the run's."""
    data = ToyImages(ways=3, queries=2, train_shots=2, max_train_shots=4, meta_batch_size=6)
    train = data.distribution("train")
    assert {train.shots_of(range(6 * s, 6 * s + 6)) for s in range(40)} == {2, 3, 4}
    for split in ("val", "test"):
        assert data.distribution(split).sample(range(13)).support_x.shape[1] == 3
    with pytest.raises(ValueError, match="max_train_shots is 1"):
        ToyImages(shots=2, max_train_shots=1)


@pytest.mark.parametrize(
    "settings", [{}, {"rotations": "random"}, {"rotations": "classes", "within_group": True}, {"aligned": True}]
)
def test_unlabelled_images_are_further_ones_of_the_same_classes(settings: dict):
    """Catches unlabelled images that are support or queries too, twice the same, of other classes or turns, labels
    that can be read off their places, tasks that change with their number, and a task that depends on its batch."""
    settings = {"ways": 3, "shots": 1, "queries": 2, "seed": 3, "split": "train", **settings}
    tasks, plain = ImageTasks(classes(), unlabelled=3, **settings), ImageTasks(classes(), **settings)
    indices = range(200)
    got, expected = tasks.sample(indices), plain.sample(indices)
    assert expected.unlabelled_x is None
    for name in ("support_x", "support_y", "query_x", "query_y", "index", "support_rows", "query_rows"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert got.unlabelled_x is not None and got.unlabelled_x.shape[1] == 9
    labelled, unlabelled = (identify(x) for x in (torch.cat([got.support_x, got.query_x], 1), got.unlabelled_x))
    first_class = []
    for seen, more in zip(labelled, unlabelled, strict=True):
        of_seen, of_more = (sorted((k, r) for k, _, r in part.tolist()) for part in (seen, more))
        assert of_seen == of_more  # three of each: 1 shot and 2 queries, 3 unlabelled
        assert len({tuple(row) for row in [*seen.tolist(), *more.tolist()]}) == 18
        first_class.append([row.tolist() for row in seen[:3, [0, 2]]].index(more[0, [0, 2]].tolist()))
    assert min(np.bincount(first_class, minlength=3)) > 40
    alone = tasks.sample([7])
    assert alone.unlabelled_x is not None
    assert torch.equal(alone.unlabelled_x[0], got.unlabelled_x[7])


def test_too_few_images_for_the_unlabelled_are_refused():
    """Catches a draw of images that are not there."""
    with pytest.raises(DataError, match="2 queries \\+ 4 unlabelled of each class"):
        ImageTasks(classes(), 3, 1, 2, seed=0, split="train", unlabelled=4)


def test_unlabelled_images_reach_the_learner_normalised():
    """Catches bytes among the floats, and a data module whose setting goes nowhere."""
    data = ToyImages(ways=3, queries=2, unlabelled=2)
    for split in ("train", "val", "test"):
        ready = data.on_device(data.distribution(split).sample([0, 1]))
        assert ready.unlabelled_x is not None and ready.unlabelled_x.shape == (2, 6, 1, 16, 16)
        assert ready.unlabelled_x.dtype == torch.float32 and ready.unlabelled_x.max() <= 1
        assert torch.equal(ready[1].support.unlabelled, ready.unlabelled_x[1])
