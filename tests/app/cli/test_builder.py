"""What the command line says when something is wrong, and what it leaves behind when all is well."""

from __future__ import annotations

import csv
import json
import re
import shlex

import pytest
import yaml

from app.cli.builder import MetaboltCLI, main
from app.runs.checkpoints import BestCheckpoint
from app.runs.progress import TaskProgress
from models.core.checkpoint_io import load_checkpoint
from tests.support.toy import command


def error(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    text = capsys.readouterr().err.strip()
    assert text.startswith("error: ")
    assert "\n" not in text, "one line"
    return text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--model.inner_rat", "0.1"), "'model.init_args.inner_rate'"),
        (("--model.init_args.iner_steps", "2"), "'model.init_args.inner_steps'"),
        (("--data.wayz", "3"), "'data.init_args.ways'"),
        (("--trainer.max_stepz", "3"), "'trainer.max_steps'"),
        (("--nam", "x"), "'name'"),
        (("--model.backbone.hiden", "4"), "'model.init_args.backbone.init_args.hidden'"),
        (("--model", "models.MALM"), "'models.MAML'"),
        (("--data", "datamodules.Omniglott"), "'datamodules.Omniglot'"),
        (("--data", "Omniglott"), "'datamodules.Omniglot'"),
        (("--model", "Protonet"), "'models.ProtoNet'"),
        (("--model.backbone", "Conf4"), "'models.Conv4'"),
        (("--model.optimizer", "torch.optim.Addam"), "'torch.optim.Adam'"),
    ],
)
def test_unknown_key_names_the_nearest(flags, expected, capsys, tmp_path):
    """Catches a typo that is ignored, or answered by a page of text."""
    text = error(capsys, *command("MAML", tmp_path), *flags)
    assert f"did you mean {expected}" in text
    assert not list(tmp_path.iterdir())


def test_unknown_key_in_a_file_names_the_nearest(capsys, tmp_path):
    """Catches a typo in YAML that is ignored."""
    path = tmp_path / "x.yaml"
    path.write_text("trainer:\n  max_stepz: 3\n")
    assert "did you mean 'trainer.max_steps'" in error(
        capsys, *command("MAML", tmp_path / "runs"), "--config", str(path)
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--data.ways", "1"), "ways is 1"),
        (("--data.shots", "0"), "shots is 0"),
        (("--data.meta_batch_size", "0"), "meta_batch_size is 0"),
        (("--model.inner_steps", "-1"), "inner_steps is -1"),
        (("--model.outputs", "4"), "--model.init_args.outputs 3"),
        (("--checkpoint_every", "0"), "checkpoint_every is 0"),
        (("--trainer.accumulate_grad_batches", "4"), "multiple of 4"),
        (("--trainer.max_steps", "-1"), "--trainer.max_steps"),
        (("--trainer.limit_test_batches", "0"), "trainer.limit_test_batches is 0"),
        (("--trainer.limit_test_batches", "0.1"), "trainer.limit_test_batches is 0.1"),  # of 3 meta-batches
        (("--ckpt_path", "nowhere.ckpt"), "nowhere.ckpt"),
        (("--stage", "test", "--ckpt_path", "best"), "train first"),
        (("--data", "datamodules.Linear", "--model", "models.ProtoNet"), "ProtoNet learns classification"),
        (("--model.optimizer.lr", "fast"), "lr"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
        (("--data.ways", "13", "--model.outputs", "13"), "12 classes"),
        (("--data.queries", "20"), "20 images"),
    ],
)
def test_impossible_values_are_refused_before_any_work(flags, expected, capsys, tmp_path):
    """Catches a run that fails after hours, or whose error does not name the setting or the cure."""
    assert expected in error(capsys, *command("MAML", tmp_path), *flags)


