"""Environments in step: ours as rows of tensors against gymnasium's vector environments, and where RL²'s time goes.

    python -m benchmarks.environments

The point robot, the bandit and the tabular MDP are written once more as plain environments of gymnasium. Before
anything is timed both sides live through the same episodes: with the same tasks, actions and uniform numbers,
observations and rewards agree to rounding. What is timed is then a trial of random actions, the drawing of its uniform
numbers included; a step is one of one environment. Gymnasium's AsyncVectorEnv takes a process for each environment, so
there are few. Of half-cheetah, a physics engine that both sides step alike, the comparison is of what stepping adds.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from scipy.special import ndtri
from torch import Tensor

import app  # noqa: F401  first, as in a run
from benchmarks.common import ROOT, Report, Row, alternate, arguments, timed
from datamodules import Bandits, HalfCheetahVelocity, PointRobot, TabularMDPs
from datamodules.reinforcement.environments import Environments
from datamodules.reinforcement.navigation import STRIDE

# The same tasks for gymnasium --------------------------------------------------------------------------------------


class PlainRobot(gymnasium.Env):
    """``DenseNavigation`` of one goal."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float64)

    def __init__(self, goal: np.ndarray) -> None:
        self.goal = goal

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.at = 2 * self.np_random.random(2) - 1
        return self.at, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.at = self.at + STRIDE * np.clip(action, -1, 1)
        return self.at, -float(np.linalg.norm(self.at - self.goal)), False, False, {}


