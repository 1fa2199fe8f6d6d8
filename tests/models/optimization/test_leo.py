"""LEO's codes, draws, penalties and inner loops against restatements; its meta-gradient against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal

from datamodules.core.episodes import Support, Task
from models import LEO, MLP, Conv4
from tests.support.gradients import assert_is_gradient, episodes, gradients_of

DOUBLE = torch.float64
PENALTIES = {"kl_weight": 0.3, "encoder_penalty": 0.2, "l2_penalty": 0.01, "orthogonality": 0.5}


def small(**settings) -> LEO:
    torch.manual_seed(2)
    defaults = {"latents": 3, "inner_steps": 2, "fine_tuning_steps": 2, "inner_rate": 0.3, "fine_tuning_rate": 0.2}
    return LEO(Conv4(hidden=4, image_size=8), **(defaults | PENALTIES | settings)).double()


def on_features(**settings) -> LEO:
    """A learner whose backbone leaves its input, (N, 5), as it is, and whose Gaussians and rates all differ."""
    torch.manual_seed(3)
    defaults = {"latents": 3, "dropout": 0.0, "inner_steps": 2, "fine_tuning_steps": 2, "fine_tuning_rate": 0.1}
    learner = LEO(MLP(5, hidden=()), **(defaults | PENALTIES | settings)).double()
    with torch.no_grad():
        learner.inner_rate.uniform_(0.1, 0.5)
        learner.fine_tuning_rate.uniform_(0.05, 0.3)
    return learner


def feature_task(shots=(2, 1, 2), queries=4) -> Task:
    g = torch.Generator().manual_seed(4)
    y = torch.arange(3).repeat_interleave(torch.tensor(shots))
    x = torch.randn(len(y), 5, generator=g, dtype=DOUBLE)
    query_x = torch.randn(queries, 5, generator=g, dtype=DOUBLE)
    return Task(Support(x, y, 3), query_x, torch.arange(queries) % 3)


def arrays(learner: LEO) -> dict[str, np.ndarray]:
    return {n: p.detach().numpy() for n, p in learner.named_parameters()}


def encoded(learner: LEO, support: Support) -> tuple[np.ndarray, np.ndarray]:
    """Equation 2 by loops: mean and deviation of every class's code."""
    w, x, y = arrays(learner), support.x.numpy(), support.y.numpy()
    layers = [w[f"relation.{i}.weight"] for i in (0, 2, 4)]
    out = np.zeros((support.ways, 2 * learner.decoder.in_features))
    for n in range(support.ways):
        count = 0
        for i in np.flatnonzero(y == n):
            for j in range(len(x)):
                h = np.concatenate([w["encoder.weight"] @ x[i], w["encoder.weight"] @ x[j]])
                for k, layer in enumerate(layers):
                    h = layer @ h
                    h = np.maximum(h, 0) if k < 2 else h
                out[n] += h
                count += 1
        out[n] /= count
    mean, log_deviation = np.split(out, 2, 1)
    return mean, np.exp(log_deviation)


def test_codes_are_means_over_all_pairs():
    """Catches pairs of a class with itself alone, a swapped pair, means that forget a class's own number of shots."""
    learner, task = on_features(), feature_task()
    q = learner.encode(task.support.x, task.support)
    mean, deviation = encoded(learner, task.support)
    np.testing.assert_allclose(q.mean.detach(), mean, rtol=1e-10)
    np.testing.assert_allclose(q.stddev.detach(), deviation, rtol=1e-10)


def test_divergence_from_the_prior_in_closed_form_and_by_draws():
    """Catches KL with its arguments swapped or deviations taken for variances, and draws of another Gaussian."""
    learner, task = on_features().train(), feature_task()
    kl = learner.objective(task)[2]["metrics"]["kl"]
    mean, deviation = encoded(learner, task.support)
    np.testing.assert_allclose(kl, np.mean((deviation**2 + mean**2 - 1) / 2 - np.log(deviation)), rtol=1e-10)
    q = learner.encode(task.support.x, task.support)
    with torch.no_grad():
        z = torch.stack([learner.draw(q) for _ in range(20_000)])
        ratio = (q.log_prob(z) - Normal(0.0, 1.0).log_prob(z)).mean((1, 2))
        assert abs(ratio.mean() - kl) < 5 * ratio.std() / math.sqrt(len(z))
        assert ((z.mean(0) - q.mean).abs() < 5 * q.stddev / math.sqrt(len(z))).all()
        assert ((z.var(0) / q.variance - 1).abs() < 5 * math.sqrt(2 / len(z))).all()


