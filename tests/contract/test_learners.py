"""What every algorithm keeps, whatever it is; a new one is found through ``models.ALGORITHMS``."""

from __future__ import annotations

import copy
import functools
import io
import json
import logging
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
from jaxtyping import Float, Int, jaxtyped
from PIL import Image
from torch import Tensor

import models
from app.cli.builder import MetaboltCLI, main
from app.evaluate import main as evaluate
from app.plots import style
from app.predict import main as predict
from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Support
from models.core.checkpoint_io import load_checkpoint
from models.networks.batch_norm import BatchNorm, BatchNormMode
from tests.support.drawing import sketch
from tests.support.toy import ALGORITHMS, LEARNERS, NOISELESS, ToyImages, command, headline, train_for, weights

RATE = 0.5
SGD = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", str(RATE))
# What couples the tasks of a meta-batch, and is to be left out where tasks are compared in other meta-batches.
COUPLED = {
    "ABML": ("--model.deviation", "1e-15"),
    "Baseline": ("--model.batch_norm", "none"),
    "PEARL": ("--model.kl_weight", "0"),  # summed over a meta-batch, as published
    "ProbabilisticTaskModel": ("--model.theme_rate", "0"),
    "SNAIL": ("--data.max_train_shots", "1"),
}


@pytest.fixture(autouse=True, scope="module")
def _sketches():
    """Pictures are drawn, but of no pixels."""
    with mock.patch.object(style, "save", sketch):
        yield


FEW_SHOT = pytest.mark.parametrize("name", ALGORITHMS)
EVERY = pytest.mark.parametrize("name", LEARNERS)


@functools.cache
def _built(name: str, *flags: str) -> tuple[models.MetaLearner, EpisodicDataModule]:
    cli = MetaboltCLI(command(name, Path("runs"), *flags))
    return cli.model, cli.datamodule


def built(name: str, *flags: str) -> tuple[models.MetaLearner, EpisodicDataModule]:
    """A learner as the command line builds it, and its data: copies, of what is built once for each choice of flags."""
    found = copy.deepcopy(_built(name, *flags))
    torch.manual_seed(0)
    return found


def learner(name: str, *flags: str) -> models.MetaLearner:
    return built(name, *flags)[0]


def task():
    data = ToyImages(ways=3, shots=2, queries=4, meta_batch_size=2)
    return data.on_device(data.distribution("train").sample([0]))[0]


def test_every_algorithm_has_a_toy_configuration():
    """Catches an algorithm that the contract is not tested on."""
    assert {a.__name__ for a in models.ALGORITHMS} <= set(LEARNERS)


@pytest.mark.parametrize("algorithm", models.ALGORITHMS)
def test_says_what_it_is(algorithm):
    """Catches an algorithm without its paper or its kind of tasks."""
    assert algorithm.paper.url.startswith("https://")
    assert 1990 < algorithm.paper.year < 2100
    assert algorithm.tasks


@FEW_SHOT
@pytest.mark.parametrize(("ways", "shots", "queries"), [(4, 1, 1), (2, 3, 2)])
def test_shapes_follow_the_task(name, ways, shots, queries):
    """Catches logits in another order of axes, of the ways of meta-training for those of the task, or of no floats."""
    model = learner(name).eval()
    data = ToyImages(ways=ways, shots=shots, queries=queries)
    batch = data.on_device(data.distribution("train").sample([0, 1]))
    with torch.no_grad(), jaxtyped("context"):
        for t in batch:
            assert isinstance(t.support.x, Float[Tensor, "support 1 16 16"])
            assert isinstance(t.query_x, Float[Tensor, "queries 1 16 16"])
            assert isinstance(t.query_y, Int[Tensor, "queries"])
            states = list(model.adaptation(t.support))
            for state in (model.adapt(t.support), states[-1]):
                assert isinstance(model.predict(state, t.query_x), Float[Tensor, f"queries {ways}"])


@FEW_SHOT
def test_state_is_returned_not_stored(name):
    """Catches state on self between support and query, which vmap and interleaved tasks would mix up."""
    model = learner(name).eval()
    t = task()
    before = copy.deepcopy({k: v for k, v in vars(model).items() if not k.startswith("_")})
    parameters = {n: p.clone() for n, p in model.state_dict().items()}
    with torch.no_grad():
        first = model.adapt(t.support)
        expected = model.predict(first, t.query_x)
        other = Support(1 - t.support.x, t.support.y.flip(0), 3)
        model.predict(model.adapt(other), t.query_x)
        torch.testing.assert_close(model.predict(first, t.query_x), expected, rtol=0, atol=0)
    after = {k: v for k, v in vars(model).items() if not k.startswith("_")}
    assert before.keys() == after.keys()
    assert all(torch.equal(p, parameters[n]) for n, p in model.state_dict().items())