class PlainBandit(gymnasium.Env):
    """``BernoulliBandit`` of these arms; there is nothing to see."""

    observation_space = spaces.Box(-np.inf, np.inf, (0,), np.float64)

    def __init__(self, arms: np.ndarray) -> None:
        self.arms, self.nothing = arms, np.zeros(0)
        self.action_space = spaces.Discrete(len(arms))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self.nothing, {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        return self.nothing, float(self.np_random.random() < self.arms[action]), False, False, {}


class PlainMDP(gymnasium.Env):
    """``TabularMDP`` of these transitions (S, A, S) and mean rewards (S, A); it sees its state one-hot."""

    def __init__(self, transitions: np.ndarray, rewards: np.ndarray) -> None:
        self.cumulated, self.rewards = transitions.cumsum(-1), rewards
        self.cumulated /= self.cumulated[..., -1:]
        self.one_hot = np.eye(len(rewards))
        self.observation_space = spaces.Box(0.0, 1.0, (len(rewards),), np.float64)
        self.action_space = spaces.Discrete(rewards.shape[1])

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.state = 0
        return self.one_hot[0], {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        where, noise = self.np_random.random(2)
        reward = self.rewards[self.state, action] + ndtri(noise)
        self.state = int((where >= self.cumulated[self.state, action]).sum())
        return self.one_hot[self.state], float(reward), False, False, {}


@dataclass(frozen=True)
class Family:
    """A kind of tasks, on both sides.

    Attributes:
        data: ours.
        plain: gymnasium's environment, from the facts of one task.
        steps: of a trial.
    """

    data: Callable[[], Any]
    plain: Callable[..., gymnasium.Env]
    steps: int


FAMILIES = {
    "point robot": Family(lambda: PointRobot(horizon=20, episodes=3), PlainRobot, 60),
    "5-armed bandit": Family(lambda: Bandits(arms=5, episodes=10), PlainBandit, 10),
    "tabular MDP": Family(lambda: TabularMDPs(states=10, actions=5, horizon=10, episodes=10), PlainMDP, 100),
}


class Trials:
    """Trials of random actions in our environments, N at once.

    Args:
        data: of the environments.
        rows: N.
    """

    def __init__(self, data: Any, rows: int) -> None:
        self.batch: Environments = data.distribution("test").sample(range(rows))
        self.environment, self.rows = self.batch.environment, rows
        self.steps = self.batch.episodes * self.environment.horizon
        self.actions = random_actions(self.environment, self.steps, rows)
        self.purpose = 0

    def run(self, starts: Tensor, moves: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Observations after each step and rewards, from uniform numbers (N, episodes, …) and (N, steps, …)."""
        environment, task, horizon = self.environment, self.batch.task, self.environment.horizon
        state, observations, rewards = None, [], []
        for t in range(self.steps):
            if t % horizon == 0:
                state = environment.start(task, starts[:, t // horizon])
            state, reward, *_ = environment.step(task, state, self.actions[t], moves[:, t])
            observations.append(environment.observe(task, state))
            rewards.append(reward)
        return observations, rewards

    def __call__(self) -> None:
        self.purpose += 2
        starts = self.batch.draws(self.batch.episodes, self.environment.start_draws, purpose=self.purpose)
        moves = self.batch.draws(self.steps, self.environment.step_draws, purpose=self.purpose + 1)
        self.run(starts, moves)


class Peers:
    """The same trials in a vector environment of gymnasium.

    Args:
        vector: of N environments.
        actions: (steps, N) or (steps, N, actions).
        horizon: steps between two resets; None resets once, at the start of the trial.
    """

    def __init__(self, vector: VectorEnv, actions: Tensor, horizon: int | None) -> None:
        self.vector, self.actions, self.horizon = vector, actions.numpy(), horizon or len(actions)

    def run(self, seeds: list[int] | None = None) -> tuple[list[np.ndarray], list[np.ndarray]]:
        observations, rewards = [], []
        for t, action in enumerate(self.actions):
            if t % self.horizon == 0:
                self.vector.reset(seed=seeds if t == 0 else None)
            observation, reward, *_ = self.vector.step(action)
            observations.append(observation)
            rewards.append(reward)
        return observations, rewards

    def __call__(self) -> None:
        self.run()


def random_actions(environment: Any, steps: int, rows: int) -> Tensor:
    """(steps, N) int64, or (steps, N, actions) float64 in [-1, 1)."""
    generator = torch.Generator().manual_seed(0)
    if environment.discrete:
        return torch.randint(environment.actions, (steps, rows), generator=generator)
    return 2 * torch.rand(steps, rows, environment.actions, generator=generator, dtype=torch.float64) - 1


def plain(family: Family, batch: Environments) -> list[Callable[[], gymnasium.Env]]:
    """Constructors of gymnasium's environments for the tasks of a batch."""
    facts = {name: value.double().numpy() for name, value in batch.task.items()}
    return [partial(family.plain, **{name: value[i] for name, value in facts.items()}) for i in range(len(batch))]


def vector(kind: type[Any], makers: Sequence[Callable[[], gymnasium.Env]]) -> VectorEnv:
    return kind(makers, autoreset_mode=AutoresetMode.DISABLED)


def compare(name: str, family: Family, rows: int = 8) -> None:
    """Assert that both sides live through the same trials, in float64."""
    trials = Trials(family.data(), rows)
    trials.batch = trials.batch.apply(lambda t: t.double() if t.is_floating_point() else t)
    environment, horizon = trials.environment, trials.environment.horizon
    numbers = [np.random.default_rng(100 + i) for i in range(rows)]  # as gymnasium seeds its own
    starts = np.zeros((rows, trials.batch.episodes, environment.start_draws))
    moves = np.zeros((rows, trials.steps, environment.step_draws))
    for i, rng in enumerate(numbers):
        for t in range(trials.steps):
            if t % horizon == 0:
                starts[i, t // horizon] = rng.random(environment.start_draws)
            moves[i, t] = rng.random(environment.step_draws)
    ours = trials.run(torch.from_numpy(starts), torch.from_numpy(moves))
    envs = vector(SyncVectorEnv, plain(family, trials.batch))
    theirs = Peers(envs, trials.actions, horizon).run([100 + i for i in range(rows)])
    envs.close()
    for what, mine, other in zip(("observations", "rewards"), ours, theirs, strict=True):
        difference = max(float(np.abs(a.numpy() - b).max(initial=0.0)) for a, b in zip(mine, other, strict=True))
        assert difference < 1e-9, f"{name}: {what} differ by {difference:.1e}, so the work is not the same"
    print(f"{name}: trajectories agree", flush=True)


def throughput(report: Report, name: str, family: Family, args: Any) -> None:
    """Rows of one family: ours with ever more environments at once, beside both of gymnasium's."""
    compare(name, family)
    sizes, rows, processes = ([1, 8], 8, 2) if args.quick else ([1, 10, 100, 1_000, 10_000], 1_000, 16)
    ours = {n: Trials(family.data(), n) for n in sizes}
    most = ours[rows]
    horizon = most.environment.horizon if most.environment.horizon > 1 else None  # a bandit has nothing to reset
    sync = Peers(vector(SyncVectorEnv, plain(family, most.batch)), most.actions, horizon)
    few = Trials(family.data(), processes)
    many = Peers(vector(AsyncVectorEnv, plain(family, few.batch)), few.actions, horizon)
    steps = {f"{n:,}": timed(t) for n, t in ours.items()} | {"sync": timed(sync), "async": timed(many)}
    median = report.keep(name, alternate(steps, args.seconds, 2 if args.quick else 3))
    sync.vector.close()
    many.vector.close()
    of_step = {f"{n:,}": median[f"{n:,}"] / n / family.steps for n in sizes}
    sync_step, async_step = median["sync"] / rows / family.steps, median["async"] / processes / family.steps
    for n in sizes:
        report.rows.append(
            Row(f"{name}, {n:,} at once", f"SyncVectorEnv, {rows:,}", sync_step, of_step[f"{n:,}"], "steps/s")
        )
    against = f"AsyncVectorEnv, {processes} processes"
    report.rows.append(Row(f"{name}, {rows:,} at once", against, async_step, of_step[f"{rows:,}"], "steps/s"))


def half_cheetah(report: Report, args: Any) -> None:
    """Rows of a physics engine, whose steps cost the same on both sides: what stepping them together adds."""
    from datamodules.reinforcement.half_cheetah_envs import HalfCheetahVelocityEnv

    rows, horizon = (2, 3) if args.quick else (32, 50)
    data = {p: HalfCheetahVelocity(horizon=horizon, episodes=1, processes=p) for p in (0, 2)}
    trials = {p: Trials(d, rows) for p, d in data.items()}
    envs = [HalfCheetahVelocityEnv for _ in range(rows)]
    actions = trials[0].actions.float()
    peers = {
        "SyncVectorEnv": Peers(vector(SyncVectorEnv, envs), actions, None),
        f"AsyncVectorEnv, {rows} processes": Peers(vector(AsyncVectorEnv, envs), actions, None),
    }
    steps = {f"ours {p}": timed(t) for p, t in trials.items()} | {name: timed(p) for name, p in peers.items()}
    median = report.keep("half-cheetah", alternate(steps, args.seconds, 2 if args.quick else 3))
    for p, d in data.items():
        d.environment.close()
        for name in peers:
            what = f"half-cheetah, {rows} " + (f"in {p} processes" if p else "in this process")
            count = rows * horizon
            report.rows.append(Row(what, name, median[name] / count, median[f"ours {p}"] / count, "steps/s"))
    for peer in peers.values():
        peer.vector.close()


# Where RL²'s time goes -----------------------------------------------------------------------------------------------

RL2 = ["--model", "models.RL2", "--model.epochs", "5", "--model.minibatches", "4", "--model.hidden", "64"]
PROFILES = {
    "bandit, 10 pulls": ["--config", str(ROOT / "configs/reinforcement/rl2/bandit-10pulls-5arms-short.yaml")],
    "MDP, 10 episodes": [
        *(*RL2, "--model.observations", "10", "--model.actions", "5", "--data", "datamodules.TabularMDPs"),
        *("--data.meta_batch_size", "250"),
    ],
    "point robot": [
        *(*RL2, "--model.observations", "2", "--model.actions", "2", "--model.discrete", "false"),
        *("--data", "datamodules.PointRobot", "--data.meta_batch_size", "400"),
    ],
    "half-cheetah": ["--config", str(ROOT / "configs/reinforcement/rl2/half-cheetah-velocity-short.yaml")],
}
PARTS = {
    "environment": "starts, steps, observations",
    "acting": "the recurrent policy, step by step, and its samples",
    "chance": "uniform numbers of the trial",
    "rest of the trial": "what is kept of it",
    "learning": "advantages, epochs of both networks, metrics",
    "Trainer": "sampling the tasks, callbacks, loggers",
}


class Clock:
    """Adds up seconds by name."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def of(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose time counts as ``name``'s."""

        def run(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - begin

        return run


def profile(flags: Sequence[str], quick: bool, seconds: float) -> dict[str, list[float]]:
    """Seconds of each part of a meta-iteration, one of each iteration but for the first."""
    import pytorch_lightning as pl

    from app.cli.builder import MetaboltCLI, quiet_lightning

    clock, times = Clock(), defaultdict(list)

    class Iterations(pl.Callback):
        first = begin = 0.0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.first = self.begin = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            now = time.perf_counter()
            of, whole = clock.seconds, now - self.begin
            inside = of["environment"] + of["acting"] + of["chance"]
            parts = {name: of[name] for name in ("environment", "acting", "chance")}
            parts["rest of the trial"] = of["trial"] - inside
            parts["learning"] = of["step"] - of["trial"]
            parts["Trainer"] = whole - of["step"]
            if batch_idx:  # the first one warms up
                for name, spent in (parts | {"iteration": whole}).items():
                    times[name].append(spent)
            trainer.should_stop = batch_idx >= (1 if quick else 3) and now - self.first > seconds
            clock.seconds.clear()
            self.begin = time.perf_counter()

    quiet_lightning()
    own = ["--wandb", "off", "--pictures", "false", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    own += ["--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches", "0"]
    own += ["--trainer.max_steps", "1000000", "--trainer.val_check_interval", "1000000"]
    own += ["--model.init_args.scheduler", "null"]  # whose length it is not
    if quick:
        own += ["--data.meta_batch_size", "8"]
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-") as runs,
        mock.patch("models.reinforcement.rl2.run_trial") as trial,
    ):
        from models.reinforcement.trials import run_trial

        trial.side_effect = clock.of("trial", run_trial)
        cli = MetaboltCLI([*flags, *own, "--runs", runs])
        model: Any = cli.model
        environment = cli.datamodule.environment
        for name in ("start", "step", "seen"):
            setattr(environment, name, clock.of("environment", getattr(environment, name)))
        agent, draws = model.agent, Environments.draws

        def timed_agent() -> Any:
            made = agent()
            made.act = clock.of("acting", made.act)
            return made

        model.agent, model.training_step = timed_agent, clock.of("step", model.training_step)
        cli.trainer.callbacks.append(Iterations())
        with mock.patch.object(Environments, "draws", lambda *a, **k: clock.of("chance", draws)(*a, **k)):
            cli.trainer.fit(model, datamodule=cli.datamodule)
    return dict(times)


def show_profile(report: Report, name: str, times: dict[str, list[float]]) -> None:
    """A table of the parts, on average over iterations, and their share of the whole."""
    report.samples[f"RL² on {name}"] = times
    whole = float(np.mean(times["iteration"]))
    print(f"\nRL² on {name}: {1e3 * whole:,.0f} ms an iteration, {len(times['iteration'])} iterations")
    for part, what in PARTS.items():
        spent = float(np.mean(times[part]))
        print(f"  {part:<18}{1e3 * spent:>10,.1f} ms{100 * spent / whole:>6.1f} %  {what}", flush=True)


def main() -> None:
    args = arguments("Environments in step, and RL²'s iteration.", seconds=20, data=False)
    report = Report("Environments", "cpu")
    for name, flags in PROFILES.items():
        show_profile(report, name, profile(flags, args.quick, args.seconds))
    print(flush=True)
    for name, family in FAMILIES.items():
        throughput(report, name, family, args)
    half_cheetah(report, args)
    report.show(args.out)


if __name__ == "__main__":
    main()
