"""Environments of gymnasium: what becomes of tasks, seeds, actions and early ends, and half-cheetah against a loop."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from PIL import Image

import datamodules
from app.cli.builder import MetaboltCLI, main
from app.dashboard import video
from datamodules import GymnasiumTasks, HalfCheetahDirection, HalfCheetahVelocity
from datamodules.core.errors import DataError
from datamodules.reinforcement.gymnasium_tasks import GymnasiumEnvironment
from models.reinforcement.trials import run_trial
from tests.support.processes import ROOT, start, wait_for_step
from tests.support.toy import weights


class Corridor(gymnasium.Env):
    """The example of GymnasiumTasks' docstring, with an end: where it is too far from 0 the episode is over.

    In the corner of its pictures is where it is, 10 to a unit of length.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    observation_space = gymnasium.spaces.Box(-10.0, 10.0, (1,))
    action_space = gymnasium.spaces.Box(-2.0, 4.0, (1,))

    def __init__(self, render_mode: str | None = None, broken: bool = False, end: float = 3.0) -> None:
        self.render_mode, self.broken, self.end = render_mode, broken, end
        self.goal = 99.0

    def sample_task(self, rng: np.random.Generator) -> dict[str, Any]:
        return {"goal": rng.uniform(-5.0, 5.0), "unused": rng.normal(size=(2, 2))}

    def set_task(self, task: dict[str, Any]) -> None:
        assert task["unused"].shape == (2, 2)
        self.goal = task["goal"]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1.0, 1.0, 1)
        return self.x, {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.x = self.x + action + self.np_random.uniform(-0.1, 0.1, 1)
        return self.x, -abs(float(self.x[0]) - self.goal), bool(abs(self.x[0]) > self.end), False, {}

    def render(self):
        assert self.render_mode == "rgb_array"
        if self.broken:
            raise RuntimeError("no\nscreen")
        picture = np.zeros((30, 40, 3), np.uint8)
        picture[:10, :10] = int(np.clip(128 + 10 * self.x[0], 0, 255))
        return picture


class Choices(gymnasium.Env):
    """Three discrete observations, and actions 5 to 8 of which the task names the right one."""

    observation_space = gymnasium.spaces.Discrete(3)
    action_space = gymnasium.spaces.Discrete(4, start=5)

    def sample_task(self, rng):
        return {"right": rng.integers(5, 9)}

    def set_task(self, task):
        self.right = int(task["right"])

    def reset(self, *, seed=None, options=None):
        self.at = 0
        return self.at, {}

    def step(self, action):
        self.at = (self.at + 1) % 3
        return self.at, float(action == self.right), False, False, {}


class Taskless(gymnasium.Env):
    observation_space = action_space = gymnasium.spaces.Discrete(2)


class Limitless(Choices):
    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))


class Texts(Choices):
    observation_space = gymnasium.spaces.Sequence(gymnasium.spaces.Discrete(2))


class Scripted:
    """An agent whose actions are functions of the draws alone."""

    def __init__(self, actions: int) -> None:
        self.draws = actions

    def begin(self, environment, task):
        return None

    def act(self, memory, seen, draws):
        return None, (4 * draws - 2).float(), ()  # half of them beyond the bounds


def loop(env: gymnasium.Env, task: dict[str, Any], seed: int, actions: np.ndarray, horizon: int) -> tuple[Any, Any]:
    """One episode, slowly: observations (horizon + 1, …) and rewards (horizon,)."""
    env.get_wrapper_attr("set_task")(task)
    observations, rewards = [env.reset(seed=seed)[0]], []
    ended = False
    for t in range(horizon):
        if ended:
            observations.append(observations[-1])
            rewards.append(0.0)
            continue
        observation, reward, ended, _, _ = env.step(actions[t])
        observations.append(observation)
        rewards.append(reward)
    return np.stack(observations), np.array(rewards)


