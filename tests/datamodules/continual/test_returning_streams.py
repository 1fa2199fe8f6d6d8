"""Streams of groups that return."""

import numpy as np
import pytest
import torch

from datamodules import DataError, ReturningStreams
from datamodules.images.tasks import ImageClasses
from tests.support.toy import ToyImages


class Numbered(ToyImages):
    """Five groups of two to four classes of 9 images, whose pixels tell class, number and group."""

    def classes(self, split: str) -> ImageClasses:
        sizes = (4, 3, 2, 3, 4)
        of_class = [g for g, size in enumerate(sizes) for _ in range(size)]
        pixels = [(k, i, g) for k, g in enumerate(of_class) for i in range(9)]
        images = torch.tensor(pixels, dtype=torch.uint8).view(-1, 1, 1, 3)
        return ImageClasses(images, np.full(16, 9), [f"c{k}" for k in range(16)], [f"g{g}" for g in of_class])


def streams(split: str = "test", **settings):
    given = {"groups": 3, "ways": 2, "experiences": 8, "shots": 2, "queries": 1, "returns": 0.6}
    return ReturningStreams(Numbered(), **given | settings).distribution(split)


def shown(batch, name: str) -> np.ndarray:
    """Class, number and group of every image, (T, J, n, 3)."""
    return batch.inputs[getattr(batch, name)].flatten(-3).numpy().astype(int)


@pytest.mark.parametrize("returns", [0.6, None])
def test_a_return_shows_the_same_classes_and_other_images(returns):
    """Catches classes drawn anew at each visit, images that are met twice, and queries that are learned somewhere."""
    batch = streams(returns=returns).sample(range(30))
    x, q, visits = shown(batch, "rows"), shown(batch, "query_rows"), batch.task["visits"].numpy()
    assert batch.classes == 6 and x.shape == (30, 8, 4, 3) and q.shape == (30, 8, 2, 3)
    for t in range(30):
        learned = [tuple(image) for image in x[t].reshape(-1, 3)]
        assert len(set(learned)) == len(learned)
        assert not set(learned) & {tuple(image) for image in q[t].reshape(-1, 3)}
        of_label, of_group = {}, {}
        for j in range(8):
            assert len(set(x[t, j, :, 2]) | set(q[t, j, :, 2])) == 1  # one alphabet
            assert of_group.setdefault(visits[t, j], x[t, j, 0, 2]) == x[t, j, 0, 2]
            assert np.bincount(batch.y[t, j] % 2).tolist() == [2, 2]
            pairs = [*zip(batch.y[t, j].tolist(), x[t, j, :, 0], strict=True)]
            pairs += zip(batch.query_y[t, j].tolist(), q[t, j, :, 0], strict=True)
            for label, one in pairs:
                assert of_label.setdefault(label, one) == one and label // 2 == visits[t, j]
        assert len(set(of_label.values())) == len(of_label) and len(set(of_group.values())) == len(of_group)
        for label, one in of_label.items():
            assert batch.task["classes"][t, label] == one
        again = [int(v in visits[t, :j]) for j, v in enumerate(visits[t])]
        assert batch.task["returns"][t].tolist() == again
    assert len({tuple(row.tolist()) for row in batch.y[:, 0]}) > 1  # examples are not sorted by label


def test_how_often_groups_return():
    """Catches returns that are drawn among new groups too, or to the group of the last visit; rounds that repeat.

    Before all three groups are known, and after the first visit, a return has probability 0.25: the mean of 400 streams
    is within four standard errors of it. Until then there is none to return to.
    """
    visits = streams(returns=0.25, experiences=3).sample(range(400)).task["visits"].numpy()
    assert (visits[:, :2] == [0, 1]).all()
    assert set(visits[:, 2]) == {0, 2} and abs((visits[:, 2] == 0).mean() - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5
    assert (np.diff(streams(returns=1.0, experiences=9).sample(range(50)).task["visits"].numpy()) != 0).all()
    rounds = streams(returns=None, experiences=9).sample(range(50)).task["visits"].view(50, 3, 3)
    assert (rounds.sort(-1).values == torch.arange(3)).all()
    assert (rounds[:, 0] != rounds[:, 1]).any()


@pytest.mark.parametrize("returns", [0.6, None])
def test_a_visit_depends_on_seed_split_and_numbers_alone(returns):
    """Catches visits that change with the length of the stream or with the other streams of the batch."""
    together = streams(returns=returns, experiences=9).sample([4, 7, 9])
    alone = streams(returns=returns, experiences=4).sample([7])
    for name in ("rows", "query_rows"):
        assert (shown(together, name)[1, :4] == shown(alone, name)[0]).all()
    assert (together.y[1, :4] == alone.y[0]).all() and together.key[1] == alone.key[0]
    other = streams(returns=returns, experiences=4, seed=1).sample([7])
    assert (shown(other, "rows") != shown(alone, "rows")).any() and other.key[0] != alone.key[0]
    assert alone.fingerprint()[0] == streams(returns=returns, experiences=4).sample([3, 7]).fingerprint()[1]


def test_streams_that_need_more_than_there_is():
    """Catches images met twice, or a traceback, in the place of one line that names the setting."""
    with pytest.raises(DataError, match="has 4 groups of 3 or more classes but a stream needs 5: lower groups to 4"):
        streams(groups=5, ways=3)
    with pytest.raises(DataError, match="has 9 images, 1 queries and 4 visits of 2 shots, so that 3 groups have less"):
        streams(experiences=13)
    assert streams(experiences=12).sample([0]).experiences == 12


def test_an_online_run_is_one_stream():
    """Catches experiences of another stream, out of order, or with inputs that are numbered as in the whole stream."""
    data = ReturningStreams(Numbered(), groups=3, ways=2, experiences=8, shots=2, queries=1, online=True)
    whole = data.distribution("test").sample([0])
    for s in range(8):
        one = data.distribution("train").sample([s])
        assert (shown(one, "rows")[0, 0] == shown(whole, "rows")[0, s]).all() and one.index.tolist() == [s]
        assert (shown(one, "query_rows")[0, 0] == shown(whole, "query_rows")[0, s]).all()
        assert torch.equal(one.y[:, 0], whole.y[:, s]) and torch.equal(one.query_y[:, 0], whole.query_y[:, s])
        assert one.key == whole.key and one.classes == whole.classes and len(one.inputs) == 6
    with pytest.raises(ValueError, match="one experience at a time"):
        ReturningStreams(Numbered(), online=True, meta_batch_size=2)
