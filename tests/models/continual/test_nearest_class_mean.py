"""Nearest class mean."""

import numpy as np
import torch
from sklearn.neighbors import NearestCentroid

from datamodules.core.episodes import Support
from models import MLP, NearestClassMean
from models.core.chance import Chance


def test_is_the_nearest_centroid_of_all_so_far_in_any_order():
    """Catches means of the last experience alone, examples that weigh by experience, and classes without an example.

    Against scikit-learn on all examples at once, of unequal numbers.
    """
    rng = np.random.default_rng(0)
    learner = NearestClassMean(MLP(3, (4,))).double().eval()
    parts = [(rng.normal(c, 1.0, (n, 4)), np.full(n, c)) for c, n in ((2, 5), (0, 1), (2, 3), (1, 4), (0, 7))]
    queries = torch.from_numpy(rng.normal(1.0, 1.5, (200, 4)))
    everything = [np.concatenate(values) for values in zip(*parts, strict=True)]
    expected = torch.from_numpy(NearestCentroid().fit(*everything).predict(queries.numpy()))
    for order in (parts, parts[::-1]):
        state = learner.begin(5, Chance.of(torch.tensor(0)))
        for x, y in order:
            state = learner.update(state, Support(torch.from_numpy(x), torch.from_numpy(y), 5))
        logits = learner.predict(state, queries)
        assert torch.equal(logits.argmax(1), expected)
        assert (logits[:, 3:] == -torch.inf).all()