def test_print_config_runs_again(capsys, tmp_path):
    """Catches a printed configuration that is incomplete or does not parse."""
    with pytest.raises(SystemExit) as stop:
        main([*command("MAML", tmp_path), "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["inner_steps"] == 2
    assert printed["trainer"]["max_steps"] == 12


def test_a_run_leaves_what_it_promises(capsys, tmp_path):
    """Catches a missing interval, seed, version or statement of transduction, a table without the folder, and pictures
    that nobody wants."""
    main(command("MAML", tmp_path))
    run = tmp_path / "maml"
    results = json.loads((run / "results.json").read_text())
    assert results["tasks"] == 12
    outside = {"known_entropy", "unknown_entropy", "open_set_auroc"}
    assert set(results["metrics"]) == {"accuracy", "nll", "ece"} | outside
    assert all({"mean", "ci95"} <= set(f) for f in results["metrics"].values())
    assert results["transductive"] is True
    assert {"torch", "pytorch-lightning", "python"} <= set(results["versions"])
    assert results["seed"] == 0
    assert (run / "checkpoints" / "best.ckpt").is_file()
    assert (run / "config.yaml").is_file()
    assert (run / "test_tasks.csv").is_file()
    assert not list(run.rglob("*.png"))
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"step", "tasks_seen", "val/accuracy", "val/accuracy_ci95", "test/accuracy"} <= set(header)
    out = capsys.readouterr().out
    assert "±" in out
    assert str(run) in out.replace("\n", "")


def test_stages_validate_and_test_use_the_best_checkpoint(capsys, tmp_path):
    """Catches a test of an untrained learner, and one that starts a directory of its own."""
    main(command("ProtoNet", tmp_path))
    first = json.loads((tmp_path / "protonet" / "results.json").read_text())
    rows = (tmp_path / "protonet" / "metrics.csv").read_text().splitlines()
    main(command("ProtoNet", tmp_path, "--stage", "test"))
    kept = (tmp_path / "protonet" / "metrics.csv").read_text().splitlines()
    assert [r.split(",")[0] for r in kept] == [r.split(",")[0] for r in rows], "a test loses no row of the training"
    again = json.loads((tmp_path / "protonet" / "results.json").read_text())
    assert again["metrics"] == first["metrics"]
    assert again["checkpoint"].endswith("best.ckpt")
    capsys.readouterr()
    main(command("ProtoNet", tmp_path, "--stage", "validate", "--ckpt_path", "last"))
    out = capsys.readouterr().out
    assert "8 meta-validation tasks" in out and "±" in out and "tasks_seen" not in out
    assert [p.name for p in tmp_path.iterdir()] == ["protonet"]


def test_metrics_that_are_no_numbers_are_told(tmp_path, capsys):
    """Catches a closing table that fails on a metric that is not a number, and with it the results."""
    diverging = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "1e20")
    main(command("MAML", tmp_path, *diverging, steps=1))  # weights that are finite, and useless
    results = json.loads((tmp_path / "maml" / "results.json").read_text())
    assert results["metrics"]["nll"]["mean"] is None
    assert "nan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (
            ("--model.backbone.image_size", "40", "--model.backbone.downsample", "pool"),
            "the data's inputs are 1×16×16 but the network takes 1×40×40",
        ),
        (("--model.backbone.in_channels", "3"), "the data's inputs are 1×16×16 but the network takes 3×16×16"),
    ],
)
@pytest.mark.parametrize("algorithm", ["MAML", "ProtoNet", "BMAML"])
def test_data_that_do_not_fit_the_network_are_refused_before_training(algorithm, flags, what, tmp_path, capsys):
    """Catches a training whose checkpoint evaluation and prediction refuse, or sixty lines of traceback."""
    with pytest.raises(SystemExit) as stopped:
        main(command(algorithm, tmp_path, *flags, steps=2))
    assert stopped.value.code == 2
    assert what in capsys.readouterr().err


def test_a_regression_on_as_many_outputs_as_targets_have(tmp_path, capsys):
    """Catches a loss that is broadcast over outputs, with metrics that look normal."""
    flags = ("--model", "MAML", "--model.backbone", "MLP", "--data", "Sinusoid", "--trainer.max_steps", "2")
    with pytest.raises(SystemExit) as stopped:
        main([*flags, "--runs", str(tmp_path), "--wandb", "off", "--trainer.accelerator", "cpu"])
    assert stopped.value.code == 2
    assert "give --model.init_args.outputs 1" in capsys.readouterr().err


def test_sizes_that_are_not_given_are_the_datas(tmp_path, capsys):
    """Catches networks of other sizes than the data's, and a configuration that does not say which they were."""
    flags = [a for a in command("ProtoNet", tmp_path, steps=2) if a not in ("--model.backbone.image_size", "16")]
    main(flags)
    settings = yaml.safe_load((tmp_path / "protonet" / "config.yaml").read_text())["model"]["init_args"]
    assert settings["backbone"]["init_args"]["image_size"] == 16
    assert settings["backbone"]["init_args"]["in_channels"] == 1
    model = ["--model", "models.RL2", "--model.hidden", "4", "--data", "datamodules.PointRobot", "--data.horizon", "3"]
    cli = MetaboltCLI(
        [*model, "--data.revealed", "true", "--runs", str(tmp_path), "--wandb", "off", "--trainer.max_steps", "3"]
    )
    assert (cli.model.observations, cli.model.actions, cli.model.discrete) == (4, 2, False)
    assert "observations: 4" in cli.yaml()