def seeds_and_actions(batch: Any, actions: int, purpose: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Seeds (T, episodes), and scripted actions (T, steps, actions) clipped to [-1, 1], as run_trial draws them."""
    starts = batch.draws(batch.episodes, 1, purpose=3 * purpose + 1)
    choices = batch.draws(batch.episodes * batch.environment.horizon, actions, purpose=3 * purpose + 3)
    seeds = np.array([[int(d * 2**31) for d in row] for row in starts[..., 0].tolist()])
    return seeds, (4 * choices - 2).float().clamp(-1, 1).numpy()


def cheetah(goal: float, seed: int, actions: np.ndarray, velocity: bool) -> tuple[np.ndarray, np.ndarray]:
    """An episode of gymnasium's own half-cheetah; observations and rewards by hand from its positions."""
    env = HalfCheetahEnv()
    env.reset(seed=seed)
    see = lambda: np.concatenate([env.data.qpos[1:], env.data.qvel, env.data.body("torso").xpos])  # noqa: E731
    observations, rewards = [see()], []
    for action in actions:
        before = env.data.qpos[0].item()
        env.step(action)
        v = (env.data.qpos[0].item() - before) / 0.05
        cost = 0.05 * sum(float(a) ** 2 for a in action)
        rewards.append((-abs(v - goal) if velocity else goal * v) - cost)
        observations.append(see())
    env.close()
    return np.stack(observations), np.array(rewards)


@pytest.fixture(autouse=True)
def _no_log_of_mujoco(tmp_path, monkeypatch):
    """Gymnasium's own half-cheetah, which the tests compare with, leaves MUJOCO_LOG.TXT where it runs."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", [HalfCheetahVelocity, HalfCheetahDirection])
def test_half_cheetah_is_the_slow_loops(kind):
    """Catches another reward, observation, frame skip or reset than documented, seeds or tasks in the wrong rows,
    and actions that are not clipped: trajectories agree bit for bit in double precision."""
    data = kind(horizon=12, episodes=2)
    batch = data.distribution("test").sample([0, 3, 29, 12]).apply(lambda t: t.double() if t.is_floating_point() else t)
    seeds, actions = seeds_and_actions(batch, 6)
    trial = run_trial(batch, Scripted(6))
    velocity = kind is HalfCheetahVelocity
    goals = batch.task["velocity" if velocity else "direction"].tolist()
    assert len(set(goals)) > 1
    for i, goal in enumerate(goals):
        for episode in range(2):
            steps = slice(12 * episode, 12 * (episode + 1))
            observations, rewards = cheetah(goal, int(seeds[i, episode]), actions[i, steps], velocity)
            assert np.array_equal(trial.seen.observation[steps, i].numpy(), observations[:-1])
            assert np.array_equal(trial.reached[steps, i].numpy(), observations[1:])
            np.testing.assert_allclose(trial.reward[steps, i].numpy(), rewards, rtol=0, atol=1e-12)
    data.environment.close()


def test_half_cheetahs_tasks_are_those_of_the_papers_code():
    """Catches another range of velocities, directions other than the two, and settings unlike the released code's."""
    data = HalfCheetahVelocity()
    goals = data.distribution("test").sample(range(2000)).task["velocity"].numpy()
    assert 0 <= goals.min() < 0.01 and 2.99 < goals.max() < 3
    assert np.mean(goals) == pytest.approx(1.5, abs=0.08)
    train = data.distribution("train").sample(range(4000)).task
    assert len(train["velocity"].unique()) == 100
    assert (data.environment.horizon, data.test_tasks) == (200, 30)
    assert (data.environment.observation_size, data.environment.actions) == (20, 6)
    directions = HalfCheetahDirection().distribution("test").sample(range(400)).task["direction"]
    assert directions.unique().tolist() == [-1, 1]
    assert directions.mean().abs() < 0.2


@pytest.mark.parametrize("processes", [0, 2])
def test_rows_do_not_depend_on_one_another(processes):
    """Catches sub-environments that share state or get one another's task, seed or action, what an earlier, larger or
    smaller batch leaves behind, and shares of the processes put together in another order."""
    data = GymnasiumTasks(
        "tests.datamodules.reinforcement.test_gymnasium_tasks.Corridor", 7, processes=processes, arguments={"end": 8.0}
    )
    tasks = data.distribution("val")
    together = tasks.sample([5, 1, 8, 2, 9])
    trial = run_trial(together, Scripted(1))
    seeds, actions = seeds_and_actions(together, 1)
    scaled = (1 + 3 * actions.astype(float)).astype(np.float32)
    ends = 0
    for i in range(5):
        task = {name: value[i].numpy() for name, value in together.task.items()}
        for episode in range(2):
            steps = slice(7 * episode, 7 * (episode + 1))
            observations, rewards = loop(Corridor(end=8.0), task, int(seeds[i, episode]), scaled[i, steps], 7)
            np.testing.assert_allclose(trial.reached[steps, i].numpy(), observations[1:], rtol=1e-6)
            np.testing.assert_allclose(trial.reward[steps, i].numpy(), rewards, rtol=1e-6)
            ends += int(rewards[-1] == 0)
    assert 2 <= ends <= 8  # episodes that ended early, and others that did not
    for i, index in enumerate([5, 1, 8, 2, 9]):
        alone = run_trial(tasks.sample([index]), Scripted(1))
        for one, all_ in ((alone.reached, trial.reached), (alone.reward, trial.reward)):
            assert torch.equal(one[:, 0], all_[:, i])
    more = run_trial(tasks.sample([*range(12), 5]), Scripted(1))
    assert torch.equal(more.reached[:, 5], trial.reached[:, 0])
    assert torch.equal(more.reward[:, 12], trial.reward[:, 0])
    data.teardown("test")
    again = run_trial(together, Scripted(1))
    assert torch.equal(again.reached, trial.reached)
    data.teardown("test")


def test_an_early_end_stays_without_reward():
    """Catches an automatic reset, rewards after the end, and an end that outlasts the episode."""
    environment = GymnasiumEnvironment(f"{__name__}.Corridor", horizon=4, arguments={"end": 1.5})
    task = {"goal": torch.tensor([2.0, 2.0]), "unused": torch.zeros(2, 2, 2)}
    draws = torch.full((2, 1), 0.25, dtype=torch.float64)
    for _ in range(2):
        state = environment.start(task, draws)
        states, rewards = [state.observation], []
        for _ in range(4):
            state, reward, shaped, ended, _ = environment.step(task, state, torch.tensor([[1.0], [-1 / 3]]), draws)
            assert torch.equal(reward, shaped) and ended.tolist() == [1, 0]
            states.append(state.observation)
            rewards.append(reward)
        first, second = torch.stack(states)[..., 0].T
        assert first[1] > 1.5 and torch.equal(first[1:], first[1].expand(4))
        assert torch.stack(rewards)[1:, 0].tolist() == [0, 0, 0]
        assert rewards[0][0] == pytest.approx(-abs(first[1].item() - 2))
        assert len(second.unique()) == 5  # goes on beside it
    environment.close()


def test_discrete_observations_and_actions():
    """Catches numbers of states for one-hot vectors, and actions that forget where theirs begin."""
    environment = GymnasiumEnvironment(f"{__name__}.Choices", horizon=4)
    assert (environment.observation_size, environment.actions, environment.discrete) == (3, 4, True)
    task = {"right": torch.tensor([5.0, 8.0])}
    state = environment.start(task, torch.zeros(2, 1, dtype=torch.float64))
    assert environment.seen(task, state).tolist() == [[1, 0, 0], [1, 0, 0]]
    state, reward, *_ = environment.step(task, state, torch.tensor([0, 0]), torch.zeros(2, 0))
    assert reward.tolist() == [1, 0]
    state, reward, *_ = environment.step(task, state, torch.tensor([3, 3]), torch.zeros(2, 0))
    assert reward.tolist() == [0, 1]
    assert state.observation.tolist() == [[0, 0, 1], [0, 0, 1]]
    environment.revealed = True
    assert environment.seen(task, state).tolist() == [[0, 0, 1, 5], [0, 0, 1, 8]]


def test_only_the_newest_state_can_be_stepped():
    """Catches a state from before that goes on with what the sub-environments have become."""
    environment = GymnasiumEnvironment(f"{__name__}.Choices", horizon=4)
    task, draws, action = {"right": torch.tensor([5.0])}, torch.zeros(1, 1, dtype=torch.float64), torch.tensor([0])
    first = environment.start(task, draws)
    second = environment.step(task, first, action, draws).state
    with pytest.raises(RuntimeError, match=r"only the newest state .* start\(\)"):
        environment.step(task, first, action, draws)
    third = environment.start(task, draws)
    with pytest.raises(RuntimeError, match="newest"):
        environment.step(task, second, action, draws)
    environment.step(task, third, action, draws)
    other = copy.deepcopy(environment)
    with pytest.raises(RuntimeError, match="newest"):
        other.step(task, third, action, draws)


def test_a_copy_makes_its_own_and_a_batch_comes_back_to_the_original():
    """Catches pipes and engines that are pickled for another process, and one more pool for every batch from there."""
    data = HalfCheetahVelocity(horizon=3)
    batch = data.distribution("val").sample([0, 1])
    trial = run_trial(batch, Scripted(6))
    received = pickle.loads(pickle.dumps(batch))
    assert received.environment is not data.environment
    assert torch.equal(run_trial(received, Scripted(6)).reached, trial.reached)
    assert data.on_device(received).environment is data.environment
    data.environment.close()


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    """Catches an example that does not work, or other settings than the text names."""
    text = GymnasiumTasks.__doc__
    assert text is not None
    lines = text.split("::\n", 1)[1].split("is trained on")[0].splitlines()
    (tmp_path / "my_envs.py").write_text("import gymnasium\n" + "\n".join(line[8:] for line in lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = text.split("trained on with ``")[1].split("``")[0].split()
    flags[1] = str(ROOT / flags[1])
    main([*flags, "--model.hidden", "6", "--runs", "runs", *SMALL])
    metrics = json.loads(Path("runs/rl2-gymnasium/results.json").read_text())["metrics"]
    assert metrics["return"]["mean"] < 0


RL2 = ["--model", "models.RL2", "--model.discrete", "false", "--model.hidden", "6", "--model.epochs", "2"]
SMALL = [
    *("--data.meta_batch_size", "4", "--data.val_tasks", "3", "--data.test_tasks", "5", "--data.eval_batch_size", "3"),
    *("--wandb", "off", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--checkpoint_every", "1"),
]
CHEETAH = [*RL2, "--model.observations", "20", "--model.actions", "6", "--data", "datamodules.HalfCheetahVelocity"]


def test_rl2_trains_on_half_cheetah_and_resumes_bit_for_bit(tmp_path):
    """Catches chance or sub-environments that a resume does not repeat, or that depend on the number of processes."""
    flags = [*CHEETAH, "--data.horizon", "4", *SMALL, "--pictures", "false"]
    last = Path("run/checkpoints/last.ckpt")
    main([*flags, "--runs", "whole"])
    main([*flags, "--runs", "halves", "--trainer.max_steps", "2"])
    main([*flags, "--runs", "halves", "--ckpt_path", "last"])
    main([*flags, "--runs", "shared", "--data.processes", "3"])
    expected = weights("whole" / last)
    for other in ("halves", "shared"):
        got = weights(other / last)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[k], got[k]) for k in expected)
    first = MetaboltCLI([*flags, "--runs", "none"]).model.state_dict()
    assert not torch.equal(first["head.linear.weight"], expected["head.linear.weight"])


def test_batches_sampled_in_other_processes_train_the_same(tmp_path):
    """Catches a worker of the loader whose environments are pickled whole, or that draws other tasks."""
    flags = [*CHEETAH, "--data.horizon", "2", *SMALL, "--pictures", "false", "--trainer.max_steps", "2"]
    for workers in ("0", "1"):
        main([*flags, "--runs", workers, "--data.workers", workers])
    one, other = (weights(Path(w, "run/checkpoints/last.ckpt")) for w in ("0", "1"))
    assert all(torch.equal(one[k], other[k]) for k in one)


DDP = ["--model.minibatches", "1", "--trainer.precision", "64-true", "--pictures", "false"]


@pytest.mark.slow
def test_two_processes_with_two_of_their_own_train_as_one(tmp_path):
    """Catches sub-environments that are carried into another process, where they neither work nor close."""
    flags = [*CHEETAH, "--data.horizon", "4", *SMALL, *DDP, "--trainer.max_steps", "2"]
    main([*flags, "--runs", "one"])
    two = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.processes", "2"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *flags, "--runs", "two", *two],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, both = (weights(Path(r, "run/checkpoints/last.ckpt")) for r in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(value, both[name], rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_sigterm_ends_a_run_and_its_processes(tmp_path):
    """Catches children that inherit how the run takes a signal, and so outlive it or keep it from ending."""
    flags = [*CHEETAH, "--data.horizon", "50", *SMALL, "--trainer.max_steps", "100000", "--data.processes", "2"]
    flags += ["--trainer.val_check_interval", "100000", "--pictures", "false"]
    process = start(*flags, "--runs", str(tmp_path / "runs"))
    wait_for_step(tmp_path / "runs/run/checkpoints/last.ckpt", 3, process)
    listed = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True)
    children = [int(pid) for pid in listed.stdout.split()]
    assert len(children) >= 2
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("absent", ["gymnasium", "mujoco"])
def test_a_missing_package_is_one_line(absent, monkeypatch, capsys):
    """Catches a traceback where gymnasium or mujoco is not installed, and a line that does not name the cure."""
    room = "datamodules.reinforcement"
    for name in [m for m in sys.modules if m.startswith((f"{room}.gymnasium_rows", f"{room}.half_cheetah_e"))]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(datamodules.reinforcement, name.split(".")[2])
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(SystemExit) as stopped:
        main([*CHEETAH, "--runs", "runs", *SMALL])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert (
        line.startswith("error: datamodules.reinforcement.half_cheetah_envs")
        and 'pip install "gymnasium[mujoco]"' in line
    )


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ("nowhere.Corridor", "give the path of a class"),
        ("tests.datamodules.reinforcement.test_gymnasium_tasks.Nothing", "has no Nothing"),
        ("NoSuchThing-v0", "give the path of a class or a registered id"),
        ("CartPole-v1", "has no sample_task: see datamodules.GymnasiumTasks"),
        ("tests.datamodules.reinforcement.test_gymnasium_tasks.Taskless", "has no sample_task"),
        ("tests.datamodules.reinforcement.test_gymnasium_tasks.Limitless", "numbers with bounds"),
        ("tests.datamodules.reinforcement.test_gymnasium_tasks.Texts", "no fixed number"),
        ("tests.datamodules.reinforcement.test_gymnasium_tasks.Pictures", "observes pictures"),
    ],
)
def test_an_environment_that_does_not_fit_is_one_line(env, said):
    """Catches a failure hours later, or one that does not say what to change."""
    with pytest.raises(DataError, match=said) as error:
        GymnasiumEnvironment(env, horizon=3)
    assert "\n" not in str(error.value)


