"""What has nothing to train and is evaluated by the same commands; a new one is found through ``models.STRATEGIES``."""

from __future__ import annotations

import json
from typing import get_args

import numpy as np
import pytest

import models
from app.cli.builder import main
from app.compare import main as compare
from models.core.task_kinds import KINDS
from models.reinforcement.bandit_strategies import BanditStrategies
from models.reinforcement.mdp_strategies import MDPStrategies
from tests.support.toy import STRATEGIES, evaluation

CHOICES = {"BanditStrategy": get_args(BanditStrategies), "MDPStrategy": get_args(MDPStrategies)}
EVERY = [(name, strategy) for name, of_kind in CHOICES.items() for strategy in of_kind]


def metrics(name: str, folder, *flags: str) -> dict[str, np.ndarray]:
    """The metrics of every task that a test of 12 left."""
    main(evaluation(name, folder, *flags))
    with np.load(folder / name.lower() / "test_tasks.npz") as content:
        return {key: content[key] for key in content.files}


def test_every_strategy_has_a_toy_configuration():
    """Catches one that the tests below leave out, or that does not say what it is."""
    assert {s.__name__ for s in models.STRATEGIES} == set(STRATEGIES)
    for strategy in models.STRATEGIES:
        assert strategy.paper.url.startswith("https://") and len(strategy.tasks) == 1


@pytest.mark.parametrize(("name", "strategy"), EVERY)
def test_metrics_depend_on_the_tasks_alone(name, strategy, tmp_path):
    """Catches chance that depends on how tasks are batched, or that differs between runs."""
    first, other = (
        metrics(name, tmp_path / size, "--model.strategy", strategy, "--data.eval_batch_size", size)
        for size in ("12", "5")
    )
    assert len(first["index"]) == 12 and first["returns"].std() > 0
    for key in set(first) - {"about"}:
        np.testing.assert_array_equal(other[key], first[key])


@pytest.mark.parametrize("name", STRATEGIES)
def test_training_is_refused(name, tmp_path, capsys):
    """Catches a training of nothing, and an error that does not say what to do instead."""
    with pytest.raises(SystemExit):
        main([*evaluation(name, tmp_path, "--trainer.max_steps", "4"), "--stage", "fit"])
    error = capsys.readouterr().err
    assert "nothing to train" in error and "--stage test" in error and error.count("\n") == 1


@pytest.mark.parametrize("name", STRATEGIES)
def test_configuration_left_behind_runs_again(name, tmp_path):
    """Catches a run whose own configuration is missing, or asks for a training."""
    first = metrics(name, tmp_path)
    main(["--config", str(tmp_path / name.lower() / "config.yaml"), "--name", "again"])
    (kind,) = getattr(models, name).tasks
    headline = KINDS[kind].headline
    with np.load(tmp_path / "again" / "test_tasks.npz") as content:
        np.testing.assert_array_equal(content[headline], first[headline])


@pytest.mark.parametrize("name", CHOICES)
def test_compares_with_another(name, tmp_path, capsys):
    """Catches tests that leave nothing to compare."""
    for strategy in ("greedy", "random"):
        main(evaluation(name, tmp_path, "--model.strategy", strategy, "--name", strategy))
    compare([str(tmp_path / "greedy"), str(tmp_path / "random")])
    assert "Paired differences" in capsys.readouterr().out
    content = json.loads((tmp_path / "comparisons" / "greedy-random" / "comparison.json").read_text())
    returns = [
        json.loads((tmp_path / s / "results.json").read_text())["metrics"]["return"]["mean"]
        for s in ("greedy", "random")
    ]
    assert content["differences"][0]["metrics"]["return"]["mean"] == pytest.approx(returns[0] - returns[1])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data", "datamodules.PointRobot"), "--data datamodules"),
        (("--model.actions", "7"), "--model.init_args.actions 3"),
        (("--model.strategi", "greedy"), "did you mean 'model.init_args.strategy'"),
        (("--model.epsilon", "2"), "epsilon is 2.0"),
    ],
)
@pytest.mark.parametrize("name", CHOICES)
def test_what_does_not_fit_is_refused_in_one_line(name, flags, words, tmp_path, capsys):
    """Catches tables of the wrong size, which would fail within the trial or not at all."""
    with pytest.raises(SystemExit):
        main(evaluation(name, tmp_path, *flags))
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize("strategy", ["greedy", "value-iteration"])
def test_what_is_revealed_is_no_state(strategy, tmp_path, capsys):
    """Catches a table that takes what is revealed of a process for states, which then do not exist."""
    flags = ("--data.revealed", "true", "--model.strategy", strategy)
    with pytest.raises(SystemExit):
        main(evaluation("MDPStrategy", tmp_path, *flags))
    error = capsys.readouterr().err
    assert "leave --data.init_args.revealed out" in error and error.count("\n") == 1
