"""Data that no learner can learn from are told before it learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from datamodules import Quadratics
from datamodules.core.errors import ConfigError
from models import MLP, Conv4, LearnedOptimizer, ProtoNet
from models.core.shapes import fits_task
from tests.support.gradients import episodes


def labelled(labels: list[int]):
    return replace(episodes(tasks=1), support_y=torch.tensor([labels]))


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (labelled([0, 0, 1, 1, 2, 5]), "support label is 5 but the tasks have 3 ways"),
        (labelled([0, 0, 1, 1, 2, -1]), "support label is -1"),
        (labelled([0, 0, 1, 1, 1, 1]), "no example of one of its 3 classes"),
        (replace(episodes(tasks=1), query_x=torch.full((1, 6, 1, 8, 8), torch.nan)), "query set .* no finite number"),
    ],
)
def test_what_is_no_task_is_refused(batch, said):
    """Catches labels of no class, classes of no example and inputs of no number, which would diverge."""
    learner = ProtoNet(Conv4(hidden=4, image_size=8)).double()
    fits_task(learner, episodes(tasks=2))
    with pytest.raises(ConfigError, match=said):
        fits_task(learner, batch)


def test_a_backbone_without_parameters_is_fitted_too():
    """Catches a device looked for among parameters that are not there, and inputs of another size that go unseen."""
    learner = LearnedOptimizer(MLP(4, []), 1, head_bias=False)
    fits_task(learner, Quadratics(dimension=4).distribution("train").sample([0]))
    with pytest.raises(ConfigError, match="inputs are 5"):
        fits_task(learner, Quadratics(dimension=5).distribution("train").sample([0]))
