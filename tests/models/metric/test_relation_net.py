"""Relation networks against explicit loops over queries and classes."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.core.episodes import Support
from models import Conv4, RelationNet
from models.core.learner import MetaLearner
from models.networks.batch_norm import BatchNorm, normalize_by
from tests.support.gradients import assert_equals_finite_differences, episodes


def small(**settings) -> RelationNet:
    torch.manual_seed(4)
    backbone = Conv4(hidden=4, image_size=16, downsample="pool", halvings=2)
    learner = RelationNet(backbone, **{"filters": 6, **settings}).double()
    for layer in learner.modules():
        if isinstance(layer, BatchNorm):  # other than at the start, so that one taken for another shows
            for tensor in (layer.weight.data, layer.bias.data, layer.running_mean):
                tensor.add_(0.3 * torch.randn_like(tensor))
            layer.running_var.uniform_(0.5, 2)
    learner.shots.fill_(2.0)
    return learner


def normalized(layer: BatchNorm, x: Tensor, by_batch: bool) -> Tensor:
    mean, var = layer.running_mean, layer.running_var
    if by_batch:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    mean, var, weight, bias = (t[None, :, None, None] for t in (mean, var, layer.weight, layer.bias))
    return (x - mean) / (var + layer.eps).sqrt() * weight + bias


def scores(learner: RelationNet, z: Tensor, y: Tensor, zq: Tensor, by_batch: bool = False) -> Tensor:
    """Relations in (0, 1) of every query and class: the pairs are made one by one, each with its stacked maps."""
    pairs = []
    for query in zq:
        for k in range(3):
            of_class = torch.zeros(4, 4, 4, dtype=torch.float64)
            for one, label in zip(z, y, strict=True):
                if label == k:
                    of_class += one.view(4, 4, 4)
            if not learner.training:  # as many as were trained on
                of_class *= learner.shots / (y == k).sum()
            pairs.append(torch.cat([of_class, query.view(4, 4, 4)]))
    x = torch.stack(pairs)
    module = learner.relation
    for conv, norm in zip(module.convs, module.norms, strict=True):
        x = F.max_pool2d(normalized(norm, F.conv2d(x, conv.weight, conv.bias, padding=1), by_batch).relu(), 2)
    first, _, second = module.linear
    hidden = (x.flatten(1) @ first.weight.T + first.bias).relu()
    return (1 / (1 + torch.exp(-(hidden @ second.weight.T + second.bias)))).view(len(zq), 3)


def problem() -> tuple[Support, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, q = (torch.rand(n, 1, 16, 16, generator=g, dtype=torch.float64) for n in (6, 4))
    return Support(x, torch.tensor([2, 0, 0, 1, 2, 2]), 3), q


def test_scores_are_of_the_sum_of_a_class_stacked_on_the_query():
    """Catches the two stacked the wrong way round, a class whose maps are larger for having more shots, a block that is
    left out, and scores that are not shares of the probability."""
    learner = small().eval()
    support, q = problem()
    with torch.no_grad(), normalize_by("running"):
        prediction = learner.predict(learner.adapt(support), q)
        expected = scores(learner, learner.embed(support.x), support.y, learner.embed(q))
    torch.testing.assert_close(prediction.exp(), expected)
    torch.testing.assert_close(prediction.softmax(-1), expected / expected.sum(-1, keepdim=True))
    learner.criterion = "cross_entropy"
    with torch.no_grad():
        torch.testing.assert_close(learner.predict(learner.adapt(support), q), torch.logit(expected))


@pytest.mark.parametrize("criterion", ["mse", "cross_entropy"])
def test_training_regresses_on_one_hot_labels_and_normalises_over_all_pairs(criterion):
    """Catches a loss over the true class alone, cross-entropy of what the sigmoid gave, and statistics of single pairs
    or of each class: support and queries share a pass of the backbone, all pairs one of the relation module."""
    learner = small(criterion=criterion).train()
    task = episodes(tasks=1, size=16)[0]
    loss, _ = learner.objective(task)
    with torch.no_grad(), normalize_by("batch"):
        z = learner.embed(torch.cat([task.support.x, task.query_x]))
    relations = scores(learner, z[:6], task.support.y, z[6:], by_batch=True)
    expected = []
    for row, label in zip(relations, task.query_y, strict=True):
        if criterion == "mse":
            expected += [(r - float(k == label)) ** 2 for k, r in enumerate(row)]
        else:
            raised = (row / (1 - row)).tolist()  # what the sigmoid takes is the logarithm of the odds
            expected.append(-torch.tensor(raised[label] / sum(raised), dtype=torch.float64).log())
    torch.testing.assert_close(loss, torch.stack(expected).mean())


@pytest.mark.parametrize(("settings"), [{}, {"criterion": "cross_entropy", "chunk": 2}, {"batch_norm": "support"}])
def test_gradient_equals_finite_differences(settings):
    """Catches class maps or statistics that the gradient does not pass through; mapped over tasks too."""
    assert_equals_finite_differences(small(**settings).train(), episodes(tasks=2, size=16))


@pytest.mark.parametrize("batch_norm", ["support", "per_query"])
def test_the_relation_module_is_normalised_by_the_support_set_too(batch_norm):
    """Catches pairs that the mode leaves out, as those of one query alone: the pairs of support and classes count."""
    learner = small(batch_norm=batch_norm).eval()
    support, q = problem()
    with torch.no_grad(), normalize_by("batch"):
        got = learner.predict(learner.adapt(support), q).exp()
        if batch_norm == "per_query":
            for i in range(4):
                z = learner.embed(torch.cat([support.x, q[i : i + 1]]))
                expected = scores(learner, z[:6], support.y, z, by_batch=True)[-1]
                torch.testing.assert_close(got[i], expected)
        else:
            z = learner.embed(support.x)
            mean, _ = learner.adapt(support).statistics[learner.relation.norms[0], 0]
            maps = z.view(6, 4, 4, 4)
            of_class = torch.stack([learner.shots * maps[support.y == k].mean(0) for k in range(3)])
            pairs = [torch.cat([c, m]) for m in maps for c in of_class]
            conv = learner.relation.convs[0]
            convolved = F.conv2d(torch.stack(pairs), conv.weight, conv.bias, padding=1)
            torch.testing.assert_close(mean, convolved.mean((0, 2, 3)))


def test_one_more_class_leaves_the_others_scores():
    """Catches a module that is tied to the number of classes: maps of one more are scored beside the others."""
    learner = small().eval()
    support, q = problem()
    with torch.no_grad(), normalize_by("running"):
        summary, z = learner.summarize(learner.embed(support.x), support), learner.embed(q)
        more = learner.relation(torch.cat([summary, z[:1]]), z)
        assert more.shape == (4, 4)
        torch.testing.assert_close(more[:, :3], learner.relation(summary, z))


@pytest.mark.parametrize(("size", "padding", "maps", "features"), [(28, 1, (64, 5, 5), 64), (84, 0, (64, 19, 19), 576)])
def test_sizes_are_the_published_ones(size, padding, maps, features):
    """Catches pooling in four blocks of the embedding, or other padding than gives the paper's 64 and 576 features."""
    backbone = Conv4(image_size=size, downsample="pool", halvings=2, unpadded=2)
    assert backbone.maps == maps
    assert RelationNet(backbone, padding=padding).relation.linear[0].weight.shape == (8, features)


