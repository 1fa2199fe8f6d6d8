"""Nothing is validated or tested on classes that were trained on, unless it is asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from app.cli.builder import main
from app.evaluate import main as evaluate
from app.runs.leaks import KEY
from datamodules import Domain, ImageFolder, ImageMixture
from datamodules.images.tasks import ImageClasses
from models.core.checkpoint_io import load_checkpoint
from tests.support.fixtures import fake_omniglot
from tests.support.toy import TRAINER

SETTINGS = ("--data.val_tasks", "4", "--data.test_tasks", "4", "--data.ways", "2", "--data.queries", "1")
SMALL = (
    *TRAINER,
    *SETTINGS,
    "--data.meta_batch_size",
    "2",
    "--trainer.max_steps",
    "2",
    "--trainer.val_check_interval",
    "1",
)
NETWORK = ("--model.backbone", "models.Conv4", "--model.backbone.hidden", "4", "--model.backbone.downsample", "pool")


@pytest.fixture(scope="module")
def omniglot(tmp_path_factory):
    """Data flags of a small Omniglot; its class can be named on the command line."""
    root = tmp_path_factory.mktemp("omniglot")
    cls = fake_omniglot(root, drawers=4)
    with pytest.MonkeyPatch.context() as patch:
        import datamodules

        for name in ("characters", "drawers", "checksums", "maml_sizes"):
            patch.setattr(datamodules.Omniglot, name, getattr(cls, name))
        yield ("--data", "datamodules.Omniglot", "--data.root", str(root))


def train(runs: Path, omniglot: tuple, *flags: str, name: str = "run") -> Path:
    model = () if "--model" in flags else ("--model", "models.ProtoNet", *NETWORK)
    main([*model, *omniglot, "--data.protocol", "maml", *SMALL, "--runs", str(runs), "--name", name, *flags])
    return runs / name / "checkpoints" / "last.ckpt"


def refused(capsys, run, *args) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(*args)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    return line


def test_an_evaluation_with_another_split_is_refused(omniglot, tmp_path, capsys):
    """Catches a test on characters that were trained on, by another seed or by another protocol, in silence; and the
    same data set named again without its protocol and seed."""
    checkpoint = train(tmp_path, omniglot, "--data.seed", "3")
    assert len(load_checkpoint(checkpoint)[KEY]) == 50
    capsys.readouterr()
    for other in (("--data.init_args.seed", "1"), ("--data.init_args.protocol", "vinyals")):
        line = refused(capsys, evaluate, ["--ckpt_path", str(checkpoint), *other])
        assert "was trained on" in line and "meta-test classes" in line and "--allow_overlap true" in line
    evaluate(["--ckpt_path", str(checkpoint), "--data.init_args.seed", "1", "--allow_overlap", "true"])
    evaluate(["--ckpt_path", str(checkpoint), "--data", "Omniglot", "--data.init_args.test_tasks", "3"])
    evaluated = tmp_path / "run" / "evaluations"
    (named,) = (f for f in evaluated.iterdir() if "data-Omniglot" in f.name)
    assert json.loads((named / "results.json").read_text())["seed"] == 3
    assert "protocol: maml" in (named / "config.yaml").read_text()


def test_a_backbone_of_another_split_is_refused_and_its_classes_are_carried_on(omniglot, tmp_path, capsys):
    """Catches a learner on a backbone that was trained on the test characters."""
    checkpoint = train(tmp_path, omniglot)
    frozen = ("--model", "models.ProtoNet", "--model.backbone", "models.Pretrained", "--model.scale", "1.0")
    frozen += ("--model.distance", "cosine", "--model.scale", "null", "--model.backbone.ckpt_path", str(checkpoint))
    frozen += ("--model.backbone.backbone", "models.Conv4", "--model.backbone.backbone.hidden", "4")
    frozen += ("--model.backbone.backbone.downsample", "pool")
    capsys.readouterr()
    line = refused(capsys, lambda: train(tmp_path, omniglot, *frozen, "--data.seed", "1", name="other"))
    assert "the backbone, or an earlier part of the run, was trained on" in line
    built = train(tmp_path, omniglot, *frozen, "--data.seed", "0", name="same")
    assert set(load_checkpoint(checkpoint)[KEY].tolist()) <= set(load_checkpoint(built)[KEY].tolist())
    allowed = train(tmp_path, omniglot, *frozen, "--data.seed", "1", "--allow_overlap", "true", name="allowed")
    assert len(load_checkpoint(allowed)[KEY]) > 50


def test_validation_on_trained_characters_selects_nothing(omniglot, tmp_path):
    """Catches a best.ckpt that is chosen by what it was trained on."""
    checkpoint = train(tmp_path, omniglot, "--data.train_on_val", "true")
    assert not (checkpoint.parent / "best.ckpt").exists()
    assert len(load_checkpoint(checkpoint)[KEY]) == 60
    assert json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["accuracy"]["mean"] is not None


def pictures(root: Path, names: list[str], seed: int) -> Path:
    noise = np.random.default_rng(seed).integers(0, 256, (len(names), 6, 12, 12), np.uint8)
    for name, of_class in zip(names, noise, strict=True):
        (root / name).mkdir(parents=True)
        for n, image in enumerate(of_class):
            Image.fromarray(image).save(root / name / f"{n}.png")
    return root


def test_classes_are_known_by_their_images_whatever_they_are_called(tmp_path):
    """Catches a renamed copy of trained classes, or a turned or inverted domain of them, taken for new ones; and other
    classes of the same name taken for trained ones."""
    names = [f"c{k:02d}" for k in range(20)]
    pictures(tmp_path / "one", names, seed=0)
    one = ImageFolder(size=12, channels=1, root=str(tmp_path / "one"), fractions=(0.5, 0.2, 0.3), queries=2)
    trained = one.distribution("train").class_digests()
    assert len(trained) == 10
    assert not trained & one.distribution("test").class_digests()
    shutil.copytree(tmp_path / "one", tmp_path / "two", ignore=shutil.ignore_patterns(".*"))
    for path in list((tmp_path / "two").iterdir()):
        path.rename(path.with_name(f"other-{path.name}"))
    two = ImageFolder(size=12, channels=1, root=str(tmp_path / "two"), fractions=(0.0, 0.0, 1.0), ways=2, queries=2)
    assert trained <= two.distribution("test").class_digests()
    pictures(tmp_path / "three", names, seed=1)
    three = ImageFolder(size=12, channels=1, root=str(tmp_path / "three"), fractions=(0, 0, 1), queries=2)
    assert not trained & three.distribution("test").class_digests()
    mixture = ImageMixture({"turned": Domain(two, rotate=90), "inverted": Domain(two, invert=True)}, queries=1)
    assert trained <= mixture.distribution("test").class_digests()


def test_digests_know_a_class_in_any_turn_and_in_its_negative():
    """Catches a class that passes for another where its pictures are turned or inverted, and two that pass for one."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 1, 5, 5), generator=g).to(torch.uint8)

    def digests(changed: torch.Tensor) -> frozenset[int]:
        return ImageClasses(changed, np.array([3, 3]), ["a", "b"], ["a", "b"]).digests()

    whole = digests(images)
    assert len(whole) == 2
    for k in range(4):
        turned = images.rot90(k, (2, 3)).contiguous()
        assert digests(turned) == whole == digests(255 - turned)
    assert not digests(images.flip(3).contiguous()) & whole
    assert len(digests(torch.cat([images[:3], 255 - images[:3]]))) == 1
    wide = torch.randint(0, 256, (6, 1, 5, 7), generator=g).to(torch.uint8)
    assert digests(wide) == digests(255 - wide)
