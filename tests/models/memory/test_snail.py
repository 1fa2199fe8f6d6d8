"""SNAIL against loops over the steps of every query's own sequence."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from datamodules.core.episodes import Support
from datamodules.core.errors import DataError
from models import SNAIL, Conv4
from models.core.deterministic_order import shuffled, shuffled_labels
from models.memory.snail import AttentionBlock, DenseBlock, TCBlock
from models.networks.batch_norm import normalize_by
from tests.support.gradients import assert_equals_finite_differences, episodes


def small(**settings) -> SNAIL:
    torch.manual_seed(5)
    sizes = {"attention": ((4, 3), (5, 4), (6, 5)), "filters": 3, "max_shots": 2}
    return SNAIL(Conv4(hidden=4, image_size=8), **{"labels": 3, **sizes, **settings}).double()


def affine(layer: nn.Linear, x: np.ndarray) -> np.ndarray:
    return layer.weight.detach().numpy() @ x + layer.bias.detach().numpy()


def dense(block: DenseBlock, x: np.ndarray) -> np.ndarray:
    """A step at a time: kernel of two, the older input first; tanh times sigmoid, behind the input."""
    rows = []
    for t, now in enumerate(x):
        before = x[t - block.dilation] if t >= block.dilation else np.zeros_like(now)
        both = affine(block.conv, np.concatenate([before, now]))
        half = len(both) // 2
        rows.append(np.concatenate([now, np.tanh(both[:half]) / (1 + np.exp(-both[half:]))]))
    return np.array(rows)


def attention(block: AttentionBlock, x: np.ndarray) -> np.ndarray:
    """A step at a time: it sees keys up to its own, and shares one unit of attention among them."""
    rows = []
    for t, now in enumerate(x):
        query = affine(block.query, now)
        keys = [affine(block.key, x[s]) for s in range(t + 1)]
        raised = np.array([np.exp(query @ key / np.sqrt(len(key))) for key in keys])
        shares = raised / raised.sum()
        rows.append(np.concatenate([now, sum(a * affine(block.value, x[s]) for s, a in enumerate(shares))]))
    return np.array(rows)


def through(block: nn.Module, x: np.ndarray) -> np.ndarray:
    if isinstance(block, AttentionBlock):
        return attention(block, x)
    for one in block.blocks if isinstance(block, TCBlock) else [block]:
        x = dense(one, x)
    return x


BLOCKS = {
    "dense": lambda: DenseBlock(5, 2, 3).double(),
    "tc": lambda: TCBlock(5, 7, 3).double(),
    "attention": lambda: AttentionBlock(5, 4, 3).double(),
    "whole": lambda: nn.ModuleList(small().blocks),
}


def run(block: nn.Module, x: torch.Tensor, steps: int) -> torch.Tensor:
    for one in block if isinstance(block, nn.ModuleList) else [block]:
        x = one(x, steps)
    return x


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_causal(name):
    """Catches a step that sees a later one, in convolution or attention, and one that does not see itself."""
    torch.manual_seed(0)
    block = BLOCKS[name]()
    x = torch.randn(7, 7 if name == "whole" else 5, dtype=torch.float64)
    with torch.no_grad():
        expected = run(block, x, 7)
        for t in range(7):
            changed = x.clone()
            changed[t:] += torch.randn_like(changed[t:])
            got = run(block, changed, 7)
            torch.testing.assert_close(got[:t], expected[:t], rtol=0, atol=0)
            assert (got[t:, x.shape[1] :] - expected[t:, x.shape[1] :]).abs().amax(1).min() > 1e-4


@pytest.mark.parametrize("name", ["dense", "tc", "attention"])
def test_blocks_equal_loops_over_steps(name):
    """Catches softmax over queries, a score that is not divided by √keys, tanh and gate exchanged, a lag that is off by
    one, and alternatives for the last step that see each other."""
    torch.manual_seed(0)
    block = BLOCKS[name]()
    for steps in (1, 2, 7):
        x = torch.randn(steps + 3, 5, dtype=torch.float64)
        with torch.no_grad():
            got = block(x, steps).numpy()
        for i in range(3):
            expected = through(block, np.concatenate([x[:steps], x[steps + i : steps + i + 1]]))
            np.testing.assert_allclose(got[:steps], expected[:steps], rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(got[steps + i], expected[steps], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("blocks", ["both", "attention", "convolution"])
def test_predictions_are_of_each_querys_own_sequence(blocks):
    """Catches an embedding that gets another one's label, a label with the query, an output that is not the last
    step's, and labels that are not turned back to classes; shots are unequal, labels more than classes."""
    learner = small(labels=4, blocks=blocks).eval()
    g = torch.Generator().manual_seed(0)
    x, q = (torch.rand(n, 1, 8, 8, generator=g, dtype=torch.float64) for n in (6, 3))
    support = Support(x, torch.tensor([2, 0, 0, 1, 2, 2]), 3)
    with torch.no_grad(), normalize_by("running"):
        got = learner.predict(learner.adapt(support), q)
        z, zq = learner.embed(x).numpy(), learner.embed(q).numpy()
    labels = shuffled_labels(support, 4).tolist()
    for i in range(3):
        sequence = [np.concatenate([z[s], np.eye(4)[labels[int(support.y[s])]]]) for s in shuffled(support).tolist()]
        h = np.array([*sequence, np.concatenate([zq[i], np.zeros(4)])])
        for block in learner.blocks:
            h = through(block, h)
        out = affine(learner.readout, h[-1])
        np.testing.assert_allclose(got[i], [out[labels[k]] for k in range(3)], rtol=1e-9, atol=1e-12)


