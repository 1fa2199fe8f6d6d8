"""What tasks do to a base network against finite differences and loops; its components against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.func import functional_call

from app.cli.builder import MetaboltCLI
from datamodules.core.episodes import Episodes, Support
from datamodules.core.errors import ConfigError
from models import MLP, Conv4, GradientPCA
from models.networks.batch_norm import normalize_by
from models.task_embedding.projection import BalancedSketch
from tests.support.gradients import assert_equals_finite_differences, assert_is_gradient, episodes, meta_gradient
from tests.support.toy import ToyImages, command, train_for


def small(**settings) -> GradientPCA:
    torch.manual_seed(2)
    defaults = {
        "components": 3,
        "records": 12,
        "projected": 0,
        "unit_length": False,
        "inner_rate": 0.3,
        "temperature": 1.0,
    }
    return GradientPCA(Conv4(hidden=4, image_size=8), outputs=3, **(defaults | settings)).double()


def prototype_head(learner: GradientPCA, support: Support) -> tuple[torch.Tensor, torch.Tensor]:
    """-‖z - c‖² as a linear head, by a loop over classes."""
    with normalize_by("batch"):
        z = learner.learner.backbone(support.x)
    c = torch.stack([z[support.y == k].mean(0) for k in range(support.ways)])
    return 2 * c, -(c**2).sum(1)


def adapted_by_autograd(learner: GradientPCA, support: Support, steps: int) -> list[dict[str, torch.Tensor]]:
    """Backbone and head before each step, by autograd of the whole support loss."""
    weight, bias = prototype_head(learner, support)
    own = {n: p for n, p in learner.learner.named_parameters() if not n.startswith("head.")}
    path = [own | {"head.weight": weight, "head.bias": bias}]
    for _ in range(steps):
        path[-1] = {n: p.detach().requires_grad_() for n, p in path[-1].items()}  # the head is a parameter by itself
        with normalize_by("batch"):
            loss = F.cross_entropy(functional_call(learner.learner, path[-1], (support.x,)), support.y)
        moves = [n for n in path[-1] if ".norms." not in n]
        gradient = torch.autograd.grad(loss, [path[-1][n] for n in moves])
        step = dict(zip(moves, gradient, strict=True))
        path.append({n: p - 0.3 * step[n] if n in step else p for n, p in path[-1].items()})
    return path


# What a task does to the network --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_recorded_gradient_equals_finite_differences(temperature):
    """Catches a gradient of another loss, one through the prototypes, and parameters of batch norm in it."""
    learner, support = small(temperature=temperature), episodes(tasks=1)[0].support
    prototypes = zip(("weight", "bias"), prototype_head(learner, support), strict=True)
    head = {f"head.{n}": v.detach() / temperature for n, v in prototypes}
    gradient = learner.raw(support)
    own = [(n, p) for n, p in learner.learner.named_parameters() if n in learner.names]
    assert {n for n, _ in own} == {f"backbone.convs.{i}.{n}" for i in range(4) for n in ("weight", "bias")}

    def loss() -> torch.Tensor:
        with normalize_by("batch"):
            return F.cross_entropy(functional_call(learner.learner, head, (support.x,)), support.y)

    assert_is_gradient(gradient, own, loss)
    vector = learner.vector(support)
    torch.testing.assert_close(vector, torch.cat([gradient[n].flatten() for n in learner.names]))


def test_change_is_that_of_the_inner_loop():
    """Catches a change of the head in it, another number of steps in evaluation, or a sign."""
    learner, support = small(of="change", inner_steps=3, eval_inner_steps=7).eval(), episodes(tasks=1)[0].support
    first, *_, end = adapted_by_autograd(learner, support, 3)
    expected = torch.cat([(end[n] - first[n]).detach().flatten() for n in learner.names])
    torch.testing.assert_close(learner.vector(support), expected, rtol=1e-8, atol=1e-12)


def test_at_a_high_temperature_it_is_the_gradient_of_the_scatter_between_classes():
    """Catches a temperature that predictions have instead, or that does not reach the bias: with as many examples of
    each class the gradient times the temperature goes to that of -2 Σ_i z_i · (c of its class - mean of all c) / n."""
    learner, support = small(temperature=1e4), episodes(tasks=1)[0].support
    own = {n: p for n, p in learner.learner.named_parameters() if n in learner.names}
    with normalize_by("batch"):
        z = learner.learner.backbone(support.x)
        c = torch.stack([z[support.y == k].mean(0) for k in range(3)]).detach()
        pull = -2 * (z * (c[support.y] - c.mean(0))).sum() / len(z)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(pull, [own[n] for n in learner.names])])
    found = 1e4 * learner.vector(support)
    assert (found - expected).norm() < 1e-3 * expected.norm()
    plain = small()
    query = episodes(tasks=1)[0].query_x
    torch.testing.assert_close(
        learner.predict(learner.adapt(support), query), plain.predict(plain.adapt(support), query)
    )


@pytest.mark.parametrize("of", ["gradient", "change"])
def test_names_of_labels_do_not_matter(of):
    """Catches a head whose rows belong to labels."""
    learner, support = small(of=of), episodes(tasks=1)[0].support
    renamed = Support(support.x, torch.tensor([2, 0, 1])[support.y], 3)
    torch.testing.assert_close(learner.vector(renamed), learner.vector(support), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("head", ["prototypes", "learned"])
def test_second_order_meta_gradient_equals_finite_differences(head):
    """Catches a dropped second-order term, and prototypes that are taken for constants."""
    learner = small(head=head, first_order=False, inner_steps=2, chunk=2)
    if head == "prototypes":  # the head that none of its tasks uses
        assert len([p for p in learner.parameters() if not p.requires_grad]) == 2
    assert_equals_finite_differences(learner, episodes(tasks=2))


def test_first_order_meta_gradient_has_the_inner_gradients_for_constants():
    """Catches first order taken for second, and a meta-gradient that does not reach the prototypes."""
    learner, batch = small(inner_steps=2), episodes(tasks=1)
    support, query = batch[0].support, batch[0]
    found = meta_gradient(learner, batch)
    path = adapted_by_autograd(learner, support, 2)
    weight, bias = prototype_head(learner, support)
    own = dict(learner.learner.named_parameters())
    start = {n: p for n, p in own.items() if not n.startswith("head.")} | {"head.weight": weight, "head.bias": bias}
    end = {n: p + (path[-1][n] - path[0][n]).detach() for n, p in start.items()}
    with normalize_by("batch"):
        loss = F.cross_entropy(functional_call(learner.learner, end, (query.query_x,)), query.query_y)
    trained = {n: p for n, p in own.items() if p.requires_grad}
    for n, expected in zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True):
        torch.testing.assert_close(found[f"learner.{n}"], expected, rtol=1e-8, atol=1e-12, msg=n)


# What is kept ---------------------------------------------------------------------------------------------------------


def kept_after(learner: GradientPCA, tasks: int, meta_batch: int, seed: int = 0) -> list[int]:
    """The task in each place."""
    found = {}
    for first in range(0, tasks, meta_batch):
        found |= learner.places(np.arange(first, first + meta_batch), seed)
    return [found[place] for place in sorted(found)]


def test_a_uniform_sample_of_all_tasks_is_kept():
    """Catches a reservoir that prefers early or late tasks, and one that depends on the meta-batch's size."""
    learner = small(records=20)
    counts = np.zeros(200)
    for seed in range(100):
        kept = kept_after(learner, 200, 8, seed)
        assert len(set(kept)) == 20
        counts[kept] += 1
    assert chisquare(counts.reshape(10, 20).sum(1)).pvalue > 0.001
    assert kept_after(learner, 200, 8) == kept_after(learner, 200, 1) == kept_after(learner, 200, 40)
    # Of three tasks two, each as likely as another: an off-by-one shows where tasks are few.
    few, often = small(records=2), np.zeros(3)
    for seed in range(300):
        often[kept_after(few, 3, 3, seed)] += 1
    assert often == pytest.approx(200, abs=33)  # four standard errors
    learner.keep = "latest"
    assert sorted(kept_after(learner, 200, 8)) == list(range(180, 200))