@FEW_SHOT
@pytest.mark.parametrize("batch_norm", get_args(BatchNormMode))
def test_prediction_depends_on_other_queries_only_if_transductive(name, batch_norm):
    """Catches batch statistics of the queries in a learner that says that it has none, and the reverse."""
    model = learner(name, "--model.batch_norm", batch_norm).eval()
    t = task()
    with torch.no_grad():
        state = model.adapt(t.support)
        changed = t.query_x.clone()
        changed[1:] = changed[1:].flip(-1) * 0.5
        same = torch.allclose(
            model.predict(state, t.query_x)[0], model.predict(state, changed)[0], rtol=1e-5, atol=1e-6
        )
    assert same != model.transductive
    normalised = any(isinstance(m, BatchNorm) for m in model.modules())
    assert model.transductive == (normalised and batch_norm == "transductive")


@FEW_SHOT
def test_order_of_the_support_set_does_not_matter(name):
    """Catches a learner that reads the support set as a sequence; shots are unequal."""
    model = learner(name).eval()
    t = task()
    keep = torch.tensor([0, 1, 2, 4])  # two, one and one shots
    with torch.no_grad():
        outputs = []
        for order in (keep, keep.flip(0)):
            state = model.adapt(Support(t.support.x[order], t.support.y[order], 3))
            outputs.append(model.predict(state, t.query_x))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert outputs[0].shape == (len(t.query_x), 3)


@FEW_SHOT
def test_labels_are_names_only(name):
    """Catches labels that carry meaning: with the head's rows permuted as the labels, predictions permute along."""
    model = learner(name).eval()
    t = task()
    order = torch.tensor([2, 0, 1])  # class k becomes order[k]
    with torch.no_grad():
        expected = model.predict(model.adapt(t.support), t.query_x)
        for p in model.class_rows().values():
            p.copy_(p.index_select(p.shape.index(3), torch.argsort(order)))
        got = model.predict(model.adapt(Support(t.support.x, order[t.support.y], 3)), t.query_x)
    torch.testing.assert_close(got[:, order], expected, rtol=1e-4, atol=1e-5)


@FEW_SHOT
def test_evaluation_keeps_no_graph(name):
    """Catches memory that grows through validation."""
    model = learner(name).eval()
    data = ToyImages(ways=3, queries=2)
    batch = data.on_device(data.distribution("val").sample(range(4)))
    with torch.inference_mode():
        model.evaluation_step(batch, "val")
    states = model.stage_metrics("val")
    assert not any(v.requires_grad for v in states.task_accuracy)
    assert states.compute()["tasks"] == 4


SCHEDULE = ("--model.scheduler", "torch.optim.lr_scheduler.StepLR", "--model.scheduler.step_size", "4")


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        run: its folder.
        log: what was logged meanwhile.
    """

    run: Path
    log: str

    @property
    def last(self) -> Path:
        return self.run / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[[str], Trained]:
    """The run of a learner, made once for the tests that only read it: with a schedule and pictures; it is to be
    stopped early, after two validations of which the second is no better by the least that counts."""
    runs = tmp_path_factory.mktemp("trained")

    @functools.cache
    def run(name: str) -> Trained:
        stopping = (
            *("--trainer.callbacks", "pytorch_lightning.callbacks.EarlyStopping"),
            *("--trainer.callbacks.monitor", f"val/{headline(name)}", "--trainer.callbacks.mode", "max"),
            *("--trainer.callbacks.patience", "1", "--trainer.callbacks.min_delta", "1e6"),
        )
        torch.manual_seed(0)
        log = io.StringIO()
        handler = logging.StreamHandler(log)
        logging.getLogger().addHandler(handler)
        try:
            main(command(name, runs, *SCHEDULE, *stopping, "--pictures", "true", steps=60))
        finally:
            logging.getLogger().removeHandler(handler)
        return Trained(runs / name.lower(), log.getvalue())

    return run


@EVERY
def test_early_stopping_stops(name, trained):
    """Catches a callback that never sees the metric that it watches."""
    assert load_checkpoint(trained(name).last)["global_step"] == 12


@EVERY
def test_trains_saves_loads_and_resumes_bit_for_bit(name, trained, tmp_path, capsys):
    """Catches state that a checkpoint lacks, repeated or skipped tasks, and a schedule or optimizer that restarts."""
    whole = trained(name)
    main(command(name, tmp_path, *SCHEDULE, steps=7))
    main(command(name, tmp_path, *SCHEDULE, "--ckpt_path", "last"))
    last = tmp_path / name.lower() / "checkpoints" / "last.ckpt"
    expected, got = weights(whole.last), weights(last)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[k], got[k]) for k in expected)
    assert load_checkpoint(last)["global_step"] == 12
    assert headline(name) in capsys.readouterr().out


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Where the runs are that those with a flag are compared with."""
    return tmp_path_factory.mktemp("plain")


