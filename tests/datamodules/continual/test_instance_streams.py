"""Streams of single examples of classes that return."""

import numpy as np
import pytest
import torch

from datamodules import DataError, InstanceStreams
from datamodules.continual.instance_streams import with_turns
from models.continual.learner import by_instance
from tests.datamodules.continual.test_class_streams import Numbered, shown
from tests.support.toy import ToyImages


def streams(**settings) -> InstanceStreams:
    return InstanceStreams(Numbered(), **{"ways": 3, "instances": 4} | settings)


def test_every_class_returns_with_other_images():
    """Catches images that are met twice, classes that come more often, labels that follow the class or the order, and
    questions about images that were shown."""
    batch = streams().distribution("test").sample(range(60))
    x, q, y = shown(batch, "rows")[:, :, 0], shown(batch, "query_rows")[:, :, 0], batch.y[..., 0].numpy()
    assert x.shape == (60, 12, 2) and batch.points == (12,) and batch.classes == 3
    for images, asked, labels, classes in zip(x, q, y, batch.task["classes"].numpy(), strict=True):
        assert len({tuple(image) for image in images}) == 12
        assert (images[:, 0] == classes[labels]).all() and (asked[:, 0] == classes[labels]).all()
        assert np.bincount(labels).tolist() == [4, 4, 4]
        assert not {tuple(image) for image in asked} & {tuple(image) for image in images}
    assert len({tuple(row) for row in y}) > 50  # orders
    assert {(int(k), int(label)) for k, label in zip(x[:, :, 0].ravel(), y.ravel(), strict=True)} == {
        (k, label) for k in range(9) for label in range(3)
    }
    again = streams().distribution("test").sample([59, 3])
    assert (shown(again, "rows")[1, :, 0] == x[3]).all() and again.key[0] == batch.key[59]
    assert again.fingerprint().tolist() == batch.fingerprint()[[59, 3]].tolist()


def test_turns_are_classes_of_their_own():
    """Catches a turn that mixes classes or is none."""
    classes = ToyImages().classes("train").select([0, 3, 5])
    turned = with_turns(classes)
    assert len(turned) == 12 and len(set(turned.names)) == 12 and turned.counts.tolist() == [20] * 12
    for turn in range(4):
        rows, own = slice(20 * (3 * turn + 1), 20 * (3 * turn + 2)), slice(20, 40)
        assert torch.equal(turned.images[rows], torch.rot90(classes.images[own], turn, (2, 3)))


def test_streams_that_need_more_than_there_is():
    """Catches a traceback in the place of one line that names the setting."""
    with pytest.raises(DataError, match="has 9 classes but a stream needs 10: lower ways to 9"):
        streams(ways=10).distribution("test")
    with pytest.raises(DataError, match=r"'c0' .* has 6 images but a stream shows 6 .* lower instances to 5"):
        streams(instances=6).distribution("test")


def test_accuracy_by_instance():
    """Catches instances that are counted over all classes, or from the second on: against counting by hand."""
    y = torch.tensor([[0, 1, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0]])[..., None]
    online = torch.tensor([[0.0, 0, 1, 1, 0, 1], [1, 0, 1, 0, 1, 1]])
    found = by_instance(online, y)
    assert found["instances"].tolist() == [[0.0, 0.5, 1.0], [0.5, 0.5, 1.0]]
    assert found["instance_1"].tolist() == [0.0, 0.5] and found["instance_3"].tolist() == [1.0, 1.0]
    assert "instance_5" not in found
    assert by_instance(online, torch.arange(6).expand(2, 6)[..., None]) == {}
