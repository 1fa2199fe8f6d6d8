"""iMAML's solution and its gradients: in closed form, against finite differences of the whole and against TorchOpt."""

from __future__ import annotations

import csv
import weakref
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.cli.builder import main
from datamodules.core.episodes import Episodes, Support
from models import IMAML, MAML, MLP
from models.core.inner_loop import last
from models.core.second_order import conjugate_gradient
from models.core.task_map import map_tasks
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNorm
from tests.support.gradients import assert_is_gradient
from tests.support.toy import command

LAMBDA, DIMENSION = 0.7, 4
EXACT = {"cg_steps": 40, "inner_steps": 90, "inner_rate": 0.2}


class Smooth(Backbone):
    """A network without kinks, so that finite differences hold wherever they are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 4), BatchNorm(4)
        self.input_shape, self.out_features = (3,), 4

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.layer(x)))


def smooth(**settings) -> IMAML:
    torch.manual_seed(3)
    learner = IMAML(Smooth(), outputs=3, **{"proximal_lambda": 4.0, **EXACT, **settings}).double()
    with torch.no_grad():  # away from the special point 1 and 0
        learner.learner.backbone.norm.weight.uniform_(0.6, 1.4)
        learner.learner.backbone.norm.bias.uniform_(-0.4, 0.4)
    return learner


def classification(tasks=2, shots=2, queries=3) -> Episodes:
    g = torch.Generator().manual_seed(5)
    label = torch.arange(3)
    x = [torch.randn(tasks, 3 * n, 3, generator=g, dtype=torch.float64) for n in (shots, queries)]
    y = [label.repeat_interleave(n).expand(tasks, -1) for n in (shots, queries)]
    return Episodes(x[0], y[0], x[1], y[1], torch.arange(tasks), 3, tasks)


def gradients(learner: IMAML | MAML, batch: Episodes) -> dict[str, Tensor]:
    learner.zero_grad()
    loss, *_ = learner.map(lambda task: learner.objective(task)[:2], batch)
    loss.mean().backward()
    return {n: p.grad.clone() for n, p in learner.named_parameters() if p.grad is not None}


class Quadratic:
    """Linear regression: L = θᵀAθ/2 - bᵀθ + c of θ, weights and bias, on the support set and on the queries."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(1)
        sizes = (6, DIMENSION - 1), (6, 1), (5, DIMENSION - 1), (5, 1)
        self.tensors = [torch.randn(s, generator=g, dtype=torch.float64) for s in sizes]
        sx, sy, qx, qy = self.tensors
        self.batch = Episodes(*(t[None] for t in self.tensors), torch.arange(1), 0, 1)
        self.a, self.b = self.normal(sx, sy)
        self.query = self.normal(qx, qy)
        self.eye = torch.eye(DIMENSION, dtype=torch.float64)

    @staticmethod
    def normal(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        return 2 * z.T @ z / len(x), 2 * z.T @ y[:, 0] / len(x)

    def learner(self, **settings) -> IMAML:
        torch.manual_seed(0)
        exact = {"proximal_lambda": LAMBDA, "inner_rate": 0.15, "inner_steps": 1000, "cg_steps": DIMENSION}
        return IMAML(MLP(DIMENSION - 1, hidden=()), outputs=1, **{**exact, **settings}).double()

    def theta(self, learner: IMAML) -> Tensor:
        return torch.cat([learner.learner.head.weight[0], learner.learner.head.bias]).detach()

    def solution(self, theta: Tensor, strength: float = LAMBDA) -> Tensor:
        return torch.linalg.solve(self.a + strength * self.eye, strength * theta + self.b)

    def query_gradient(self, at: Tensor) -> Tensor:
        return self.query[0] @ at - self.query[1]

    def meta_gradient(self, theta: Tensor, damping: float = 0.0) -> Tensor:
        target = self.query_gradient(self.solution(theta))
        return torch.linalg.solve((1 + damping) * self.eye + self.a / LAMBDA, target)

    def error(self, **settings) -> float:
        learner = self.learner(**settings)
        expected = self.meta_gradient(self.theta(learner), settings.get("cg_damping", 0.0))
        return ((flat(gradients(learner, self.batch)) - expected).norm() / expected.norm()).item()


def flat(head: dict[str, Tensor]) -> Tensor:
    weight, bias = (next(p for n, p in head.items() if n.endswith(end)) for end in ("head.weight", "head.bias"))
    return torch.cat([weight[0], bias])


@pytest.mark.parametrize(("solver", "steps"), [("gradient", 1000), ("hessian_free", 1)])
@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_on_a_quadratic_solution_and_meta_gradient_have_the_closed_form(solver, steps, damping):
    """Catches an inner loop without the proximal term, a wrong sign or scale of λ, damping that is put elsewhere."""
    problem = Quadratic()
    learner = problem.learner(solver=solver, inner_steps=steps, cg_damping=damping)
    theta, task = problem.theta(learner), problem.batch[0]
    torch.testing.assert_close(flat(learner.adapt(task.support).parameters), problem.solution(theta))
    got = flat(gradients(learner, problem.batch))
    torch.testing.assert_close(got, problem.meta_gradient(theta, damping), rtol=1e-8, atol=1e-10)


def test_error_falls_with_conjugate_gradient_steps_to_none():
    """Catches conjugate gradients whose directions are not conjugate: exact after as many steps as dimensions."""
    errors = [Quadratic().error(cg_steps=steps) for steps in range(1, DIMENSION + 1)]
    assert all(after < 0.7 * before for before, after in pairwise(errors))
    assert errors[0] > 0.05
    assert errors[-1] < 1e-9
    assert Quadratic().error(cg_steps=3 * DIMENSION) < 1e-9  # and stays so, with nothing left to solve


def test_error_falls_with_inner_steps_to_none():
    """Catches an implicit gradient that is taken elsewhere than at the end of the inner loop."""
    errors = [Quadratic().error(inner_steps=steps) for steps in (0, 4, 16, 64, 256)]
    assert all(after < 0.5 * before for before, after in pairwise(errors))
    assert errors[-1] < 1e-6


@pytest.mark.parametrize("batch_norm", ["transductive", "support", "per_query", "none"])
@pytest.mark.parametrize("adapt_normalization", [False, True])
def test_gradients_equal_finite_differences_of_the_whole(adapt_normalization, batch_norm):
    """Catches a lost or doubled path: of θ, of λ, and of scale and shift that move both the queries and φ*."""
    learner = smooth(learned_lambda=True, adapt_normalization=adapt_normalization, batch_norm=batch_norm, chunk=1)
    batch = classification(tasks=1)
    gradient = gradients(learner, batch)
    assert gradient.keys() == {n for n, _ in learner.named_parameters()}

    def objective() -> torch.Tensor:
        return learner.map(lambda task: learner.objective(task)[0], batch).mean()

    assert_is_gradient(gradient, learner.named_parameters(), objective, rel=2e-6, abs=1e-9, steps=(1e-5,))


def test_hessian_free_reaches_the_solution_of_gradient_descent():
    """Catches a Newton step on another objective; a few steps of it do what many of gradient descent do."""
    batch = classification(tasks=1)
    support = batch[0].support
    descent = smooth(inner_steps=150).adapt(support).parameters
    newton = smooth(solver="hessian_free", inner_steps=7).adapt(support).parameters
    for name, expected in descent.items():
        torch.testing.assert_close(newton[name], expected, rtol=1e-7, atol=1e-9)
    expected = gradients(smooth(inner_steps=150), batch)
    for name, got in gradients(smooth(solver="hessian_free", inner_steps=7), batch).items():
        torch.testing.assert_close(got, expected[name], rtol=1e-6, atol=1e-9)


def test_a_newton_step_never_goes_up():
    """Catches full steps taken blindly: far from the solution, with hardly a penalty, they overshoot."""
    learner = smooth(solver="hessian_free", proximal_lambda=0.01, inner_steps=8)
    with torch.no_grad():
        learner.learner.head.weight.mul_(30)
    support = classification(tasks=1)[0].support
    states = list(learner.adaptation(support))
    start, values = states[0].parameters, []
    for state in states:
        outputs = torch.func.functional_call(learner.learner, state.parameters, support.x)
        apart = sum((p - start[n]).square().sum() for n, p in state.parameters.items())
        values.append((F.cross_entropy(outputs, support.y) + 0.005 * apart).item())
    assert all(after <= before for before, after in pairwise(values))
    assert values[-1] < 0.5 * values[0]


def test_conjugate_gradients_stop_for_each_task_where_curvature_is_not_positive():
    """Catches NaN and divergence on a saddle or a solved system, and a task that is stopped by its neighbour."""
    matrices = torch.stack(
        [torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([1.0, 2, 3], [-1, -1, 1], [1, 1, -1.5], [1, 2, 3])]
    )
    targets = torch.tensor([[1.0, 1, 1], [1, 1, 1], [1, 1, 1], [0, 0, 0]], dtype=torch.float64)

    def solve(matrix: Tensor, target: Tensor) -> Tensor:
        return conjugate_gradient(lambda v: {"x": matrix @ v["x"]}, {"x": target}, 6)["x"]

    together, alone = (map_tasks(solve, matrices, targets, chunk=chunk) for chunk in (4, 1))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(together[0], targets[0] / matrices[0].diag())
    torch.testing.assert_close(together[1], targets[1])  # the first direction curves downwards: the target itself
    torch.testing.assert_close(together[2], 6 * targets[2])  # stopped after one step of length 3 / 0.5
    torch.testing.assert_close(together[3], targets[3])


def graph(learner: IMAML | MAML, batch: Episodes) -> int:
    """Operations that are kept for the meta-update's backward pass."""
    loss, *_ = learner.map(lambda task: learner.objective(task)[:2], batch)
    seen, waiting = set(), [loss.mean().grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return len(seen)


@pytest.mark.parametrize("chunk", [1, None])
def test_no_graph_of_the_inner_loop_is_kept(chunk):
    """Catches memory that grows with the inner steps, as MAML's does."""
    batch = classification()
    implicit = {steps: graph(smooth(inner_steps=steps, chunk=chunk, learned_lambda=True), batch) for steps in (4, 64)}
    newton = {
        steps: graph(smooth(inner_steps=steps, chunk=chunk, solver="hessian_free", cg_steps=2), batch)
        for steps in (1, 8)
    }
    through = {
        steps: graph(MAML(Smooth(), outputs=3, inner_steps=steps, chunk=chunk).double(), batch) for steps in (4, 64)
    }
    assert implicit[4] == implicit[64] > 0
    assert newton[1] == newton[8] > 0
    assert through[64] > 10 * through[4]


def test_no_solution_along_the_way_is_kept():
    """Catches memory that grows with the inner steps though no graph does: parameters of each of them."""
    learner = smooth(inner_steps=12)
    improve, of_steps, alive = learner.improve, [], []

    def watched(*problem):
        parameters = improve(*problem)
        of_steps.append(weakref.ref(parameters["head.weight"]))
        alive.append(sum(reference() is not None for reference in of_steps))
        return parameters

    learner.improve = watched
    learner.adapt(classification(tasks=1)[0].support)
    assert len(alive) == 12
    assert max(alive) <= 3


@pytest.mark.parametrize("solver", ["gradient", "hessian_free"])
@pytest.mark.parametrize("chunk", [1, 2])
def test_chunks_do_not_change_the_gradients(chunk, solver):
    """Catches tasks that leak into one another in vmap, and a step length that is chosen for all of them together."""
    batch = classification(tasks=3)
    settings = {"solver": solver, "inner_steps": 3, "cg_steps": 3, "learned_lambda": True, "proximal_lambda": 0.1}
    expected = gradients(smooth(chunk=3, **settings), batch)
    got = gradients(smooth(chunk=chunk, **settings), batch)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-12)


def test_evaluation_has_its_own_steps_and_lambda():
    """Catches training's settings in evaluation: without λ it is MAML's gradient descent. No graph is needed."""
    settings = {"eval_inner_steps": 3, "inner_rate": 0.3}
    support = classification(tasks=1)[0].support
    plain = smooth(**settings, eval_lambda=0.0).eval()
    with torch.inference_mode():
        states = list(plain.adaptation(support))
        newton = smooth(solver="hessian_free", eval_inner_steps=2).eval().adapt(support)
    assert len(states) == 4
    assert not any(p.requires_grad for n, p in newton.parameters.items() if ".norm." not in n)
    reference = MAML(Smooth(), outputs=3, inner_steps=3, inner_rate=0.3).double()
    reference.learner.load_state_dict(plain.learner.state_dict())
    expected = last(reference.adaptation(support)).parameters
    for name, value in states[-1].parameters.items():
        torch.testing.assert_close(value, expected[name].detach())
    kept = smooth(**settings).eval().adapt(support).parameters
    assert (kept["head.weight"] - expected["head.weight"]).norm() > 1e-3


def test_the_inner_gradient_is_reported_for_each_task(tmp_path):
    """Catches a metric of another point or without the penalty: by autograd, of the support loss with it."""
    learner = smooth(inner_steps=2)
    batch = classification()
    metrics = learner.map(lambda task: learner.objective(task)[2]["metrics"]["inner_gradient"], batch)
    for task, metric in zip((batch[0], batch[1]), metrics, strict=True):
        state = learner.adapt(task.support).parameters
        moved = {n: p.detach().requires_grad_() for n, p in state.items() if ".norm." not in n}
        fixed = {n: p for n, p in state.items() if ".norm." in n}
        loss = F.cross_entropy(
            torch.func.functional_call(learner.learner, moved | fixed, task.support.x), task.support.y
        )
        named = dict(learner.learner.named_parameters())
        loss = loss + 2 * sum((p - named[n].detach()).square().sum() for n, p in moved.items())  # λ/2 = 2
        loss.backward()
        expected = torch.cat([p.grad.flatten() for p in moved.values()]).norm()
        torch.testing.assert_close(metric, expected)

    main(command("IMAML", tmp_path, "--trainer.log_every_n_steps", "3", steps=6))
    with open(tmp_path / "imaml" / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/inner_gradient")]
    assert len(rows) == 2
    assert all(float(r["train/inner_gradient_worst_decile"]) >= float(r["train/inner_gradient"]) > 0 for r in rows)


def test_lambda_is_learned_and_kept_by_a_checkpoint_only_if_it_is():
    """Catches a fixed λ that a checkpoint would override, and a learned one that leaves the positive numbers."""
    assert "log_lambda" not in smooth().state_dict()
    learner = smooth(learned_lambda=True)
    optimizer = torch.optim.SGD([learner.log_lambda], lr=1e4)
    before = learner.strength.item()
    assert before == pytest.approx(4.0)
    gradients(learner, classification())
    optimizer.step()
    assert learner.strength.item() > 0
    assert learner.strength.item() != before


@pytest.mark.filterwarnings("ignore:We've integrated functorch:FutureWarning")
@pytest.mark.parametrize("cg_steps", [2, 40])
def test_gradients_equal_torchopts(cg_steps):
    """Catches any difference from an independent library of implicit differentiation, at any number of its steps."""
    import torchopt

    learner = smooth(learned_lambda=True, cg_steps=cg_steps)
    batch = classification(tasks=1)
    got = gradients(learner, batch)
    task = batch[0]
    names = [n for n, _ in learner.learner.named_parameters()]
    moving = [n for n in names if ".norm." not in n]

    def network(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        hidden = F.linear(x, parameters["backbone.layer.weight"], parameters["backbone.layer.bias"])
        hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()
        hidden = hidden * parameters["backbone.norm.weight"] + parameters["backbone.norm.bias"]
        return F.linear(torch.tanh(hidden), parameters["head.weight"], parameters["head.bias"])

    def inner(phi, theta, scale, shift, strength):
        fixed = {"backbone.norm.weight": scale, "backbone.norm.bias": shift}
        loss = F.cross_entropy(network(dict(zip(moving, phi, strict=True)) | fixed, task.support.x), task.support.y)
        return loss + strength / 2 * sum((p - t).square().sum() for p, t in zip(phi, theta, strict=True))

    optimality = torch.func.grad(inner)
    cg = torchopt.linear_solve.solve_cg(maxiter=cg_steps, rtol=1e-14)

    @torchopt.diff.implicit.custom_root(optimality, argnums=(1, 2, 3, 4), solve=cg)
    def solve(phi, theta, scale, shift, strength):
        for _ in range(120):
            phi = tuple(p - 0.2 * d for p, d in zip(phi, optimality(phi, theta, scale, shift, strength), strict=True))
        return phi

    leaves = {n: p.detach().clone().requires_grad_() for n, p in learner.learner.named_parameters()}
    strength = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    theta = tuple(leaves[n] for n in moving)
    scale, shift = leaves["backbone.norm.weight"], leaves["backbone.norm.bias"]
    phi = solve(tuple(t.detach() for t in theta), theta, scale, shift, strength)
    adapted = dict(zip(moving, phi, strict=True)) | {"backbone.norm.weight": scale, "backbone.norm.bias": shift}
    F.cross_entropy(network(adapted, task.query_x), task.query_y).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(got[f"learner.{name}"], leaf.grad, rtol=1e-7, atol=1e-9, msg=name)
    torch.testing.assert_close(got["log_lambda"], 4.0 * strength.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"outputs": 0},
        {"inner_steps": -1},
        {"cg_steps": 0},
        {"proximal_lambda": 0.0},
        {"cg_damping": -1.0},
        {"eval_lambda": -1.0},
        {"eval_lambda": 0.0, "solver": "hessian_free"},
    ],
)
def test_impossible_settings_are_refused(settings):
    """Catches settings that would fail, or divide by zero, only much later."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        IMAML(**{"backbone": Smooth(), **settings})


def test_other_numbers_of_ways():
    """Catches a head, or a pull towards it, that cannot serve a user's own number of classes."""
    learner = smooth(inner_steps=2, learned_lambda=True)
    for ways in (2, 5):
        x = torch.randn(2 * ways, 3, dtype=torch.float64)
        state = learner.adapt(Support(x, torch.arange(ways).repeat(2), ways))
        assert learner.predict(state, x).shape == (2 * ways, ways)