def test_a_registered_id_with_a_time_limit(monkeypatch):
    """Catches ids that are not made, wrappers that hide the task, and a time limit that is taken for a state in which
    nothing is paid for ever: it is refused, before and while it runs, but for the last step."""
    gymnasium.register("Limited-v0", f"{__name__}:Corridor", max_episode_steps=2)
    with pytest.raises(DataError, match=r"truncated after 2 steps, but horizon is 4: give --data.init_args.horizon 2"):
        GymnasiumEnvironment("Limited-v0", horizon=4, arguments={"end": 1e6})
    environment = GymnasiumEnvironment("Limited-v0", horizon=2, arguments={"end": 1e6})
    task = {"goal": torch.tensor([2.0]), "unused": torch.zeros(1, 2, 2)}

    def episode(environment, steps):
        state, ended = environment.start(task, torch.zeros(1, 1, dtype=torch.float64)), []
        for _ in range(steps):
            step = environment.step(task, state, torch.zeros(1, 1), torch.zeros(1, 0))
            state = step.state
            ended.append(step.terminated.item())
        return ended

    assert episode(environment, 2) == [0, 0]
    environment.close()
    del gymnasium.registry["Limited-v0"]
    cut = GymnasiumEnvironment(f"{__name__}.Corridor", horizon=4)
    step = Corridor.step
    monkeypatch.setattr(Corridor, "step", lambda self, action: (*step(self, action)[:3], True, {}))
    with pytest.raises(DataError, match="is truncated after 1 of 4 steps, which is no end"):
        episode(cut, 1)
    cut.close()


