"""OSAKA streams: when tasks change, what stays with a task, and which domains are shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.continual.osaka import OsakaStreams
from datamodules.core.errors import DataError
from datamodules.images.multi_domain import Domain
from tests.support.toy import ToyImages


def streams(**settings) -> OsakaStreams:
    domains = {"toy": Domain(ToyImages()), "negative": Domain(ToyImages(), invert=True)}
    common = {"trained": "toy", "probabilities": {"toy": 0.75, "negative": 0.25}, "stay": 0.8}
    common |= {"ways": 3, "shots": 2, "queries": 1, "experiences": 40}
    return OsakaStreams(domains, **{**common, **settings})


def rows(batch) -> tuple[np.ndarray, np.ndarray]:
    """Which image of the two domains each example is, learned and asked about, known by its pixels."""
    toy = ToyImages().classes("test").images
    both = torch.cat([255 - toy, toy])  # in the order of the domains' names
    known = {image.numpy().tobytes(): k for k, image in enumerate(both)}
    number = np.array([known[image.numpy().tobytes()] for image in batch.inputs])
    return number[batch.rows], number[batch.query_rows]


def test_a_task_keeps_classes_labels_and_domain_until_it_changes():
    """Catches classes that are drawn for each experience, a domain that changes within a task, boundaries that are told
    one experience late, and labels without a class of their own; read off the pixels."""
    batch = streams().distribution("test").sample([0, 1, 2])
    learned, asked = rows(batch)
    of_class = learned // 20  # 24 of them, the first 12 negatives
    for i in range(3):
        by_label = [np.array([of_class[i, j][batch.y[i, j] == k] for k in range(3)]) for j in range(40)]
        for j in range(40):
            assert (by_label[j] == by_label[j][:, :1]).all()  # a label is a class
            assert ((of_class[i, j] >= 12) == bool(batch.task["domains"][i, j])).all()
            assert set(asked[i, j] // 20) == set(of_class[i, j]) and not set(asked[i, j]) & set(learned[i, j])
            if j:
                same = (by_label[j] == by_label[j - 1]).all()
                assert same != bool(batch.task["boundaries"][i, j])
    assert batch.task["boundaries"][:, 0].all()
    assert (learned[:, 1:] != learned[:, :-1]).any()  # other images of the same classes


def test_changes_and_domains_are_as_often_as_asked():
    """Catches the probability of a change taken for that of staying, and domains drawn by experience or alike; against
    the binomial's four standard errors."""
    batch = streams(experiences=50).distribution("val").sample(range(60))
    changes = batch.task["boundaries"][:, 1:].double()
    assert abs(changes.mean() - 0.2) < 4 * (0.2 * 0.8 / changes.numel()) ** 0.5
    of_tasks = batch.task["domains"][batch.task["boundaries"]].double()
    assert abs(of_tasks.mean() - 0.75) < 4 * (0.25 * 0.75 / len(of_tasks)) ** 0.5


def test_an_experience_is_a_function_of_its_numbers():
    """Catches an experience that depends on how many follow, or on the other streams of the batch."""
    long, short = (rows(streams(experiences=n).distribution("test").sample(i)) for n, i in ((9, [4, 7]), (6, [7])))
    assert all((a[1, :6] == b[0]).all() for a, b in zip(long, short, strict=True))


def test_meta_training_is_of_the_first_domain_and_of_its_own_classes():
    """Catches other domains in meta-training, and classes of the test there."""
    data = streams()
    train = data.distribution("train").sample(range(4))
    toy = {image.numpy().tobytes() for image in ToyImages().classes("train").images}
    assert {image.numpy().tobytes() for image in train.inputs} <= toy
    assert not data.distribution("train").class_digests() & data.distribution("test").class_digests()


def test_refuses_what_there_is_not():
    """Catches probabilities of other domains, and images that run out within a batch."""
    with pytest.raises(ValueError, match="probabilities"):
        streams(probabilities={"toy": 1.0})
    with pytest.raises(DataError, match="lower shots"):
        streams(shots=20).distribution("test")