@EVERY
@pytest.mark.parametrize(
    "flags",
    [
        ("--trainer.precision", "bf16-mixed", "--pictures", "true"),
        ("--trainer.precision", "64-true"),
    ],
)
def test_trainer_features_take_effect(name, flags, tmp_path, plain, caplog):
    """Catches a Trainer option that is accepted and ignored: weights must move, and differently, or the option is
    refused in one line; results of a type that cannot be written, and pictures that autocast breaks."""
    last = f"{name.lower()}/checkpoints/last.ckpt"
    if not (plain / last).exists():
        main(command(name, plain, *SGD, steps=2))
    main(command(name, tmp_path, *SGD, *flags, steps=2))
    a, b = weights(plain / last), weights(tmp_path / last)
    assert all(torch.isfinite(v).all() for v in b.values())
    assert any(not torch.equal(a[k], b[k]) for k in a)
    assert (tmp_path / name.lower() / "test_tasks.npz").exists()
    assert "not made" not in caplog.text


def moved(name: str, *flags: str, steps: int = 1, **trainer) -> dict[str, torch.Tensor]:
    """How far each parameter is from its start after so many meta-updates, by plain gradient descent in float64."""
    model, data = built(name, *SGD, *flags)
    model = model.double()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    pl.seed_everything(0)
    train_for(model, data, steps, precision="64-true", **trainer)
    return {n: p.detach() - start[n] for n, p in model.named_parameters()}


def refuses_manual(name: str, tmp_path, capsys, flag: str) -> bool:
    """Whether the learner takes optimizer steps of its own; then the flag is refused in one line."""
    if learner(name).automatic_optimization:
        return False
    with pytest.raises(SystemExit):
        main(command(name, tmp_path, flag, "2", steps=2))
    assert "takes several steps of its own" in capsys.readouterr().err
    return True


@EVERY
def test_gradients_are_clipped_to_their_norm(name, tmp_path, capsys):
    """Catches a norm of some of the gradients alone, or a clipping that comes after the step: the step must be
    shortened to the norm, in its own direction."""
    if refuses_manual(name, tmp_path, capsys, "--trainer.gradient_clip_val"):
        return
    whole = moved(name)
    norm = torch.stack([d.norm() for d in whole.values()]).norm() / RATE
    assert norm > 0
    clipped = moved(name, gradient_clip_val=(norm / 3).item())
    for parameter, d in whole.items():
        shortened = d / 3 * norm / (norm + 1e-6)  # as torch has it, which matters where gradients are small
        torch.testing.assert_close(clipped[parameter], shortened, rtol=1e-5, atol=1e-12, msg=parameter)


@EVERY
def test_accumulated_meta_batches_are_one(name, tmp_path, capsys):
    """Catches gradients that are summed, or cleared in between, or tasks that are skipped: two meta-batches of four
    tasks, accumulated, move every parameter as one of eight."""
    if refuses_manual(name, tmp_path, capsys, "--trainer.accumulate_grad_batches"):
        return
    flags = (*NOISELESS.get(name, ()), *COUPLED.get(name, ()))
    halves = moved(name, *flags, "--data.meta_batch_size", "4", accumulate_grad_batches=2)
    whole = moved(name, *flags, "--data.meta_batch_size", "8")
    assert any(d.norm() > 0 for d in whole.values())
    for parameter, d in whole.items():
        torch.testing.assert_close(halves[parameter], d, rtol=1e-6, atol=1e-10, msg=parameter)


