"""Controls of the learners that have a task embedding built in; those of models.Conditioned are in tests/contract."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import models
from datamodules.core.errors import ConfigError
from tests.support.gradients import episodes


def backbone() -> models.Conv4:
    return models.Conv4(hidden=4, image_size=8, halvings=2)


LEARNERS: dict[str, Any] = {
    "TADAM": lambda **settings: models.TADAM(backbone(), layers=2, **settings),
    "CNAPs": lambda **settings: models.CNAPs(backbone(), code=5, **settings),
    "SimpleCNAPs": lambda **settings: models.SimpleCNAPs(backbone(), code=5, **settings),
}


def made(name: str, **settings: Any) -> Any:
    """Away from where training starts, at which modulation hardly depends on the task."""
    torch.manual_seed(0)
    found = LEARNERS[name](**{"batch_norm": "support", **settings})
    for key, parameter in found.named_parameters():
        if key.endswith("factor"):
            torch.nn.init.normal_(parameter, std=1.0)
    return found.double()


def only(learner: Any, embedding: torch.Tensor) -> Any:
    """The same learner, whose networks find this embedding in every support set."""
    given = copy.deepcopy(learner)
    given._control = None
    if isinstance(given, models.TADAM):
        given.centre = lambda x, support: embedding
    else:
        given.adaptation_network.encoder.forward = lambda x: embedding
    return given


@pytest.mark.parametrize("batch_norm", ["support", "transductive", "per_query"])
@pytest.mark.parametrize("name", LEARNERS)
def test_controls_are_what_they_are_called(name, batch_norm):
    """Catches a control that reaches none or some of the passes, a shuffling that gives a task its own embedding back,
    a constant that is not the training mean, and one that is not heeded where queries pass the network one by one."""
    found, tasks = made(name, batch_norm=batch_norm).eval(), episodes(tasks=3)
    with torch.no_grad():
        own = torch.stack([found.embed_task(tasks[i].support) for i in range(3)])
        plain = found.predictions(tasks)
        found.update_from_tasks({"task_embedding": own.mean(0)})
        found.update_from_tasks({"task_embedding": own.mean(0) + 1})
        mean = own.mean(0) + 0.5
        torch.testing.assert_close(found.mean_embedding, mean)
        for control, seen in (("shuffled", own[[1, 2, 0]]), ("constant", mean.expand(3, -1))):
            found.control(control)
            for i, embedding in enumerate(seen):
                given = only(found, embedding)
                expected = given.predict(given.adapt(tasks[i].support), tasks.query_x[i])
                torch.testing.assert_close(found.predictions(tasks)[i], expected, rtol=1e-9, atol=1e-12)
            assert (found.predictions(tasks) - plain).abs().max() > 1e-3
            parts = found.predictions_by_parts(tasks, 3)
            if batch_norm != "transductive":  # where no query depends on another
                whole = found.predictions(tasks)
                torch.testing.assert_close(parts.flatten(1, 2), whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LEARNERS)
def test_training_keeps_the_mean_of_its_embeddings(name):
    """Catches a mean of other vectors than the learner is conditioned on, a lost or counted-twice meta-batch, and a
    control that training heeds."""
    found, tasks = made(name).train(), episodes(tasks=3)
    found.update_from_tasks({"task_embedding": torch.zeros_like(found.mean_embedding)})
    _, _, kept = found.map(found.objective, tasks)
    expected = torch.stack([found.embed_task(tasks[i].support) for i in range(3)]).detach()
    torch.testing.assert_close(kept["task_embedding"], expected, rtol=1e-9, atol=1e-12)
    assert not kept["task_embedding"].requires_grad
    found.update_from_tasks({"task_embedding": kept["task_embedding"].mean(0)})
    torch.testing.assert_close(found.mean_embedding, expected.mean(0) / 2)
    assert found.means_taken == 2
    found.control("constant")
    torch.testing.assert_close(found.map(found.objective, tasks)[2]["task_embedding"], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_checkpoint_of_before_there_were_controls(name):
    """Catches one that does not load any more, and a constant control by a mean that nothing was taken of."""
    found = made(name)
    state = {key: value for key, value in found.state_dict().items() if key not in ("mean_embedding", "means_taken")}
    assert len(state) == len(found.state_dict()) - 2
    found.load_state_dict(state)
    found.control("shuffled")
    with pytest.raises(ConfigError, match="no mean of the training tasks' embeddings"):
        found.control("constant")
    plain = made(name, conditioned=False)
    assert plain.controls == () and "mean_embedding" not in plain.state_dict()
    assert not plain.map(plain.objective, episodes(tasks=2))[2].get("task_embedding")