class Faulty(Choices):
    """Fails in its third step, in a way of the task's own; its tasks have an integer, a text and a split."""

    def sample_task(self, rng, split):
        return {
            "right": int(rng.integers(5, 9)),
            "way": ["nan", "raise", "big"][rng.integers(3)],
            "of": split,
            "on": True,
        }

    def set_task(self, task):
        assert type(task["right"]) is int and type(task["on"]) is bool and type(task["of"]) is str
        self.right, self.way, self.t = task["right"], task["way"], 0

    def step(self, action):
        self.t += 1
        observation, reward, *ends, _ = super().step(action)
        if self.t == 3 and self.way == "raise":
            raise RuntimeError("no\nforce")
        if self.t == 3 and self.way == "nan":
            reward = float("nan")
        return observation, reward, *ends, {"distance": float(self.t), "success": self.t == 2}


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize(("way", "said"), [("nan", "its reward is nan"), ("raise", "no force")])
def test_what_fails_in_a_step_is_named(way, said, processes):
    """Catches a traceback without environment, task or step, and a reward that is no number in the replay buffer."""
    data = GymnasiumTasks(f"{__name__}.Faulty", 4, episodes=1, processes=processes)
    facts = data.distribution("val").sample(range(60))
    ways = [data.environment._told("way", w.numpy()) for w in facts.task["way"]]
    batch = data.distribution("val").sample([ways.index("big"), ways.index(way)])
    assert {data.environment._told("of", w.numpy()) for w in facts.task["of"]} == {"val"}
    with pytest.raises(DataError) as error:
        run_trial(batch, Uniform())
    assert str(error.value).startswith(f"{__name__}.Faulty failed in step 3 of task {{'right': ")
    assert f"'way': '{way}', 'of': 'val'" in str(error.value) and f"({said})" in str(error.value)
    data.environment.close()


