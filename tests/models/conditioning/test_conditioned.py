"""What a task embedding sets, against the learner that it is set in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import models
from datamodules.core.errors import ConfigError
from models.core.inner_loop import split_parameters, with_values
from tests.contract.test_conditioning import batch
from tests.support.gradients import episodes, meta_gradient


def maml(**settings) -> models.MAML:
    torch.manual_seed(2)
    return models.MAML(models.Conv4(hidden=4, image_size=8), 3, inner_rate=0.3, **settings)


def l2f(learner: models.MetaLearner, **settings) -> models.Conditioned:
    return models.Conditioned(models.GradientMeans(**settings), models.Attenuation(), learner)


def test_l2f_whose_attenuation_is_one_is_maml_to_the_bit():
    """Catches an inner loop, a loss or a head of its own beside the learner's."""
    # Task by task: mapped over, weights of a task's own take another kernel of convolution.
    plain, conditioned = maml(inner_steps=2, chunk=1), l2f(maml(inner_steps=2, chunk=1))
    with torch.no_grad():
        conditioned.conditioning.generator[2].weight.zero_()
        conditioned.conditioning.generator[2].bias.fill_(40.0)  # whose sigmoid is 1 in single precision
    tasks = episodes(tasks=1, dtype=torch.float32)  # of several the order of sums is another
    for a, b in zip(plain.map(plain.objective, tasks), conditioned.map(conditioned.objective, tasks), strict=False):
        assert torch.equal(a, b)
    ours, theirs = meta_gradient(conditioned, tasks), meta_gradient(plain, tasks)
    assert all(torch.equal(ours[f"learner.{name}"], gradient) for name, gradient in theirs.items())


def test_l2f_step_by_step():
    """Catches gradients at other parameters, means of absolute values, attenuated norms and other orders of tensors:
    one task by hand."""
    learner = l2f(maml(inner_steps=1)).double()
    task = episodes(tasks=1)[0]
    network = learner.learner.learner
    start, fixed = split_parameters(network, False)

    def loss(parameters):
        return F.cross_entropy(functional_call(network, parameters | fixed, (task.support.x,)), task.support.y)

    leaves = {n: p.detach().requires_grad_() for n, p in start.items()}
    means = torch.stack([g.mean() for g in torch.autograd.grad(loss(leaves), list(leaves.values()))])
    torch.testing.assert_close(learner.embed_task(task.support), means)
    first, _, second = learner.conditioning.generator
    gamma = 1 / (1 + (-(second.weight @ (first.weight @ means + first.bias).clamp(min=0) + second.bias)).exp())
    scaled = {n: (g * p).detach().requires_grad_() for g, (n, p) in zip(gamma, start.items(), strict=True)}
    steps = torch.autograd.grad(loss(scaled), list(scaled.values()))
    moved = {n: p - 0.3 * g for (n, p), g in zip(scaled.items(), steps, strict=True)}
    expected = functional_call(network, moved | fixed, (task.query_x,))
    torch.testing.assert_close(learner.predict(learner.adapt(task.support), task.query_x), expected)


def test_embedding_of_l2f_is_a_constant_unless_told_otherwise():
    """Catches the gradient of the embedding in the released L2F's meta-gradient, and its absence in ALFA's copy."""
    found = [meta_gradient(l2f(maml(), differentiable=d).double(), episodes()) for d in (False, True)]
    name = "learner.learner.backbone.convs.0.weight"
    assert (found[0][name] - found[1][name]).norm() > 1e-3 * found[0][name].norm()
    assert torch.equal(found[0]["conditioning.generator.0.weight"], found[1]["conditioning.generator.0.weight"])


def test_label_attention_gives_each_group_an_initialisation_of_its_own():
    """Catches a mixture where a choice is meant: Multi-MAML's gradient of a group is MAML's from its initialisation."""
    torch.manual_seed(0)
    learner = models.Conditioned(models.TaskLabel(3), models.Experts(3, "label"), maml()).double()
    tasks = batch("classification")
    gradient = meta_gradient(learner, tasks)
    for group in (1, 2):
        plain = maml().double()
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                if f"{name.replace('.', '_')}" in learner.conditioning.others:
                    parameter.copy_(learner.conditioning.others[name.replace(".", "_")][group - 1])
        loss, *_ = plain.objective(tasks[group])
        loss.backward()
        for name, parameter in plain.named_parameters():
            if name.replace(".", "_") in learner.conditioning.others:
                own = gradient[f"conditioning.others.{name.replace('.', '_')}"][group - 1]
                torch.testing.assert_close(3 * own, parameter.grad)


