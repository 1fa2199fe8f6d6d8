"""Image tasks over few small classes, and what shows that two are the same."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch

from datamodules.core.episodes import Episodes
from datamodules.images.tasks import ImageClasses, ImageTasks

# Twelve classes of 6 to 9 images, in three groups of 5, 4 and 3 classes that are not contiguous.
COUNTS = [6, 7, 8, 9, 6, 7, 8, 9, 6, 7, 8, 9]
GROUPS = ["a", "b", "a", "c", "b", "a", "a", "c", "b", "a", "b", "c"]
SIZE = 4


@cache
def classes() -> ImageClasses:
    """Images that are all different, and remain so however they are turned."""
    images = torch.randint(0, 256, (sum(COUNTS), 1, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    names = [f"{group}/{i}" for i, group in enumerate(GROUPS)]
    return ImageClasses(images.to(torch.uint8), np.array(COUNTS), names, GROUPS)


def tasks(ways: int = 3, shots: int = 2, queries: int = 3, **settings: Any) -> ImageTasks:
    return ImageTasks(classes(), ways, shots, queries, **{"seed": 0, "split": "train"} | settings)


def chi_square_is_plausible(values: np.ndarray, cells: int) -> bool:
    """Whether counts of integers in [0, cells) fit the uniform distribution (fails by chance once in 10,000)."""
    counts = np.bincount(values.ravel(), minlength=cells)
    assert len(counts) == cells
    expected, dof = values.size / cells, cells - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return statistic < dof * (1 - 2 / (9 * dof) + 3.72 * math.sqrt(2 / (9 * dof))) ** 3


def same(a: Episodes, i: int, b: Episodes, j: int) -> bool:
    """Whether task i of a is task j of b, in every tensor."""
    fields = ("support_x", "support_y", "query_x", "query_y", "index")
    equal = all(torch.equal(getattr(a, f)[i], getattr(b, f)[j]) for f in fields)
    return equal and all(torch.equal(a.task[k][i], b.task[k][j]) for k in a.task)
