"""ANIL: the head alone adapts, and the meta-gradient reaches the features."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from models import ANIL, MAML, Conv4
from tests.support.gradients import assert_equals_finite_differences, episodes, meta_gradient


def small(**settings) -> ANIL:
    torch.manual_seed(2)
    return ANIL(Conv4(hidden=4, image_size=8), outputs=3, inner_rate=0.3, **{"inner_steps": 3, **settings}).double()


@pytest.mark.parametrize("batch_norm", ["transductive", "support", "none"])
def test_meta_gradient_equals_finite_differences(batch_norm):
    """Catches features that are constants to the meta-gradient, or a head whose steps are."""
    assert_equals_finite_differences(small(batch_norm=batch_norm, chunk=2), episodes())


def test_only_the_head_adapts_and_by_the_support_loss():
    """Catches an inner loop over all parameters, and features of another pass than the support's."""
    learner, task = small(inner_steps=1), episodes(tasks=1)[0]
    state = learner.adapt(task.support)
    assert set(state.parameters) == {"head.weight", "head.bias"}
    head = {n: p.detach().requires_grad_() for n, p in learner.learner.named_parameters() if n.startswith("head.")}
    logits = functional_call(learner.learner, head, (task.support.x,))
    gradient = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, task.support.y), list(head.values()))
    for (name, p), g in zip(head.items(), gradient, strict=True):
        torch.testing.assert_close(state.parameters[name], p - 0.3 * g, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("batch_norm", "passes"), [("transductive", 1), ("support", 2), ("per_query", 1)])
def test_the_support_set_passes_the_backbone_once(batch_norm, passes):
    """Catches features, or statistics of the support set, that are computed anew for every step."""
    learner, task, seen = small(batch_norm=batch_norm), episodes(tasks=1)[0], []
    learner.learner.backbone.register_forward_hook(lambda *_: seen.append(1))
    states = list(learner.adaptation(task.support))
    assert len(states) == 4 and [state.step for state in states] == [0, 1, 2, 3]
    assert len(seen) == passes


def test_differs_from_maml_and_equals_it_without_a_step():
    """Catches MAML under another name: with no inner step both are plain training, with one they part."""
    batch = episodes()
    for steps in (0, 1):
        torch.manual_seed(2)
        maml = MAML(Conv4(hidden=4, image_size=8), outputs=3, inner_rate=0.3, inner_steps=steps).double()
        ours, theirs = meta_gradient(small(inner_steps=steps), batch), meta_gradient(maml, batch)
        name = "learner.backbone.convs.1.weight"
        apart = (ours[name] - theirs[name]).norm() / theirs[name].norm()
        assert apart < 1e-12 if steps == 0 else apart > 0.01
