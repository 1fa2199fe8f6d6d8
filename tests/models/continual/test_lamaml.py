"""La-MAML, Sync La-MAML and C-MAML."""

import pytest
import torch
from torch import Tensor

from datamodules.core.episodes import Support
from models import MLP, LaMAML
from models.continual.online_sgd import Online
from models.core.base_learner import Parameters
from models.core.chance import Chance
from tests.models.continual.test_online_sgd import KEY, experiences

HESSIAN = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 1.5]], dtype=torch.float64)
START = torch.tensor([0.4, -0.7, 1.1], dtype=torch.float64)
RATES = torch.tensor([0.2, 0.05, -0.1], dtype=torch.float64)
BATCH = torch.tensor([[1.0, 0.2, -0.4], [-0.5, 0.9, 0.3]], dtype=torch.float64)
OLD = torch.tensor([[0.1, -1.2, 0.8], [9.0, 9.0, 9.0]], dtype=torch.float64)
THERE = torch.tensor([True, False])
LABELS = torch.zeros(2, dtype=torch.int64)


class Quadratic(LaMAML):
    """The loss of an example x is ½ (θ - x)ᵀ H (θ - x)."""

    def mean_loss(self, parameters: Parameters, x: Tensor, y: Tensor, there: Tensor | None = None) -> Tensor:
        away = parameters["w"] - x
        loss = 0.5 * ((away @ HESSIAN) * away).sum(1)
        return loss.mean() if there is None else (loss * there).sum() / there.sum()


def quadratic(**settings) -> Quadratic:
    return Quadratic(MLP(3, (2,)), **{"clip": None, "replay": 2, "memory": 4} | settings).double().eval()


def by_hand(second: bool, clip: float | None = None) -> tuple[Tensor, Tensor]:
    """The meta-gradient by θ and by α, of two inner steps, by the chain rule."""

    def limited(g: Tensor) -> Tensor:
        return g if clip is None else g.clip(-clip, clip)

    d, everything = RATES.clip(min=0), torch.cat([BATCH, OLD[:1]])
    g0 = limited(HESSIAN @ (START - BATCH[0]))
    one = START - d * g0
    g1 = limited(HESSIAN @ (one - BATCH[1]))
    two = one - d * g1
    m1, m2 = (HESSIAN @ (at - everything.mean(0)) for at in (one, two))
    back = m2 - HESSIAN @ (d * m2) if second else m2  # through the second step
    by_rates = -(g0 * (m1 + back) + g1 * m2) / 2 * (RATES > 0)
    to_start = m1 + back
    return (to_start - HESSIAN @ (d * to_start) if second else to_start) / 2, by_rates


@pytest.mark.parametrize("second", [False, True])
def test_meta_gradient_on_a_quadratic_in_closed_form(second):
    """Catches first order for second and the reverse, which differ by the Hessian's term, and learned rates below 0."""
    learner = quadratic(first_order=not second)
    at, rates = {"w": START.clone().requires_grad_()}, {"w": RATES.clone().requires_grad_()}
    loss = learner.meta_objective(at, rates, BATCH, LABELS, (OLD, LABELS, THERE))
    found = torch.autograd.grad(loss, [at["w"], rates["w"]])
    for value, expected, other in zip(found, by_hand(second), by_hand(not second), strict=True):
        torch.testing.assert_close(value, expected)
        assert (value - other).abs().max() > 1e-2


def step(learner: LaMAML) -> tuple[Tensor, Tensor]:
    """θ and α after a step from the numbers above."""
    state = learner.begin(4, Chance.of(KEY))
    kept = state.kept._replace(rates={"w": RATES})
    memory = kept.earlier._replace(x=torch.cat([OLD, OLD]), held=torch.tensor([True, False, False, False]))
    state = Online({"w": START}, kept._replace(earlier=memory), in_order(state.chance))
    with torch.no_grad():
        after = learner.step(state, BATCH, LABELS)
    return after.parameters["w"], after.kept.rates["w"]


def in_order(chance: Chance) -> Chance:
    """Chance that leaves a batch of two in its order."""
    while (lots := chance.uniform(2)[0])[0] > lots[1]:
        chance = chance._replace(drawn=chance.drawn + 1)
    return chance


@pytest.mark.parametrize("second", [False, True])
def test_a_step_of_each_form(second):
    """Catches θ moved by the rates before they were learned, by negative ones, and rates of C-MAML that learn."""
    by_start, by_rates = by_hand(second)
    settings = {"first_order": not second, "rate": 0.3, "rate_of_rates": 0.25}
    learned = RATES - 0.25 * by_rates
    for form, rates, moved in (
        ("async", learned, learned.clip(min=0) * by_start),
        ("sync", learned, 0.3 * by_start),
        ("cmaml", RATES, 0.3 * by_start),
    ):
        theta, alpha = step(quadratic(form=form, **settings))
        torch.testing.assert_close(alpha, rates)
        torch.testing.assert_close(theta, START - moved)


@pytest.mark.parametrize("clip", [0.2, 0.05])
def test_clipping_clips(clip):
    """Catches a limit whose result is thrown away, of inner gradients by number and of meta-gradients by norm."""
    theta, alpha = step(quadratic(form="sync", clip=clip, rate=1.0, rate_of_rates=1.0))
    for moved, gradient in zip((START - theta, RATES - alpha), by_hand(False, clip), strict=True):
        torch.testing.assert_close(moved, gradient * min(1.0, clip / gradient.norm().item()))
    assert (START - theta).norm().item() == pytest.approx(clip)


class Watched(LaMAML):
    """Keeps what was replayed, outside of the state."""

    def meta_objective(self, parameters, rates, x, y, replayed) -> Tensor:
        self.replays.append((replayed[0][replayed[2]], x))
        return super().meta_objective(parameters, rates, x, y, replayed)


@pytest.mark.parametrize("replayed", ["earlier", "all"])
def test_what_is_replayed_is_of_earlier_experiences(replayed):
    """Catches a memory of earlier experiences that is the list which the current one is written to.

    Every experience's inputs are its number.
    """
    learner = Watched(MLP(3, (5,)), memory=6, replay=4, batch=2, glances=2, replayed=replayed).double().eval()
    state = learner.begin(4, Chance.of(KEY))
    met = set()
    for number in range(5):
        learner.replays = []
        x = torch.full((10, 3), float(number), dtype=torch.float64)
        state = learner.update(state, Support(x, torch.arange(10) % 4, 4))
        shown = torch.cat([old[:, 0] for old, _ in learner.replays]).unique().tolist()
        assert len(learner.replays) == 10 and all((new == number).all() for _, new in learner.replays)
        if replayed == "earlier":
            assert all(old < number for old in shown) and bool(shown) == (number > 0)
        else:
            met |= set(shown) & {float(number)}
    assert len(met) >= 3 if replayed == "all" else not met
    assert len(set(state.kept.memory.x[:, 0].tolist())) > 1  # a reservoir of all experiences


def test_learns_along_a_stream_of_its_own_order():
    """Catches examples of a batch that are always learned in one order, and first glances that differ by nothing."""
    learner = LaMAML(MLP(3, (5,)), batch=7, glances=1, memory=5).double().eval()
    part = experiences(1)[0]
    ends = []
    for key in (1, 2):
        state = learner.begin(4, Chance.of(torch.tensor(1)))
        state = learner.update(state._replace(chance=Chance.of(torch.tensor(key))), part)
        ends.append(state.parameters["head.weight"])
    assert not torch.allclose(*ends)
