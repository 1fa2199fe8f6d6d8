"""HSML's encoder, hierarchy and gates against restatements in numpy, its meta-gradient against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import nn

from app.cli.builder import main
from datamodules import FourFamily
from datamodules.core.episodes import Episodes
from models import HSML, MAML, MLP, Conv2, Conv4
from models.core.metrics import mutual_information
from models.networks.recurrent import GRUCell
from models.task_embedding.clusters import FunctionLevel
from models.task_embedding.task_encoders import PoolingAutoencoder, RecurrentAutoencoder
from tests.contract.test_two_processes import TWO
from tests.support.gradients import assert_equals_finite_differences, episodes
from tests.support.processes import finished
from tests.support.toy import command, weights

DOUBLE = torch.float64


def images(**settings) -> HSML:
    torch.manual_seed(2)
    defaults = {"outputs": 3, "features": 6, "hidden": 5, "clusters": (3, 2, 1), "inner_rate": 0.3, "inner_steps": 2}
    return HSML(Conv4(hidden=3, image_size=8), **(defaults | settings)).double()


def functions(**settings) -> HSML:
    torch.manual_seed(2)
    defaults = {"outputs": 1, "features": 4, "hidden": 5, "clusters": (4, 2, 1), "inner_rate": 0.05, "inner_steps": 2}
    return HSML(MLP(hidden=(6, 6)), **(defaults | settings)).double()


def of_functions(**settings) -> HSML:
    return functions(encoder="functions", embedding=MLP(hidden=(6,)), reconstruction_weight=0.3, **settings)


def families(tasks=3) -> Episodes:
    batch = FourFamily(shots=4, queries=3, families=["line", "cubic"]).distribution("val").sample(range(tasks))
    batch.meta_batch = tasks
    return batch.apply(lambda t: t.double() / 4 if t.is_floating_point() else t)


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def gru(cell: GRUCell, x: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Cho et al.'s unit with torch's parameters, a hidden unit at a time."""
    wi, wh, bi, bh = (array(p) for p in (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh))
    size, new = len(h), np.zeros_like(h)
    for k in range(size):
        r, z = (sigmoid(wi[o + k] @ x + bi[o + k] + wh[o + k] @ h + bh[o + k]) for o in (0, size))
        n = np.tanh(wi[2 * size + k] @ x + bi[2 * size + k] + r * (wh[2 * size + k] @ h + bh[2 * size + k]))
        new[k] = (1 - z) * n + z * h[k]
    return new


# The encoder --------------------------------------------------------------------------------------------------------