def test_decoder_draws_weights_around_glorots_deviation():
    """Catches means and deviations of the decoder swapped, and weights not drawn, or not around √(2/(in+out))."""
    learner = on_features().train()
    z = torch.randn(3, 3, dtype=DOUBLE)
    both = z.numpy() @ arrays(learner)["decoder.weight"].T
    mean, deviation = both[:, :5], math.sqrt(2 / (5 + 3)) * np.exp(both[:, 5:])
    with torch.no_grad():
        drawn = torch.stack([learner.draw(learner.decode(z)) for _ in range(20_000)]).numpy()
        assert (abs(drawn.mean(0) - mean) < 5 * deviation / math.sqrt(len(drawn))).all()
        assert (abs(drawn.var(0) / deviation**2 - 1) < 5 * math.sqrt(2 / len(drawn))).all()
        np.testing.assert_allclose(learner.eval().draw(learner.decode(z)), mean, rtol=1e-10)
        still = on_features(stochastic=False).train()
        np.testing.assert_allclose(still.draw(still.decode(z)), mean, rtol=1e-10)


def softmax_gradient(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Of the sum over classes of their examples' mean cross-entropy, by the weights."""
    logits = x @ w.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return ((p - np.eye(len(w))[y]) / np.bincount(y)[y, None]).T @ x


@pytest.mark.parametrize("steps", [(2, 3), (0, 2), (2, 0), (0, 0)])
def test_both_inner_loops_by_hand(steps):
    """Catches a step on the codes with the weights' rate, weights that are not decoded anew, and a loop left out."""
    learner = on_features(inner_steps=steps[0], fine_tuning_steps=steps[1]).eval()
    task = feature_task()
    w, x, y = arrays(learner), task.support.x.numpy(), task.support.y.numpy()
    matrix = w["decoder.weight"][:5]
    z, _ = encoded(learner, task.support)
    path = [z @ matrix.T]
    for _ in range(steps[0]):
        z = z - w["inner_rate"] * (softmax_gradient(x, y, z @ matrix.T) @ matrix)
        path.append(z @ matrix.T)
    weights = path[-1]
    for _ in range(steps[1]):
        weights = weights - w["fine_tuning_rate"] * softmax_gradient(x, y, weights)
        path.append(weights)
    with torch.no_grad():
        states = [state.weights for state in learner.adaptation(task.support)]
        np.testing.assert_allclose(torch.stack(states), path, rtol=1e-9)
        logits = learner.predict(learner.adapt(task.support), task.query_x)
    np.testing.assert_allclose(logits, task.query_x.numpy() @ weights.T, rtol=1e-9)


def test_objective_is_query_loss_and_four_penalties():
    """Catches a penalty that is left out, halved or weighed by another's weight, against its definition in numpy."""
    learner, task = on_features(stochastic=False).train(), feature_task()
    loss, prediction, kept = learner.objective(task)
    w = arrays(learner)
    z, _ = encoded(learner, task.support)
    codes = learner.codes(task.support.x, torch.from_numpy(z), task.support)
    moved = ((list(codes)[-1].detach().numpy() - z) ** 2).mean()
    assert kept["metrics"]["encoder_penalty"].item() == pytest.approx(moved, rel=1e-9)
    squares = sum((w[n] ** 2).sum() for n in w if n.endswith("weight"))
    decoder, latents = w["decoder.weight"], 3
    off = 0.0
    for i in range(latents):
        for j in range(latents):
            a, b = decoder[:, i], decoder[:, j]
            off += (a @ b / math.sqrt((a @ a) * (b @ b)) - (i == j)) ** 2 / latents**2
    expected = F.cross_entropy(prediction, task.query_y).item() + 0.2 * moved + 0.01 * squares + 0.5 * off
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    drawing = on_features().train()
    torch.manual_seed(0)
    whole, prediction, kept = drawing.objective(task)
    metrics = kept["metrics"]
    rest = F.cross_entropy(prediction, task.query_y) + 0.2 * metrics["encoder_penalty"] + 0.01 * squares + 0.5 * off
    assert whole.item() == pytest.approx((rest + 0.3 * metrics["kl"]).item(), rel=1e-10)
    assert metrics["kl"] > 0.01


def check_meta_gradient(learner: LEO, batch) -> None:
    """Against central differences with the noise held fixed, the adapted codes of the encoder penalty too."""
    penalty, held = learner.encoder_penalty, []
    codes = learner.codes

    def objective(fixed: bool = False) -> torch.Tensor:
        torch.manual_seed(5)
        if not fixed:
            return learner.map(learner.objective, batch)[0].mean()
        # The penalty by hand: its first argument is what it was at the point itself.
        learner.encoder_penalty = 0.0
        starts = []
        learner.codes = lambda x, z, support: starts.append(z) or codes(x, z, support)
        rest = learner.map(learner.objective, batch)[0].mean()
        learner.encoder_penalty, learner.codes = penalty, codes
        distance = torch.stack([(h - z).square().mean() for h, z in zip(held, starts, strict=True)]).mean()
        return rest + penalty * distance

    learner.codes = lambda x, z, support: [held.append(c) or c for c in codes(x, z, support)][-1:]
    with torch.no_grad():
        objective()
    learner.codes = codes
    assert len(held) == len(batch) * (learner.inner_steps + 1)
    held = held[learner.inner_steps :: learner.inner_steps + 1]
    learner.zero_grad()
    objective().backward()
    learned = [(n, p) for n, p in learner.named_parameters() if p.requires_grad]
    assert_is_gradient(gradients_of(learner), learned, lambda: objective(fixed=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_norm": "running"},
        {"batch_norm": "support", "dropout": 0.0},
        {"batch_norm": "transductive", "inner_steps": 1},
        {"batch_norm": "none", "stochastic": False},
        {"batch_norm": "per_query", "conditional": False, "fine_tuning_steps": 0},
    ],
)
def test_meta_gradient_equals_finite_differences(settings):
    """Catches first-order steps in latent or weight space, noise or rates outside of the graph, and a gradient of the
    encoder penalty through the adapted codes, or none."""
    check_meta_gradient(small(**({"dropout": 0.3, "chunk": 1} | settings)).train(), episodes(tasks=2))


def test_vmapped_tasks_have_the_gradient_of_a_loop():
    """Catches a second derivative that is another one under vmap."""
    batch, gradients = episodes(), []
    for chunk in (1, 3):
        learner = small(stochastic=False, dropout=0.0, chunk=chunk).train()
        learner.map(learner.objective, batch)[0].mean().backward()
        gradients.append([p.grad for p in learner.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_evaluation_draws_nothing_and_depends_on_the_support_set_alone():
    """Catches dropout or draws in evaluation, and a result that depends on batch or order of the support set."""
    learner, batch = small(batch_norm="support").eval(), episodes(tasks=4)
    with torch.inference_mode():
        expected = learner.predictions(batch)
        before = torch.random.get_rng_state()
        for chunk in (1, 3):
            learner.chunk = chunk
            torch.testing.assert_close(learner.predictions(batch), expected, rtol=1e-8, atol=1e-10)
        assert torch.equal(torch.random.get_rng_state(), before)
        x, y = batch.support_x[1], batch.support_y[1]
        order = torch.randperm(len(y))
        state = learner.adapt(Support(x[order], y[order], 3))
        torch.testing.assert_close(learner.predict(state, batch.query_x[1]), expected[1], rtol=1e-8, atol=1e-10)


def test_codes_from_the_prior_know_nothing_of_the_task():
    """Catches an ablation that still encodes: before the first step every class has the same classifier."""
    learner, task = on_features(conditional=False), feature_task()
    with torch.no_grad():
        assert not learner.eval().encode(task.support.x, task.support).mean.any()
        drawn = torch.stack([learner.train().draw(learner.encode(task.support.x, task.support)) for _ in range(10_000)])
    assert (drawn.mean(0).abs() < 0.06).all() and ((drawn.std(0) - 1).abs() < 0.05).all()


def clipped(learner: LEO, gradients: dict[str, torch.Tensor], **trainer) -> dict[str, np.ndarray]:
    for name, parameter in learner.named_parameters():
        parameter.grad = gradients[name].clone()
    learner.clip_gradients = lambda *told: trainer.update(told=told)
    learner.configure_gradient_clipping(torch.optim.SGD(learner.parameters(), 1.0), 0.5, "norm")
    assert trainer["told"][1:] == (0.5, "norm")
    return {n: None if p.grad is None else p.grad.numpy() for n, p in learner.named_parameters()}


def test_meta_gradient_is_clipped_by_value_and_then_by_norm(recwarn):
    """Catches the other order, the norm of all tensors together, and a Trainer's own clipping that is dropped."""
    learner = on_features(clip_value=0.1, clip_norm=0.25)
    g = torch.Generator().manual_seed(0)
    gradients = {n: 0.2 * torch.randn(p.shape, generator=g, dtype=DOUBLE) for n, p in learner.named_parameters()}
    got = clipped(learner, gradients)
    bound = 0
    for name, gradient in gradients.items():
        expected = np.clip(gradient.numpy(), -0.1, 0.1)
        norm = np.sqrt((expected**2).sum())
        bound += norm > 0.25
        np.testing.assert_allclose(got[name], expected * min(1, 0.25 / norm), rtol=1e-5)
    assert 0 < bound < len(gradients)


def test_a_gradient_that_is_not_finite_lets_weights_decay():
    """Catches one NaN that spoils all weights for good."""
    learner = on_features(clip_value=10.0, clip_norm=10.0)
    gradients = {n: torch.ones_like(p) for n, p in learner.named_parameters()}
    gradients["inner_rate"][1] = math.nan
    with pytest.warns(UserWarning, match="not finite"):
        got = clipped(learner, gradients)
    for name, parameter in learner.named_parameters():
        if name.endswith("weight"):
            np.testing.assert_allclose(got[name], 1e-4 * parameter.detach().numpy(), rtol=1e-5)
        else:
            assert got[name] is None