class Uniform:
    """Discrete actions at random."""

    draws = 1

    def begin(self, environment, task):
        return None

    def act(self, memory, seen, draws):
        return None, (draws[:, 0] * 4).long(), ()


@pytest.mark.parametrize("processes", [0, 2])
def test_numbers_of_a_step_become_metrics(processes):
    """Catches successes and other metrics of an environment that nobody sees, or of another episode's steps."""
    data = GymnasiumTasks(
        f"{__name__}.Faulty", 2, episodes=3, processes=processes, info_metrics=["success", "distance", "absent"]
    )
    batch = data.distribution("val").sample(range(5))
    told = run_trial(batch, Uniform()).last_info(3)
    assert told["success"].tolist() == [1] * 5 and told["distance"].tolist() == [1.5] * 5
    assert data.own_metrics["success"].share and data.own_metrics.keys() == {"success", "distance", "absent"}
    data.environment.close()


def test_too_many_environments_at_a_time_are_refused():
    """Catches twenty thousand open engines, from settings that look harmless."""
    data = GymnasiumTasks(f"{__name__}.Corridor", 3, most_open=7)
    with pytest.raises(DataError, match="8 environments would be open at a time, which is more than 7: lower"):
        run_trial(data.distribution("val").sample(range(8)), Scripted(1))
    assert len(run_trial(data.distribution("val").sample(range(7)), Scripted(1)).reward[0]) == 7
    data.environment.close()


class Pictures(Choices):
    observation_space = gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"n": 2**24 + 1}, "below 2"),
        ({"n": float("nan")}, "give numbers"),
        ({"n": "x" * 65}, "64 bytes"),
        ({"n": None}, "give numbers"),
    ],
)
def test_tasks_that_cannot_be_kept_are_refused(task, said, monkeypatch):
    """Catches facts that are rounded or lost on the way to ``set_task``."""
    monkeypatch.setattr(Choices, "sample_task", lambda self, rng: task)
    with pytest.raises(DataError, match=said):
        GymnasiumEnvironment(f"{__name__}.Choices", horizon=3)


class Strong(Choices):
    """Actions within bounds that are the task's own, and rewards that say which one arrived."""

    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float64)

    def sample_task(self, rng):
        return {"low": rng.uniform(-3.0, -1.0), "high": rng.uniform(1.0, 3.0)}

    def set_task(self, task):
        shape = (2,) if task["low"] < -2 else (1, 2)
        self.action_space = gymnasium.spaces.Box(task["low"], task["high"], shape, np.float64)

    def step(self, action):
        assert self.action_space.contains(action)
        return 0, float(action.flat[0] + 100 * action.flat[1]), False, False, {}


class Shifted(Choices):
    """Four choices that begin at a number of the task's own."""

    def sample_task(self, rng):
        return {"start": int(rng.integers(5))}

    def set_task(self, task):
        self.action_space = gymnasium.spaces.Discrete(4, start=task["start"])

    def step(self, action):
        return 0, float(action), False, False, {}


@pytest.mark.parametrize("processes", [0, 2])
def test_every_row_acts_within_its_own_bounds(processes):
    """Catches actions that are stretched to the bounds of another task, or the first choice of another task's."""
    draws = torch.zeros(3, 1, dtype=torch.float64)
    strong = GymnasiumEnvironment(f"{__name__}.Strong", horizon=3, processes=processes)
    for low, high in (([-1.0, -2.0, -3.0], [1.0, 3.0, 4.0]), ([-2.0, -2.0, -1.0], [2.0, 1.0, 5.0])):
        task = {"low": torch.tensor(low), "high": torch.tensor(high)}
        state, reward, *_ = strong.step(task, strong.start(task, draws), torch.tensor([[-1.0, 1.0]] * 3), draws)
        assert reward.tolist() == [a + 100 * b for a, b in zip(low, high, strict=True)]
        centres = [101 * (a + b) / 2 for a, b in zip(low, high, strict=True)]
        assert strong.step(task, state, torch.zeros(3, 2), draws).reward.tolist() == centres
    strong.close()
    shifted = GymnasiumEnvironment(f"{__name__}.Shifted", horizon=3, processes=processes)
    task = {"start": torch.tensor([0.0, 4.0, 2.0])}
    assert shifted.step(task, shifted.start(task, draws), torch.tensor([1, 1, 3]), draws).reward.tolist() == [1, 5, 5]
    shifted.close()


@pytest.mark.parametrize(
    ("env", "space", "said"),
    [
        ("Choices", gymnasium.spaces.Discrete(3), "Discrete(3) in task {'right': 5}, but 4 choices where it was made"),
        ("Choices", gymnasium.spaces.Box(-1.0, 1.0, (4,)), "in task {'right': 5}, but 4 choices where it was made"),
        ("Strong", gymnasium.spaces.Box(-1.0, 1.0, (3,)), "'high': 5.0}, but 2 numbers with bounds where it was made"),
        (
            "Strong",
            gymnasium.spaces.Box(-np.inf, 1.0, (2,)),
            "'high': 5.0}, but 2 numbers with bounds where it was made",
        ),
        ("Strong", gymnasium.spaces.Discrete(2), "Discrete(2) in task {'low': 5.0, 'high': 5.0}, but 2 numbers"),
    ],
)
def test_tasks_with_other_actions_are_refused(env, space, said, monkeypatch):
    """Catches choices that are never made, numbers that are left out, and an error that does not name the task."""
    environment = GymnasiumEnvironment(f"{__name__}.{env}", horizon=3)
    monkeypatch.setattr(globals()[env], "set_task", lambda self, task: setattr(self, "action_space", space))
    task = {name: torch.tensor([5.0]) for name in environment.kinds}
    with pytest.raises(DataError) as error:
        environment.start(task, torch.zeros(1, 1, dtype=torch.float64))
    assert str(error.value).startswith(f"{__name__}.{env} takes {space}") and said in str(error.value)
    environment.close()


