"""FTML: its meta-gradient, what it measures along the sequence, its rivals, and the regret of following the leader."""

from __future__ import annotations

import math

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.func import functional_call, jacrev, vmap
from torch.optim import Adam

from datamodules.continual.rainbow import RainbowImages
from datamodules.core.episodes import Episodes
from models import FTML, Conv4
from models.core.inner_loop import last, sgd_path
from tests.support.gradients import assert_equals_finite_differences, meta_gradient
from tests.support.toy import ToyImages, train_for

# Steps 0, 3 | 4, 7 | 8, 11 begin the two arrivals of three tasks.
SCHEDULE = {"arrival_steps": 3, "task_steps": 4, "tasks": 4}


def sequence(**settings) -> RainbowImages:
    return RainbowImages(ToyImages(), ways=3, held_out=3, meta_batch_size=2, seed=1, **{**SCHEDULE, **settings})


def small(**settings) -> FTML:
    torch.manual_seed(0)
    return FTML(Conv4(in_channels=3, hidden=4, image_size=16), outputs=3, **{"inner_steps": 2, **settings})


def buffered(data: RainbowImages) -> Episodes:
    """A meta-batch of float64 images of step 9, when three tasks exist."""
    return data.on_device(data.sequence().sample([18, 19])).apply(lambda t: t.double() if t.is_floating_point() else t)


def test_meta_gradient_is_mamls_on_the_tasks_of_the_buffer():
    """Catches a rival's objective in the place of MAML's, a first-order gradient, and labels smoothed in one loop
    alone: against finite differences, and the same two steps written out with torch's own autograd."""
    batch = buffered(sequence())
    learner = small(inner_rate=0.3).double()
    assert_equals_finite_differences(learner, batch)
    got = meta_gradient(learner, batch)
    named = dict(learner.learner.named_parameters())
    total = torch.zeros((), dtype=torch.float64)
    for i in range(2):
        at: dict[str, torch.Tensor] = {**named}
        for _ in range(2):
            logits = functional_call(learner.learner, at, batch.support_x[i])
            smooth = 0.9 * F.one_hot(batch.support_y[i], 3).double() + 0.1 / 3
            loss = -(smooth * logits.log_softmax(1)).sum(1).mean()
            moving = {n: p for n, p in at.items() if ".norms." not in n}
            gradients = torch.autograd.grad(loss, list(moving.values()), create_graph=True)
            at = at | {n: p - 0.3 * g for (n, p), g in zip(moving.items(), gradients, strict=True)}
        logits = functional_call(learner.learner, at, batch.query_x[i])
        smooth = 0.9 * F.one_hot(batch.query_y[i], 3).double() + 0.1 / 3
        total = total - (smooth * logits.log_softmax(1)).sum(1).mean() / 2
    for (name, expected), p in zip(named.items(), torch.autograd.grad(total, list(named.values())), strict=True):
        torch.testing.assert_close(got[f"learner.{name}"], p, rtol=1e-8, atol=1e-11, msg=name)
        assert expected.shape == p.shape


class Weights(pl.Callback):
    """Keeps the learner's weights before each step, and as the optimizer finds them."""

    def __init__(self) -> None:
        self.before, self.stepping, self.states = [], [], []

    def on_train_batch_start(self, trainer, learner, batch, batch_idx):
        self.before.append({n: v.clone() for n, v in learner.learner.state_dict().items()})

    def on_before_optimizer_step(self, trainer, learner, optimizer):
        self.stepping.append({n: v.clone() for n, v in learner.learner.state_dict().items()})
        self.states.append(len(optimizer.state))

    def on_train_end(self, trainer, learner):
        self.on_train_batch_start(trainer, learner, None, None)


@pytest.fixture(scope="module")
def trained():
    """A learner after the first three tasks, with the weights along the way."""
    kept, data = Weights(), sequence()
    learner = small(inner_steps=1, optimizer=lambda p: Adam(p, lr=0.01))
    train_for(learner, data, 12, callbacks=[kept])
    return learner, data, kept.before