@EVERY
def test_evaluates_through_the_same_command(name, trained, tmp_path):
    """Catches a checkpoint that gives other metrics than its training's test, or in other batches, and pictures that
    fail."""
    run = trained(name).run
    assert (run / "results.png").exists() and list((run / "figures").glob("val_*.png"))
    assert "not made" not in trained(name).log
    best = run / "checkpoints" / "best.ckpt"  # none where validation selects nothing
    tested = best if best.exists() else best.with_name("last.ckpt")
    checkpoint = ["--ckpt_path", str(tested), "--out", str(tmp_path / "out")]
    evaluate([*checkpoint, "--data.init_args.eval_batch_size", "5"])
    first, again = (json.loads((f / "results.json").read_text())["metrics"] for f in (run, tmp_path / "out"))
    assert first.keys() == again.keys()
    for metric in {"nll", headline(name)} & first.keys():
        assert again[metric]["mean"] == pytest.approx(first[metric]["mean"], rel=1e-4)


@FEW_SHOT
def test_predicts_labels_of_pictures(name, trained, tmp_path):
    """Catches a learner that cannot serve other ways and unequal shots than it was trained on."""
    checkpoint = ["--ckpt_path", str(trained(name).last), "--out", str(tmp_path / "out")]
    data = ToyImages(ways=4)
    images = data.classes("test").images
    for k in range(4):
        for folder, numbers in (("support", range(1 + k % 2)), ("query", range(5, 8))):
            place = tmp_path / folder / f"class{k}"
            place.mkdir(parents=True)
            for i in numbers:
                Image.fromarray(images[20 * k + i, 0].numpy()).save(place / f"{i}.png")
    predict([*checkpoint, "--support", str(tmp_path / "support"), "--query", str(tmp_path / "query")])
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())["predictions"]
    assert len(found) == 12
    for row in found:
        assert len(row["probabilities"]) == 4
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4)


@FEW_SHOT
def test_shots_are_information_and_no_prior(name):
    """Catches sums over shots where the paper has none to sum, and losses by which a class with more examples is the
    likelier: five shots must not be worse than one, and with five of one class and one of the others that class must
    not be called more often than the others. Without the weights by class it is called .55 (Reptile) to .99 (Baseline)
    of the time."""
    flags = ["--model.optimizer", "torch.optim.Adam", "--model.optimizer.lr", "0.005"]
    # The published rate is of features of unit length; of others its inner loop may overflow.
    flags += ["--model.inner_rate", "0.1"] if name == "LEO" else []
    # An optimizer may go uphill at first that is meta-trained for some steps by an estimate with noise.
    flags += NOISELESS[name] if name == "LearnedOptimizerPES" else []
    model, data = built(name, *flags)
    if any(True for _ in model.parameters()):
        train_for(model, data, 15)
    model.eval()
    data = ToyImages(ways=3, shots=5, queries=4, meta_batch_size=2)
    tasks = data.on_device(data.distribution("test").sample(range(30)))
    right = dict.fromkeys(("one", "five", "unequal"), 0)
    called = asked = 0
    for i in range(30):
        t, many = tasks[i], i % 3
        of_class = [(t.support.y == k).nonzero()[:, 0] for k in range(3)]
        rows = {
            "one": torch.stack([own[0] for own in of_class]),
            "five": torch.cat(of_class),
            "unequal": torch.cat([own if k == many else own[:1] for k, own in enumerate(of_class)]),
        }
        asked += len(t.query_y)
        with torch.no_grad():
            for which, some in rows.items():
                state = model.adapt(Support(t.support.x[some], t.support.y[some], 3))
                chosen = model.predict(state, t.query_x).argmax(-1)
                right[which] += int((chosen == t.query_y).sum())
                called += int((chosen == many).sum()) if which == "unequal" else 0
    error = asked**-0.5 / 2
    assert right["five"] / asked > right["one"] / asked - 3 * error
    # Above a third, since a mean of five examples is nearer to what it is the mean of than one example is.
    assert called / asked < 0.45


@EVERY
def test_copies_and_pickles(name, tmp_path):
    """Catches a learner of the command line that holds its parser, or anything else that cannot be copied: weight
    averaging, and processes that are started otherwise, take copies."""
    model = MetaboltCLI(command(name, tmp_path)).model
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        if any(p.requires_grad for p in other.parameters()):
            other.configure_optimizers()