BOX3 = gymnasium.spaces.Box(-1.0, 1.0, (3,))
BOTH = gymnasium.spaces.Dict({"a": BOX3, "b": gymnasium.spaces.Tuple([gymnasium.spaces.Discrete(2)])})


@pytest.mark.parametrize(
    ("space", "fits", "seen", "said"),
    [
        (BOX3, np.zeros(3), np.zeros(1), "its observation has the shape (1,), but observation_space declares (3,)"),
        (BOX3, [0, 0, 0], 0.5, "its observation has the shape (), but observation_space declares (3,)"),
        (BOX3, np.zeros(3), np.zeros((1, 3)), "its observation has the shape (1, 3), but observation_space declares"),
        (BOX3, np.zeros(3), None, "its observation has the shape (), but"),
        (BOTH, {"a": np.zeros(3), "b": (0,)}, {"a": np.zeros(1), "b": (0,)}, "observation a has the shape (1,), but"),
        (BOTH, {"a": np.zeros(3), "b": (0,)}, {"a": np.zeros(3), "b": ([0, 1],)}, "observation b 0 has the shape (2,)"),
        (BOTH, {"a": np.zeros(3), "b": (0,)}, {"b": (0,)}, "it raised KeyError('a')"),
    ],
)
def test_observations_of_another_shape_than_declared_are_refused(space, fits, seen, said, monkeypatch):
    """Catches one number that is repeated to fill the place of three, in a reset and in a step."""
    monkeypatch.setattr(Choices, "observation_space", space)
    monkeypatch.setattr(Choices, "reset", lambda self, **_: (fits, {}))
    monkeypatch.setattr(Choices, "step", lambda self, action: (seen, 0.0, False, False, {}))
    environment = GymnasiumEnvironment(f"{__name__}.Choices", horizon=3)
    task, draws = {"right": torch.tensor([5.0])}, torch.zeros(1, 1, dtype=torch.float64)
    state = environment.start(task, draws)
    with pytest.raises(DataError) as error:
        environment.step(task, state, torch.tensor([0]), draws)
    assert str(error.value).startswith(f"{__name__}.Choices failed in step 1 of task ") and said in str(error.value)
    monkeypatch.setattr(Choices, "reset", lambda self, **_: (seen, {}))
    with pytest.raises(DataError) as error:
        environment.start(task, draws)
    assert str(error.value).startswith(f"{__name__}.Choices failed in reset of task ") and said in str(error.value)


def test_an_observation_space_of_another_size_is_refused(monkeypatch):
    """Catches a task that is seen by one number where the network has three, which are all that one."""
    environment = GymnasiumEnvironment(f"{__name__}.Choices", horizon=3)
    small = gymnasium.spaces.Discrete(1)
    monkeypatch.setattr(Choices, "set_task", lambda self, task: setattr(self, "observation_space", small))
    with pytest.raises(DataError, match=r"its observation_space is Discrete\(1\), 1 numbers, but 3 where it was made"):
        environment.start({"right": torch.tensor([5.0])}, torch.zeros(1, 1, dtype=torch.float64))


def test_names_of_facts_are_the_users(monkeypatch):
    """Catches a fact that a name of ours takes the place of, on its way to ``set_task`` and to an oracle."""
    given = []
    monkeypatch.setattr(Choices, "sample_task", lambda self, rng: {"number": rng.uniform(), "index": 7, "task": 1.5})
    monkeypatch.setattr(Choices, "set_task", lambda self, task: given.append(task))
    monkeypatch.setattr(Choices, "step", lambda self, action: (0, 0.0, False, False, {}))
    data = GymnasiumTasks(f"{__name__}.Choices", 2, episodes=1, train_tasks=3, revealed=True)
    batch = data.distribution("train").sample(range(4))
    assert set(batch.number.tolist()) <= {0, 1, 2}
    run_trial(batch, Uniform())
    assert [task["index"] for task in given] == [7] * 4 and [task["task"] for task in given] == [1.5] * 4
    assert [task["number"] for task in given] == batch.task["number"].tolist() and 0 < given[0]["number"] < 1
    assert data.environment.describe(batch.task)[:, 0].tolist() == batch.task["number"].tolist()
    data.environment.close()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"n": 1, "m": [1, 2], "more": 2},
            "gives n, m, for another task n, m, more: give .* the same names for every",
        ),
        ({"n": 1}, "gives n, m, for another task n: give .* under the same names for every task"),
        (
            {"n": 1, "m": [1, 2, 3]},
            r"gives m of shape \(3,\), for another task \(2,\): give every task the same one",
        ),
        ({"n": 1, "m": 1}, r"gives m of shape \(\), for another task \(2,\): give every task the same one"),
        ({"n": "one", "m": [1, 2]}, "gives n 'one', for another task one of type int: give the same type"),
        ({"n": 0.5, "m": [1, 2]}, "gives n 0.5, for another task one of type int: give the same type"),
    ],
)
def test_tasks_unlike_the_others_are_refused(other, said, monkeypatch):
    """Catches facts that only some tasks have, which were left out, and fractions that a whole number would lose."""
    tasks = iter([{"n": 1, "m": [1, 2]}, {"n": 3.0, "m": [1.5, 2]}, other])
    monkeypatch.setattr(Choices, "sample_task", lambda self, rng: next(tasks))
    data = GymnasiumTasks(f"{__name__}.Choices", 3)
    with pytest.raises(DataError, match=f"^{__name__}.Choices's sample_task {said}"):
        data.distribution("val").sample(range(2))


