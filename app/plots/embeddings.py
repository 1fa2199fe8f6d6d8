"""Pictures of embeddings on the plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from app.plots.style import CLASSES, MUTED, shorten, single, styled


def principal(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first two principal components of points (N, features), (N, 2), and what share of the variance each has."""
    away = points - points.mean(0)
    _, singular, directions = np.linalg.svd(away, full_matrices=False)
    share = singular**2 / max(float((singular**2).sum()), 1e-12)
    flat = away @ directions[:2].T
    lacking = 2 - flat.shape[1]  # one feature, or one point
    return np.pad(flat, [(0, 0), (0, lacking)]), np.pad(share, (0, lacking))[:2]


def component_names(share: np.ndarray) -> tuple[str, str]:
    """Labels of the axes of two principal components."""
    return f"1st component ({share[0]:.0%} of variance)", f"2nd component ({share[1]:.0%} of variance)"


@styled
def embedding(query_z: Any, query_y: Any, support_z: Any, support_y: Any, names: Sequence[str], title: str) -> Figure:
    """The first two principal components of one task's embeddings, with the prototype of each class.

    Args:
        query_z, support_z: embeddings, (Q, features) and (S, features).
        query_y, support_y: labels, (Q,) and (S,); of more than ten classes the first ten are shown.
        names: of the classes, by label.
        title: of the figure.
    """
    query_z, support_z = np.asarray(query_z, np.float64), np.asarray(support_z, np.float64)
    query_y, support_y = np.asarray(query_y), np.asarray(support_y)
    flat, share = principal(np.concatenate([query_z, support_z]))
    flat_query, flat_support = flat[: len(query_z)], flat[len(query_z) :]
    figure, axes = single(6.2, 4.2)
    for label in range(min(len(names), len(CLASSES))):
        queries, colour = flat_query[query_y == label], CLASSES[label]
        prototype = flat_support[support_y == label].mean(0)
        axes.scatter(*queries.T, s=26, color=colour, alpha=0.75, lw=0, label=shorten(names[label]))
        axes.scatter(*prototype, s=190, marker="*", color=colour, ec="white", lw=1.2, zorder=4)
    axes.scatter([], [], s=130, marker="*", color=MUTED, label="prototype")
    x, y = component_names(share)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.set_aspect("equal", adjustable="datalim")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    return figure
