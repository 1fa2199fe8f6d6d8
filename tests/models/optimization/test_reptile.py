"""Reptile: its direction in closed form, its mini-batches, its Adam and the statistics of single queries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from app.cli.builder import main
from datamodules.core.episodes import Episodes
from models import MAML, MLP, Conv4, Reptile
from models.core.inner_loop import last
from tests.support.gradients import episodes, meta_gradient
from tests.support.toy import command, weights

RATE = 0.05


def linear(tasks: int, examples: int, **settings) -> tuple[Reptile, Episodes, torch.Tensor]:
    """Linear regression: a learner, tasks, and θ with the bias last."""
    torch.manual_seed(0)
    settings = {"inner_optimizer": "sgd", "inner_rate": RATE, "inner_batch": examples, **settings}
    learner = Reptile(MLP(in_features=2, hidden=()), outputs=1, **settings).double()
    x = torch.randn(tasks, examples, 2, dtype=torch.float64)
    y = torch.randn(tasks, examples, 1, dtype=torch.float64)
    batch = Episodes(x, y, x[:, :3], y[:, :3], torch.arange(tasks), 0, tasks)
    head = learner.learner.head
    return learner, batch, torch.cat([head.weight[0], head.bias]).detach()


def quadratics(batch: Episodes) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each task's mean squared error as θᵀAθ/2 - bᵀθ + c."""
    ones = torch.ones(*batch.support_y.shape[:2], 1, dtype=torch.float64)
    z = torch.cat([batch.support_x, ones], -1)
    n = z.shape[1]
    return [(2 * zi.T @ zi / n, 2 * zi.T @ yi[:, 0] / n) for zi, yi in zip(z, batch.support_y, strict=True)]


def direction(learner: Reptile, batch: Episodes) -> torch.Tensor:
    gradient = meta_gradient(learner, batch)
    return torch.cat([gradient["learner.head.weight"][0], gradient["learner.head.bias"]])


@pytest.mark.parametrize("steps", [1, 4])
def test_direction_on_quadratics_has_the_closed_form(steps):
    """Catches a direction of wrong sign or scale, and k > 1 taken for k = 1.

    One step of full batches is α times the gradient of the expected loss, joint training; k steps end at
    φ = θ* + (I - αA)^k (θ - θ*).
    """
    learner, batch, theta = linear(tasks=3, examples=6, inner_steps=steps)
    expected = torch.zeros(3, dtype=torch.float64)
    for a, b in quadratics(batch):
        optimum = torch.linalg.solve(a, b)
        shrink = torch.linalg.matrix_power(torch.eye(3, dtype=torch.float64) - RATE * a, steps)
        expected += (theta - optimum - shrink @ (theta - optimum)) / 3
    torch.testing.assert_close(direction(learner, batch), expected, rtol=1e-10, atol=1e-12)
    joint = sum((a @ theta - b for a, b in quadratics(batch)), torch.zeros(3, dtype=torch.float64)) / 3
    same = torch.allclose(expected, RATE * joint, rtol=1e-6)
    assert same == (steps == 1)


def test_expected_direction_over_mini_batches_is_that_of_the_paper():
    """Catches mini-batches that are all alike, or drawn with replacement, and a step that forgets the one before.

    Two mini-batches of one example, i and then j ≠ i, move θ by α(g_i + g_j - αH_j g_i), exactly on a quadratic
    (Nichol et al. 2018, eq. 26). Over tasks every ordered pair occurs, each as often.
    """
    learner, batch, theta = linear(tasks=1200, examples=4, inner_steps=2, inner_batch=1)
    batch.support_x, batch.support_y = (t[:1].expand_as(t) for t in (batch.support_x, batch.support_y))
    z = torch.cat([batch.support_x[0], torch.ones(4, 1, dtype=torch.float64)], -1)
    hessian = [2 * torch.outer(v, v) for v in z]
    gradient = [h @ theta - 2 * v * y for h, v, y in zip(hessian, z, batch.support_y[0], strict=True)]
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    moves = torch.stack([RATE * (gradient[i] + gradient[j] - RATE * hessian[j] @ gradient[i]) for i, j in pairs])
    end = learner.map(lambda task: last(learner.inner_loop(task.support))[0], batch)
    moved = theta - torch.cat([end["head.weight"][:, 0], end["head.bias"]], -1)
    distance, pair = torch.cdist(moved, moves).min(-1)
    assert distance.max() < 1e-7
    counts = torch.bincount(pair, minlength=12)
    assert ((counts - 100).abs() < 50).all()  # five standard deviations
    assert ((direction(learner, batch) - moves.mean(0)).abs() < 5 * moves.std(0) / 1200**0.5).all()


