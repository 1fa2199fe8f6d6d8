"""What all learners share: the loss of a support set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import models
from app.cli.builder import main
from datamodules import Support
from models import ABML, ANIL, IMAML, MAML, MLP, Baseline, Conv4, MetaSGD, ProtoNet, Reptile
from models.core.inner_loop import adapted, with_gradient
from models.networks.batch_norm import BatchNorm
from tests.support.toy import ToyImages, command, train_for

DOUBLE = torch.float64
REPEATED = torch.tensor([0, 0, 0, 0, 1, 2])


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(3, 4, generator=g, dtype=DOUBLE), torch.randn(5, 4, generator=g, dtype=DOUBLE)


def made(name: str):
    torch.manual_seed(0)
    network = MLP(4, hidden=[8])
    steps = {"outputs": 3, "inner_steps": 3}
    learners = {
        "MAML": lambda: MAML(network, inner_rate=0.1, **steps),
        "ANIL": lambda: ANIL(network, inner_rate=0.1, **steps),
        "MetaSGD": lambda: MetaSGD(network, **steps),
        "IMAML": lambda: IMAML(network, inner_rate=0.1, **steps),
        "ProtoNet": lambda: ProtoNet(network),
        "Reptile": lambda: Reptile(network, outputs=3, inner_rate=0.1, eval_inner_steps=4, eval_inner_batch=6),
        "ABML": lambda: ABML(network, outputs=3, inner_rate=0.1, inner_kl_weight=0.0),
        "Baseline": lambda: Baseline(network, classes=7, passes=4, batch=6),
    }
    return learners[name]().double().eval()


# LEO's codes are means over pairs of examples, as published.
@pytest.mark.parametrize("name", ["MAML", "ANIL", "MetaSGD", "IMAML", "ProtoNet", "Reptile", "ABML", "Baseline"])
def test_an_example_that_is_there_four_times_adapts_as_once(name):
    """Catches shots that act as a prior: a class is the likelier for having more examples, though they tell nothing."""
    learner, (x, q) = made(name), problem()
    once = torch.arange(3)
    with torch.no_grad():
        alone, repeated = (learner.predict(learner.adapt(Support(x[y], y, 3)), q) for y in (once, REPEATED))
    torch.testing.assert_close(repeated, alone, rtol=1e-9, atol=1e-10)


def test_with_as_many_examples_of_each_class_it_is_the_mean():
    """Catches a weight by class that changes what the papers have."""
    learner, logits = made("MAML"), torch.randn(6, 3, dtype=DOUBLE)
    support = Support(torch.zeros(6, 4), torch.tensor([0, 1, 2, 2, 0, 1]), 3)
    torch.testing.assert_close(learner.support_loss(logits, support), F.cross_entropy(logits, support.y))
    of_class = [F.cross_entropy(logits[k == REPEATED], REPEATED[k == REPEATED]) for k in range(3)]
    unequal = learner.support_loss(logits, Support(torch.zeros(6, 4), REPEATED, 3))
    torch.testing.assert_close(unequal, torch.stack(of_class).mean())


def test_a_class_without_examples_is_refused():
    """Catches probabilities that are no numbers, of a class that nobody gave an example of."""
    learner, (x, _) = made("ProtoNet"), problem()
    with pytest.raises(ValueError, match="class 1 of 3 has no example"):
        learner.adapt(Support(x, torch.tensor([0, 2, 0]), 3))


def test_a_surrogate_lends_its_gradient_and_no_value():
    """Catches a loss that is shown with what it takes its gradient from added to it."""
    x = torch.tensor(3.0, requires_grad=True)
    loss = with_gradient(7 * x, x**2)
    loss.backward()
    assert loss.item() == 21.0 and x.grad.item() == 6.0


@pytest.mark.parametrize(("step", "place"), [(0, 0), (1, 0), (2, 1), (3, 2)])
def test_statistics_of_a_support_set_are_of_the_step_that_led_here(step, place):
    """Catches layers whose steps have scales of their own, normalised after a step by those of another one."""
    network = torch.nn.Sequential(torch.nn.Linear(4, 3), BatchNorm(3))
    network[1].per_step(3)
    state = adapted(network, {}, Support(torch.randn(6, 4), REPEATED, 3), "support", step)
    assert {of for _, of in state.statistics} == {place}


def test_a_learner_that_was_loaded_is_trained_on_as_any_other(tmp_path):
    """Catches batch norm that stays in evaluation, where its running averages never move."""
    main(command("ProtoNet", tmp_path, steps=2))
    loaded = models.load(tmp_path / "protonet" / "checkpoints" / "last.ckpt")
    assert not loaded.training
    before = {n: b.clone() for n, b in loaded.named_buffers() if "running" in n}
    train_for(loaded, ToyImages(ways=3, meta_batch_size=2), 2)
    assert before and all(not torch.equal(b, before[n]) for n, b in loaded.named_buffers() if n in before)


def test_running_averages_move_by_the_mean_over_tasks():
    """Catches sums over tasks, and means over fewer than the meta-batch has: by hand from each task's own batch."""
    torch.manual_seed(0)
    data = ToyImages(ways=3, shots=1, queries=2, meta_batch_size=4)
    learner = ProtoNet(Conv4(hidden=4, image_size=16))
    first: BatchNorm = next(m for m in learner.modules() if isinstance(m, BatchNorm))
    batch = data.on_device(data.distribution("train").sample(range(4)))
    with torch.no_grad():
        inputs = [learner.backbone.convs[0](torch.cat([t.support.x, t.query_x])) for t in batch]
        means = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
        variances = torch.stack([x.var((0, 2, 3), correction=0) for x in inputs]).mean(0)
    train_for(learner, data, 1)
    torch.testing.assert_close(first.running_mean, 0.1 * means, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first.running_var, 0.9 + 0.1 * variances, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"ways": 1}, "ways"), ({"workers": -1}, "workers"), ({"shots": 0}, "shots"), ({"train_ways": 1}, "train_ways")],
)
def test_data_of_no_task_are_refused(settings, said):
    """Catches sizes by which nothing can be told apart, and numbers that torch refuses in its own words."""
    with pytest.raises(ValueError, match=said):
        ToyImages(**settings)
