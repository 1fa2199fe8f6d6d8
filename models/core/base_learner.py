"""The base learner: the network whose parameters adapt, a backbone and a head with a row for each class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.networks.backbones import Backbone

Parameters = dict[str, Tensor]


class BaseLearner(nn.Module):
    """Outputs (N, outputs) of inputs (N, *input): a backbone's features through a linear head.

    Args:
        backbone: of the features.
        outputs: rows of the head: ways, or the dimension of y.
        bias: whether the head has one.
    """

    def __init__(self, backbone: Backbone, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.out_features, outputs, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    @staticmethod
    def in_head(name: str) -> bool:
        """Whether a parameter of this name has a row for each class."""
        return name.startswith("head.")

    def head_parameters(self) -> Parameters:
        """Those with a row for each class, by their names in the base learner."""
        return {name: p for name, p in self.named_parameters() if self.in_head(name)}

    def resize_head(self, parameters: Parameters, ways: int) -> Parameters:
        """Parameters, or what has their names and shapes, with rows for so many classes; 0 leaves them."""
        if not ways:
            return parameters
        return {n: fit_outputs(p, ways) if self.in_head(n) else p for n, p in parameters.items()}


def entry(name: str) -> str:
    """A parameter's name as torch allows it for what is kept beside the parameter: an entry of a ParameterDict."""
    return name.replace(".", "_")


def fit_outputs(weight: Tensor, outputs: int) -> Tensor:
    """A linear head's rows (or bias) for another number of classes.

    The first ``outputs`` rows; classes beyond the trained ones start from the mean row, which serves any class when
    labels are permuted (Ye and Chao, ICLR 2022).
    """
    if outputs <= len(weight):
        return weight[:outputs]
    return torch.cat([weight, weight.mean(0, keepdim=True).expand(outputs - len(weight), *weight.shape[1:])])
