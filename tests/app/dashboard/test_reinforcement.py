"""What is seen of a run in environments: which pictures there are, and that they show what was tested."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import matplotlib.image
import numpy as np
import pytest
import torch

from app import compare as comparison
from app import predict
from app.cli.builder import MetaboltCLI, main
from app.compare import returns
from app.dashboard import reinforcement as dashboards_rl
from app.dashboard.callback import Dashboard
from app.dashboard.reinforcement import TrialFigures, latents_of, optimum_of, positions_of
from app.dashboard.view import View
from app.runs.evaluation_record import Evaluation
from app.runs.probe import Probe
from app.runs.progress import TaskProgress
from datamodules.core.metric import Metric
from datamodules.reinforcement.environments import Environments
from datamodules.reinforcement.navigation import STRIDE
from models import RL2
from models.reinforcement.trials import run_trial
from tests.support.toy import SIZES, command
from tests.support.trained import picture_tree

# Lightning calls what jsonargparse 5 will not have.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


class Encoding(RL2):
    """RL² that tells twice its goal for a latent, and a third number."""

    has_latents = True

    def task_latents(self, batch: Environments) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        goal = batch.task["goal"]
        return torch.cat([2 * goal, torch.ones_like(goal[:, :1])], 1)


WALKS = [
    *(
        "--model",
        "tests.app.dashboard.test_reinforcement.Encoding",
        "--model.observations",
        "2",
        "--model.actions",
        "2",
    ),
    *("--model.discrete", "false", "--model.hidden", "6", "--model.epochs", "1", "--model.minibatches", "1"),
    *("--data", "datamodules.PointRobot", "--data.horizon", "5", "--data.meta_batch_size", "8"),
    *(*SIZES, "--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--trainer.accelerator", "cpu"),
    *("--trainer.enable_progress_bar", "false"),
]


def walks(runs: Path, *flags: str) -> list[str]:
    return ["--runs", str(runs), *WALKS, *flags]


@pytest.fixture(scope="module")
def bandits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an RL² run on bandits, with pictures."""
    runs = tmp_path_factory.mktemp("runs")
    with mock.patch.object(logging.getLogger("app.dashboard.callback"), "warning") as warned:
        main(command("RL2", runs, "--pictures", "true"))
    assert not warned.call_args_list  # no picture failed
    return runs / "rl2"


def test_bandits_are_seen(bandits: Path):
    """Catches a picture that fails, is missing at validation or at the test, or is made of something else's data."""
    drawn = {p.stem for p in (bandits / "figures").glob("*.png")}
    along = {"episodes", "regret", "arms"}
    assert drawn == {f"{split}_{n}" for split in ("val", "test") for n in along} | {"test_histogram", "test_training"}
    assert min(matplotlib.image.imread(bandits / "results.png").shape[:2]) > 600