def test_is_measured_when_met_and_before_the_next_batch(trained):
    """Catches measures by other weights than those after the batch's meta-updates, on other data than the task's so
    far, at another place of the table, and a last batch of a run that is never measured."""
    learner, data, weights = trained
    alone = small(inner_steps=1).eval()
    expected, met = torch.full((4, 2), -1.0), torch.full((4,), -1.0)

    def look(step: int, number: int, arrived: int) -> tuple[torch.Tensor, torch.Tensor]:
        alone.learner.load_state_dict(weights[step])
        task = data.on_device(data.sequence().whole([number], arrived))[0]
        with torch.no_grad():
            logits = alone.predict(alone.adapt(task.support), task.query_x)
        return (logits.argmax(1) == task.query_y).float().mean(), F.cross_entropy(logits, task.query_y)

    for number, (first, second, end) in enumerate(((0, 3, 4), (4, 7, 8), (8, 11, 12))):
        met[number] = look(first, number, 2)[1]
        expected[number, 0] = look(second, number, 1)[0]
        expected[number, 1] = look(end, number, 2)[0]
    torch.testing.assert_close(learner.learned[:4, :2], expected)
    torch.testing.assert_close(learner.met[:4], met)
    assert (learner.learned[4:] == -1).all() and (learner.learned[:, 2:] == -1).all() and (learner.met[4:] == -1).all()
    assert not learner.training or learner.steps == 1


def test_metrics_of_a_task_are_those_of_its_row(trained):
    """Catches examples counted from the last batch or by batches, regret with its sign turned, and what was not met
    counted as learned; the table is made by hand."""
    learner, data, _ = trained
    learner.eval()
    learner.learned = torch.tensor([[0.2, 0.9], [0.95, 0.1], [0.5, 0.6], [-1.0, -1.0]])
    learner.met = torch.tensor([2.0, 1.0, 0.5, -1.0])
    batch = data.on_device(data.distribution("test").sample(range(4)))
    with torch.no_grad():
        found = learner.task_metrics(batch)
        now = torch.stack(
            [F.cross_entropy(learner.predict(learner.adapt(t.support), t.query_x), t.query_y) for t in batch]
        )
    assert found["examples"].tolist() == [6, 3, 9, 9]  # batches of 3; all two and one more where not reached
    torch.testing.assert_close(found["regret"][:3], learner.met[:3] - now[:3])
    assert found["regret"][3] == 0 and found["arrivals"][3].tolist() == [0, 0]
    assert found["first_batch"].tolist() == pytest.approx([0.2, 0.95, 0.5, 0])
    assert found["ten_batches"].tolist() == found["all_batches"].tolist() == pytest.approx([0.9, 0.1, 0.6, 0])


def test_rivals_adapt_as_the_paper_has_them():
    """Catches a rival that looks at the support set in training, or one that is to adapt and does not."""
    batch = buffered(sequence())
    task = batch[0]
    for form, in_training, in_evaluation in (
        ("ftml", True, True),
        ("finetune", False, True),
        ("everything", False, False),
        ("scratch", False, False),
    ):
        learner = small(form=form).double()
        for mode, adapts in ((True, in_training), (False, in_evaluation)):
            learner.train(mode)
            logits = learner.predict(learner.adapt(task.support), task.query_x)
            same = torch.allclose(logits, functional_call(learner.learner, {}, (task.query_x,)))
            assert same != adapts, (form, mode)


def test_scratch_begins_every_task_from_the_first_weights():
    """Catches weights, or moments of Adam, that a task inherits from the one before, and a start in mid-task."""
    kept = Weights()
    learner = small(form="scratch", optimizer=lambda p: Adam(p, lr=0.01))
    start = {n: v.clone() for n, v in learner.learner.state_dict().items()}
    train_for(learner, sequence(drawn="current"), 10, callbacks=[kept])
    fresh = [all(torch.equal(w[n], start[n]) for n in start) for w in kept.stepping]
    assert fresh == [step % 4 == 0 for step in range(10)]
    assert [states == 0 for states in kept.states] == fresh


