"""Task memory."""

from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.continual.streams import Streams
from datamodules.core.episodes import Support
from models import MLP, TaskMemory
from models.continual.records import By
from models.continual.task_memory import TaskState
from models.core.chance import Chance
from models.core.task_embedding import TaskEmbedding
from models.networks.backbones import Backbone
from tests.support.gradients import assert_is_gradient, meta_gradient

CLASSES, N, INPUTS = 6, 4, 3


class AsIs(Backbone):
    """Features that are the inputs."""

    def __init__(self, features: int = INPUTS) -> None:
        super().__init__()
        self.input_shape, self.out_features = (features,), features
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def learner(**settings: Any) -> TaskMemory:
    return TaskMemory(AsIs(), **{"steps": 3, "rate": 0.5} | settings).double().eval()


def experiences(number: int, seed: int = 0, examples: int = N) -> list[Support]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 2, (3, INPUTS))
    found = []
    for _ in range(number):
        group = rng.integers(3)
        x = torch.from_numpy(centres[group] + rng.normal(0, 1, (examples, INPUTS)))
        found.append(Support(x, torch.from_numpy(2 * group + rng.integers(0, 2, examples)), CLASSES))
    return found


def after(model: TaskMemory, given: list[Support]) -> list[TaskState]:
    """The states after each experience."""
    states, state = [], model.begin(CLASSES, Chance.of(torch.tensor(7)))
    with torch.no_grad():
        for e in given:
            state = model.update(state, Support(model.encode(e.x), e.y, CLASSES))
            states.append(state)
    return states


def fine_tuned(x: Tensor, y: Tensor, steps: int = 3, rate: float = 0.5) -> Tensor:
    """A head (classes, features + 1) trained from zero on all of these at once."""
    x, head = torch.cat([x, torch.ones(len(x), 1).to(x)], 1), torch.zeros(CLASSES, x.shape[1] + 1).to(x)
    for _ in range(steps):
        wrong = (x @ head.T).softmax(-1) - F.one_hot(y, CLASSES).to(x)
        head = head - torch.tensor(rate).log().double().exp() * ((wrong * (1 / torch.tensor(len(x)).to(x))).T @ x)
    return head


def test_no_memory_is_no_memory_to_the_bit():
    """Catches empty places that count as examples, or a division by their number."""
    given = experiences(6)
    for settings in ({"keep": 0}, {"keep": 8, "retrieve": 0}, {"keep": 0, "retrieve": "all", "writes": "surprise"}):
        for state, e in zip(after(learner(**settings), given), given, strict=True):
            assert torch.equal(state.head, fine_tuned(e.x, e.y))


@pytest.mark.parametrize("by", get_args(By))
def test_all_is_fine_tuning_on_everything_that_is_kept_to_the_bit(by):
    """Catches retrieval that leaves out, repeats or weighs what is kept, and a head that does not begin anew."""
    given = experiences(6)
    for keep, writes in ((N * 3, "reservoir"), (N, "oldest"), (N, "surprise")):
        for retrieve in ("all", keep, keep + 5):
            states = after(learner(keep=keep, retrieve=retrieve, by=by, writes=writes), given)
            for (before, state), e in zip(pairwise(states), given[1:], strict=True):
                kept = before.memory.held
                assert int(kept.sum()) == min(keep, N * int(before.experiences))
                x = torch.cat([e.x, before.memory.x[kept][:, :-1]])
                y = torch.cat([e.y, before.memory.y[kept]])
                if kept.all():
                    assert torch.equal(state.head, fine_tuned(x, y))
                torch.testing.assert_close(state.head, fine_tuned(x, y), rtol=1e-12, atol=1e-12)
            assert states[-2].memory.held.all()


def test_steps_are_those_of_autograd():
    """Catches a wrong gradient of the head or its bias, or a mean over the wrong number."""
    e, model = experiences(1, examples=9)[0], learner(keep=0, steps=5, rate=0.3)
    layer = nn.Linear(INPUTS, CLASSES).double()
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(layer(e.x), e.y).backward()
        optimizer.step()
    (state,) = after(model, [e])
    expected = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    torch.testing.assert_close(state.head, expected, rtol=1e-6, atol=1e-7)