def toy(**settings) -> tuple[GradientPCA, ToyImages]:
    torch.manual_seed(0)
    defaults = {"components": 3, "records": 16, "projected": 30, "inner_rate": 0.3}
    learner = GradientPCA(Conv4(hidden=4, image_size=16), outputs=3, **(defaults | settings))
    return learner, ToyImages(ways=3, queries=2, meta_batch_size=4)


def test_what_is_kept_is_what_those_tasks_do_to_the_network_of_their_time():
    """Catches rows in another task's place, and gradients of the network after the update."""
    learner, data = toy()
    learner.optimizer = lambda p: torch.optim.SGD(p, lr=0.0)
    train_for(learner, data, 10)
    assert learner.kept_tasks.min() >= 0 and learner.kept_tasks.max() > 16
    train = data.distribution("train")
    for row, number in zip(learner.kept, learner.kept_tasks.tolist(), strict=True):
        task = data.on_device(train.sample([number]))[0]
        torch.testing.assert_close(row, learner.vector(task.support), rtol=1e-4, atol=1e-5)
    # One update later, the network is another and so is what the same tasks do to it.
    moving, _ = toy()
    moving.optimizer = lambda p: torch.optim.SGD(p, lr=0.5)
    train_for(moving, data, 2)
    torch.testing.assert_close(moving.kept[:4], toy_rows(toy()[0], data, range(4)), rtol=1e-4, atol=1e-5)
    assert (moving.kept[4:8] - toy_rows(toy()[0], data, range(4, 8))).norm() > 1e-3


