"""How a task embedding changes a learner: by tensors that take the places of the learner's own for one task."""

from __future__ import annotations

from torch import Tensor, nn

from datamodules.core.errors import ConfigError
from models.core.base_learner import BaseLearner, Parameters
from models.core.inner_loop import split_parameters
from models.networks.backbones import Backbone


class Conditioning(nn.Module):
    """From a task embedding to what takes the places of a learner's parameters and buffers, by their names in it."""

    def attach(self, learner: nn.Module, embedding_size: int) -> None:
        """Make what it needs for this learner and embeddings (embedding_size,); once, before training.

        Raises:
            ConfigError: it cannot condition such a learner.
        """
        raise NotImplementedError

    def forward(self, embedding: Tensor, parameters: Parameters) -> Parameters:
        """For one task.

        Args:
            embedding: (embedding_size,).
            parameters: the learner's, all by name.
        """
        raise NotImplementedError


def base_network(learner: nn.Module) -> tuple[str, nn.Module]:
    """A learner's base learner, or the backbone of one that has no head, and its name in the learner.

    Raises:
        ConfigError: it has neither.
    """
    for kind in (BaseLearner, Backbone):
        for name, module in learner.named_modules():
            if isinstance(module, kind):
                return name, module
    raise ConfigError(f"{type(learner).__name__} has no network that could be conditioned: choose another learner")


def initialisation(learner: nn.Module) -> Parameters:
    """The tensors that a learner's adaptation starts from, by name in the learner: of its network, not batch norm's.

    Raises:
        ConfigError: there are none, as in a frozen backbone.
    """
    prefix, network = base_network(learner)
    start, _ = split_parameters(network, adapt_normalization=False)
    if not start:
        raise ConfigError(f"no parameter of {type(learner).__name__}'s network is trained: there is no initialisation")
    return {f"{prefix}.{name}": parameter for name, parameter in start.items()}