def test_gated_unit_equals_torchs():
    """Catches gates in another order, a bias outside of the reset gate, and update for keep, also under vmap."""
    cell, whole = GRUCell(3, 4).double(), nn.GRU(3, 4, batch_first=True).double()
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(whole, f"{name}_l0").data.copy_(getattr(cell, name))
    x = torch.randn(5, 6, 3, dtype=DOUBLE)

    def read(one: torch.Tensor) -> torch.Tensor:
        states = [one.new_zeros(4)]
        for example in one.unbind(0):
            states.append(cell(example, states[-1]))
        return torch.stack(states[1:])

    ours, theirs = torch.func.vmap(read)(x), whole(x)[0]
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    ours_g = torch.autograd.grad((ours * weight).sum(), [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh])
    theirs_g = torch.autograd.grad((theirs * weight).sum(), list(whole.parameters()))
    for a, b in zip(ours_g, theirs_g, strict=True):
        torch.testing.assert_close(a, b)
    # Second derivatives, against differences of the gradient.
    start, direction = cell.weight_hh.detach().clone(), torch.randn_like(cell.weight_hh)

    def gradient(at: torch.Tensor) -> torch.Tensor:
        def value(w: torch.Tensor) -> torch.Tensor:
            state = torch.full((4,), 0.3, dtype=DOUBLE)
            return torch.func.functional_call(cell, {"weight_hh": w}, (x[0, 0], state)).sum()

        return torch.func.grad(value)(at)

    exact = torch.func.grad(lambda w: (gradient(w) * direction).sum())(start)
    numeric = (gradient(start + 1e-6 * direction) - gradient(start - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(exact, numeric, rtol=1e-6, atol=1e-9)


def test_recurrent_code_and_reconstruction_by_hand():
    """Catches the last state for the mean, examples reconstructed in the wrong order, and a decoder that sees them."""
    torch.manual_seed(1)
    autoencoder = RecurrentAutoencoder(3, 4).double()
    x = torch.randn(5, 3, dtype=DOUBLE)
    state, states, written, error = np.zeros(4), [], np.zeros(3), 0.0
    for example in array(x):
        state = gru(autoencoder.encoder, example, state)
        states.append(state)
    for example in array(x)[::-1]:
        state = gru(autoencoder.decoder, written, state)
        written = array(autoencoder.written.weight) @ state + array(autoencoder.written.bias)
        error += ((written - example) ** 2).sum()
    code, loss = autoencoder(x)
    np.testing.assert_allclose(array(code), np.mean(states, 0))
    assert loss.item() == pytest.approx(error / 15)


def test_pooled_code_and_reconstruction_by_hand():
    """Catches reconstruction from the pooled code, and pooling before the code's ReLU."""
    autoencoder = PoolingAutoencoder(3, 4).double()
    x = torch.randn(5, 3, dtype=DOUBLE)
    into, out = autoencoder.encoder[0], autoencoder.decoder
    codes = [np.maximum(array(into.weight) @ e + array(into.bias), 0) for e in array(x)]
    error = sum(
        ((array(out.weight) @ c + array(out.bias) - e) ** 2).sum() for c, e in zip(codes, array(x), strict=True)
    )
    code, loss = autoencoder(x)
    np.testing.assert_allclose(array(code), np.mean(codes, 0))
    assert loss.item() == pytest.approx(error / 15)


@pytest.mark.parametrize("kind", ["functions", "images"])
def test_examples_are_read_with_their_targets_in_the_order_of_their_inputs(kind):
    """Catches a code without targets or with those of other examples, and an order that is not the inputs' sums."""
    learner, task = (functions(), families()[0]) if kind == "functions" else (images(), episodes(shots=1)[0])
    x, y = array(task.support.x).reshape(len(task.support.x), -1), array(task.support.y)
    w, b, table = (array(p) for p in (learner.joint.weight, learner.joint.bias, learner.head_targets))
    seen = [w @ e + b + (table[0] * t[0] if kind == "functions" else table[t]) for e, t in zip(x, y, strict=True)]
    order = sorted(range(len(x)), key=lambda i: x[i].sum())
    for learner.ordered, expected in ((True, [seen[i] for i in order]), (False, seen)):
        code, loss = learner.encoder(torch.tensor(np.array(expected)))
        got, got_loss, _ = learner.encode(task.support)
        torch.testing.assert_close(got, code)
        torch.testing.assert_close(got_loss, loss)
    assert not images(encoder="pooling").ordered  # it does not see an order


def test_view_of_images_is_local_and_alone():
    """Catches a normalisation over other channels or with another constant, and images that see each other."""
    view = Conv2(hidden=12, image_size=9, dense=(7, 5)).double()
    x = torch.rand(4, 1, 9, 9, dtype=DOUBLE)
    values = array(torch.rand(1, 12, 2, 2, dtype=DOUBLE)) * 40
    expected = np.zeros_like(values)
    for c in range(12):
        near = values[:, max(0, c - 4) : c + 5] ** 2
        expected[:, c] = values[:, c] / (1 + 0.001 / 9 * near.sum(1)) ** 0.75
    np.testing.assert_allclose(array(view.respond(torch.tensor(values))), expected)
    torch.testing.assert_close(view(x)[2], view(x[2:3])[0])
    torch.testing.assert_close(torch.func.vmap(lambda one: view(one[None])[0])(x), view(x))
    learner = images(embedding=Conv2(hidden=3, image_size=8, dense=(7, 5)), inner_steps=1, chunk=2)
    assert_equals_finite_differences(learner, episodes(tasks=2, queries=1))


# Clusters of functions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", [2, 3])
def test_evidence_code_and_clusters_of_functions_by_hand(active):
    """Catches a covariance for its root, a noise that is not a variance, shares of clusters not in use, a code of the
    likeliest cluster alone, and examples whose order matters."""
    torch.manual_seed(3)
    level = FunctionLevel(3, 4).double()
    with torch.no_grad():
        for p in level.parameters():
            p.normal_()
    features, y = torch.randn(5, 4, dtype=DOUBLE), torch.randn(5, 1, dtype=DOUBLE)
    phi, target = array(features), array(y)[:, 0]
    centres, roots, share = (array(p) for p in (level.centres, level.root, level.share))
    variance = (math.exp(level.log_noise.item()) + 0.02) ** 2
    shares = np.exp(share[:active]) / np.exp(share[:active]).sum()
    joint, codes = np.zeros(3), np.zeros((3, 4))
    for k in range(active):
        prior = roots[k] @ roots[k].T
        joint[k] = shares[k] * multivariate_normal.pdf(
            target, phi @ centres[k], phi @ prior @ phi.T + variance * np.eye(5)
        )
        precision = np.linalg.inv(prior) + phi.T @ phi / variance
        codes[k] = np.linalg.solve(precision, np.linalg.solve(prior, centres[k]) + phi.T @ target / variance)
    for order in (slice(None), [3, 1, 4, 0, 2]):
        code, loss, assignment = level.read(features[order], y[order], torch.tensor(active))
        np.testing.assert_allclose(array(assignment), [joint / joint.sum()], rtol=1e-6)
        np.testing.assert_allclose(array(code), joint @ codes / joint.sum(), rtol=1e-6)
        assert loss.item() == pytest.approx(-math.log(joint.sum()) / 5)


def test_functions_are_read_into_the_hierarchy():
    """Catches a first level that assigns once more, by its distances, and examples that are not of the embedding."""
    learner, task = of_functions(), families()[0]
    first = learner.levels[0]
    features = learner.joint(learner.embedding(task.support.x))
    code, loss, assignment = first.read(features, task.support.y, learner.active)
    for got, expected in zip(learner.encode(task.support), (code, loss, assignment), strict=True):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(learner.assignments(families())[0], assignment[0])
    assert not torch.allclose(assignment, first.assignment(code[None]))
    held = (assignment[0, :, None] * torch.tanh(first.weight @ code + first.bias)).sum(0)
    torch.testing.assert_close(first(code[None], assignment).sum(0), held)
    root, (known, _, _) = learner.hierarchy(code, assignment)
    assert known is assignment
    for ours, theirs in zip(
        learner.adaptation(task.support), learner.path(task.support, learner.gate(code, root, 0)), strict=True
    ):
        torch.testing.assert_close(ours.parameters, theirs.parameters)
    assert_equals_finite_differences(learner, families())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, 4, 5])