def toy_rows(learner: GradientPCA, data: ToyImages, numbers: range) -> torch.Tensor:
    batch: Episodes = data.on_device(data.distribution("train").sample(numbers))
    return learner.map(lambda t: learner.vector(t.support), batch)


# What is fitted -------------------------------------------------------------------------------------------------------


def filled(summary: str = "pca", **settings) -> tuple[GradientPCA, np.ndarray]:
    """A learner that keeps vectors of three groups of tasks."""
    learner = small(summary=summary, records=60, clusters=3, **settings)
    g = torch.Generator().manual_seed(0)
    size = learner.kept.shape[1]
    centres = torch.randn(3, size, generator=g, dtype=torch.float64)
    rows = centres[torch.arange(60) % 3] + 0.3 * torch.randn(60, size, generator=g, dtype=torch.float64)
    learner.kept.copy_(rows)
    learner.kept_tasks.copy_(torch.arange(60))
    learner.fit_components()
    return learner, rows.numpy()


def embedded(learner: GradientPCA, rows: np.ndarray) -> np.ndarray:
    """The embeddings of tasks that do this to the network."""
    found = []
    for row in torch.from_numpy(rows):
        learner.vector = lambda support, row=row: row  # pyright: ignore
        found.append(learner.embed_task(Support(row, row, 0)))
    return torch.stack(found).numpy()


def test_components_are_scikit_learns():
    """Catches an uncentred decomposition, components in columns, and scores of another mean."""
    learner, rows = filled()
    theirs = PCA(3, svd_solver="full").fit(rows)
    np.testing.assert_allclose(np.abs(np.sum(learner.axes.numpy() * theirs.components_, 1)), 1, rtol=1e-8)
    np.testing.assert_allclose(learner.explained.numpy(), theirs.explained_variance_ratio_, rtol=1e-6)
    signs = np.sign(np.sum(learner.axes.numpy() * theirs.components_, 1))
    np.testing.assert_allclose(embedded(learner, rows[:5]), theirs.transform(rows[:5]) * signs, rtol=1e-6, atol=1e-8)


def test_clusters_are_scikit_learns():
    """Catches squared distances, and responsibilities without weights or determinants."""
    learner, rows = filled("kmeans")
    scores = (rows - learner.mean.numpy()) @ learner.axes.numpy().T
    theirs = KMeans(3, random_state=0, n_init=10).fit(scores)
    np.testing.assert_allclose(embedded(learner, rows[:6]), theirs.transform(scores[:6]), rtol=1e-6)

    learner, rows = filled("mixture")
    floor = 1e-6 * scores.var(0).max()
    mixture = GaussianMixture(3, covariance_type="diag", reg_covar=floor, random_state=0, n_init=10).fit(scores)
    between = (rows[:6] + rows[1:7]) / 2  # where no Gaussian has all of a task
    probabilities = mixture.predict_proba((between - learner.mean.numpy()) @ learner.axes.numpy().T)
    np.testing.assert_allclose(embedded(learner, between), probabilities, atol=1e-6)
    assert len(set(probabilities.argmax(1))) > 1


