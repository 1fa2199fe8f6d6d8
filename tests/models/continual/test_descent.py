"""Steps along a stream: plain and by Adam, on a linear head in closed form."""

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch.func import vmap

from datamodules.core.episodes import Support
from models import MLP, OML
from models.continual.descent import Descent, all_slopes, drawn_head, slopes, with_one
from models.continual.head_learner import HEAD
from models.core.chance import Chance

CLASSES, FEATURES = 4, 5


def examples(n: int = 12, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, FEATURES, generator=g, dtype=torch.float64)
    return z, torch.randint(CLASSES, (n,), generator=g)


def by_torch(optimizer: type[torch.optim.Optimizer], rate: float, head: torch.Tensor, z, y) -> torch.Tensor:
    """The head after torch's own optimizer took a step for each example, one after another."""
    linear = torch.nn.Linear(FEATURES, CLASSES, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(head[:, :-1])
        linear.bias.copy_(head[:, -1])
    steps = optimizer(linear.parameters(), lr=rate)
    for one, label in zip(z, y, strict=True):
        steps.zero_grad()
        F.cross_entropy(linear(one[None]), label[None]).backward()
        steps.step()
    return torch.cat([linear.weight, linear.bias[:, None]], 1).detach()


def test_the_gradient_of_a_head_is_that_of_autograd():
    """Catches a sign, the label's 1 at another class, and a bias that is left out."""
    z, y = examples(1)
    head = torch.randn(CLASSES, FEATURES + 1, dtype=torch.float64, requires_grad=True)
    x = with_one(z)
    F.cross_entropy(x @ head.T, y).backward()
    ours = torch.outer(slopes((x @ head.T)[0], y[0]), x[0])
    torch.testing.assert_close(ours.detach(), head.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_stream_is_learned_one_example_at_a_time(optimizer):
    """Catches a step of a whole experience, steps at the head before all, Adam's corrections, and averages that an
    experience begins anew: against torch's optimizers on a linear layer."""
    learner = OML(MLP(1, (FEATURES,)), CLASSES, eval_rates=[0.03], eval_optimizer=optimizer).double().eval()
    z, y = examples()
    with torch.no_grad():
        state = learner.begin(CLASSES, Chance.of(torch.tensor(7)))
        start = state.parameters[HEAD].clone()
        for part in ((0, 5), (5, 6), (6, 12)):
            state = learner.update(state, Support(with_one(z)[slice(*part)], y[slice(*part)], CLASSES))
    theirs = by_torch({"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer], 0.03, start, z, y)
    torch.testing.assert_close(state.parameters[HEAD], theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(learner.predict(state, with_one(z)), with_one(z) @ theirs.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_streams_do_not_depend_on_each_other(optimizer):
    """Catches steps in place, or averages, that streams that are mapped together share."""
    learner = OML(MLP(1, (FEATURES,)), CLASSES, eval_rates=[0.03], eval_optimizer=optimizer).double().eval()
    parts = [examples(seed=seed) for seed in range(3)]
    z, y = (torch.stack(values) for values in zip(*parts, strict=True))
    key = torch.tensor([3, 1, 4])

    def learned(z, y, key):
        state = learner.begin(CLASSES, Chance.of(key))
        return learner.update(state, Support(with_one(z), y, CLASSES)).parameters[HEAD]

    with torch.no_grad():
        together = vmap(learned)(z, y, key)
        alone = torch.stack([learned(*one) for one in zip(z, y, key, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(alone[0], alone[1])


def test_first_step_of_sgd_by_hand():
    """Catches a rate that counts twice: one example of class 1 and a head of zeros."""
    head, x = torch.zeros(2, 3), torch.tensor([[2.0, -1.0, 1.0]])
    assert all_slopes(head, x, torch.tensor([1]), 0.1).tolist() == [[0.5, -0.5]]
    state = Descent.of({HEAD: head}, "sgd").stepped({HEAD: torch.outer(torch.tensor([0.5, -0.5]), x[0])}, 0.1)
    expected = torch.tensor([[-0.1, 0.05, -0.05], [0.1, -0.05, 0.05]])
    torch.testing.assert_close(state.parameters[HEAD], expected)


def test_heads_are_drawn_as_he_et_al():
    """Catches another variance, a distribution that is not normal, drawn biases, and one head for all streams."""
    head, after = drawn_head(Chance.of(torch.tensor(11)), 50, 200, torch.zeros((), dtype=torch.float64))
    assert (head[:, -1] == 0).all()
    weights = head[:, :-1].flatten().numpy()
    assert stats.kstest(weights, stats.norm(scale=(2 / 200) ** 0.5).cdf).pvalue > 0.01
    other, _ = drawn_head(after, 50, 200, head)
    assert abs(stats.pearsonr(weights, other[:, :-1].flatten().numpy()).statistic) < 0.04