def test_clusters_become_families(seed):
    """Catches clusters that are not of families: all tasks in one, a table of other tasks' families."""
    torch.manual_seed(seed)
    data = FourFamily(train_queries=10, meta_batch_size=25, seed=seed)
    learner = HSML(MLP(), 1, MLP(), encoder="functions", reconstruction_weight=1.0, inner_steps=1)
    optimizer, train = torch.optim.Adam(learner.parameters(), 3e-3), data.distribution("train")
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    for step in range(1000):
        batch = train.sample(range(25 * step, 25 * step + 25))
        optimizer.zero_grad()
        learner.map(learner.objective, batch)[0].mean().backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 10.0)
        optimizer.step()
        scheduler.step()
    test = data.distribution("test").sample(range(2000))
    with torch.no_grad():
        table = learner.eval().task_metrics(test)["families"].sum(0)
    assert table.sum(1).tolist() == torch.bincount(test.task["family"]).tolist()
    assert mutual_information(table) >= 0.6, table


# The hierarchy and the gates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", [2, 4])
def test_hierarchy_by_loops(active):
    """Catches assignments over the wrong nodes, σ for σ², the parent's transform of another cluster, a bias inside of
    the assignment, and clusters not yet in use that hold something."""
    learner = functions(clusters=(2, 3, 1), max_clusters=4, deviation=0.7)
    learner.active.fill_(active)
    with torch.no_grad():
        for p in learner.levels.parameters():
            p.normal_()
    code = torch.randn(5, dtype=DOUBLE)
    nodes = [array(code)]
    held, assignments = learner.hierarchy(code)
    for number, (level, assignment) in enumerate(zip(learner.levels, assignments, strict=True)):
        centres, weight, bias = (array(p) for p in (level.centres, level.weight, level.bias))
        clusters = active if number == 0 else len(centres)
        upper = [np.zeros(5) for _ in range(clusters)]
        for n, node in enumerate(nodes):
            scores = [math.exp(-sum(((node - centres[k]) / 0.7) ** 2) / 2) for k in range(clusters)]
            for k in range(clusters):
                share = scores[k] / sum(scores)
                assert assignment[n, k].item() == pytest.approx(share)
                upper[k] = upper[k] + share * np.tanh(weight[k] @ node + bias[k])
        if number == 0:
            assert (assignment[:, active:] == 0).all()
            upper += [np.zeros(5)] * (len(centres) - active)
            nodes = upper
        else:
            nodes = upper
        torch.testing.assert_close(assignment.sum(-1), torch.ones(len(assignment), dtype=DOUBLE))
    np.testing.assert_allclose(array(held), nodes[0])