def test_few_tasks_make_few_components():
    """Catches directions of rounding errors, which differ by machine: of four tasks three components, the rest zero."""
    learner = small(components=6, records=50)
    learner.kept[:4] = torch.randn(4, learner.kept.shape[1], generator=torch.Generator().manual_seed(0)).double()
    learner.kept[3] = learner.kept[2]  # and of those one is the same
    learner.kept_tasks[:4] = torch.arange(4)
    learner.fit_components()
    assert (learner.axes.norm(dim=1) > 0.5).tolist() == [True] * 2 + [False] * 4
    assert learner.embed_task(episodes(tasks=1)[0].support).shape == (6,)


def test_a_checkpoint_knows_all_that_was_kept(tmp_path):
    """Catches a checkpoint whose components are of an earlier time than its network, at the end of a training."""
    from app.cli.builder import main
    from models import load

    main(command("GradientPCA", tmp_path, steps=8))  # validates after six
    learner = load(tmp_path / "gradientpca" / "checkpoints" / "last.ckpt")
    assert learner.kept_tasks.max() == learner.fitted > 24
    rows = learner.kept.double().numpy()
    np.testing.assert_allclose(learner.mean.numpy(), rows.mean(0), rtol=1e-4, atol=1e-6)
    assert learner.axes.norm(dim=1).numpy() == pytest.approx(1, abs=1e-5)


# The rest -------------------------------------------------------------------------------------------------------------


def test_sketch_keeps_inner_products():
    """Catches a projection that is no linear map, has a bias, or an error other than its own."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 505, generator=g, dtype=torch.float64)
    b = a + b
    found = []
    for seed in range(300):
        sketch = BalancedSketch(505, 50, seed)
        found.append(float(sketch(a) @ sketch(b)))
    exact = float(a @ b)
    error = ((a.norm() * b.norm()) ** 2 + exact**2).item() ** 0.5 / 50**0.5
    assert np.mean(found) == pytest.approx(exact, abs=4 * error / 300**0.5)
    assert np.std(found) == pytest.approx(error, rel=0.25)
    sketch = BalancedSketch(505, 50)
    torch.testing.assert_close(sketch(2 * a - b), 2 * sketch(a) - sketch(b))
    torch.testing.assert_close(torch.func.vmap(sketch)(torch.stack([a, b])), torch.stack([sketch(a), sketch(b)]))
    dense = torch.stack([sketch(e) for e in torch.eye(505).double()])
    assert (dense.abs().sum(1) == 1).all() and dense.abs().sum(0).max() == 11


def test_regression_has_a_learned_head(tmp_path):
    """Catches prototypes of values: refused in one line, and MAML's head embeds functions."""
    flags = ("--model", "models.GradientPCA", "--model.backbone", "models.MLP", "--model.outputs", "1")
    data = ("--data", "datamodules.Sinusoid", "--runs", str(tmp_path), "--wandb", "off", "--trainer.max_steps", "2")
    with pytest.raises(ConfigError, match=r"--model\.init_args\.head learned"):
        MetaboltCLI([*flags, *data])
    learner = MetaboltCLI([*flags, *data, "--model.head", "learned"]).model.double()
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    (layer, *_) = [m for m in learner.learner.modules() if isinstance(m, nn.Linear)]
    learner.unit_length, learner.sketch = False, nn.Identity()
    expected = torch.autograd.grad((learner.learner(x) - x.sin()).square().mean(), [layer.weight])[0]
    found = learner.raw(Support(x, x.sin(), 0))[
        "backbone." + next(iter(dict(learner.learner.backbone.named_parameters())))
    ]
    torch.testing.assert_close(found, expected)
    assert isinstance(learner.learner.backbone, MLP)
