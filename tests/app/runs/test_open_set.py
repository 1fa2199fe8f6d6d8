"""Entropies of queries whose class is not in their episode, against pairs counted one by one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from app.cli.builder import main
from app.dashboard.confusion import Confusions
from app.runs.open_set import OpenSet, entropy
from app.runs.probe import Probe
from datamodules.core.episodes import Episodes, TaskDistribution
from models import Conv4, ProtoNet
from models.core.learner import MetaLearner
from models.core.task_map import map_tasks
from tests.support.toy import ToyImages, command

WAYS, QUERIES, TASKS = 4, 3, 30


class Recognises:
    """Stands for a learner of one number per query, its class: sure where that class is in the support set.

    Its confidence depends on the query's place in the batch too, so that no two queries are alike.
    """

    device, dtype = torch.device("cpu"), torch.float32
    predictions_by_parts = MetaLearner.predictions_by_parts

    def __init__(self, sure: float = 3.0) -> None:
        self.sure = sure
        self.sizes: set[int] = set()

    def map(self, function: Any, episodes: Any) -> Any:
        tensors = (episodes.support_x, episodes.support_y, episodes.query_x)

        def one(support_x: torch.Tensor, support_y: torch.Tensor, query_x: torch.Tensor) -> Any:
            return function(SimpleNamespace(support=SimpleNamespace(x=support_x, y=support_y), query_x=query_x))

        return map_tasks(one, *tensors)

    def adapt(self, support: Any) -> torch.Tensor:
        return support.x

    def predict(self, state: torch.Tensor, query_x: torch.Tensor) -> torch.Tensor:
        self.sizes.add(len(query_x))
        place = torch.arange(len(query_x))[:, None] / 50
        return (self.sure + place) * (query_x == state.T).float() + torch.linspace(0, 0.5, WAYS)


class Classes(TaskDistribution):
    """Tasks whose inputs are the numbers of their classes: 9 in all, so neighbours share some."""

    def __init__(self, total: int = 9) -> None:
        self.total = total

    def sample(self, indices: Any) -> Any:
        drawn = [np.random.default_rng(i).choice(self.total, WAYS, replace=False) for i in indices]
        classes = torch.from_numpy(np.stack(drawn))
        y = torch.arange(WAYS).repeat_interleave(QUERIES).expand(len(drawn), -1)
        of_queries = classes.gather(1, y)
        return Episodes(
            classes.float()[..., None],
            torch.arange(WAYS).expand(len(drawn), -1),
            of_queries.float()[..., None],
            y,
            torch.tensor(list(indices)),
            WAYS,
            task={"classes": classes},
        )


def probe_of(learner: Any, total: int = 9, batch: int = 7) -> Any:
    data = SimpleNamespace(
        distribution=lambda split: Classes(total), kind="classification", on_device=lambda e: e, eval_batch_size=batch
    )
    return Probe(learner, data, "test")  # pyright: ignore


def test_queries_of_classes_of_the_episode_are_left_out():
    """Catches classes that both tasks have counted as foreign, labels taken for classes, or another task's queries."""
    outside = OpenSet.of(probe_of(Recognises()), TASKS)
    assert outside is not None
    tasks = [np.random.default_rng(i).choice(9, WAYS, replace=False) for i in range(TASKS + 1)]
    expected = [[c not in tasks[i] for c in tasks[i + 1] for _ in range(QUERIES)] for i in range(TASKS)]
    assert outside.kept.tolist() == expected
    assert 0 < outside.kept.float().mean() < 1
    # It is as sure of a class that the episode has as of its own, and of none other.
    least = entropy(torch.linspace(0, 0.5, WAYS))
    assert torch.allclose(outside.unknown[outside.kept], least.expand(int(outside.kept.sum())))
    assert (outside.unknown[~outside.kept] < least - 0.1).all()
    assert (outside.known < least - 0.1).all()
    assert outside.metrics()["open_set_auroc"].tolist() == pytest.approx([1.0] * TASKS)


def test_a_task_is_measured_alike_in_every_batch_and_number():
    """Catches a last task that takes the first one's queries, or tasks at the end of a batch without a next one."""
    whole, parts = OpenSet.of(probe_of(Recognises()), TASKS), OpenSet.of(probe_of(Recognises(), batch=1), TASKS - 4)
    assert whole is not None and parts is not None
    for name in ("known", "unknown", "kept"):
        assert torch.equal(getattr(whole, name)[: TASKS - 4], getattr(parts, name))