def test_generated_tensors_in_closed_form():
    """Catches a product in another order, rows for columns, and a convolution's weights flattened another way."""
    torch.manual_seed(0)
    network = models.ProtoNet(models.Conv4(hidden=4, image_size=8)).double()
    parameters = dict(network.named_parameters())
    e = torch.randn(5, dtype=torch.float64)
    low, rows = models.LowRank(2), models.EmbeddingRows("all")
    for part in (low, rows):
        part.attach(network, 5)
        part.double()
        for p in part.parameters():
            torch.nn.init.normal_(p)
    name = "backbone.convs.1.weight"  # (4, 4, 3, 3)
    key = name.replace(".", "_")
    a, b, c = low.left[key], low.right[key], low.code[key]
    expected = parameters[name].clone()
    for o, i in torch.cartesian_prod(torch.arange(4), torch.arange(36)).tolist():
        change = sum(a[o, r] * (c[r] @ e) * b[r, i] for r in range(2))
        expected[o, i // 9, i % 9 // 3, i % 3] += change
    torch.testing.assert_close(low(e, parameters)[name], expected)
    bias = "backbone.convs.1.bias"
    torch.testing.assert_close(low(e, parameters)[bias], parameters[bias] + low.code[bias.replace(".", "_")] @ e)
    expected = parameters[name].clone()
    for o, i in torch.cartesian_prod(torch.arange(4), torch.arange(36)).tolist():
        expected[o, i // 9, i % 9 // 3, i % 3] += rows.scales[key][o] * e[i % 5]
    torch.testing.assert_close(rows(e, parameters)[name], expected)
    assert low(e, parameters).keys() > rows(e, parameters).keys()
    assert not any("norms" in n for n in low(e, parameters))


@pytest.mark.parametrize("form", ["film", "sigmoid", "softmax"])
def test_modulation_in_closed_form(form):
    """Catches γ for 1 + γ, scales of another layer, and shifts where there are none."""
    torch.manual_seed(0)
    network = models.ProtoNet(models.MLP(3, (4, 2))).double()
    modulation = models.Modulation(form)
    modulation.attach(network, 5)
    modulation.double()
    torch.nn.init.normal_(modulation.generator.weight)
    e, x = torch.randn(5, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    values = modulation(e, {})
    found = with_values(network, values, lambda: network.embed(x))
    g = modulation.generator.weight @ e
    shapes = {
        "film": lambda z: 1 + z,
        "sigmoid": lambda z: 1 / (1 + (-z).exp()),
        "softmax": lambda z: z.exp() / z.exp().sum(),
    }
    scales, shifts = [shapes[form](g[:4]), shapes[form](g[4:6])], [0, 0]
    if form == "film":
        shifts = [g[6:10], g[10:12]]
    z = x
    for layer, scale, shift in zip(network.backbone.layers, scales, shifts, strict=True):
        z = F.relu(scale * (z @ layer.weight.T + layer.bias) + shift)
    torch.testing.assert_close(found, z)


def test_conditionings_start_from_the_learner():
    """Catches a start away from the learner's own initialisation, which a short training does not get back to."""
    e = torch.randn(4)
    for conditioning, learner in (
        (models.LowRank(), maml()),
        (models.EmbeddingRows(), maml()),
        (models.Rates(), maml(learned_rates=True)),
    ):
        conditioning.attach(learner, 4)
        parameters = dict(learner.named_parameters())
        values = conditioning(e, parameters)
        assert values and all(torch.equal(value, parameters[name]) for name, value in values.items())


def test_rates_multiply_the_learned_ones():
    """Catches rates that are added to, or that the inner loop does not take."""
    learner = maml(learned_rates=True)
    rates = models.Rates()
    rates.attach(learner, 2)
    torch.nn.init.constant_(rates.generator.weight, 0.5)
    factor = rates(torch.tensor([1.0, 2.0]), dict(learner.named_parameters()))["rates"] / learner.rates
    torch.testing.assert_close(factor, torch.full_like(factor, 4.4816890703))  # exp(1.5)
    task = episodes(tasks=1, dtype=torch.float32)[0]
    moved = with_values(learner, {"rates": torch.zeros_like(learner.rates)}, lambda: learner.adapt(task.support))
    start = dict(learner.learner.named_parameters())
    assert all(torch.equal(p, start[n]) for n, p in moved.parameters.items())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: models.Conditioned(models.GradientMeans(), models.Attenuation(), models.ProtoNet(models.Conv4())),
            "support loss",
        ),
        (lambda: models.Conditioned(models.SetEncoder(models.Conv4()), models.Rates(), maml()), "no learned rates"),
        (lambda: models.Conditioned(models.SetEncoder(models.Conv4()), models.UpdateRule(), maml()), "code_size 32"),
        (lambda: models.Conditioned(models.TaskLabel(4), models.Experts(3, "label"), maml()), "4 weights"),
        (
            lambda: models.Conditioned(models.TaskLabel(4), models.Modulation(), models.RL2(2, 2)),
            "training step",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(make, said):
    """Catches a combination that trains without a word and conditions nothing."""
    with pytest.raises(ConfigError, match=said):
        make()


def test_oracle_needs_groups():
    """Catches an oracle that is told nothing."""
    learner = models.Conditioned(models.TaskLabel(3), models.Modulation(), maml())
    with pytest.raises(ConfigError, match="groups are known"):
        learner.adapt(episodes(dtype=torch.float32)[0].support)
