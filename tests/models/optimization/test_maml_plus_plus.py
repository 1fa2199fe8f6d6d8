"""The options of MAML++: learned rates, batch norm by step, multi-step loss, derivative-order annealing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from models import MAML, Conv4
from models.networks.batch_norm import BatchNorm, recording
from tests.support.gradients import assert_equals_finite_differences, episodes, meta_gradient


class At(MAML):
    """A learner at a given meta-update."""

    done = 0

    @property
    def meta_updates(self) -> int:
        return self.done


def small(**settings) -> At:
    torch.manual_seed(2)
    learner = At(Conv4(hidden=4, image_size=8), outputs=3, **{"inner_rate": 0.3, "inner_steps": 3, **settings}).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # rates and norms that differ by step, so that a wrong step shows
        for p in (*([learner.rates] if learner.rates is not None else []), *learner.learner.parameters()):
            p += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return learner


OPTIONS = [
    {"learned_rates": True},
    {"per_step_norm": True},
    {"multi_step_updates": 10},
    {"learned_rates": True, "per_step_norm": True, "multi_step_updates": 10},
    {"learned_rates": True, "per_step_norm": True, "adapt_normalization": True, "batch_norm": "support"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_meta_gradient_equals_finite_differences(options):
    """Catches an option that cuts the graph: rates, norms of each step and all query losses get their gradient."""
    learner = small(**options, chunk=2)
    learner.done = 4
    assert_equals_finite_differences(learner, episodes())


def plain_objective(learner: At, batch, weights: list[float]) -> torch.Tensor:
    """The multi-step objective of one task, restated with loops, autograd and PyTorch's own batch norm."""
    names = [n for n, _ in learner.learner.named_parameters() if ".norms." not in n]
    parameters = dict(learner.learner.named_parameters())
    adapted = {n: parameters[n] for n in names}

    def forward(values, x, k):
        for i in range(4):
            x = F.conv2d(x, values[f"backbone.convs.{i}.weight"], values[f"backbone.convs.{i}.bias"], 2, 1)
            scale, shift = parameters[f"backbone.norms.{i}.weight"][k], parameters[f"backbone.norms.{i}.bias"][k]
            x = F.relu(F.batch_norm(x, None, None, scale, shift, training=True))
        return F.linear(x.mean((2, 3)), values["head.weight"], values["head.bias"])

    total = torch.zeros((), dtype=torch.float64)
    for k, weight in enumerate(weights):
        loss = F.cross_entropy(forward(adapted, batch.support_x[0], k), batch.support_y[0])
        gradient = torch.autograd.grad(loss, list(adapted.values()), create_graph=True)
        adapted = {
            n: adapted[n] - learner.rates[k, j] * g for j, (n, g) in enumerate(zip(names, gradient, strict=True))
        }
        total = total + weight * F.cross_entropy(forward(adapted, batch.query_x[0], k), batch.query_y[0])
    return total


def test_the_objective_is_the_papers():
    """Catches rates or norms of another step, and weights of the query losses in another order."""
    learner = small(learned_rates=True, per_step_norm=True, multi_step_updates=10)
    learner.done = 4
    batch = episodes(tasks=1)
    early = (1 - 4 / 10) / 3
    expected = plain_objective(learner, batch, [early, early, 1 - 2 * early])
    got = learner.map(learner.objective, batch)[0]
    torch.testing.assert_close(got[0], expected, rtol=1e-10, atol=1e-12)
    gradient = meta_gradient(learner, batch)
    for (name, p), e in zip(
        learner.named_parameters(), torch.autograd.grad(expected, list(learner.parameters())), strict=True
    ):
        torch.testing.assert_close(gradient[name], e, rtol=1e-8, atol=1e-10, msg=f"{name} {tuple(p.shape)}")


def test_multi_step_weights_anneal_to_the_last_step():
    """Catches weights that do not sum to one, do not start alike, or outlive their annealing."""
    learner = small(multi_step_updates=100)
    for done, early in ((0, 1 / 3), (50, 1 / 6), (99, 0.03 / 3)):
        learner.done = done
        assert learner.step_weights() == pytest.approx([0, early, early, 1 - 2 * early])
    learner.done = 100
    assert learner.step_weights() == [0, 0, 0, 1]


def test_first_order_until_its_last_meta_update():
    """Catches derivative-order annealing that never ends, never begins, or changes the loss itself."""
    batch = episodes()
    annealed, first, second = small(first_order_updates=7), small(first_order=True), small()
    gradient_1, gradient_2 = meta_gradient(first, batch), meta_gradient(second, batch)
    name = "learner.backbone.convs.1.weight"
    assert (gradient_1[name] - gradient_2[name]).norm() > 0.01 * gradient_2[name].norm()
    for done, expected in ((0, gradient_1), (6, gradient_1), (7, gradient_2)):
        annealed.done = done
        torch.testing.assert_close(meta_gradient(annealed, batch)[name], expected[name], rtol=1e-12, atol=0)


def test_running_averages_are_those_of_their_step():
    """Catches one average for all steps: each step's moves by the query batch normalised after that step."""
    learner = small(per_step_norm=True, batch_norm="running")
    task = episodes(tasks=1)[0]
    record = {}
    with recording(record, differentiable=False):
        learner.objective(task)
    layer = learner.learner.get_submodule("backbone.norms.0")
    assert isinstance(layer, BatchNorm)
    assert layer.running_mean.shape == (3, 4)
    for k, state in enumerate(list(learner.adaptation(task.support))[1:]):
        weight, bias = (state.parameters[f"backbone.convs.0.{n}"] for n in ("weight", "bias"))
        features = F.conv2d(task.query_x, weight, bias, 2, 1)
        torch.testing.assert_close(record[layer, k][0], features.mean((0, 2, 3)).detach(), rtol=1e-10, atol=1e-12)
        layer.update_running(*record[layer, k], step=k)
        torch.testing.assert_close(layer.running_mean[k], 0.1 * record[layer, k][0])
    assert not torch.equal(layer.running_mean[0], layer.running_mean[2])


def test_steps_beyond_the_trained_take_the_last_ones_settings():
    """Catches an index out of range, or rates that start over, where evaluation takes more steps than training."""
    learner = small(learned_rates=True, per_step_norm=True, eval_inner_steps=5).eval()
    support = episodes(tasks=1)[0].support
    states = list(learner.adaptation(support))
    assert len(states) == 6
    before, after = states[4].parameters, states[5].parameters
    last = {n: p[2] if ".norms." in n else p for n, p in learner.learner.named_parameters()}
    values = {n: last[n] if ".norms." in n else before[n].detach().requires_grad_() for n in before}
    plain = small()  # with one set of norms
    loss = F.cross_entropy(functional_call(plain.learner, values, (support.x,)), support.y)
    (gradient,) = torch.autograd.grad(loss, [values["head.weight"]])
    names = [n for n in values if ".norms." not in n]
    expected = before["head.weight"] - learner.rates[2, names.index("head.weight")] * gradient
    torch.testing.assert_close(after["head.weight"], expected, rtol=1e-10, atol=1e-12)