@pytest.mark.parametrize("build", [functions, images])
def test_gate_multiplies_every_initial_parameter(build):
    """Catches a parameter without its gate, one number for a whole tensor, a gate of the code or hierarchy alone."""
    learner = build(inner_steps=0)
    batch = families() if build is functions else episodes()
    task = batch[1]
    with torch.no_grad():
        for p in (*learner.gate_biases.values(), *learner.learner.parameters()):
            p.normal_()
    code, *_ = learner.encode(task.support)
    both = np.concatenate([array(code), array(learner.hierarchy(code)[0])])
    state = learner.adapt(task.support)
    names = [n for n, _ in learner.learner.named_parameters()]
    assert set(state.parameters) == set(names)
    for name, initial in learner.learner.named_parameters():
        w, b = (array(d[name.replace(".", "_")]) for d in (learner.gates, learner.gate_biases))
        assert b.shape == initial.shape
        got, expected = array(state.parameters[name]), np.zeros(b.shape)
        for place in np.ndindex(*b.shape):
            eta = sigmoid(w[place] @ both + b[place])
            assert 0 < eta < 1
            expected[place] = array(initial)[place] * eta
        np.testing.assert_allclose(got, expected, rtol=1e-9)


@pytest.mark.parametrize("adapt_normalization", [False, True])
def test_open_gates_make_it_maml(adapt_normalization):
    """Catches an inner loop that differs from MAML's, gates that are applied after it, or at every step."""
    learner = images(adapt_normalization=adapt_normalization)
    maml = MAML(Conv4(hidden=3, image_size=8), 3, 0.3, 2, adapt_normalization=adapt_normalization).double()
    maml.learner.load_state_dict(learner.learner.state_dict())
    for bias in learner.gate_biases.values():
        bias.data.fill_(60.0)
    task = episodes()[0]
    for ours, theirs in zip(learner.adaptation(task.support), maml.adaptation(task.support), strict=True):
        torch.testing.assert_close(learner.predict(ours, task.query_x), maml.predict(theirs, task.query_x))


# The meta-gradient --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("encoder", "chunk"), [("recurrent", 1), ("recurrent", 2), ("pooling", 2)])
def test_meta_gradient_of_functions_equals_finite_differences(encoder, chunk):
    """Catches a detached code, assignment or gate, a first-order inner loop, and vmap through the recurrence."""
    settings = {"encoder": encoder, "max_clusters": 5, "clusters": (2, 1), "deviation": 0.8}
    learner = functions(chunk=chunk, reconstruction_weight=0.3, **settings)
    assert_equals_finite_differences(learner, families())


@pytest.mark.parametrize("batch_norm", ["transductive", "support"])
def test_meta_gradient_of_images_equals_finite_differences(batch_norm):
    """Catches wrong second derivatives of gated batch norm, and labels outside of the graph."""
    learner = images(batch_norm=batch_norm, adapt_normalization=True, chunk=2, reconstruction_weight=0.3)
    assert_equals_finite_differences(learner, episodes(tasks=2, queries=1))


