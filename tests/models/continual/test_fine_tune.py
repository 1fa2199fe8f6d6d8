"""Training on the stream itself, and the oracle that has it all at once."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from datamodules.core.episodes import Support
from models import MLP, ConvNet, FineTune
from models.continual.head_learner import HEAD
from models.core.chance import Chance
from tests.support.gradients import assert_equals_finite_differences
from tests.support.streams import image_streams


def learner(backbone=None, **settings) -> FineTune:
    torch.manual_seed(0)
    backbone = MLP(64, (6,)) if backbone is None else backbone
    return FineTune(backbone, **{"classes": 5, "eval_rates": [0.05]} | settings).double().eval()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_whole_network_takes_torchs_steps(optimizer):
    """Catches layers that stay, averages of one parameter for another, and passes over the stream instead of over each
    experience: against torch's optimizers on a network of its own."""
    model = learner(eval_adapts="network", eval_optimizer=optimizer, passes=2)
    g = torch.Generator().manual_seed(2)
    x, y = torch.rand(6, 1, 8, 8, generator=g, dtype=torch.float64), torch.tensor([0, 0, 0, 2, 2, 2])
    state = model.begin(3, Chance.of(torch.tensor(5)))
    theirs = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for p, ours in zip(theirs.parameters(), state.parameters.values(), strict=True):
            p.copy_(ours)
        encoded = model.encode(x)
        for part in (slice(3), slice(3, 6)):
            state = model.update(state, Support(encoded[part], y[part], 3))
        predicted = model.predict(state, encoded)
    steps = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer](theirs.parameters(), lr=0.05)
    for place in (0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5):
        steps.zero_grad()
        F.cross_entropy(theirs(x[place : place + 1]), y[place : place + 1]).backward()
        steps.step()
    torch.testing.assert_close(predicted, theirs(x).detach(), rtol=1e-7, atol=1e-10)
    assert torch.equal(model.learner.backbone.layers[0].weight, learner().learner.backbone.layers[0].weight)


def test_from_scratch_knows_nothing_of_meta_training():
    """Catches a start that meta-training has a part in, one start for all streams, and norms that are drawn along."""
    kind = {"hidden": 3, "image_size": 8, "strides": (2, 2), "instance_norm": True}
    model = learner(ConvNet(**kind), eval_adapts="network", start="random")
    before, _ = model.start(Chance.of(torch.tensor(4)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    after, _ = model.start(Chance.of(torch.tensor(4)))
    other, _ = model.start(Chance.of(torch.tensor(3)))
    assert all(torch.equal(p, after[n]) for n, p in before.items())
    assert all((p == float("weight" in n)).all() for n, p in before.items() if p.dim() == 1)
    weights = [n for n, p in before.items() if p.dim() > 1]
    assert len(weights) == 2 and not any(torch.equal(before[n], other[n]) for n in weights)
    assert before["backbone.convs.1.weight"].std().item() == pytest.approx((2 / 27) ** 0.5, rel=0.2)
    with pytest.raises(ValueError, match="eval_adapts is head"):
        learner(start="random")


def test_the_oracle_has_all_so_far_in_random_order():
    """Catches examples of experiences to come, passes in one order, and a point that goes on from the one before."""
    model = learner(shuffled=True, passes=2, eval_optimizer="sgd")
    streams = image_streams(streams=1, experiences=3, classes=3)
    streams.points = (2, 3)
    seen: list[tuple[int, int]] = []
    starts: list[torch.Tensor] = []
    original = model.step_of_head

    def step(state, x, y):
        place = (model.encode(streams.inputs) == x).all(1).nonzero()[0].item()
        starts.append(state.parameters[HEAD])
        seen.append((int(state.steps), int(place)))
        return original(state, x, y)

    model.step_of_head = step  # pyright: ignore
    with torch.no_grad():
        found = model.followed(streams)
    rows = streams.rows[0].flatten().tolist()
    orders = [[place for _, place in seen[a:b]] for a, b in ((0, 4), (4, 8), (8, 14), (14, 20))]
    assert [sorted(order) for order in orders] == [sorted(rows[:4])] * 2 + [sorted(rows)] * 2
    assert len({tuple(o) for o in orders[:2]}) == 2 and len({tuple(o) for o in orders[2:]}) == 2
    assert [n for n, _ in seen] == [*range(8), *range(12)]
    assert not torch.equal(starts[8], starts[7])
    matrix = found["matrix"][0]
    assert np.isnan(matrix[0, 2].item()) and not matrix[0, :2].isnan().any() and not matrix[1].isnan().any()


def test_meta_training_classifies_all_that_streams_show():
    """Catches images that the classifier does not see."""
    model = learner(ConvNet(hidden=3, image_size=8, strides=(2, 2))).train()
    streams = image_streams(streams=2, remember=2)
    assert_equals_finite_differences(model, streams)
    loss, prediction = model.map(model.objective, streams)
    assert prediction.shape == (2, 3 * 4 + 2, 5)
    assert streams.remembered_rows is not None and streams.remembered_y is not None
    of_both = []
    for i in range(2):
        rows = torch.cat([streams.rows[i].flatten(), streams.query_rows[i].flatten(), streams.remembered_rows[i]])
        y = torch.cat([streams.y[i].flatten(), streams.query_y[i].flatten(), streams.remembered_y[i]])
        of_both.append(F.cross_entropy(model.learner(streams.inputs[rows]), y))
    torch.testing.assert_close(loss, torch.stack(of_both))