# What a user's environment may do wrong -------------------------------------------------------------------------------


def broken(error: BaseException) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise error

    return call


NO_CLASS = 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"__init__": broken(ValueError("no\nlicence"))},
            "failed in its constructor (no licence): give what it needs by",
        ),
        (
            {"__init__": lambda self, size: None},
            "missing 1 required positional argument: 'size'): give what it needs by ",
        ),
        ({"__init__": broken(SystemExit(0))}, "failed in its constructor (it raised SystemExit(0)): "),
        ({"observation_space": None}, "has no observation_space: give it one of gymnasium.spaces"),
        ({"action_space": None}, "has no action_space: give it one of gymnasium.spaces"),
        ({"sample_task": lambda self, rng: None}, "'s sample_task gives None, which is no dictionary: give numbers"),
        ({"sample_task": lambda self, rng: [1.0]}, "'s sample_task gives [1.0], which is no dictionary: give numbers"),
        (
            {"sample_task": broken(RuntimeError())},
            "failed in sample_task (it raised RuntimeError()): mend the environment",
        ),
        (
            {"sample_task": broken(SystemExit(0))},
            "failed in sample_task (it raised SystemExit(0)): mend the environment",
        ),
        ({"sample_task": lambda self: {"n": 1}}, "failed in sample_task ("),
        ({"sample_task": 3}, "has no sample_task"),
    ],
)
def test_what_fails_before_the_first_episode_is_named(change, said, monkeypatch):
    """Catches an error of the user's class that is told as one of the program's."""
    for name, value in change.items():
        monkeypatch.setattr(Choices, name, value)
    with pytest.raises(DataError) as error:
        GymnasiumEnvironment(f"{__name__}.Choices", horizon=3)
    assert str(error.value).startswith(f"{__name__}.Choices") and said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("env", "said"),
    [("NO_CLASS", "NO_CLASS', which is 3: give the path of a class"), ("broken", "subclass of gymnasium.Env")],
)
def test_what_is_no_environment_is_named(env, said):
    """Catches a number that is called, and a function's result that is asked for tasks."""
    arguments = {"error": None} if env == "broken" else {}
    with pytest.raises(DataError, match=said) as error:
        GymnasiumEnvironment(f"{__name__}.{env}", horizon=3, arguments=arguments)
    assert str(error.value).startswith(f"env is '{__name__}.{env}'")


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"set_task": broken(KeyError("goal"))},
            "failed in set_task of task {'right': 5} (it raised KeyError('goal')): ",
        ),
        (
            {"reset": broken(SystemExit(0))},
            "failed in reset of task {'right': 5} (it raised SystemExit(0)): mend the env",
        ),
        (
            {"step": broken(SystemExit(0))},
            "failed in step 1 of task {'right': 5} (it raised SystemExit(0)): mend the env",
        ),
        (
            {"step": lambda self, action: (0, 0.0, np.array([True, False]), False, {})},
            "failed in step 1 of task {'right': 5} (its terminated is [ True False], where True or False is due): mend",
        ),
        (
            {"step": lambda self, action: (0, 0.0, False, np.array([True, False]), {})},
            "failed in step 1 of task {'right': 5} (its truncated is [ True False], where True or False is due): mend",
        ),
    ],
)
def test_what_fails_in_an_episode_is_named(change, said, processes, monkeypatch):
    """Catches an exit that ends the training without a word, and an array where one truth is due."""
    for name, value in change.items():
        monkeypatch.setattr(Choices, name, value)
    environment = GymnasiumEnvironment(f"{__name__}.Choices", horizon=3, processes=processes)
    task, draws = {"right": torch.tensor([5.0])}, torch.zeros(1, 1, dtype=torch.float64)
    with pytest.raises(DataError) as error:
        environment.step(task, environment.start(task, draws), torch.tensor([0]), draws)
    assert str(error.value).startswith(f"{__name__}.Choices {said}")
    environment.close()


def test_an_environment_that_cannot_close_is_named(monkeypatch):
    """Catches an error of the program's after all is done."""
    environment = GymnasiumEnvironment(f"{__name__}.Choices", horizon=3)
    monkeypatch.setattr(Choices, "close", broken(OSError("no window")))
    with pytest.raises(DataError, match=r"Choices failed in close \(no window\): mend the environment"):
        environment.close()


@pytest.mark.parametrize(
    ("end", "said"), [(lambda: os.kill(os.getpid(), 9), "was killed by SIGKILL"), (lambda: os._exit(3), "exit code 3")]
)
def test_a_process_that_ends_is_told(end, said, monkeypatch):
    """Catches the end of a pipe that is told as an error of the program's, and one more that nobody reads from."""
    alone = os.getpid()
    monkeypatch.setattr(Choices, "step", lambda self, action: None if os.getpid() == alone else end())
    environment = GymnasiumEnvironment(f"{__name__}.Choices", horizon=3, processes=2)
    task, draws = {"right": torch.tensor([5.0])}, torch.zeros(1, 1, dtype=torch.float64)
    state = environment.start(task, draws)
    children = environment._rows().vector.processes
    with pytest.raises(DataError) as error:
        environment.step(task, state, torch.tensor([0]), draws)
    assert str(error.value).startswith(f"{__name__}.Choices failed in step (one of its processes ")
    assert said in str(error.value) and "--data.init_args.processes 0" in str(error.value)
    assert not any(child.is_alive() for child in children)
    environment.close()
    monkeypatch.undo()
    again = environment.start(task, draws)
    assert environment.step(task, again, torch.tensor([0]), draws).reward.tolist() == [1]
    environment.close()