def test_the_table_of_trials_has_one_number_to_a_column(bandits: Path):
    """Catches returns of all episodes squeezed into a cell, or tasks without their metrics."""
    with open(bandits / "test_tasks.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["task", "return", "first_episode", "last_episode", "regret"]
    assert [int(r["task"]) for r in rows] == list(range(12))
    result = json.loads((bandits / "results.json").read_text())["metrics"]
    for name in ("return", "first_episode", "last_episode", "regret"):
        assert np.mean([float(r[name]) for r in rows]) == pytest.approx(result[name]["mean"], rel=1e-5)


def test_walks_and_latents_are_seen_and_go_to_wandb(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Catches trajectories or latents that fail or that W&B does not get, and arms asked of what has none."""
    logged: list[dict[str, Any]] = []
    with (
        mock.patch("app.dashboard.wandb.WandbRun.write", lambda self, values, step=None: logged.append(values)),
        mock.patch("app.dashboard.wandb.WandbRun.experiment"),
        caplog.at_level(logging.WARNING, "app.dashboard"),
    ):
        main(walks(tmp_path, "--wandb", "offline"))
    assert not [r.message for r in caplog.records if r.name.startswith("app.dashboard")]
    drawn = {p.stem for p in (tmp_path / "run" / "figures").glob("*.png")}
    along = {"episodes", "context", "trajectories", "latents"}
    assert drawn == {f"{split}_{n}" for split in ("val", "test") for n in along} | {"test_histogram", "test_training"}
    names = {name for values in logged for name in values}
    assert {f"{split}/{n}" for split in ("val", "test") for n in along} | {"test/results"} <= names
    assert (tmp_path / "run" / "results.png").is_file()


def untrained(flags: list[str]) -> tuple[Probe, dict[str, torch.Tensor]]:
    """A learner as it begins, and the table of its test."""
    cli = MetaboltCLI(flags)
    learner: Any = cli.model.eval()
    probe = Probe(learner, cli.datamodule, "test")
    with torch.inference_mode():
        learner.evaluation_step(probe.sample(range(cli.datamodule.test_tasks))[1], "test")
    metric = learner.stage_metrics("test")
    metric.compute()
    return probe, metric.all_tasks


def seen(probe: Probe, table: dict[str, torch.Tensor], guard: Any) -> View:
    return View(probe, table, "meta-test", True, Path(), guard)


def made(probe: Probe, table: dict[str, torch.Tensor], name: str, drawing: str) -> tuple[Any, ...]:
    """What a picture is made from."""
    with mock.patch.object(dashboards_rl.plots, drawing) as draw, torch.inference_mode():
        pictures = TrialFigures(seen(probe, table, lambda what, action: action()))
        dict(pictures.all())[name]()
    return draw.call_args.args


def test_arms_are_those_that_were_pulled_in_the_test(tmp_path: Path):
    """Catches other trials than those tested, time and tasks swapped, or another task's probabilities."""
    probe, table = untrained(command("RL2", tmp_path, "--data.test_tasks", "300"))
    arms, pulls, numbers, _ = made(probe, table, "arms", "pulls")
    assert arms.shape == (200, 3)  # enough
    assert pulls.shape == (200, 4)
    assert numbers == list(range(200))
    stored = probe.tasks.sample(range(300))
    assert torch.equal(arms, stored.task["arms"][:200])
    # The same chance paid as in the test: the uniform number of the pull is less than the probability of its arm.
    paid = stored.draws(4, 1, purpose=2)[:200, :, 0] < arms.gather(1, pulls)
    assert torch.equal(paid.float(), table["returns"][:200])


def test_regret_is_against_the_best_arm_and_a_random_one(tmp_path: Path):
    """Catches the optimum of a trial for that of an episode, and tasks in another order than the table's."""
    probe, table = untrained(command("RL2", tmp_path))
    shuffled = {name: values.flip(0) for name, values in table.items()}
    probabilities = probe.tasks.sample(range(11, -1, -1)).task["arms"]
    returns, optimum, chance, _ = made(probe, shuffled, "regret", "regret")
    assert torch.equal(returns, table["returns"].flip(0))
    assert torch.allclose(optimum, probabilities.max(1).values)
    assert torch.allclose(chance, probabilities.mean(1))
    assert torch.allclose((optimum[:, None] - returns).sum(1), shuffled["regret"], atol=1e-5)
    assert optimum_of({"returns": returns}) is None


def test_trajectories_are_the_walks_of_the_test(tmp_path: Path):
    """Catches tasks, episodes and steps mixed up, a start that is missing, and another trial than that tested."""
    probe, table = untrained(walks(tmp_path, "--wandb", "off", "--data.sparse", "true", "--data.radius", "0.7"))
    positions, goals, returns, numbers, radius, _ = made(probe, table, "trajectories", "trajectories")
    assert positions.shape == (6, 3, 6, 2)
    assert radius == 0.7
    assert numbers == [0, 1, 2, 3, 4, 5]
    assert torch.equal(goals, probe.tasks.sample(range(6)).task["goal"])
    assert torch.allclose(returns, table["returns"][:6])
    near = (positions[:, :, 1:] - goals[:, None, None]).norm(dim=-1)
    paid = torch.where(near <= 0.7, 1 - near, 0).sum(-1)
    assert torch.allclose(paid, table["returns"][:6], atol=1e-5)
    assert (positions[:, :, 0] == 0).all()
    with torch.inference_mode():
        trial = run_trial(probe.sample(range(6))[1], probe.learner.agent())  # pyright: ignore
    moves = trial.action.clamp(-1, 1).view(3, 5, 6, 2).permute(2, 0, 1, 3)
    assert torch.allclose(positions.diff(dim=2), STRIDE * moves, atol=1e-6)


def test_trajectories_of_adapted_policies_are_of_one_episode_of_each_block(tmp_path: Path):
    """Catches a learner whose trials are no agent's, and whose walks are of another number of gradient steps."""
    point_robot = [*("--data", "datamodules.PointRobot", "--data.horizon", "5", "--data.episodes", "3")]
    sizes = ("--model.observations", "2", "--model.actions", "2")
    probe, _ = untrained(command("MAMLPolicy", tmp_path, *point_robot, *sizes))
    learner: Any = probe.learner
    _, batch = probe.sample(range(4))
    with torch.inference_mode():
        trial = learner.shown_trial(batch)
        blocks = [block for _, block in learner.blocks(batch, 2)]
    assert positions_of(trial, 3).shape == (4, 3, 6, 2)
    for k, block in enumerate(blocks):
        assert torch.equal(trial.reward[5 * k : 5 * k + 5], block.reward[:, :: learner.rollouts])


def test_positions_do_not_take_what_is_revealed(tmp_path: Path):
    """Catches an oracle's picture made of four numbers of each observation."""
    probe, _ = untrained(walks(tmp_path, "--wandb", "off", "--data.revealed", "true", "--model.observations", "4"))
    with torch.inference_mode():
        trial = run_trial(probe.sample(range(2))[1], probe.learner.agent())  # pyright: ignore
    assert trial.reached.shape[-1] == 4
    assert positions_of(trial, 3).shape == (2, 3, 6, 2)


def test_latents_are_beside_the_goals_of_their_tasks(tmp_path: Path):
    """Catches latents of one task coloured by another's goal, and the numbers of finitely many tasks for facts."""
    probe, _ = untrained(walks(tmp_path, "--wandb", "off"))
    with torch.inference_mode():
        latents, facts, names = latents_of(probe, 7)
        assert torch.allclose(latents[:, :2], 2 * facts)
        assert torch.equal(facts, probe.tasks.sample(range(7)).task["goal"])
        assert names == ["goal 1", "goal 2"]
        probe.split, probe.tasks = "train", probe.data.distribution("train")
        assert probe.tasks.sample([0]).number is not None
        assert latents_of(probe, 7)[2] == names


def test_a_learner_without_latents_has_no_picture_of_them(tmp_path: Path):
    """Catches a picture of nothing, of a learner that encodes tasks but was told not to."""
    probe, table = untrained(walks(tmp_path, "--wandb", "off"))
    probe.learner.__dict__["task_latents"] = lambda batch: None
    with torch.inference_mode():
        drawn = dict(TrialFigures(seen(probe, table, lambda what, action: action())).all())
    assert "latents" not in drawn and {"episodes", "trajectories"} <= set(drawn)


def test_beliefs_are_those_of_the_test(tmp_path: Path):
    """Catches beliefs of other tasks than those tested, and a figure of them of a learner that has none."""
    probe, table = untrained(command("VariBAD", tmp_path))
    deviations, errors, episodes, _ = made(probe, table, "beliefs", "beliefs")
    assert episodes == 2
    with torch.inference_mode():
        trial = run_trial(probe.sample(range(12))[1], probe.learner.agent())  # pyright: ignore
    assert torch.allclose(deviations, trial.extras.belief.log_deviation.exp().transpose(0, 1))
    assert torch.allclose(errors.nanmean(1), table["reward_error"])
    others, their = untrained(walks(tmp_path, "--wandb", "off"))
    with torch.inference_mode():
        pictures = dict(TrialFigures(seen(others, their, lambda what, action: action())).all())
    assert "beliefs" not in pictures


def test_a_trial_that_cannot_be_looked_at_costs_its_picture_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Catches returns, regret and the figure of all panels lost with the picture of the arms."""
    probe, table = untrained(command("RL2", tmp_path))
    pictures = TrialFigures(seen(probe, table, Dashboard(tmp_path)._guarded))
    with mock.patch.object(pictures.learner, "shown_trial", side_effect=RuntimeError("no\ntrial")):
        assert list(dict(pictures.all())) == ["episodes", "regret"]
    assert [title for title, _ in pictures.panels] == ["Pulls", "Regret"]
    told = [r.message for r in caplog.records if r.name.startswith("app.dashboard")]
    assert told == ["arms not made, the run goes on: RuntimeError: no trial"]


def test_learners_are_compared_along_their_trials(bandits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Catches returns under another learner's name, an optimum of a trial, no picture, or one for classification."""
    other = tmp_path / "other"
    other.mkdir()
    for name in ("test_tasks.npz", "results.json"):
        shutil.copy(bandits / name, other / name)
    comparison.main([str(bandits), str(other), "--out", str(tmp_path / "out")])
    assert matplotlib.image.imread(tmp_path / "out" / "returns.png").shape[1] > 600
    assert (tmp_path / "out" / "comparison.png").is_file()
    assert "returns.png" in capsys.readouterr().out
    one, two = Evaluation.load(bandits), Evaluation.load(other)
    two.metrics["returns"] = two.metrics["returns"] + 1
    along = returns([one, two])
    assert along is not None
    assert [name for name, _ in along[0]] == ["rl2", "other"]
    assert torch.equal(along[0][0][1] + 1, along[0][1][1])
    assert along[1] is not None
    assert torch.allclose(along[1], one.metrics["of_optimum"][:, 1] / 4)
    del one.metrics["returns"]
    assert [name for name, _ in (returns([one, two]) or ([], None))[0]] == ["other"]
    del two.metrics["returns"]
    assert returns([one, two]) is None


def test_pictures_cannot_be_classified_by_an_agent(bandits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Catches a traceback, or a message that does not say what would serve."""
    support = picture_tree(tmp_path / "support", {"a": 1, "b": 1})
    checkpoint = bandits / "checkpoints" / "best.ckpt"
    with pytest.raises(SystemExit) as stopped:
        predict.main(["--ckpt_path", str(checkpoint), "--support", str(support), "--query", str(support / "a")])
    assert stopped.value.code != 0
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "was trained on Bandits, not on pictures: give a checkpoint that classifies them" in line
    assert "app.evaluate" in line


def test_the_progress_tells_the_return(capsys: pytest.CaptureFixture[str]):
    """Catches a number at the end of the line that nobody knows the name of."""
    bar = TaskProgress("return", Metric("higher"))
    trainer: Any = SimpleNamespace(
        callback_metrics={"val/return": torch.tensor(6.5), "val/return_ci95": torch.tensor(0.25)},
        state=SimpleNamespace(fn="fit"),
    )
    bar.on_validation_end(trainer, None)  # pyright: ignore
    assert bar._note == "val return 6.5000 ± 0.2500"