def test_the_best_checkpoint_is_chosen_by_what_is_asked_for(tmp_path, capsys):
    """Catches a choice by the wrong metric or the wrong way round, and a metric that is not measured."""
    main(command("ProtoNet", tmp_path, "--select", "nll", "--trainer.val_check_interval", "2", steps=8))
    best = load_checkpoint(tmp_path / "protonet" / "checkpoints" / "best.ckpt")
    with open(tmp_path / "protonet" / "metrics.csv") as file:
        rows = [(float(r["val/nll"]), int(r["step"])) for r in csv.DictReader(file) if r.get("val/nll")]
    assert len(rows) == 4 and best["global_step"] == min(rows)[1] + 1
    with pytest.raises(SystemExit):
        main(command("ProtoNet", tmp_path, "--select", "known_entropy"))
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--select is 'known_entropy' but validation can choose by one of accuracy, ece, loss, nll" in said
    robot = ["--data", "datamodules.PointRobot", "--data.horizon", "3", "--runs", str(tmp_path), "--wandb", "off"]
    for model, chosen in (("PEARL", "last_episode"), ("MAMLPolicy", "last_episode"), ("RL2", "return")):
        cli = MetaboltCLI(["--model", f"models.{model}", *robot, "--trainer.max_steps", "3"])
        (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, BestCheckpoint)]
        assert (callback.monitor, callback.mode) == (f"val/{chosen}", "max")


def test_a_start_that_is_refused_leaves_no_run(capsys, tmp_path):
    """Catches a folder without a training, which ``--ckpt_path last`` then goes on with in place of the real run."""
    main(command("ProtoNet", tmp_path, steps=2))
    error(capsys, *command("ProtoNet", tmp_path, "--data.ways", "200", steps=2))
    assert [folder.name for folder in tmp_path.iterdir()] == ["protonet"]
    main(command("ProtoNet", tmp_path, "--ckpt_path", "last", steps=4))
    assert load_checkpoint(tmp_path / "protonet" / "checkpoints" / "last.ckpt")["global_step"] == 4
    assert [folder.name for folder in tmp_path.iterdir()] == ["protonet"]


def test_the_test_that_is_told_to_do_again_is_the_one_that_was_done(capsys, tmp_path):
    """Catches a hint that, after a resume with other settings, measures other tasks and overwrites the results; one
    that tests the newest run of the name for an older one; and steps of the training for those of the checkpoint."""
    for flags in ((), ("--ckpt_path", "last", "--data.test_tasks", "20")):
        main(command("ProtoNet", tmp_path, *flags, steps=6 + 2 * len(flags)))
    hint = re.search(r"again: python (\S*train.py .*)", capsys.readouterr().out.rsplit("run folder", 1)[1])
    assert hint is not None and "config.resume-1.yaml" in hint[1]
    run = tmp_path / "protonet"
    before = json.loads((run / "results.json").read_text())
    main(command("ProtoNet", tmp_path, steps=2))  # of the same name
    main(shlex.split(hint[1])[1:])
    after = json.loads((run / "results.json").read_text())
    assert after["metrics"] == before["metrics"] and after["tasks"] == 20
    best = load_checkpoint(run / "checkpoints" / "best.ckpt")["global_step"]
    assert after["meta_steps"] == before["meta_steps"] == best


@pytest.mark.parametrize(
    ("algorithm", "flags", "shown"),
    [("ProtoNet", (), "accuracy"), ("ProtoNet", ("--select", "nll"), "nll"), ("PEARL", (), "last_episode")],
)
def test_progress_shows_what_the_best_checkpoint_is_chosen_by(algorithm, flags, shown, tmp_path):
    """Catches a bar on which another metric rises than the one that counts."""
    cli = MetaboltCLI(command(algorithm, tmp_path, *flags, "--trainer.enable_progress_bar", "true"))
    (bar,) = (c for c in cli.trainer.callbacks if isinstance(c, TaskProgress))
    (best,) = (c for c in cli.trainer.callbacks if isinstance(c, BestCheckpoint))
    assert bar.name == shown and best.monitor == f"val/{shown}"
