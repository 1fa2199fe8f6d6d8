"""Class-incremental streams."""

import numpy as np
import pytest
import torch

from datamodules import ClassStreams, DataError
from datamodules.images.tasks import ImageClasses
from tests.support.toy import ToyImages

COUNTS = (6, 7, 8, 9, 10, 6, 7, 8, 9)


class Numbered(ToyImages):
    """Nine classes in three groups, of 6 to 10 images, whose pixels tell class and number."""

    def classes(self, split: str) -> ImageClasses:
        counts = np.array(COUNTS)
        pixels = [(k, i) for k, n in enumerate(counts) for i in range(n)]
        images = torch.tensor(pixels, dtype=torch.uint8).view(-1, 1, 1, 2)
        return ImageClasses(images, counts, [f"c{k}" for k in range(9)], [f"g{k % 3}" for k in range(9)])


def streams(split: str = "test", **settings) -> ClassStreams:
    data = ClassStreams(Numbered(), **{"experiences": 5, "shots": 3, "queries": 2, "test_tasks": 4} | settings)
    return data


def shown(batch, name: str) -> np.ndarray:
    """Class and number of every image, (T, …, 2)."""
    return batch.inputs[getattr(batch, name)].flatten(-3).numpy()


def test_an_experience_is_a_class_and_its_queries_are_other_images():
    """Catches images of another class, images learned that are asked again, and labels that are not the stream's."""
    batch = streams().distribution("test").sample(range(30))
    x, q = shown(batch, "rows"), shown(batch, "query_rows")
    classes = batch.task["classes"].numpy()
    assert (x[..., 0] == classes[..., None]).all() and (q[..., 0] == classes[..., None]).all()
    assert all(len(set(row)) == 5 for row in classes)
    for of_stream in np.concatenate([x, q], 2)[..., 1]:
        assert all(len(set(numbers)) == 5 for numbers in of_stream)
    assert (batch.y == torch.arange(5)[:, None]).all() and (batch.query_y == torch.arange(5)[:, None]).all()
    assert batch.classes == 5 and batch.points == (1, 2, 3, 4, 5)
    # All images of a class are met, as many of them being queries.
    assert {(k, i) for k, i in q.reshape(-1, 2).tolist()} == {(k, i) for k in range(9) for i in range(COUNTS[k])}


def test_an_experience_depends_on_seed_split_and_numbers_alone():
    """Catches experiences that change with the length of the stream or with the other streams of the batch."""
    long, short = streams(experiences=8).distribution("test"), streams(experiences=3).distribution("test")
    together, alone = long.sample([4, 7, 9]), short.sample([7])
    assert (shown(together, "rows")[1, :3] == shown(alone, "rows")[0]).all()
    assert (shown(together, "query_rows")[1, :3] == shown(alone, "query_rows")[0]).all()
    assert together.key[1] == alone.key[0]
    other = streams(experiences=3, seed=1).distribution("test").sample([7])
    assert (shown(other, "rows") != shown(alone, "rows")).any() and other.key[0] != alone.key[0]
    of_validation = streams(experiences=3, val_tasks=9).distribution("val").sample([7])
    assert (shown(of_validation, "rows") != shown(alone, "rows")).any() and of_validation.key[0] != alone.key[0]
    assert alone.fingerprint()[0] == short.sample([3, 7]).fingerprint()[1] != other.fingerprint()[0]


def test_orders():
    """Catches groups that are interleaved, always in one order, or always with one order of classes."""
    stored = streams(order="stored").distribution("test").sample(range(20)).task["classes"]
    assert (stored.diff(dim=1) > 0).all()
    grouped = streams(order="groups", experiences=9).distribution("test").sample(range(40)).task["classes"]
    group = grouped % 3
    assert ((group.diff(dim=1) != 0).sum(1) == 2).all()
    assert len({tuple(row[::3].tolist()) for row in group}) == 6  # orders of three groups
    assert len({tuple(sorted(row[:3].tolist())) for row in grouped}) == 3
    assert len({tuple(row[:3].tolist()) for row in grouped}) > 9


def test_meta_training_has_the_classes_own_labels_and_remembers():
    """Catches labels by place in meta-training, and memories of the stream's own classes where others are asked for."""
    settings = {"train_experiences": 4, "train_shots": 2, "train_queries": 1, "remember": 50}
    batch = streams(**settings, remember_from="others").distribution("train").sample(range(20))
    assert batch.classes == 9 and (batch.y[..., 0] == batch.task["classes"]).all()
    memory = shown(batch, "remembered_rows")
    assert (memory[..., 0] == batch.remembered_y.numpy()).all()
    for of_stream, classes in zip(memory[..., 0], batch.task["classes"].tolist(), strict=True):
        assert set(of_stream) == set(range(9)) - set(classes)
    batch = streams(**settings, remember_from="first_half").distribution("train").sample(range(20))
    assert batch.task["classes"].unique().tolist() == [4, 5, 6, 7, 8]
    assert batch.remembered_y.unique().tolist() == [0, 1, 2, 3]
    batch = streams(**settings).distribution("train").sample(range(20))
    assert batch.remembered_y.unique().tolist() == list(range(9))
    assert streams(**settings).distribution("test").sample([0]).remembered_rows is None


def test_meta_training_may_label_by_place():
    """Catches labels beyond the number of classes, and other images for other labels."""
    settings = {"train_experiences": 4, "train_shots": 2}
    batch = streams(**settings, own_labels=False).distribution("train").sample(range(5))
    assert batch.classes == 4 and (batch.y == torch.arange(4)[:, None]).all()
    assert torch.equal(batch.query_y[..., 0], torch.arange(4).expand(5, -1))
    own = streams(**settings).distribution("train").sample(range(5))
    assert torch.equal(batch.rows, own.rows) and torch.equal(batch.key, own.key)
    with pytest.raises(ValueError, match="own_labels is false but remember is 1"):
        streams(**settings, own_labels=False, remember=1)


def test_meta_validation_may_be_of_fewer_experiences():
    """Catches validation streams of the test's length, with its points beyond their end or without that."""
    data = streams(experiences=8, val_experiences=5, points=[2, 5, 6])
    val, test = (data.distribution(split).sample([0]) for split in ("val", "test"))
    assert (val.experiences, val.points) == (5, (2, 5)) and (test.experiences, test.points) == (8, (2, 5, 6, 8))
    assert data.task_shape()["experiences"] == 8
    with pytest.raises(DataError, match="lower val_experiences to 9"):
        streams(val_experiences=10).distribution("val")


def test_data_tells_how_many_classes_a_head_has_rows_for():
    """Catches the classes of another split, and data that is not there yet taken for none."""
    assert streams().network_settings()["classes"] == 9

    class Missing(Numbered):
        def classes(self, split: str) -> ImageClasses:
            raise DataError("not there")

    assert "classes" not in ClassStreams(Missing(), 5, 3, 2).network_settings()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"experiences": 10}, "has 9 classes but a stream needs 10: lower experiences to 9"),
        ({"shots": 6}, "class 'c0' (test) has 6 images but an experience needs 6 shots + 2 queries: lower shots"),
    ],
)
def test_streams_that_need_more_than_there_is(settings, words):
    """Catches a traceback, or images that are met twice, in the place of one line that names the setting."""
    with pytest.raises(DataError) as told:
        streams(**settings).distribution("test")
    assert words in str(told.value)


def test_inputs_are_held_once():
    """Catches memory that grows with the number of streams that show the same images."""
    batch = streams().distribution("test").sample(range(200))
    assert len(batch.inputs) == 70
