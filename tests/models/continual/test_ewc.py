"""Elastic weight consolidation."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from models import EWC, MLP
from models.core.chance import Chance
from models.networks.backbones import Backbone
from tests.models.continual.test_online_sgd import KEY, experiences


class Inputs(Backbone):
    """Three inputs as they are, so that the base learner is a softmax regression."""

    out_features, input_shape = 3, (3,)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_fisher_of_softmax_regression_in_closed_form():
    """Catches the squared gradient of a batch's mean, the labels' (empirical) Fisher, and a sum over examples.

    F of the weight of class c and feature f is the mean of p_c (1 - p_c) x_f².
    """
    learner = EWC(Inputs(), fisher_examples=5).double().eval()
    state, part = learner.begin(4, Chance.of(KEY)), experiences(1)[0]
    with torch.no_grad():
        fisher = learner.fisher(state.parameters, part)
    x = part.x[:5]
    p = (x @ state.parameters["head.weight"].T).softmax(1)
    spread = p * (1 - p)
    torch.testing.assert_close(fisher["head.weight"], spread.T @ x.square() / 5)
    torch.testing.assert_close(fisher["head.bias"], spread.mean(0))


@pytest.mark.parametrize("form", ["separate", "online"])
def test_penalties_are_those_of_a_list_of_anchors(form):
    """Catches anchors at the last weights for those of each experience and the reverse, a penalty of double weight, and
    an experience held by its own penalty: against autograd on the loss as it is written."""
    settings = {"penalty": 3.0, "rate": 0.2, "batch": 3, "form": form, "decay": 0.7 if form == "online" else 1.0}
    learner = EWC(MLP(3, (5,)), **settings).double().eval()
    state = learner.begin(4, Chance.of(KEY))
    weights = {n: p.clone().requires_grad_() for n, p in state.parameters.items()}
    anchors: list[tuple[dict, dict]] = []
    for part in experiences(4):
        with torch.no_grad():
            state = learner.update(state, part)
        for x, y in zip(part.x.split(3), part.y.split(3), strict=True):
            loss = F.cross_entropy(functional_call(learner.base, weights, (x,)), y)
            for fisher, at in anchors:
                loss = loss + 1.5 * sum((fisher[n] * (w - at[n]) ** 2).sum() for n, w in weights.items())
            gradient = torch.autograd.grad(loss, list(weights.values()))
            moved = {n: w - 0.2 * g for (n, w), g in zip(weights.items(), gradient, strict=True)}
            weights = {n: w.detach().requires_grad_() for n, w in moved.items()}
        at = {n: w.detach() for n, w in weights.items()}
        fisher = {n: f.detach() for n, f in learner.fisher(at, part).items()}
        if form == "online" and anchors:
            fisher = {n: f + 0.7 * anchors[0][0][n] for n, f in fisher.items()}
        anchors = [(fisher, at)] if form == "online" else [*anchors, (fisher, at)]
    for name, value in weights.items():
        torch.testing.assert_close(state.parameters[name], value.detach())