def test_mini_batches_pass_through_the_shuffled_examples():
    """Catches an example met twice before another was met once."""
    learner = Reptile(MLP(), outputs=1, inner_steps=4, inner_batch=3, eval_inner_steps=3, eval_inner_batch=20)
    torch.manual_seed(1)
    order = learner.mini_batches(6).flatten().tolist()
    assert len(order) == 12
    assert sorted(order[:6]) == sorted(order[6:]) == list(range(6))
    assert order[:6] != order[6:]
    learner.eval()
    assert learner.mini_batches(6).shape == (3, 6)
    assert torch.equal(learner.mini_batches(6), learner.mini_batches(6))


def test_inner_adam_is_pytorchs_and_goes_on_from_the_last_tasks_moments(tmp_path):
    """Catches momentum inside, moments that start anew with every task, and a wrong bias correction."""
    learner, batch, theta = linear(tasks=1, examples=5, inner_steps=3, inner_optimizer="adam", inner_rate=0.01)
    parameter = theta.clone().requires_grad_()
    adam = torch.optim.Adam([parameter], lr=0.01, betas=(0.0, 0.999), eps=1e-8)
    z = torch.cat([batch.support_x[0], torch.ones(5, 1, dtype=torch.float64)], -1)
    for _ in range(2):  # the second task meets the state that the first one left
        with torch.no_grad():
            parameter.copy_(theta)
        for _ in range(3):
            adam.zero_grad()
            F.mse_loss(z @ parameter, batch.support_y[0, :, 0]).backward()
            adam.step()
        _, _, kept = learner.map(learner.objective, batch)
        torch.testing.assert_close(direction(learner, batch), theta - parameter.detach(), rtol=1e-9, atol=1e-12)
        learner.update_from_tasks({name: value.mean(0) for name, value in kept.items()})
    assert learner.updates == 6
    before = {n: b.clone() for n, b in learner.moments.named_buffers()}
    learner.eval()
    with torch.inference_mode():
        learner.adapt(batch[0].support)
    assert all(torch.equal(b, before[n]) for n, b in learner.moments.named_buffers())


def test_training_carries_the_moments_in_the_checkpoint(tmp_path):
    """Catches second moments that stay zero in a real run, or that a checkpoint lacks."""
    main(command("Reptile", tmp_path, "--model.inner_optimizer", "adam", steps=3))
    state = weights(tmp_path / "reptile" / "checkpoints" / "last.ckpt")
    assert state["updates"] == 15
    assert (state["moments.head_weight"] > 0).all()


def test_meta_optimizer_at_rate_one_moves_to_the_mean_of_the_ends():
    """Catches an outer step that is not an interpolation: at ε = 1 θ becomes the mean over tasks of φ."""
    learner, batch, theta = linear(tasks=3, examples=6, inner_steps=4)
    ends = []
    for a, b in quadratics(batch):
        phi = theta
        for _ in range(4):
            phi = phi - RATE * (a @ phi - b)
        ends.append(phi)
    torch.testing.assert_close(theta - direction(learner, batch), torch.stack(ends).mean(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("algorithm", [MAML, Reptile])
def test_per_query_normalises_each_query_with_the_support_set(algorithm):
    """Catches statistics of other queries, or of the query alone: against one forward pass for every query."""
    torch.manual_seed(2)
    learner = algorithm(Conv4(hidden=4, image_size=8), outputs=3, inner_steps=1, batch_norm="per_query").double().eval()
    task = episodes(tasks=1)[0]
    state = learner.adapt(task.support)
    got = learner.predict(state, task.query_x)
    for i, x in enumerate(task.query_x):
        together = torch.cat([task.support.x, x[None]])
        expected = torch.func.functional_call(learner.learner, state.parameters, (together,))[-1]
        torch.testing.assert_close(got[i], expected, rtol=1e-10, atol=1e-12)
