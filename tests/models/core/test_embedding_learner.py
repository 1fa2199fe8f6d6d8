"""What learners of embeddings share: the order they read a support set in, and images embedded once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from datamodules.core.episodes import Support
from models import SNAIL, Conv4, MatchingNet, ProtoNet, RelationNet
from models.core.deterministic_order import shuffled, shuffled_labels
from models.core.embedding_learner import EmbeddingLearner
from tests.support.toy import ToyImages

LEARNERS = pytest.mark.parametrize("kind", [ProtoNet, MatchingNet, RelationNet, SNAIL])


def small(kind: type[EmbeddingLearner], **settings) -> EmbeddingLearner:
    return kind(Conv4(hidden=4, image_size=16, downsample="pool", halvings=2), **settings).eval()


def test_orders_and_labels_are_uniform_over_tasks():
    """Catches an order by class, by ink, or that always puts one of two images first, labels that tell the order of the
    examples, and labels that no task uses; shots are unequal, and there are more labels than classes."""
    g = torch.Generator().manual_seed(0)
    images, y = torch.randint(0, 256, (9, 4), generator=g) / 255, torch.tensor([0, 1, 1, 2])
    places, labels, pairs = [], [], set()
    for chosen in itertools.permutations(range(9), 4):
        if chosen[1] > chosen[2]:  # the same support set
            continue
        support = Support(images[list(chosen)], y, 3)
        order = shuffled(support).tolist()
        assert sorted(order) == [0, 1, 2, 3]
        places.append([order.index(i) for i in range(4)])
        labels.append(shuffled_labels(support, 4).tolist())
        if {0, 8} <= set(chosen):
            pairs.add(order.index(chosen.index(0)) < order.index(chosen.index(8)))
    assert pairs == {True, False}
    places, labels = np.array(places), np.array(labels)
    for example in range(4):
        assert chisquare(np.bincount(places[:, example])).pvalue > 1e-3
    together = np.unique(labels, axis=0, return_counts=True)[1]
    assert len(together) == 24 and together.min() > len(labels) / 48
    for k, example in ((0, 0), (2, 3)):
        counts = np.unique(np.stack([places[:, example], labels[:, k]]), axis=1, return_counts=True)[1]
        assert len(counts) == 16 and counts.min() > len(labels) / 32
    by_ways = np.array([shuffled_labels(Support(images[i : i + 3], torch.arange(3), 3), 3).tolist() for i in range(6)])
    assert (np.sort(by_ways) == np.arange(3)).all()


def test_orders_and_labels_follow_the_images_and_not_their_places_or_names():
    """Catches an order by place, or labels by name: both must turn along."""
    x, y = torch.rand(7, 1, 8, 8), torch.tensor([0, 0, 1, 2, 2, 2, 3])
    support = Support(x, y, 4)
    turn, names = torch.randperm(7), torch.randperm(4)
    again = Support(x[turn], names[y[turn]], 4)
    assert torch.equal(turn[shuffled(again)], shuffled(support))
    assert torch.equal(shuffled_labels(again, 6)[names], shuffled_labels(support, 6))
    almost = Support(x.double() * (1 + 1e-12), y, 4)
    assert torch.equal(shuffled(almost), shuffled(support))


@LEARNERS
def test_embedding_each_image_once_changes_no_prediction(kind):
    """Catches a cached embedding that is given to another image, or that outlives the weights it was made with."""
    learner, data = small(kind), ToyImages(ways=3, shots=2, queries=4)
    passes = []
    learner.backbone.register_forward_hook(lambda m, x, y: passes.append(len(x[0])))
    with torch.no_grad():
        for start in (0, 3, 0):
            batch = data.on_device(data.distribution("val").sample(range(start, start + 5)))
            tasks = [batch[i] for i in range(len(batch))]
            plain = torch.stack([learner.predict(learner.adapt(t.support), t.query_x) for t in tasks])
            passes.clear()
            torch.testing.assert_close(learner.predictions(batch), plain, rtol=1e-4, atol=1e-5)
        assert not passes, "the third batch shows nothing new"
        learner.backbone.convs[0].weight.mul_(-1)
        learner.on_validation_epoch_start()
        expected = learner.predict(learner.adapt(batch[0].support), batch[0].query_x)
        torch.testing.assert_close(learner.predictions(batch)[0], expected, rtol=1e-4, atol=1e-5)


@LEARNERS
@pytest.mark.parametrize("batch_norm", ["support", "per_query"])
def test_statistics_are_of_what_the_mode_says(kind, batch_norm):
    """Catches statistics without the support set, or of one query for another: a query alone, and the network run on
    exactly the images that may normalise it."""
    learner, data = small(kind, batch_norm=batch_norm), ToyImages(ways=3, shots=2, queries=4)
    task = data.on_device(data.distribution("val").sample([0]))[0]
    seen = []
    learner.backbone.register_forward_hook(lambda m, x, y: seen.append(x[0]))
    with torch.no_grad():
        state = learner.adapt(task.support)
        seen.clear()
        learner.predict(state, task.query_x)
        if batch_norm == "support":
            means, _ = state.statistics[learner.backbone.norms[0], 0]
            torch.testing.assert_close(means, learner.backbone.convs[0](task.support.x).mean((0, 2, 3)))
            assert torch.equal(seen[0], task.query_x)
        else:
            assert len(seen) == len(task.query_x)
            for x, query in zip(seen, task.query_x, strict=True):
                assert torch.equal(x, torch.cat([task.support.x, query[None]]))