class Book:
    """A memory as a list of dictionaries, written and searched one by one; chance is the learner's own."""

    def __init__(self, keep: int, retrieve: int, by: str, writes: str) -> None:
        self.keep, self.retrieve, self.by, self.writes = keep, retrieve, by, writes
        self.places: list[dict[str, Any] | None] = [None] * keep
        self.met: list[int] = []
        self.chance = Chance.of(torch.tensor(7))
        self.head = np.zeros((CLASSES, INPUTS + 1))

    def score(self, record: dict[str, Any], x: np.ndarray) -> float:
        if self.by == "embedding":
            return ((record["task"] - x.mean(0)) ** 2).sum()
        return min(((record["x"] - one) ** 2).sum() for one in x)

    def meet(self, number: int, x: np.ndarray, y: np.ndarray) -> list[int]:
        if self.by == "random":
            lots, self.chance = self.chance.uniform(self.keep)
            scores = {p: float(lots[p]) for p, r in enumerate(self.places) if r}
        else:
            scores = {p: self.score(r, x) for p, r in enumerate(self.places) if r}
        found = sorted(sorted(scores, key=lambda p: (scores[p], p))[: self.retrieve])
        records = [self.places[p] for p in found]
        for record in records:
            record["used"] += 1
        both_x = torch.from_numpy(np.array([*x, *(r["x"] for r in records)]))
        head = fine_tuned(both_x, torch.tensor([*y.tolist(), *(r["y"] for r in records)])).numpy()
        logits = np.c_[x, np.ones(len(x))] @ self.head.T
        losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]
        new = [
            {"x": a, "y": int(b), "loss": c, "order": len(self.met) + k, "used": 0}
            | {"task": x.mean(0), "experience": number}
            for k, (a, b, c) in enumerate(zip(x, y, losses, strict=True))
        ]
        self.write(new)
        self.met += y.tolist()
        self.head = head
        return [r["experience"] for r in records]

    def write(self, new: list[dict[str, Any]]) -> None:
        if self.writes == "reservoir":
            lots, self.chance = self.chance.uniform(len(new))
        if self.writes == "surprise":
            worth = [(r["loss"], r["order"]) if r else (-np.inf, 0) for r in self.places]
            gives_way = sorted(range(self.keep), key=lambda p: worth[p])
            for p, record in zip(gives_way, sorted(new, key=lambda r: -r["loss"]), strict=False):
                self.places[p] = record if record["loss"] > worth[p][0] else self.places[p]
            return
        for k, record in enumerate(new):
            number = record["order"]
            if self.writes == "least_used":  # those of this experience stay
                rivals = [p for p, r in enumerate(self.places) if r is None or r["experience"] != record["experience"]]
                empty = [p for p in rivals if self.places[p] is None]
                place = (empty or sorted(rivals, key=lambda p: (self.places[p]["used"], self.places[p]["order"])))[0]
            elif self.writes == "oldest":
                place = number % self.keep
            elif number < self.keep:
                place = number
            else:
                place = int(float(lots[k]) * (number + 1))
            if place < self.keep:
                self.places[place] = record