@pytest.mark.parametrize("downsample", ["pool", "stride"])
@pytest.mark.parametrize("halvings", [0, 2, 4])
@pytest.mark.parametrize("unpadded", [0, 2])
@pytest.mark.parametrize("size", [29, 47])
def test_backbone_says_its_size(downsample, halvings, unpadded, size):
    """Catches sizes that are computed otherwise than the network has them, with odd sizes too."""
    backbone = Conv4(1, 2, size, downsample, True, halvings, unpadded)
    shapes = []
    backbone.norms[-1].register_forward_hook(lambda m, x, y: shapes.append(y.shape))
    features = backbone(torch.rand(2, 1, size, size)).shape[1]
    assert features == backbone.out_features == torch.Size(backbone.maps).numel()
    if downsample == "stride" or halvings < 4:
        assert tuple(shapes[0][1:]) == backbone.maps


def test_maps_that_are_averaged_or_vanish_are_refused():
    """Catches relations between averages that were taken for maps, and an image that is too small for the blocks."""
    with pytest.raises(ValueError, match="feature maps"):
        RelationNet(Conv4())
    with pytest.raises(ValueError, match="nothing is left of maps of 1×1 after two poolings"):
        RelationNet(Conv4(downsample="pool"))
    with pytest.raises(ValueError, match="image_size is 20 but nothing is left of that after 4 blocks"):
        Conv4(image_size=20, downsample="pool", unpadded=2)


def test_at_the_shots_of_training_a_class_is_the_sum_of_its_maps():
    """Catches a mean, in meta-training or after it, where the paper has the sum; and shots that are not counted."""
    learner, task = small(), episodes(tasks=1, size=16)[0]
    z = torch.rand(6, 64, dtype=torch.float64)
    of_classes = torch.stack([z[task.support.y == k].sum(0) for k in range(3)])
    torch.testing.assert_close(learner.train().summarize(z, task.support), of_classes)
    torch.testing.assert_close(learner.eval().summarize(z, task.support), of_classes)
    learner.shots.zero_()
    for shots in (2, 2, 5):
        with mock.patch.object(MetaLearner, "on_train_batch_start"):
            learner.on_train_batch_start(episodes(tasks=2, shots=shots, size=16), 0)
    assert learner.shots.item() == pytest.approx(3)
