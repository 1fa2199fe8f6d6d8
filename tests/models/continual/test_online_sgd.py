"""Gradient descent on a stream."""

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call

from datamodules import TransformedStreams
from datamodules.core.episodes import Support
from models import MLP, LaMAML, OnlineSGD
from models.core.chance import Chance
from tests.support.toy import ToyImages

KEY = torch.tensor(5)


def experiences(count: int, examples: int = 7, features: int = 3, classes: int = 4) -> list[Support]:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(count, examples, features, generator=g, dtype=torch.float64)
    y = torch.randint(classes, (count, examples), generator=g)
    return [Support(*one, classes) for one in zip(x, y, strict=True)]


def test_is_torchs_sgd_on_batches_as_they_arrive():
    """Catches batches that are shuffled, a last one that is left out, glances out of turn, and a sum for a mean."""
    learner = OnlineSGD(MLP(3, (5,)), rate=0.3, batch=3, glances=2).double().eval()
    state = learner.begin(4, Chance.of(KEY))
    weights = {n: p.clone().requires_grad_() for n, p in state.parameters.items()}
    optimizer = torch.optim.SGD(weights.values(), 0.3)
    for part in experiences(2):
        with torch.no_grad():
            state = learner.update(state, part)
        for rows in ([0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5], [6], [6]):
            optimizer.zero_grad()
            F.cross_entropy(functional_call(learner.base, weights, (part.x[rows],)), part.y[rows]).backward()
            optimizer.step()
    for name, value in weights.items():
        torch.testing.assert_close(state.parameters[name], value.detach())


def test_every_stream_begins_from_weights_of_its_own():
    """Catches one initialisation for all streams, which no interval over streams would show, and a wrong variance."""
    learner = OnlineSGD(MLP(400, (300,)))
    first, same, other = (learner.begin(7, Chance.of(torch.tensor(k))).parameters for k in (1, 1, 2))
    assert first["head.weight"].shape == (7, 300) and not first["head.bias"].any()
    for name, p in first.items():
        assert torch.equal(p, same[name])
        if p.ndim > 1:
            assert not torch.equal(p, other[name])
    w = first["backbone.layers.0.weight"]
    assert abs(w.std().item() / (2 / 400) ** 0.5 - 1) < 0.01 and abs(w.mean().item()) < 1e-3
    assert abs((w.abs() < w.std()).float().mean().item() - 0.6827) < 0.005  # as of a Gaussian
    assert abs(np.corrcoef(w.flatten(), other["backbone.layers.0.weight"].flatten())[0, 1]) < 0.01


def test_what_is_drawn_does_not_depend_on_the_other_streams():
    """Catches initial weights, orders of a batch and draws from a memory that are shared by what is mapped together."""
    data = TransformedStreams(ToyImages(), experiences=2, shots=8, queries=4, classes=3)
    learner = LaMAML(MLP(256, (6,)), memory=6, replay=3, batch=4, glances=2).eval()
    with torch.no_grad():
        together, alone = (
            learner.followed(data.on_device(data.distribution("test").sample(i))) for i in ([2, 5, 9], [5])
        )
    for name, value in alone.items():
        torch.testing.assert_close(together[name][1:2], value, equal_nan=True)


def test_a_frozen_backbone_stays():
    """Catches weights that are drawn over those of a pretrained backbone, or that move on the stream."""
    backbone = MLP(3, (5,)).requires_grad_(False)
    learner = OnlineSGD(backbone).double().eval()
    state, part = learner.begin(4, Chance.of(KEY)), experiences(1)[0]
    assert set(learner.update(state, part).parameters) == {"head.weight", "head.bias"}
    expected = F.linear(backbone(part.x), state.parameters["head.weight"])
    torch.testing.assert_close(learner.predict(state, part.x), expected)