@pytest.mark.parametrize("by", get_args(By))
@pytest.mark.parametrize("writes", ["reservoir", "oldest", "least_used", "surprise"])
def test_memory_is_that_of_a_list_of_records(by, writes):
    """Catches what a brute-force memory does otherwise: what is retrieved, counted, kept, overwritten, and the head."""
    keep, retrieve = 10, 3
    book = Book(keep, retrieve, by, writes)
    given = experiences(12, seed=3)
    states = after(learner(keep=keep, retrieve=retrieve, by=by, writes=writes), given)
    for number, (state, e) in enumerate(zip(states, given, strict=True)):
        retrieved = state.retrieved[state.retrieved >= 0].tolist()
        assert sorted(book.meet(number, e.x.numpy(), e.y.numpy())) == sorted(retrieved)
        memory, records = state.memory, [r for r in book.places if r]
        held = memory.held.nonzero()[:, 0].tolist()
        assert sorted(memory.order[held].tolist()) == sorted(r["order"] for r in records)
        place = {int(memory.order[p]): p for p in held}
        for r in records:
            p = place[r["order"]]
            assert int(memory.used[p]) == r["used"] and int(memory.y[p]) == r["y"]
            assert int(memory.experience[p]) == r["experience"]
            np.testing.assert_allclose(memory.x[p, :-1], r["x"], rtol=1e-12)
            np.testing.assert_allclose(memory.task[p], r["task"], rtol=1e-12)
            np.testing.assert_allclose(memory.loss[p], r["loss"], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(state.head, book.head, rtol=1e-9, atol=1e-12)


def test_a_query_is_answered_by_what_is_near_to_it():
    """Catches a kernel of distances for their squares, neighbours of another query, and steps from another head.

    Against autograd on the weighted loss of each query's neighbours; with no neighbours it is the head itself.
    """
    given = experiences(5)
    model, plain = (learner(keep=12, retrieve=4, local=k) for k in (3, 0))
    state, same = after(model, given)[-1], after(plain, given)[-1]
    assert torch.equal(state.head, same.head)
    queries = experiences(1, seed=5)[0].x
    with torch.no_grad():
        logits = model.predict(state, model.encode(queries))
        assert torch.equal(plain.predict(same, plain.encode(queries)), plain.encode(queries) @ same.head.T)
    for query, answer in zip(queries, logits, strict=True):
        distance = (state.memory.x[:, :-1] - query).square().sum(1)
        near = distance.argsort()[:3]
        kernel = 1 / (1e-3 + distance[near])
        head = state.head.clone().requires_grad_(True)
        for _ in range(3):
            losses = F.cross_entropy(state.memory.x[near] @ head.T, state.memory.y[near], reduction="none")
            (slope,) = torch.autograd.grad((losses * kernel).sum() / kernel.sum(), head)
            head = (head - 0.5 * slope).detach().requires_grad_(True)
        torch.testing.assert_close(answer, torch.cat([query, torch.ones(1).double()]) @ head.T, rtol=1e-6, atol=1e-7)


class Spread(TaskEmbedding):
    """The largest input, which features do not tell."""

    embedding_size = 1

    def embed_task(self, support: Support) -> Tensor:
        assert support.ways == 1 and support.x.shape[1:] == (INPUTS,)
        return support.x.amax()[None]


def test_another_embedding_sees_the_inputs():
    """Catches an embedding of features, or of inputs that are stored as features."""
    given = experiences(4)
    model = learner(keep=16, retrieve=4, embedding=Spread())
    with torch.no_grad():
        model.backbone.scale.fill_(-2.0)
    states = after(model, given)
    memory = states[-1].memory
    assert memory.x.shape == (16, INPUTS + 1)
    for p in range(16):
        assert memory.task[p, 0] == given[int(memory.experience[p])].x.max()
    largest = torch.stack([e.x.max() for e in given])
    nearest = int((largest[:3] - largest[3]).abs().argmin())
    assert states[-1].retrieved.tolist() == [nearest] * 4


def streams(number: int, seed: int = 0) -> Streams:
    """Streams of 12 visits to 4 groups of 3 classes in 8 dimensions, one shot and five queries of each class."""
    rng = np.random.default_rng(seed)
    visits = torch.from_numpy(rng.integers(0, 4, (number, 12)))
    centres = rng.normal(0, 4, (number, 4, 1, 8)) + rng.normal(0, 1, (number, 4, 3, 8))
    label = visits[..., None] * 3 + torch.arange(3)
    own = centres[np.arange(number)[:, None], visits.numpy()]  # (T, 12, 3, 8)
    x = own[:, :, :, None] + rng.normal(0, 1.2, (number, 12, 3, 6, 8))
    rows = torch.arange(number * 12 * 18).view(number, 12, 3, 6)
    before = torch.stack([(visits[:, :j] == visits[:, j : j + 1]).any(1) for j in range(12)], 1)
    return Streams(
        inputs=torch.from_numpy(x.reshape(-1, 8)),
        rows=rows[..., 0],
        y=label,
        query_rows=rows[..., 1:].flatten(2),
        query_y=label.repeat_interleave(5, -1),
        index=torch.arange(number),
        key=torch.arange(number) + 100,
        digest=torch.arange(number),
        classes=12,
        points=(6, 12),
        meta_batch=number,
        task={"visits": visits, "returns": before.long()},
    )


def test_retrieval_beats_replay_of_as_much():
    """Catches retrieval that brings nothing: on the same streams it is better than as many examples at random.

    By more than four standard errors of the difference over 30 streams, as is its precision than the random one's; and
    no memory is worse than either.
    """
    given, found = streams(30), {}
    kinds = {"task": {}, "feature": {"by": "feature"}, "random": {"by": "random"}, "none": {"keep": 0}}
    for name, settings in kinds.items():
        whole = {"keep": 24, "retrieve": 6, "steps": 100, "rate": 0.01} | settings
        model = TaskMemory(AsIs(8), **whole).double().eval()
        with torch.inference_mode():
            found[name] = model.metrics_of_streams(model.with_facts(model.followed(given), given))
    for rival in ("random", "none"):
        for name in ("task", "feature"):
            better = found[name]["return_accuracy"] - found[rival]["return_accuracy"]
            assert better.mean() > 4 * better.std() / 30**0.5, (name, rival)
    assert (found["task"]["precision"] > found["random"]["precision"] + 0.2).float().mean() > 0.9
    assert (found["none"]["precision"] == 0).all() and (found["none"]["usage"] == 0).all()


def test_what_was_retrieved_is_told():
    """Catches a precision over first visits too, or by the group of another experience, and a usage of empty places."""
    model = TaskMemory(AsIs(8), keep=100, retrieve=2)
    found = {
        "matrix": torch.ones(1, 1, 3),
        "learned": torch.ones(1, 1, 3),
        **{name: torch.tensor([[1.0, 0.5, 0.25]]) for name in ("first", "before", "after", "online")},
        "retrieved": torch.tensor([[[-1, -1], [0, 0], [0, 1]]]),
        "right": torch.tensor([[[False, False], [False, False], [True, False]]]),
        "returns": torch.tensor([[False, False, True]]),
        "usage": torch.tensor([[0.0, 0.1, 0.2]]),
    }
    metrics = model.metrics_of_streams(found)
    assert metrics["precision"].tolist() == [0.5] and metrics["return_accuracy"].tolist() == [0.25]
    torch.testing.assert_close(metrics["usage"], torch.tensor([0.2]))
    given = streams(3)
    with torch.inference_mode():
        model = TaskMemory(AsIs(8), keep=100, retrieve=3).double().eval()
        along = model.with_facts(model.followed(given), given)
    assert (along["retrieved"][:, 0] == -1).all() and (along["retrieved"][:, 1] == 0).all()
    visits = given.task["visits"]
    for t in range(3):
        for j in range(1, 12):
            expected = [bool(visits[t, e] == visits[t, j]) for e in along["retrieved"][t, j]]
            assert along["right"][t, j].tolist() == expected


def test_meta_gradient():
    """Catches a rate or a backbone that the meta-gradient does not reach through the steps, or reaches wrongly."""
    torch.manual_seed(0)
    model = TaskMemory(MLP(INPUTS, (5,)), keep=8, retrieve=4, steps=2, rate=0.3, local=2, batch_norm="none").double()
    given = streams(2)
    given.inputs = given.inputs[:, :INPUTS].contiguous()

    def objective() -> Tensor:
        return model.map(model.objective, given)[0].mean()

    assert_is_gradient(meta_gradient(model, given), model.named_parameters(), objective)  # pyright: ignore
