"""A backbone taken from a checkpoint: whose weights it has, when it reads them, and that it stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

import models
from app.cli.builder import main
from app.evaluate import main as evaluate
from datamodules.core.errors import ConfigError
from models import MAML, MLP, Conv4, MetaSGD, Pretrained, ProtoNet, UnitLength
from models.core.pretrained import load_pretrained
from models.networks.batch_norm import BatchNorm, BatchNormMode, normalize_by
from tests.support.gradients import episodes, meta_gradient
from tests.support.toy import BACKBONE, command, weights

IN = ("--model.backbone", "models.Pretrained", "--model.backbone.backbone", "models.Conv4")
NETWORK = ("--model.backbone.backbone.hidden", "8", "--model.backbone.backbone.image_size", "16")


def network(**settings) -> Conv4:
    return Conv4(**{"hidden": 4, "image_size": 8, **settings})


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Of a ProtoNet in float64, with running averages that are not those at the start."""
    torch.manual_seed(7)
    learner = ProtoNet(network()).double()
    for layer in learner.modules():
        if isinstance(layer, BatchNorm):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    path = tmp_path / "source.ckpt"
    torch.save({"state_dict": learner.state_dict()}, path)
    return path


def of(checkpoint: Path) -> Pretrained:
    backbone = Pretrained(network().double(), str(checkpoint))
    backbone.load()
    return backbone


def features(checkpoint: Path, x: torch.Tensor) -> torch.Tensor:
    """What the network of the checkpoint makes of x by its running averages."""
    source = ProtoNet(network()).double()
    source.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    with normalize_by("running"):
        return source.backbone(x)


def test_frozen_features_are_the_sources_by_running_averages(checkpoint):
    """Catches batch statistics, or dropout, in a frozen backbone, and a gradient to it."""
    x = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    expected = features(checkpoint, x).detach()
    backbone = of(checkpoint).train()
    for source in ("batch", "running", "none"):
        with normalize_by(source):
            torch.testing.assert_close(backbone(x), expected, rtol=1e-12, atol=1e-12)
    assert not backbone(x).requires_grad and not backbone.backbone.training
    unit = UnitLength(backbone)(x)
    torch.testing.assert_close(unit, expected / expected.square().sum(1, keepdim=True).sqrt())


@pytest.mark.parametrize("batch_norm", get_args(BatchNormMode))
def test_learner_on_a_frozen_backbone_is_the_learner_on_its_features(checkpoint, batch_norm):
    """Catches frozen weights that the inner loop adapts or the meta-gradient reaches, in any mode of batch norm."""
    batch = episodes()
    frozen = MetaSGD(of(checkpoint), outputs=3, inner_rate=0.1, inner_steps=2, batch_norm=batch_norm).double()
    plain = MetaSGD(MLP(frozen.learner.backbone.out_features, hidden=()), outputs=3, inner_rate=0.1, inner_steps=2)
    plain = plain.double()
    for name in ("weight", "bias"):
        getattr(plain.learner.head, name).data.copy_(getattr(frozen.learner.head, name).data)
    assert not frozen.transductive
    optimized = [p for group in frozen.configure_optimizers().param_groups for p in group["params"]]
    assert len(optimized) == 4  # the head and its rates
    ours = meta_gradient(frozen, batch)
    batch.support_x, batch.query_x = (
        features(checkpoint, x.flatten(0, 1)).detach().unflatten(0, x.shape[:2])
        for x in (batch.support_x, batch.query_x)
    )
    for name, expected in meta_gradient(plain, batch).items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-12)
    assert all(not g.any() for n, g in ours.items() if "backbone" in n)


def flags_for(algorithm: str, tmp_path, *flags: str) -> tuple[list[str], Path]:
    """Arguments of train.py for two meta-updates on a pretrained backbone, without validation, and its checkpoint."""
    source = tmp_path / "source16.ckpt"
    torch.manual_seed(7)
    torch.save({"state_dict": ProtoNet(network(hidden=8, image_size=16)).state_dict()}, source)
    plain = command(algorithm, tmp_path, "--trainer.limit_val_batches", "0", "--name", "mine", *flags, steps=2)
    i = plain.index(BACKBONE[0])
    pretrained = [*IN, *NETWORK, "--model.backbone.ckpt_path", str(source)]
    return [*plain[:i], *pretrained, *plain[i + len(BACKBONE) :]], source