def test_a_querys_label_and_the_other_queries_are_out_of_reach():
    """Catches a label given with its query, in training too: by what enters the first block, and by predictions."""
    learner = small(batch_norm="none").train()
    task = episodes(tasks=1)[0]
    entered = []
    learner.blocks[0].register_forward_pre_hook(lambda m, args: entered.append(args))
    _, prediction = learner.objective(task)
    (x, steps), *_ = entered
    assert steps == 6 and torch.equal(x[:steps, -3:].sum(1), torch.ones(6)) and not x[steps:, -3:].any()
    other = dataclasses.replace(task, query_y=1 - task.query_y.clamp(max=1))
    torch.testing.assert_close(learner.objective(other)[1], prediction, rtol=0, atol=0)
    images = task.query_x.clone()
    images[1:] = images[1:].flip(-1)
    got = learner.objective(dataclasses.replace(task, query_x=images))[1]
    torch.testing.assert_close(got[0], prediction[0])
    assert not torch.allclose(got[1:], prediction[1:])


@pytest.mark.parametrize("settings", [{}, {"labels": 5, "chunk": 2}])
def test_gradient_equals_finite_differences(settings):
    """Catches blocks, labels or support embeddings that the gradient does not pass through; mapped over tasks too."""
    assert_equals_finite_differences(small(**settings).train(), episodes(tasks=2))


@pytest.mark.parametrize(("ways", "dilations"), [(5, [2, 4, 8, 16, 32]), (20, [2, 4, 8, 16, 32, 64, 128])])
def test_sizes_and_dilations_are_the_published_ones(ways, dilations):
    """Catches a stack that is too short for five shots, other dilations, and inputs that are replaced, not kept."""
    learner = SNAIL(Conv4(downsample="pool"), labels=ways)
    kinds = [type(block).__name__ for block in learner.blocks]
    assert kinds == ["AttentionBlock", "TCBlock", "AttentionBlock", "TCBlock", "AttentionBlock"]
    channels = 64 + ways
    for block, size in zip(learner.blocks, [(64, 32), 128, (256, 128), 128, (512, 256)], strict=True):
        if isinstance(size, tuple):
            assert block.key.weight.shape == block.query.weight.shape == (size[0], channels)
            assert block.value.weight.shape == (size[1], channels)
            channels += size[1]
        else:
            assert [b.dilation for b in block.blocks] == dilations
            for b in block.blocks:
                assert b.conv.weight.shape == (2 * size, 2 * channels)
                channels += size
    assert learner.readout.weight.shape == (ways, channels)


def test_convolutions_reach_over_the_whole_sequence():
    """Catches a receptive field that ends before the first step: dilations are even, and so are the lags."""
    block = TCBlock(1, 26, 2).double()
    x = torch.randn(26, 1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(block(x, 26)[-1].sum(), x)
    assert (slope.flatten() != 0).tolist() == [t % 2 == 1 for t in range(26)]


def test_more_classes_than_labels_are_refused():
    """Catches classes that share a label."""
    learner, task = small(labels=2), episodes(tasks=1)[0]
    with pytest.raises(DataError, match="3 ways but the model only 2 labels"):
        learner.adapt(task.support)
