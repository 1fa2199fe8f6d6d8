"""Rainbow tasks: the schedule, and what the images are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.continual.rainbow import COLOURS, RainbowImages, half_size
from datamodules.core.errors import DataError
from tests.support.toy import ToyImages


def rainbow(**settings) -> RainbowImages:
    common = {"ways": 3, "held_out": 4, "arrival_steps": 3, "task_steps": 8, "meta_batch_size": 2, "seed": 5}
    return RainbowImages(ToyImages(), **{**common, **settings})


def test_the_schedule_is_that_by_hand():
    """Catches a batch too early or too late, a task that goes on after the next began, and arrivals past their end."""
    tasks = rainbow(tasks=2).sequence()
    assert tasks.arrivals == 3  # at steps 0, 3 and 6 of 8
    expected = [(0, 1)] * 3 + [(0, 2)] * 3 + [(0, 3)] * 2 + [(1, 1)] * 3 + [(1, 2)] * 3 + [(1, 3)] * 2 + [(2, 0)] * 4
    assert [tasks.moment(s) for s in range(20)] == expected
    assert rainbow(arrivals=2).sequence().moment(7) == (0, 2)
    assert rainbow(task_steps=1000).sequence().arrivals == 20 - 4


def rows_of(batch, tasks) -> list[set[int]]:
    """The images of each task of a batch, by their rows before they were coloured."""
    both = torch.cat([batch.support_rows, batch.query_rows], 1) % len(tasks.classes.images)
    return [set(row.tolist()) for row in both]


def test_meta_training_shows_what_has_arrived_and_all_of_it():
    """Catches tasks of the future, images that have not arrived, held-out images, and arrivals that are never drawn;
    against sets that are built from the order of arrival by hand."""
    data = rainbow(shots=1, queries=1)
    tasks = data.sequence()
    held = set(tasks.held.ravel().tolist())
    for step, counts in {0: [1], 4: [2], 8: [3, 1], 12: [3, 2], 23: [3, 3, 3]}.items():
        seen = [set() for _ in counts]
        # Meta-updates of other seeds' numbers would be of other steps: many tasks at one step.
        wide = rainbow(meta_batch_size=400).sequence()
        batch = wide.sample(range(400 * step, 400 * (step + 1)))
        for number, rows in zip(batch.task["number"].tolist(), rows_of(batch, wide), strict=True):
            seen[number] |= rows
        for number, count in enumerate(counts):
            assert seen[number] == set(tasks.arriving[number, :, :count].ravel().tolist())
            assert not seen[number] & held
    share = np.bincount(batch.task["number"], minlength=3) / 400
    assert abs(share - 1 / 3).max() < 0.08  # uniform: 3.3 standard errors
    current = rainbow(drawn="current").sequence().sample([16, 17])  # of step 8
    assert current.task["number"].tolist() == [1, 1]


def test_support_and_queries_are_other_images_as_soon_as_there_are_two():
    """Catches a query that is in its own support set though others have arrived, and labels of other classes."""
    tasks = rainbow(shots=1, queries=2, meta_batch_size=50).sequence()
    first, later = tasks.sample(range(50)), tasks.sample(range(300, 350))  # one batch has arrived; three
    assert torch.equal(first.support_rows.repeat_interleave(2, 1), first.query_rows)
    for label in range(3):
        support = later.support_rows[later.support_y == label].view(50, 1)
        query = later.query_rows[later.query_y == label].view(50, 2)
        assert not (support == query).any() and (query[:, 0] != query[:, 1]).all()
        of_class = (later.query_rows % len(tasks.classes.images)) // 20
        assert (of_class[later.query_y == label] == label).all()


def test_current_task_has_its_data_so_far():
    """Catches queries that were learned, and a support set that lags behind what has arrived or is ahead of it."""
    data = rainbow()
    tasks = data.sequence()
    for step, number, count in ((0, 0, 1), (7, 0, 3), (8, 1, 1), (11, 1, 2)):
        now = data.current(step)
        own = now.support_rows[0] % len(tasks.classes.images)
        assert now.task["number"].tolist() == [number]
        assert set(own.tolist()) == set(tasks.arriving[number, :, :count].ravel().tolist())
        assert set((now.query_rows[0] % len(tasks.classes.images)).tolist()) == set(tasks.held.ravel().tolist())


def test_sequence_is_all_variations_once_in_an_order_of_the_seed():
    """Catches a variation that is missing or comes twice, and an order that ignores the seed."""

    def all_of(seed):
        tasks = rainbow(seed=seed).sequence()
        return [tasks.description(k) for k in range(56)]

    first, other = all_of(0), all_of(1)
    assert len(set(first)) == 56 and sorted(first) == sorted(other) and first != other


def test_images_are_black_on_their_colour_turned_and_shrunk():
    """Catches a wrong colour, sense of a turn or place of a small image; pixels recomputed from the source."""
    data = rainbow()
    tasks = data.distribution("test")
    batch = tasks.sample(range(56))
    for k in range(56):
        scale, turn, colour = (int(v) for v in tasks.variation(np.array(k)))
        image = tasks.classes.images[int(batch.support_rows[k, 0]) % len(tasks.classes.images)][0].numpy()
        ink = np.rot90(image, turn).astype(float)
        if scale:
            small, ink = ink.reshape(8, 2, 8, 2).mean((1, 3)), np.zeros((16, 16))
            ink[4:12, 4:12] = small
        expected = (255 - ink)[None] * np.array(list(COLOURS.values())[colour])[:, None, None] / 255
        assert np.abs(batch.support_x[k, 0].numpy() - expected).max() <= 1.5
    assert half_size(torch.full((1, 1, 7, 7), 9, dtype=torch.uint8)).sum() == 9 * 9  # 3 × 3, of odd sizes too


def test_tasks_are_functions_of_seed_and_number():
    """Catches a task that depends on which others are drawn with it."""
    tasks = rainbow().sequence()
    alone, among = tasks.sample([21]), tasks.sample([20, 21])
    assert torch.equal(alone.support_x[0], among.support_x[1]) and torch.equal(alone.query_x[0], among.query_x[1])


def test_refuses_what_there_is_not():
    """Catches a sequence that ends in the middle of a run's test, and held-out images that leave none to learn."""
    with pytest.raises(ValueError, match="test_tasks is 4"):
        rainbow(tasks=3, test_tasks=4)
    assert torch.equal(*(rainbow(tasks=3).distribution("test").sample([k]).support_x for k in (1, 4)))  # comes round
    with pytest.raises(DataError, match="lower held_out"):
        rainbow(held_out=20).sequence()