@pytest.mark.parametrize("algorithm", ["Reptile", "LEO"])
def test_training_leaves_a_frozen_backbone_as_it_is_and_needs_its_file_no_more(algorithm, tmp_path):
    """Catches a learner whose inner or outer loop, or whose running averages, move frozen weights; an evaluation and
    a resume that read the file that the weights came from."""
    flags, source = flags_for(algorithm, tmp_path)
    main(flags)
    last = tmp_path / "mine" / "checkpoints" / "last.ckpt"
    before, after = weights(source), weights(last)
    prefix = next(n for n in after if n.endswith("backbone.backbone.convs.0.weight"))[: -len("convs.0.weight")]
    kept = [n for n in before if n.startswith("backbone.")]
    assert len(kept) == 24
    for name in kept:
        assert torch.equal(before[name], after[prefix + name.removeprefix("backbone.")]), name
    source.unlink()
    if algorithm == "LEO":
        evaluate(["--ckpt_path", str(last), "--out", str(tmp_path / "out")])
        assert (tmp_path / "out" / "results.json").is_file()
        main([*flags, "--ckpt_path", "last", "--trainer.max_steps", "3"])


def test_thawed_backbone_starts_from_the_checkpoint_and_moves(tmp_path):
    """Catches a start that is not the checkpoint's, and a test after training that reads it again."""
    sgd = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "1e-6")
    flags, source = flags_for("ProtoNet", tmp_path, *sgd)
    main([*flags, "--model.backbone.frozen", "false"])
    start, end = weights(source), weights(tmp_path / "mine" / "checkpoints" / "last.ckpt")
    first = "backbone.convs.0.weight"
    moved = (start[first] - end["backbone." + first]).abs().max()
    assert 0 < moved < 1e-3


def test_a_learner_of_nothing_but_a_frozen_backbone_says_so(checkpoint):
    """Catches the optimizer's own error, which does not say what is missing."""
    with pytest.raises(ConfigError, match="nothing to train"):
        ProtoNet(of(checkpoint)).configure_optimizers()
    ProtoNet(of(checkpoint), distance="cosine").configure_optimizers()


def test_what_is_read_must_be_there_and_fit(checkpoint, tmp_path, capsys):
    """Catches a traceback for a file that is absent or of another network, and weights that were never read."""
    with pytest.raises(ConfigError, match="no checkpoint at"):
        Pretrained(network(), str(tmp_path / "none.ckpt")).load()
    for other in (network(hidden=5), MLP(64, hidden=(4, 4)), Conv4(1, 4, 16, "pool")):
        if isinstance(other, Conv4) and other.convs[0].out_channels == 4:
            other.convs = other.convs[:3]  # fewer layers than the checkpoint has
        with pytest.raises(ConfigError, match="holds no backbone of these settings"):
            Pretrained(other, str(checkpoint)).load()
    with pytest.raises(ConfigError, match="not loaded"):
        Pretrained(network(), str(checkpoint))(torch.rand(1, 1, 8, 8))
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ConfigError, match="holds no backbone"):
        Pretrained(network(), str(tmp_path / "list.ckpt")).load()
    flags, source = flags_for("MetaSGD", tmp_path)
    source.unlink()
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.splitlines()[-1].startswith(f"error: no checkpoint at {source}")
    assert not (tmp_path / "mine").exists()


def test_backbone_is_found_in_any_learners_checkpoint(checkpoint, tmp_path):
    """Catches a place of the backbone in the state_dict that is not known: behind "learner", or pretrained itself."""
    learners = (MAML(network(), 3).double(), ProtoNet(of(checkpoint)).double(), MAML(of(checkpoint), 3).double())
    for i, learner in enumerate(learners):
        path = tmp_path / f"{i}.ckpt"
        torch.save({"state_dict": learner.state_dict()}, path)
        taken = of(path).backbone.state_dict()
        given = learner.state_dict()
        prefix = next(n for n in given if n.endswith("convs.0.weight"))[: -len("convs.0.weight")]
        assert all(torch.equal(v, given[prefix + n]) for n, v in taken.items())
        again = models.MAML(Pretrained(network().double(), "gone.ckpt"), 3).double()
        if i == 2:
            again.load_state_dict(given)
            load_pretrained(again)  # reads nothing: the weights are there
