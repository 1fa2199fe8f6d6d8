"""Every task embedding with every conditioning and every kind of learner that they make sense for."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import models
from datamodules.core.episodes import Episodes
from models.core.conditioning import Conditioning
from models.core.task_embedding import TaskEmbedding
from tests.support.gradients import assert_is_gradient, episodes

SIZE = 3  # groups of tasks, and numbers of an embedding where that is to choose


def functions(tasks: int = 3) -> Episodes:
    """Noisy lines of three groups."""
    g = torch.Generator().manual_seed(5)
    x = torch.rand(tasks, 9, 1, generator=g, dtype=torch.float64) * 4 - 2
    slope, noise = (torch.randn(tasks, n, 1, generator=g, dtype=torch.float64) for n in (1, 9))
    y = slope * x + 0.1 * noise
    return Episodes(x[:, :5], y[:, :5], x[:, 5:], y[:, 5:], torch.arange(tasks), meta_batch=tasks)


def batch(kind: str, tasks: int = 3) -> Episodes:
    made = episodes(tasks=tasks) if kind == "classification" else functions(tasks)
    made.task = {"group": torch.arange(tasks) % SIZE}
    made.task_groups = ("group", tuple("abc"))
    return made


def backbone(kind: str) -> models.Conv4 | models.MLP:
    return models.Conv4(hidden=4, image_size=8, halvings=2) if kind == "classification" else models.MLP(1, (6, 5))


LEARNERS = {
    "MAML": lambda kind: models.MAML(backbone(kind), 3 if kind == "classification" else 1, 0.1, learned_rates=True),
    "MetaSGD": lambda kind: models.MetaSGD(backbone(kind), 3 if kind == "classification" else 1),
    "ProtoNet": lambda kind: models.ProtoNet(backbone(kind), batch_norm="transductive"),
    "MatchingNet": lambda kind: models.MatchingNet(backbone(kind), batch_norm="transductive"),
}
EMBEDDINGS = {
    "SetEncoder": lambda kind: models.SetEncoder(
        models.Conv4(hidden=4, image_size=8) if kind == "classification" else models.MLP(2, (6,)), SIZE
    ),
    "RecurrentEncoder": lambda kind: models.RecurrentEncoder(2, 3, 2),
    "GradientMeans": lambda kind: models.GradientMeans(differentiable=True),
    "PrototypeMean": lambda kind: models.PrototypeMean(),
    "ConstantEmbedding": lambda kind: models.ConstantEmbedding(SIZE),
    "TaskLabel": lambda kind: models.TaskLabel(SIZE),
}
CONDITIONINGS = {
    "Attenuation": models.Attenuation,
    "LowRank": lambda: models.LowRank(2),
    "EmbeddingRows": lambda: models.EmbeddingRows("all"),
    "Experts": lambda: models.Experts(3),
    "Modulation film": models.Modulation,
    "Modulation sigmoid": lambda: models.Modulation("sigmoid"),
    "Modulation softmax": lambda: models.Modulation("softmax"),
    "Rates": models.Rates,
}


def sensible(kind: str, learner: str, embedding: str, conditioning: str) -> bool:
    gradient_steps = learner in ("MAML", "MetaSGD")
    if not gradient_steps and (kind == "regression" or embedding == "GradientMeans" or conditioning == "Rates"):
        return False  # no regression, no support loss and no inner loop
    return not (embedding == "RecurrentEncoder" and kind == "classification")


KINDS = ("classification", "regression")
EVERY = [c for c in itertools.product(KINDS, LEARNERS, EMBEDDINGS, CONDITIONINGS) if sensible(*c)]
# An update rule that reads the embedding is ALFA's alone.
LEARNERS["ALFA"] = lambda kind: models.ALFA(
    backbone(kind), 3 if kind == "classification" else 1, 0.1, inner_steps=2, code_size=SIZE
)
CONDITIONINGS["UpdateRule"] = models.UpdateRule
EVERY += [(kind, "ALFA", e, "UpdateRule") for kind in KINDS for e in ("SetEncoder", "ConstantEmbedding", "TaskLabel")]


def made(kind: str, learner: str, embedding: str, conditioning: str) -> models.Conditioned:
    """Away from where conditionings start, at which some do not yet depend on the embedding."""
    torch.manual_seed(0)
    found = models.Conditioned(EMBEDDINGS[embedding](kind), CONDITIONINGS[conditioning](), LEARNERS[learner](kind))
    for parameter in found.conditioning.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return found.double()


def test_every_embedding_and_conditioning_is_here():
    """Catches one that no combination is tested of."""
    exported = [getattr(models, name) for name in models.__all__]
    kinds = [c for c in exported if isinstance(c, type) and issubclass(c, (TaskEmbedding, Conditioning))]
    elsewhere = {models.TrainedEmbedding}
    there = {f("regression").__class__ for f in EMBEDDINGS.values()} | {f().__class__ for f in CONDITIONINGS.values()}
    assert set(kinds) - elsewhere == there


@pytest.mark.parametrize(("kind", "learner", "embedding", "conditioning"), EVERY)
def test_meta_gradient_through_embedding_and_conditioning(kind, learner, embedding, conditioning):
    """Catches a path of the meta-gradient that is cut, or wrong where tasks are mapped over: finite differences of
    tasks one by one, along a direction through one tensor of each part."""
    found = made(kind, learner, embedding, conditioning)
    tasks = batch(kind)
    loss, *_ = found.map(found.objective, tasks)
    loss.mean().backward()
    alone = [tasks[i] for i in range(len(tasks))]
    value = torch.stack([found.objective(task)[0] for task in alone]).mean()
    torch.testing.assert_close(loss.mean(), value, rtol=1e-9, atol=1e-12)
    trained = [(n, p) for n, p in found.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-12]
    parts = {n.split(".")[0] for n, _ in trained}
    own = {"ConstantEmbedding", "SetEncoder", "RecurrentEncoder"}
    generated = {"conditioning"} if any(True for _ in found.conditioning.parameters()) else set()
    assert parts == {"learner"} | generated | ({"embedding"} if embedding in own else set())
    largest = {
        part: max((p for p in trained if p[0].startswith(part)), key=lambda p: p[1].grad.norm()) for part in parts
    }
    assert_is_gradient(
        {n: p.grad for n, p in trained},
        largest.values(),
        lambda: torch.stack([found.objective(task)[0] for task in alone]).mean(),
    )


@pytest.mark.parametrize(("kind", "learner", "embedding", "conditioning"), EVERY)
def test_evaluates_as_it_trains_and_changes_nothing(kind, learner, embedding, conditioning):
    """Catches parameters that are not adapted where no graph is kept, and values of a task that stay in the learner."""
    found = made(kind, learner, embedding, conditioning).eval()
    tasks = batch(kind)
    before = copy.deepcopy(found.state_dict())
    states = [list(found.adaptation(tasks[i].support))[-1] for i in range(3)]
    expected = torch.stack([found.predict(state, tasks.query_x[i]) for i, state in enumerate(states)])
    with torch.no_grad():
        torch.testing.assert_close(found.predictions(tasks), expected, rtol=1e-9, atol=1e-12)
    with torch.inference_mode():
        torch.testing.assert_close(found.predictions(tasks), expected, rtol=1e-9, atol=1e-12)
    after = found.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("name", ["MAML", "ProtoNet"])
def test_controls_are_what_they_are_called(name):
    """Catches a shuffling that gives a task its own embedding back, and a constant that is not the training mean."""
    found = made("classification", name, "SetEncoder", "Modulation film").eval()
    tasks = batch("classification")
    with torch.no_grad():
        own = torch.stack([found.embed_task(tasks[i].support) for i in range(3)])
        plain = found.predictions(tasks)
        found.update_from_tasks({"task_embedding": own.mean(0)})
        found.update_from_tasks({"task_embedding": own.mean(0) + 1})
        torch.testing.assert_close(found.mean_embedding, own.mean(0) + 0.5)
        for control, seen in (("shuffled", own[[1, 2, 0]]), ("constant", (own.mean(0) + 0.5).expand(3, -1))):
            found.control(control)
            given = copy.deepcopy(found)
            for i in range(3):
                given.embed_task = lambda support, e=seen[i]: e
                given._control = None
                expected = given.predict(given.adapt(tasks[i].support), tasks.query_x[i])
                torch.testing.assert_close(found.predictions(tasks)[i], expected, rtol=1e-9, atol=1e-12)
            assert (found.predictions(tasks) - plain).abs().max() > 1e-3
            parts = found.predictions_by_parts(tasks, 3)
            assert parts.shape == (3, 2, 3, 3)