def test_foreign_queries_are_a_batch_of_the_same_size():
    """Catches foreign queries that are normalised together with the task's own, or by fewer of them."""
    learner = Recognises()
    OpenSet.of(probe_of(learner), 5)
    assert learner.sizes == {WAYS * QUERIES}


def test_the_auroc_is_the_share_of_pairs_in_the_right_order():
    """Catches the reverse of the AUROC, queries that were left out in it, or ties that rounding makes."""
    rng = np.random.default_rng(0)
    inside, outside = (torch.from_numpy(rng.uniform(0, s, (3, 6))) for s in (1.0, 1.3))
    inside[1], outside[1] = inside[1] * 1e-6, outside[1] * 1e-6  # of a learner that is sure
    kept = torch.from_numpy(rng.uniform(size=(3, 6)) < 0.7)
    found = OpenSet(inside, outside, kept, 5, torch.zeros(3, 6))
    pairs = [(o > i) + 0.5 * (o == i) for t in range(3) for o in outside[t][kept[t]] for i in inside[t]]
    sizes = [int(kept[t].sum()) * 6 for t in range(3)]
    expected = [np.mean(part) for part in np.split(np.array(pairs, float), np.cumsum(sizes)[:-1])]
    assert found.auroc.tolist() == pytest.approx(expected)
    metrics = found.metrics()
    assert metrics["open_set_auroc"].tolist() == pytest.approx(expected)
    assert metrics["unknown_entropy"].tolist() == pytest.approx([float(outside[t][kept[t]].mean()) for t in range(3)])
    assert metrics["known_entropy"].tolist() == pytest.approx(inside.mean(1).tolist())


def test_entropy_is_that_of_the_probabilities():
    """Catches another base, or what is not a number where a probability is 0."""
    logits = torch.tensor([[0.0, 0.0, 0.0], [1e4, 0.0, -1e4]])
    assert entropy(logits).tolist() == pytest.approx([np.log(3), 0.0])


def test_a_split_with_no_other_classes_has_no_metric():
    """Catches a division by no queries, where all tasks have all classes."""
    assert OpenSet.of(probe_of(Recognises(), total=WAYS), 5) is None


def test_confusions_need_not_predict_again():
    """Catches predictions of other tasks, or of the foreign queries, handed on as those of the task."""
    data = ToyImages(ways=3, queries=2, eval_batch_size=4)
    learner: Any = torch.nn.Module()
    learner.device, learner.dtype = torch.device("cpu"), torch.float32
    learner.map = lambda f, e: torch.stack([f(e[i]) for i in range(len(e))])
    learner.adapt = lambda support: support.x.flatten(1)[:, :1]  # one noisy pixel
    learner.predict = lambda state, x: -torch.cdist(x.flatten(1)[:, :1], state)
    learner.predictions_by_parts = partial(MetaLearner.predictions_by_parts, learner)
    probe = Probe(learner, data, "test")
    outside = OpenSet.of(probe, 10)
    assert outside is not None
    again, handed = Confusions.of(probe, 10), Confusions.of(probe, 10, outside.predicted)
    assert again is not None and handed is not None
    assert again.wrong.sum() > 0
    assert np.array_equal(again.wrong, handed.wrong)


@pytest.mark.parametrize("batch_norm", ["running", "support", "transductive"])
def test_embedded_once_or_again_the_queries_of_the_next_task_are_predicted_alike(batch_norm: str):
    """Catches foreign queries taken from the cache of embeddings under another image's row, or normalised together."""
    data = ToyImages(ways=3, queries=2, eval_batch_size=4)
    learner = ProtoNet(Conv4(hidden=4, image_size=16), batch_norm=batch_norm).eval()
    plain = ProtoNet(Conv4(hidden=4, image_size=16), batch_norm=batch_norm).eval()
    plain.load_state_dict(learner.state_dict())
    plain.embeds_once = lambda batch: False
    with torch.inference_mode():
        found = [OpenSet.of(Probe(one, data, "test"), 10) for one in (learner, plain)]
    assert found[0] is not None and found[1] is not None
    for name in ("known", "unknown", "predicted"):
        torch.testing.assert_close(getattr(found[0], name), getattr(found[1], name), rtol=1e-5, atol=1e-6)
    assert (learner.embedded.values is not None) == (batch_norm == "running")


def test_no_task_need_be_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Catches an option that leaves nothing out, or that fails for want of a task."""
    main(command("ProtoNet", tmp_path, "--open_set_tasks", "0", steps=2))
    assert "not made" not in caplog.text
    assert "open_set_auroc" not in json.loads((tmp_path / "protonet" / "results.json").read_text())["metrics"]
