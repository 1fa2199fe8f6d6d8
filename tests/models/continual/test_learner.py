"""What a learner did along a stream, and what is measured of it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.continual.streams import Streams, usual_points
from datamodules.core.episodes import Support
from models.continual.learner import ContinualLearner, correct, stream_metrics
from models.core.chance import Chance


class Forgetful(ContinualLearner):
    """Is right about the classes of the last two experiences alone; x is the class's number."""

    def begin(self, classes: int, chance: Chance) -> Tensor:
        return torch.full((2,), -1.0)

    def update(self, state: Tensor, experience: Support) -> Tensor:
        return torch.stack([state[1], experience.x[0, 0]])

    def predict(self, state: Tensor, query_x: Tensor) -> Tensor:
        known = (query_x == state).any(1)
        label = torch.where(known, query_x[:, 0].long(), (query_x[:, 0].long() + 1) % 4)
        return (label[:, None] == torch.arange(4)).float()


def numbered(streams: list[list[int]], points: tuple[int, ...]) -> Streams:
    """Streams whose experiences are two examples and three queries of a class each, the input being the class."""
    y = torch.tensor(streams)
    t = len(y)
    return Streams(
        inputs=torch.arange(4.0)[:, None],
        rows=y[..., None].expand(-1, -1, 2),
        y=y[..., None].expand(-1, -1, 2),
        query_rows=y[..., None].expand(-1, -1, 3),
        query_y=y[..., None].expand(-1, -1, 3),
        index=torch.arange(t),
        key=torch.arange(t),
        digest=torch.arange(t),
        classes=4,
        points=points,
        meta_batch=t,
    )


def test_follows_a_stream_as_it_arrives():
    """Catches experiences out of order, tests of experiences to come, and before taken for after."""
    nan = torch.nan
    found = Forgetful().eval().followed(numbered([[2, 0, 3, 1], [0, 1, 2, 3]], (2, 4)))
    assert torch.equal(found["first"], torch.zeros(2, 4))
    assert torch.equal(found["before"], torch.zeros(2, 4)) and torch.equal(found["online"], torch.zeros(2, 4))
    assert torch.equal(found["after"], torch.ones(2, 4))
    expected = torch.tensor([[1, 1, nan, nan], [0, 0, 1, 1]]).expand(2, 2, 4)
    assert torch.equal(found["matrix"].nan_to_num(-1), expected.nan_to_num(-1))
    assert torch.equal(found["learned"].nan_to_num(-1), expected.nan_to_num(-1))


def gem(r: list[list[float]], start: list[float]) -> tuple[float, float, float]:
    """Average accuracy, backward and forward transfer as Lopez-Paz and Ranzato define them, from the whole matrix."""
    t = len(r)
    acc = sum(r[t - 1][j] for j in range(t)) / t
    bwt = sum(r[t - 1][i] - r[i][i] for i in range(t - 1)) / (t - 1)
    fwt = sum(r[i - 1][i] - start[i] for i in range(1, t)) / (t - 1)
    return acc, bwt, fwt


def test_metrics_are_those_of_the_matrix():
    """Catches transfer averaged over the last experience too, or a sign, and forgetting from the last and not the best.

    Against the definitions restated on a matrix made by hand, whose upper part (experiences to come) is known.
    """
    r = [[0.9, 0.3, 0.2], [0.95, 0.7, 0.1], [0.5, 0.8, 0.6]]
    start = [0.1, 0.2, 0.05]
    matrix = torch.tensor([[[r[i][j] if j <= i else torch.nan for j in range(3)] for i in range(3)]])
    found = {
        "matrix": matrix,
        "learned": matrix + 0.01,
        "first": torch.tensor([start]),
        "before": torch.tensor([[start[0], r[0][1], r[1][2]]]),
        "after": torch.tensor([[0.9, 0.7, 0.6]]),
        "online": torch.tensor([[0.0, 0.3, 0.6]]),
    }
    metrics = {name: value[0] for name, value in stream_metrics(found).items()}
    acc, bwt, fwt = gem(r, start)
    torch.testing.assert_close(metrics["accuracy"], torch.tensor(acc))
    torch.testing.assert_close(metrics["backward_transfer"], torch.tensor(bwt))
    torch.testing.assert_close(metrics["forward_transfer"], torch.tensor(fwt))
    torch.testing.assert_close(metrics["forgetting"], torch.tensor(((0.95 - 0.5) + (0.7 - 0.8)) / 2))
    torch.testing.assert_close(metrics["learning_accuracy"], torch.tensor((0.9 + 0.7 + 0.6) / 3))
    torch.testing.assert_close(metrics["learned"], torch.tensor(acc + 0.01))
    torch.testing.assert_close(metrics["online"], torch.tensor(0.3))
    torch.testing.assert_close(metrics["accuracies"], torch.tensor([0.9, (0.95 + 0.7) / 2, acc]))


def test_streams_do_not_normalise_each_other():
    """Catches predictions on a stream that depend on the other streams of its meta-batch."""

    class Encoding(Forgetful):
        def encode(self, inputs: Tensor) -> Tensor:
            return 2 * inputs

    with pytest.raises(ValueError, match="encodes the inputs of all streams together"):
        Encoding(batch_norm="transductive")
    assert Encoding().batch_norm == "running"
    assert Forgetful(batch_norm="transductive").batch_norm == "transductive"


def test_nothing_predicted_is_wrong():
    """Catches a memory without a class that is right about class 0 by argmax alone."""
    logits = torch.tensor([[-torch.inf, -torch.inf], [-1.0, -torch.inf], [-torch.inf, -2.0]])
    assert correct(logits, torch.tensor([0, 0, 1])).tolist() == [0.0, 1.0, 1.0]


def test_points_rise_to_the_end():
    """Catches a stream whose end is not tested, and points beyond it."""
    assert usual_points(3) == (1, 2, 3) and usual_points(20) == tuple(range(1, 21))
    assert usual_points(600) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 600)
    assert usual_points(100) == (1, 2, 5, 10, 20, 50, 100)


class Sums(Forgetful):
    """Meta-trained: its loss tells which examples were learned, and what it was asked."""

    def encode(self, inputs: Tensor) -> Tensor:
        return 10 * inputs

    def begin(self, classes: int, chance: Chance) -> Tensor:
        return torch.zeros(())

    def update(self, state: Tensor, experience: Support) -> Tensor:
        return 2 * state + experience.x.sum()

    def predict(self, state: Tensor, query_x: Tensor) -> Tensor:
        return state + query_x

    def loss(self, prediction: Any, target: Tensor, shares: Tensor | None = None) -> Tensor:
        return (prediction[:, 0] * (1 + target)).sum()


def test_meta_objective_is_of_the_end_of_the_stream():
    """Catches inputs that are not encoded or twice, experiences in another order, and what is remembered left out."""
    streams = numbered([[2, 0, 3]], (3,))
    streams.remembered_rows, streams.remembered_y = torch.tensor([[1, 1]]), torch.tensor([[1, 0]])
    loss = Sums().map(lambda stream: Sums().objective(stream)[0], streams)
    asked = [(20, 2)] * 3 + [(0, 0)] * 3 + [(30, 3)] * 3 + [(10, 1), (10, 0)]
    state = 0
    for x in (20, 0, 30):
        state = 2 * state + 2 * x
    assert loss.tolist() == [sum((state + x) * (1 + y) for x, y in asked)]