def test_refuses_data_that_are_no_sequence_or_of_other_tasks():
    """Catches a rival that is trained on the tasks of another."""
    assert "RainbowImages" in (small().check(ToyImages()) or "")
    assert "drawn" in (small(form="scratch").check(sequence()) or "")
    assert small(form="scratch").check(sequence(drawn="current")) is None
    assert "raise model.arrivals" in (small(arrivals=1).check(sequence()) or "")


def quadratics(tasks: int, low: float, high: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Hessians (T, 3, 3) with eigenvalues in [low, high], and minima (T, 3), of f_t(w) = ½ (w - c)ᵀ A (w - c)."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(tasks, 3, 3, generator=g, dtype=torch.float64))[0]
    eigenvalues = low + (high - low) * torch.rand(tasks, 3, generator=g, dtype=torch.float64)
    eigenvalues[:, 0], eigenvalues[:, 1] = low, high
    centres = torch.rand(tasks, 3, generator=g, dtype=torch.float64) * 2 - 1
    return (basis * eigenvalues[:, None]) @ basis.mT, centres


def test_regret_on_quadratics_grows_as_the_logarithm():
    """Catches an inner step that breaks the theory's conditions, and a leader that is not one: with α = 1/(2β), as
    theorem 1 asks where third derivatives vanish, f∘U is μ/8-strongly convex and 9β/8-smooth, the regret stays below
    (32 G²/μ) log T and gains as little from T/2 to T as a logarithm does, where who stays at the start gains a line."""
    low, high, rounds = 0.5, 2.0, 400
    rate = 1 / (2 * high)
    a, c = quadratics(rounds, low, high)

    def composed(w: torch.Tensor, a: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        def f(at: dict[str, torch.Tensor], step: int = 0) -> torch.Tensor:
            return (at["w"] - c) @ a @ (at["w"] - c) / 2

        return f(last(sgd_path(f, {"w": w}, rate, 1)))

    w = torch.zeros(3, dtype=torch.float64)
    curvature, slope = (vmap(op(composed), (None, 0, 0))(w, a, c) for op in (lambda f: jacrev(jacrev(f)), jacrev))
    inner = torch.eye(3, dtype=torch.float64) - rate * a
    torch.testing.assert_close(curvature, inner @ a @ inner)  # closed form of the composition
    eigenvalues = torch.linalg.eigvalsh(curvature)
    assert eigenvalues.min() >= low / 8 and eigenvalues.max() <= 9 * high / 8
    # f∘U is a quadratic: its sum's minimum is where a Newton step from 0 leads. The first leader is 0.
    leaders = torch.linalg.solve(curvature.cumsum(0), -slope.cumsum(0)[..., None])[..., 0]
    played = torch.cat([w[None], leaders[:-1]])

    def regret(at: torch.Tensor, upto: int) -> float:
        a_t, c_t = a[:upto], c[:upto]
        own = vmap(composed)(at[:upto], a_t, c_t).sum()
        return (own - vmap(composed, (None, 0, 0))(leaders[upto - 1], a_t, c_t).sum()).item()

    steepest = torch.linalg.vector_norm(vmap(jacrev(lambda w, a, c: (w - c) @ a @ (w - c) / 2))(played, a, c), dim=1)
    for upto in (50, 100, 200, rounds):
        assert 0 <= regret(played, upto) <= 32 * steepest.max().item() ** 2 / low * math.log(upto)
    gained = regret(played, rounds) - regret(played, rounds // 2)
    assert gained < 2 * regret(played, rounds) / math.log2(rounds)
    still = torch.ones_like(played)
    assert regret(still, rounds) - regret(still, rounds // 2) > 0.4 * regret(still, rounds) > 20 * gained
