"""Experience replay: each batch is learned along with examples from a reservoir of all so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from datamodules.core.errors import at_least
from models.continual.memory import Memory, Policy
from models.continual.online_sgd import Online, OnlineSGD
from models.core.base_learner import Parameters
from models.core.learner import Paper
from models.networks.backbones import Backbone


class ExperienceReplay(OnlineSGD):
    """A step is on a batch and as many examples from a memory (Chaudhry et al. 2019, algorithm 1).

    Args:
        backbone: see OnlineSGD.
        memory: M, examples that are kept.
        replay: examples of the memory in each step.
        policy: which example gives way, see ``models.continual.memory``.
        **others: see OnlineSGD.
    """

    paper = Paper(
        "Chaudhry, Rohrbach, Elhoseiny, Ajanthan, Dokania, Torr and Ranzato",
        "On Tiny Episodic Memories in Continual Learning",
        "arXiv",
        2019,
        "https://arxiv.org/abs/1902.10486",
    )

    def __init__(
        self, backbone: Backbone, memory: int = 200, replay: int = 10, policy: Policy = "reservoir", **others: Any
    ) -> None:
        super().__init__(backbone, **others)
        at_least(1, memory=memory, replay=replay)
        self.memory, self.replay = memory, replay
        self.policy: Policy = policy

    def keep(self, parameters: Parameters, classes: int) -> Memory:
        return Memory.empty(self.memory, self.features, classes, next(iter(parameters.values())))

    def step(self, state: Online, x: Tensor, y: Tensor) -> Online:
        (old_x, old_y, there), chance = state.kept.drawn(self.replay, state.chance)
        both = torch.cat([x, old_x.view(-1, *x.shape[1:])]), torch.cat([y, old_y])
        gradient = self.gradient(state.parameters, *both, torch.cat([torch.ones_like(y, dtype=torch.bool), there]))
        return self.descended(state._replace(chance=chance), gradient)

    def wrote(self, state: Online, x: Tensor, y: Tensor) -> Online:
        memory, chance = state.kept.written(x, y, self.policy, state.chance)
        return state._replace(kept=memory, chance=chance)
