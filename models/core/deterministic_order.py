"""An order of a support set's examples, as good as random, by nothing but the examples themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.core.episodes import Support, checksum


def mixed(numbers: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014): a bijection of int64 that looks random."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 2**64 + 1)):
        numbers = (numbers ^ (numbers >> shift & 2 ** (64 - shift) - 1)) * (factor - 2**64)
    return numbers


def marks(support: Support) -> Tensor:
    """A number for each example of the support set, (S,) int64, as good as random.

    It depends on the example's image, and on which others there are: not on the order that they come in, on their
    labels, nor on what they are evaluated along with.
    """
    # To 1/1024: coarse enough to be the same wherever the input was computed.
    of_images = checksum((support.x.flatten(1) * 1024).round().long())
    return mixed(of_images + of_images.sum())  # two examples do not come in the same order in every task


def shuffled(support: Support) -> Tensor:
    """An order of the support set's examples, (S,), by their marks."""
    return marks(support).argsort()


def shuffled_labels(support: Support, labels: int) -> Tensor:
    """Which of so many labels stands for each class, (ways,), by the marks of its examples: whatever its name."""
    of_examples = marks(support)
    of_classes = mixed((support.members() * of_examples[:, None]).sum(0))
    of_labels = mixed(torch.arange(labels, device=of_classes.device) + of_examples.sum())
    return of_labels.argsort()[of_classes.argsort().argsort()]
