"""What the parser says, in the words of the configuration: the whole key, the value, what it must be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from app.cli.builder import main
from app.evaluate import main as evaluate
from models.core.checkpoint_io import load_checkpoint
from tests.support.processes import ROOT
from tests.support.toy import command


def told(capsys, run, *args: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(list(args))
    assert stop.value.code == 2
    text = capsys.readouterr().err.strip()
    assert "\n" not in text and text.startswith("error: ")
    return text.removeprefix("error: ")


BACKBONE = "model.init_args.backbone"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--model.distance cosin", "model.init_args.distance is 'cosin' but must be one of euclidean, cosine"),
        ("--data.ways abc", "data.init_args.ways is 'abc' but must be int"),
        ("--data.init_args.ways=abc", "data.init_args.ways is 'abc' but must be int"),
        ("--model.backbone.hidden x", f"{BACKBONE}.init_args.hidden is 'x' but must be int"),
        ("--model.chunk x", "model.init_args.chunk is 'x' but must be int or null"),
        ("--trainer.max_steps x", "trainer.max_steps is 'x' but must be int"),
        ("--open_set_tasks -3", "open_set_tasks is '-3' but must be at least 0"),
        ("--model.init_args null", "model.init_args holds no settings: give it keys and values, or leave it out"),
        ("--trainer null", "trainer is 'null', which is no configuration: give settings, or a YAML file of them"),
        ("--model nowhere.X", "model is nowhere.X, but there is no module nowhere: run from the folder that holds it"),
        ("--model.backbone nowhere.X", f"{BACKBONE} is nowhere.X, but there is no module nowhere: run from"),
        ("--model.optimizer nowhere.X", "model.init_args.optimizer is nowhere.X, but there is no module nowhere"),
        ("--model json.Nothing", "model is json.Nothing, but the module json has no Nothing: correct the name"),
    ],
)
def test_a_wrong_value_is_told_with_its_whole_key(flags: str, said: str, capsys, tmp_path: Path):
    """Catches the parser's own language, and a key that could be of the learner, its network or the data."""
    assert told(capsys, main, *command("ProtoNet", tmp_path), *flags.split()).startswith(said)


def test_choices_of_several_types_are_one_list(capsys, tmp_path: Path):
    """Catches a line that is cut off before it says what there is to choose from."""
    line = told(capsys, main, *command("ProtoNet", tmp_path), "--trainer.precision", "7")
    assert line.startswith("trainer.precision is '7' but must be one of 64, 32, 16, transformer-engine, ")
    assert line.endswith(", bf16 or null")


def test_a_wrong_value_in_a_file_is_told_with_its_whole_key(capsys, tmp_path: Path):
    """Catches a key that is found among the flags alone."""
    (tmp_path / "x.yaml").write_text("data: {class_path: datamodules.Sinusoid, init_args: {shots: many}}\n")
    line = told(capsys, main, *command("ProtoNet", tmp_path), "--config", str(tmp_path / "x.yaml"))
    assert line == "data.init_args.shots is 'many' but must be int"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "no model and no data given: give --model, as models.ProtoNet"),
        ("--data datamodules.Sinusoid", "no model given: give --model, as models.ProtoNet"),
        ("--data datamodules.Sinusoid --model models.MAML", "model needs a backbone: give --model.backbone, as "),
        ("--data datamodules.Sinusoid --model MAML", "model needs a backbone: give --model.backbone, as "),
    ],
)
def test_what_is_missing_is_told_with_what_to_give(flags: str, said: str, capsys):
    """Catches a bare "required: backbone", which is no flag."""
    assert told(capsys, main, *flags.split()).startswith(said)


def test_a_file_that_imports_what_is_not_there_is_told_apart(tmp_path: Path):
    """Catches advice to look for the file where something that it imports is missing."""
    (tmp_path / "broken.py").write_text("import nopackage\n")
    words = [sys.executable, str(ROOT / "train.py"), *command("ProtoNet", tmp_path), "--model", "broken.X"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    said = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60).stderr
    assert said.strip().endswith(
        "model is broken.X, but its file imports nopackage, which is not there: install it, or add its folder to "
        "PYTHONPATH"
    )


@pytest.mark.parametrize("part", ["model", "data"])
def test_a_checkpoint_whose_classes_are_elsewhere(part: str, capsys, tmp_path: Path):
    """Catches a dump of settings, cut off, where the learner's file is in another folder."""
    main(command("ProtoNet", tmp_path, steps=1))
    content = load_checkpoint(tmp_path / "protonet" / "checkpoints" / "last.ckpt")
    own = {"model": "models.ProtoNet", "data": "tests.support.toy.ToyImages"}[part]
    content["config"] = content["config"].replace(own, "my_learner.Means")
    torch.save(content, tmp_path / "x.ckpt")
    line = told(capsys, evaluate, "--ckpt_path", str(tmp_path / "x.ckpt"), "--out", str(tmp_path / "out"))
    assert line == (
        f"{part} is my_learner.Means, but there is no module my_learner: run from the folder that holds it, or add "
        "that to PYTHONPATH"
    )