def test_an_exit_of_an_environment_ends_a_run_with_an_error(monkeypatch, capsys):
    """Catches a training that ends with exit code 0 and no result."""
    monkeypatch.setattr(Corridor, "step", broken(SystemExit(0)))
    with pytest.raises(SystemExit) as stopped:
        main(corridor("--pictures", "false"))
    assert stopped.value.code == 2
    assert f"error: {__name__}.Corridor failed in step 1 of task " in capsys.readouterr().err.splitlines()[-1]


# On film --------------------------------------------------------------------------------------------------------------


def corridor(*flags: str) -> list[str]:
    model = [*RL2, "--model.observations", "1", "--model.actions", "1"]
    data = ["--data", "datamodules.GymnasiumTasks", "--data.env", f"{__name__}.Corridor", "--data.horizon", "5"]
    return [*model, *data, *SMALL, "--trainer.max_steps", "2", "--runs", "runs", *flags]


def summary(run: Path) -> dict[str, Any]:
    """What W&B's own reader says of the run's only session."""
    (session,) = (run / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", "--summary", str(session)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)["summary"]


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_the_test_is_on_film_here_and_in_wandb(caplog):
    """Catches a film of other states than the evaluation of test task 0 went through, one that changes the metrics,
    and one that W&B does not get."""
    main(corridor("--wandb", "offline"))
    assert "video not made" not in caplog.text
    run = Path("runs/run")
    with Image.open(run / "figures" / "test_video.gif") as gif:
        assert gif.n_frames == 2 * 6
        colours = []
        for k in range(gif.n_frames):
            gif.seek(k)
            colours.append(gif.convert("RGB").getpixel((20, video.STRIP + 20))[0])
        assert gif.info["duration"] == 50
    cli = MetaboltCLI([*corridor(), "--stage", "test", "--ckpt_path", str(run / "checkpoints" / "best.ckpt")])
    learner = cli.model.eval()
    learner.load_state_dict(torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"])
    with torch.no_grad():
        trial = run_trial(cli.datamodule.distribution("test").sample([0]), learner.agent())
    states = [trial.seen.observation[0], *trial.reached[:5], trial.seen.observation[5], *trial.reached[5:]]
    expected = [float(np.clip(128 + 10 * s.item(), 0, 255)) for s in states]
    assert np.allclose(colours, expected, atol=2)  # of a palette
    assert len({round(c) for c in expected}) > 3
    seen = summary(run)
    assert seen["test/video"]["_type"] == "video-file"
    metrics = json.loads((run / "results.json").read_text())["metrics"]
    assert seen["test/return"] == pytest.approx(metrics["return"]["mean"])
    cli.trainer.test(learner, datamodule=cli.datamodule, verbose=False)
    assert cli.trainer.callback_metrics["test/return"].item() == pytest.approx(metrics["return"]["mean"], rel=1e-5)


def test_a_film_that_fails_costs_one_line(caplog):
    """Catches a run that dies where there is nothing to draw with, or goes without a word."""
    with caplog.at_level(logging.WARNING):
        main(corridor("--data.arguments", '{"broken": true}'))
    assert [r.getMessage() for r in caplog.records if "video" in r.getMessage()] == [
        "video not made, the run goes on: RuntimeError: no screen"
    ]
    assert Path("runs/run/results.json").exists() and not Path("runs/run/metrics/test_video.gif").exists()


def test_nothing_is_filmed_without_pictures(monkeypatch):
    """Catches a film that --pictures false does not prevent, and one of environments that cannot be rendered."""
    filmed = mock.Mock()
    monkeypatch.setattr(video, "film", filmed)
    main(corridor("--pictures", "false"))
    filmed.assert_not_called()
    monkeypatch.undo()
    assert video.film(None, mock.Mock(environment=GymnasiumEnvironment(f"{__name__}.Choices", 3))) is None


def test_a_film_has_as_many_frames_as_there_is_time_for(monkeypatch):
    """Catches a rendering so slow that the test takes minutes, and a last state of an episode that is left out."""
    shown = GymnasiumEnvironment(f"{__name__}.Corridor", 100, arguments={"render_mode": "rgb_array", "end": 1e6})
    monkeypatch.setattr(video.time, "monotonic", mock.Mock(side_effect=[0.0, 0.5]))  # 30 frames in 15 seconds
    film = video.Film(shown, 2 * 100)
    task = {"goal": torch.tensor([2.0]), "unused": torch.zeros(1, 2, 2)}
    for _ in range(2):
        state = film.start(task, torch.zeros(1, 1, dtype=torch.float64))
        for _ in range(100):
            state = film.step(task, state, torch.zeros(1, 1), torch.zeros(1, 0)).state
    assert film.stride == 7
    assert len(film.frames) == 2 * (1 + 100 // 7 + 1)
    shown.close()


def test_seeds_of_resets_fit_signed_words():
    """Catches seeds that environments of 32 bits refuse, or fold."""
    data = GymnasiumTasks(f"{__name__}.Corridor", 3, val_tasks=2, test_tasks=2)
    environment, given = data.environment, []
    with mock.patch.object(environment, "_rows") as rows:
        rows.return_value.begin.side_effect = lambda tasks, seeds: given.extend(seeds) or np.zeros((len(tasks), 1))
        batch = data.distribution("test").sample(range(200))
        environment.start(batch.task, batch.draws(1))
    assert len(set(given)) == 200 and min(given) >= 0 and max(given) < 2**31
