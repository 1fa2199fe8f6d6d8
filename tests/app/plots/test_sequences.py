"""The picture of how soon each task of a sequence is learned."""

from __future__ import annotations

import numpy as np

from app.plots.sequences import proficiency


def test_dots_are_the_tasks_and_the_line_their_mean_around_each():
    """Catches a mean over the tasks before alone, or one that is padded with nothing at the ends."""
    examples = np.array([70.0, 60, 50, 40, 30, 20, 10, 100, 10])
    axes = proficiency([("FTML", examples), ("TOE", examples + 5)], "title").axes[0]
    dots, line, other, _ = axes.get_lines()
    assert np.array_equal(dots.get_ydata(), examples) and np.array_equal(dots.get_xdata(), np.arange(1, 10))
    assert np.array_equal(other.get_ydata(), examples + 5)
    expected = [np.mean([examples[j] for j in range(9) if abs(j - k) <= 3]) for k in range(9)]
    assert np.allclose(line.get_ydata(), expected)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["FTML, mean 43", "TOE, mean 48"]
