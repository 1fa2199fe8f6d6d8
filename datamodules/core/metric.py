"""What a number that is measured of each task is, as learners, data and kinds of task declare it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """What a number that is measured of each task is; learners, data and kinds of task declare theirs by name.

    Attributes:
        better: "higher" or "lower", which also says where the worst decile is; "neither" has none.
        label: on axes; empty for the metric's name.
        share: lies between 0 and 1 and is told in per cent.
        pooled: what is kept of each task are counts, which are summed over tasks before they make a metric: its name,
            one of ``models.core.metrics.POOLS``, or None.
        curve: each task has several values, in order: kept for figures, and no metric by itself.
    """

    better: Literal["higher", "lower", "neither"] = "neither"
    label: str = ""
    share: bool = False
    pooled: str | None = None
    curve: bool = False

    def text(self, value: float, half: float, signed: bool = False) -> str:
        """A mean with the half-width of its interval as people read it: a share in per cent, anything else as it is.

        Of one task there is no interval, nan.
        """
        sign = "+" if signed else ""
        if self.share:
            return f"{100 * value:{sign}.2f}{'' if math.isnan(half) else f' ± {100 * half:.2f}'} %"
        return f"{value:{sign}.4f}{'' if math.isnan(half) else f' ± {half:.4f}'}"

    def short(self, value: float) -> str:
        """A value alone, for the legend of a figure."""
        return f"{100 * value:.2f} %" if self.share else f"{value:.3g}"
