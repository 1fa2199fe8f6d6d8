"""CAVIA: contexts, predictions and meta-gradients against closed forms, plain autograd and finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules import Sinusoid
from datamodules.core.episodes import Episodes
from models import CAVIA, MLP, Conv4
from models.task_embedding.cavia import CONTEXT
from tests.support.gradients import assert_equals_finite_differences, episodes, meta_gradient
from tests.support.toy import ToyImages, train_for


def functions(tasks: int = 3, shots: int = 6, queries: int = 5) -> Episodes:
    """Sinusoids in float64."""
    batch = Sinusoid(shots=shots, queries=queries).distribution("test").sample(range(tasks))
    return batch.apply(lambda t: t.double() if t.is_floating_point() else t)


def some(batch: Episodes, rows: list[int]) -> Episodes:
    return batch.apply(lambda t: t[rows])


def concatenated(**settings) -> CAVIA:
    torch.manual_seed(2)
    return CAVIA(MLP(1 + 3, [7, 6]), **{"context_size": 3, "clamp": None, "inner_steps": 2, **settings}).double()


def film(**settings) -> CAVIA:
    torch.manual_seed(2)
    given = {"outputs": 3, "context_size": 4, "conditioning": "film", "clamp": None, "inner_steps": 2, **settings}
    learner = CAVIA(Conv4(hidden=5, image_size=16, downsample="pool"), **given).double()
    with torch.no_grad():  # biases of zero lie on kinks of ReLU
        for parameter in learner.learner.backbone.backbone.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return learner


def reference(learner: CAVIA, x: Tensor, context: Tensor, blocks: tuple[int, ...] = (3,)) -> Tensor:
    """The published network of images, written out: conv, batch norm, max pooling, γ x + β, ReLU; γ as it comes."""
    contextual = learner.learner.backbone
    conv4, films = contextual.backbone, dict(zip(blocks, contextual.films, strict=True))
    for block in range(4):
        x = F.conv2d(x, conv4.convs[block].weight, conv4.convs[block].bias, padding=1)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        scale, shift = (t[None, :, None, None] for t in conv4.norms[block].parameters())
        x = F.max_pool2d(scale * (x - mean) / (var + 1e-5).sqrt() + shift, 2)
        if block + 1 in films:
            modulation = films[block + 1].weight @ context + films[block + 1].bias
            gamma, beta = modulation[:5], modulation[5:]
            x = gamma[None, :, None, None] * x + beta[None, :, None, None]
        x = x.relu()
    return x.flatten(1) @ learner.learner.head.weight.T + learner.learner.head.bias


def test_steps_of_a_network_that_is_linear_in_the_context_in_closed_form():
    """Catches another rate, a sum for the mean, a context that does not begin at zero, or steps on anything else."""
    torch.manual_seed(0)
    learner = CAVIA(MLP(1 + 3, []), context_size=3, inner_rate=0.7, inner_steps=2).double()
    task = functions(1)[0]
    weight, bias = (p.detach() for p in (learner.learner.head.weight[0], learner.learner.head.bias))
    residual = (weight[0] * task.support.x[:, 0] + bias - task.support.y[:, 0]).mean()
    first = -0.7 * 2 * residual * weight[1:]
    second = first - 0.7 * 2 * (residual + weight[1:] @ first) * weight[1:]
    states = list(learner.adaptation(task.support))
    for state, expected in zip(states, (torch.zeros(3).double(), first, second), strict=True):
        torch.testing.assert_close(state.parameters[CONTEXT], expected)
    torch.testing.assert_close(learner.embed_task(task.support), second)
    assert learner.embedding_size == 3
    expected = task.query_x * weight[0] + second @ weight[1:] + bias
    torch.testing.assert_close(learner.predict(states[-1], task.query_x), expected)


@pytest.mark.parametrize("blocks", [(3,), (1, 4)])
def test_contexts_and_predictions_of_images_against_the_published_network(blocks):
    """Catches 1 + γ for γ, γ and β exchanged, another block than the third, modulation before pooling or after ReLU."""
    learner, task = film(blocks=blocks), episodes(tasks=1, size=16)[0]
    context = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    for state in learner.adaptation(task.support):
        torch.testing.assert_close(state.parameters[CONTEXT], context)
        expected = reference(learner, task.query_x, context, blocks)
        torch.testing.assert_close(learner.predict(state, task.query_x), expected)
        loss = F.cross_entropy(reference(learner, task.support.x, context, blocks), task.support.y)
        context = context - 1.0 * torch.autograd.grad(loss, context)[0]


def test_meta_gradient_of_concatenated_contexts_equals_finite_differences():
    """Catches inner gradients that are constants to the outer one."""
    assert_equals_finite_differences(concatenated(chunk=2), functions())


@pytest.mark.parametrize("batch_norm", ["transductive", "support"])
def test_meta_gradient_of_modulating_contexts_equals_finite_differences(batch_norm):
    """Catches layers of γ and β that are constants to the meta-gradient, and batch norm that is wrong under vmap."""
    assert_equals_finite_differences(film(batch_norm=batch_norm), episodes(tasks=2, size=16))


def test_first_order_is_the_gradient_at_contexts_held_constant():
    """Catches an option without effect, or one that also cuts the shared parameters off."""
    learner, batch = concatenated(first_order=True), functions()
    found, full = meta_gradient(learner, batch), meta_gradient(concatenated(), batch)
    learner.zero_grad()
    losses = []
    for i in range(len(batch)):
        task = batch[i]
        state = learner.adapt(task.support)
        constant = state._replace(parameters={CONTEXT: state.parameters[CONTEXT].detach()})
        losses.append(F.mse_loss(learner.predict(constant, task.query_x), task.query_y))
    torch.stack(losses).mean().backward()
    for name, parameter in learner.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
    first = "learner.backbone.backbone.layers.0.weight"
    assert (found[first] - full[first]).norm() > 0.01 * full[first].norm()


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("built", [concatenated, film])
def test_each_tasks_meta_gradient_is_clamped_before_the_mean(built, chunk):
    """Catches a clamp of the mean, of the norm or of the inner gradient, and one that changes the loss: against a loop
    over tasks, by plain autograd."""
    batch = functions() if built is concatenated else episodes(size=16)
    free, tasks = built(), len(batch)
    names = [name for name, _ in free.named_parameters()]
    losses = [free.objective(batch[i])[0] for i in range(tasks)]
    own = [torch.autograd.grad(loss, list(free.parameters())) for loss in losses]
    limit = 0.5 * torch.cat([g.flatten() for g in own[0]]).abs().max().item()
    learner = built(clamp=limit, chunk=chunk)
    found = meta_gradient(learner, batch)
    binds = False
    for name, gradients in zip(names, zip(*own, strict=True), strict=True):
        each = torch.stack(gradients)
        torch.testing.assert_close(found[name], each.clamp(-limit, limit).mean(0))
        binds |= not torch.allclose(each.clamp(-limit, limit).mean(0), each.mean(0).clamp(-limit, limit))
    assert binds
    loss, prediction = learner.map(learner.objective, batch)
    torch.testing.assert_close(loss, torch.stack(losses))
    torch.testing.assert_close(prediction[1], free.objective(batch[1])[1])


def test_a_clamp_that_never_binds_trains_as_none_does():
    """Catches running averages that are lost, or are the inner loop's, where the meta-gradient is taken by task."""

    def trained(clamp: float | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        backbone = Conv4(hidden=4, image_size=16, downsample="pool")
        settings = {"outputs": 3, "conditioning": "film", "inner_steps": 2, "batch_norm": "running", "clamp": clamp}
        learner = CAVIA(backbone, **settings, optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1)).double()
        train_for(learner, ToyImages(ways=3, queries=2, meta_batch_size=4), 3, precision="64-true")
        return learner.state_dict()

    free, clamped = trained(None), trained(1e9)
    assert not torch.equal(free["learner.backbone.backbone.norms.2.running_mean"], torch.zeros(4).double())
    for name, value in free.items():
        torch.testing.assert_close(clamped[name], value, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("built", [concatenated, film])
def test_every_task_begins_at_zero(built):
    """Catches a context that is carried from task to task, or that is a parameter: by the order of the tasks."""
    batch = functions() if built is concatenated else episodes(size=16)
    learner = built(clamp=10.0)
    alone = [learner.embed_task(batch[i].support) for i in range(3)]
    for order in ([0, 1, 2], [2, 0, 1]):
        for i in order:
            torch.testing.assert_close(learner.embed_task(batch[i].support), alone[i], rtol=0, atol=0)
        together = learner.map(lambda task: learner.embed_task(task.support), some(batch, order))
        torch.testing.assert_close(together, torch.stack([alone[i] for i in order]))
    assert (torch.stack(alone).diff(dim=0).abs().amax(1) > 1e-4).all()
    assert not learner.learner.backbone.context.any()
    assert not [name for name in (*learner.state_dict(), *dict(learner.named_parameters())) if "context" in name]


def test_the_context_alone_adapts():
    """Catches an inner loop that moves the head or the network along."""
    learner, task = concatenated(), functions(1)[0]
    state = learner.adapt(task.support)
    moved = [n for n, p in learner.learner.named_parameters() if n in state.parameters and state.parameters[n] is not p]
    assert not moved
    assert state.parameters[CONTEXT].any()


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (lambda: CAVIA(MLP(5, [4]), context_size=5), "leaves none beside a context of 5"),
        (lambda: CAVIA(Conv4()), "conditioning film"),
        (lambda: CAVIA(MLP(3, [4, 4]), conditioning="film"), "2 places to modulate"),
        (lambda: CAVIA(Conv4(), conditioning="film", blocks=[0]), "counted from 1"),
        (lambda: CAVIA(MLP(6, [4]), clamp=0.0), "must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(build, what):
    """Catches an error of torch, or silence, in place of a line that names the setting."""
    with pytest.raises(ValueError, match=what):
        build()