def test_reconstruction_counts_as_much_as_its_weight():
    """Catches a reconstruction loss that is left out, and one that evaluation depends on."""
    task = families()[0]
    values = {}
    for weight in (0.0, 1.0, 0.25):
        learner = functions(reconstruction_weight=weight)
        loss, prediction, kept = learner.objective(task)
        values[weight] = loss.item()
        assert kept["metrics"]["reconstruction"].item() == pytest.approx(learner.encode(task.support)[1].item())
        assert values[0.0] == pytest.approx(((prediction - task.query_y) ** 2).mean().item())
        assert loss.item() == pytest.approx(values[0.0] + weight * kept["metrics"]["reconstruction"].item())


# Growth -------------------------------------------------------------------------------------------------------------


def test_a_cluster_is_added_where_a_window_is_so_many_times_harder_than_the_one_before():
    """Catches windows that overlap, a comparison of single losses or with the best window, and growth without end."""
    learner = functions(clusters=(2, 1), max_clusters=4, expansion_interval=3, expansion_ratio=1.5)
    losses = [1, 1, 1, 1, 1, 1.6, 9, 0, 0, 2, 2, 2, 2, 2, 3.5, 4, 4, 4, 30, 30, 30]
    seen, active, before = [], 2, None
    for start in range(0, len(losses), 3):
        mean = sum(losses[start : start + 3]) / 3
        if before is not None and mean > 1.5 * before:
            active = min(active + 1, 4)
        before = mean
        seen.append(active)
    got = []
    for loss in losses:
        learner.update_from_tasks({"query_loss": torch.tensor(float(loss), dtype=DOUBLE)})
        got.append(learner.active.item())
    assert got[2::3] == seen
    assert got[0] == 2
    assert seen == [2, 2, 3, 3, 3, 4, 4]  # no growth by less than half, no more than max_clusters


def test_a_cluster_not_in_use_stays_as_it_is_and_learns_from_then_on():
    """Catches gradients or optimizer steps of clusters to come, and new ones outside of the meta-update."""
    learner = functions(clusters=(2, 2, 1), max_clusters=4)
    optimizer, batch = learner.configure_optimizers(), families()
    level = learner.levels[0]
    for active in (2, 3):
        learner.active.fill_(active)
        before = {n: p.detach().clone() for n, p in level.named_parameters()}
        for _ in range(2):
            optimizer.zero_grad()
            learner.map(learner.objective, batch)[0].mean().backward()
            optimizer.step()
        for n, p in level.named_parameters():
            moved = (p != before[n]).flatten(1).any(1).tolist()
            assert moved == [k < active for k in range(4)], n


GROWING = (
    *("--model.max_clusters", "6", "--model.expansion_interval", "2", "--model.expansion_ratio", "0.1"),
    *("--model.encoder", "recurrent"),
)


def test_growth_resumes_bit_for_bit(tmp_path):
    """Catches a window or a number of clusters that a checkpoint lacks: the cut is within a window."""
    main(command("HSML", tmp_path / "whole", *GROWING))
    main(command("HSML", tmp_path / "halves", *GROWING, steps=5))
    main(command("HSML", tmp_path / "halves", *GROWING, "--ckpt_path", "last"))
    whole, halves = (weights(tmp_path / r / "hsml" / "checkpoints" / "last.ckpt") for r in ("whole", "halves"))
    assert all(torch.equal(whole[k], halves[k]) for k in whole)
    assert whole["active"] == 6


@pytest.mark.slow
def test_two_processes_grow_alike(tmp_path):
    """Catches a rule that looks at the losses of one process alone: unequal shares, a threshold between the two."""
    for runs, more in (("one", ()), ("two", TWO)):
        finished(*command("HSML", tmp_path / runs, *GROWING, "--data.meta_batch_size", "5", *more, steps=6))
    one, two = (weights(tmp_path / r / "hsml" / "checkpoints" / "last.ckpt") for r in ("one", "two"))
    assert one["active"] == two["active"] == 6
    torch.testing.assert_close(one["losses"], two["losses"], rtol=1e-3, atol=1e-4)


def test_impossible_hierarchies_are_refused():
    """Catches a hierarchy without a root, which would silently hand on one node of several."""
    for clusters in ((4,), (4, 2), (2, 0, 1)):
        with pytest.raises(ValueError, match="clusters"):
            functions(clusters=clusters)
    with pytest.raises(ValueError, match="max_clusters"):
        functions(max_clusters=3)
    with pytest.raises(ValueError, match="outputs"):
        of_functions(outputs=2)
