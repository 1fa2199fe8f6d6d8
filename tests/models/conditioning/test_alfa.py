"""ALFA against MAML, a step-by-step loop and finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from datamodules.core.episodes import Support
from models import ALFA, MAML, Conv4
from tests.support.gradients import assert_equals_finite_differences, episodes, meta_gradient


def alfa(**settings) -> ALFA:
    torch.manual_seed(2)
    settings = {"inner_rate": 0.3, "weight_decay": 0.1, "inner_steps": 3} | settings
    return ALFA(Conv4(hidden=4, image_size=8), outputs=3, **settings)


def freeze(learner: ALFA) -> ALFA:
    """A generator that answers 1 whatever it reads."""
    last = learner.generator[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.ones_(last.bias)
    return learner


@pytest.mark.parametrize("adapt_normalization", [False, True])
def test_with_a_frozen_generator_and_no_decay_it_is_maml_with_learned_rates(adapt_normalization):
    """Catches any difference from MAML's inner loop beyond the generator, bit for bit: adapted parameters and
    predictions of float32, rates that differ by step and tensor, and the meta-gradients of both."""
    ours = freeze(alfa(weight_decay=0.0, adapt_normalization=adapt_normalization))
    torch.manual_seed(2)
    backbone = Conv4(hidden=4, image_size=8)
    settings = {"inner_steps": 3, "learned_rates": True, "adapt_normalization": adapt_normalization}
    twin = MAML(backbone, outputs=3, inner_rate=0.3, **settings)
    assert twin.rates is not None
    with torch.no_grad():
        rates = torch.rand_like(twin.rates)
        ours.rates.copy_(rates)
        twin.rates.copy_(rates)
    batch = episodes(dtype=torch.float32)
    task = batch[0]
    own = dict(ours.learner.named_parameters())
    for mine, theirs in zip(ours.adaptation(task.support), twin.adaptation(task.support), strict=True):
        for name, p in theirs.parameters.items():
            assert torch.equal((own | mine.parameters)[name], p), name
        assert torch.equal(ours.predict(mine, task.query_x), twin.predict(theirs, task.query_x))
    mine, theirs = meta_gradient(ours, batch), meta_gradient(twin, batch)
    for name, gradient in theirs.items():
        if name == "rates":  # a sum over tasks, which stand in other places there
            torch.testing.assert_close(mine[name], gradient, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(mine[name], gradient), name


def test_decays_shrink_the_weights_step_by_step():
    """Catches a decay of the wrong tensor, step or sign, or one of the new parameters: a loop written out, with rates
    and decays that differ by step and tensor."""
    learner = freeze(alfa()).double()
    with torch.no_grad():
        learner.rates.uniform_(0.1, 0.5)
        learner.decays.uniform_(0.01, 0.2)
    task = episodes()[0]
    *_, state = learner.adaptation(task.support)
    names = [n for n, _ in learner.learner.named_parameters() if ".norms." not in n]
    at = {n: p.detach().clone().requires_grad_() for n, p in learner.learner.named_parameters()}
    for step in range(3):
        loss = F.cross_entropy(functional_call(learner.learner, at, (task.support.x,)), task.support.y)
        gradient = torch.autograd.grad(loss, [at[n] for n in names])
        for i, (n, g) in enumerate(zip(names, gradient, strict=True)):
            shrunk = (1 - learner.decays[step, i]) * at[n]
            at[n] = (shrunk - learner.rates[step, i] * g).detach().requires_grad_()
    for n in names:
        torch.testing.assert_close(state.parameters[n], at[n], rtol=1e-9, atol=1e-12, msg=n)


@pytest.mark.parametrize(
    "settings", [{}, {"adapt_normalization": True, "batch_norm": "support"}, {"random_init": True}]
)
def test_meta_gradient_equals_finite_differences(settings):
    """Catches a generator that reads constants: its weights' gradient passes through the states of later steps too."""
    learner = alfa(**settings, inner_steps=2).double()
    if learner.own_decays:
        assert not [n for n, p in learner.learner.named_parameters() if p.requires_grad]
        learner.learner.requires_grad_(True)  # for the differences, which are of all parameters
    assert_equals_finite_differences(learner, episodes(tasks=2))


def test_the_generator_reads_the_means_of_weights_and_gradients():
    """Catches a state of other tensors, of another order, or of the first step alone: the generator's inputs against
    means written out, at each step's own parameters."""
    learner = alfa().double()
    task, read = episodes()[0], []
    learner.generator.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].detach()))
    states = list(learner.adaptation(task.support))
    assert len(read) == 3
    for state, state_read in zip(states, read, strict=False):
        at = {n: p.detach().requires_grad_() for n, p in state.parameters.items()}
        loss = F.cross_entropy(functional_call(learner.learner, at, (task.support.x,)), task.support.y)
        gradient = torch.autograd.grad(loss, list(at.values()))
        expected = [float(t.detach().mean()) for t in (*at.values(), *gradient)]
        torch.testing.assert_close(state_read, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-13)
    embedding = learner.embed_task(task.support).detach()
    assert learner.embedding_size == len(embedding) == len(states[0].parameters)
    torch.testing.assert_close(embedding, read[0][learner.embedding_size :], rtol=1e-9, atol=1e-13)


class Conditioned(nn.Module):
    """Predictions of a learner for a task, as a module whose tensors can be replaced."""

    def __init__(self, learner: ALFA) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        return self.learner.predict(self.learner.adapt(Support(support, labels, 3)), query)


def test_a_code_of_the_task_changes_the_steps():
    """Catches a code that is not read, is kept in checkpoints, or takes no gradient through functional replacement,
    each task its own: by finite differences."""
    learner = alfa(code_size=4).double()
    assert learner.code.shape == (4,) and "code" not in learner.state_dict()
    batch = episodes()
    codes = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def predictions(codes: Tensor) -> Tensor:
        def one(code: Tensor, *task: Tensor) -> Tensor:
            return functional_call(Conditioned(learner), {"learner.code": code}, task)

        return vmap(one)(codes, batch.support_x, batch.support_y, batch.query_x)

    zero = learner.predict(learner.adapt(batch[0].support), batch[0].query_x)
    torch.testing.assert_close(predictions(torch.zeros_like(codes))[0], zero)
    assert (predictions(codes)[0] - zero).abs().max() > 1e-3
    assert not learner.code.any()
    leaf = codes.clone().requires_grad_()
    weights, direction = torch.randn_like(predictions(codes)), torch.randn_like(codes)
    (gradient,) = torch.autograd.grad((predictions(leaf) * weights).sum(), leaf)
    with torch.no_grad():
        ends = [float((predictions(codes + s * 1e-6 * direction) * weights).sum()) for s in (1, -1)]
    assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-8)


def test_random_init_multiplies_a_decay_of_each_weight():
    """Catches an ablation that trains the base learner, or decays all weights of a tensor alike."""
    learner = freeze(alfa(random_init=True, inner_steps=1)).double()
    torch.testing.assert_close(learner.decays, torch.ones_like(learner.decays))
    with torch.no_grad():
        learner.rates.zero_()
        learner.decays.fill_(0.5)
        own = learner.own_decays["head_weight"]
        torch.testing.assert_close(own, torch.full_like(own, 0.3 * 0.1), rtol=1e-6, atol=0)
        own.uniform_(0, 1)
    start, end = learner.adaptation(episodes()[0].support)
    expected = (1 - 0.5 * own) * start.parameters["head.weight"]
    torch.testing.assert_close(end.parameters["head.weight"], expected, rtol=1e-12, atol=0)


def test_a_negative_code_is_refused():
    """Catches a size that fails only where the generator is made."""
    with pytest.raises(ValueError, match="code_size"):
        alfa(code_size=-1)
