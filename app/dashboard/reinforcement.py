"""What is seen of trials in environments: which data the pictures of reinforcement learning are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from app.plots import reinforcement as plots
from app.plots.style import Panel
from datamodules.reinforcement.bandits import BernoulliBandit
from datamodules.reinforcement.environments import Environments
from datamodules.reinforcement.navigation import DenseNavigation
from models.reinforcement.learner import ReinforcementLearner
from models.reinforcement.trials import Trial, run_trial

if TYPE_CHECKING:
    from app.dashboard.probe import Probe

PULLED, WALKED, ENCODED = 200, 6, 200  # tasks behind the pictures of arms, of trajectories and of latents


class TrialPictures:
    """The pictures of a split's trials.

    Args:
        probe: looks at the learner.
        table: metrics of each task, name to (T, …), with ``returns`` (T, E) and, where the best policy is known,
            ``of_optimum`` (T, 2).
        at: when it was measured, for titles.
        guarded: the result of an action, or None with a line in the log where it fails.

    Attributes:
        encodes: the learner tells a latent of each task, see ``ReinforcementLearner.task_latents``.
        panels: of these pictures, what belongs into one of several panels; whole once ``all`` has come to its end.
    """

    def __init__(self, probe: Probe, table: dict[str, Tensor], at: str, guarded: Callable[..., Any]) -> None:
        self.probe, self.table, self.at, self.guarded = probe, table, at, guarded
        self.environment = probe.tasks.environment
        self.available = probe.data.test_tasks if probe.split == "test" else probe.data.val_tasks
        self.unit = "pull" if isinstance(self.environment, BernoulliBandit) else "episode"
        self.encodes = getattr(type(probe.learner), "task_latents", None) is not ReinforcementLearner.task_latents
        self.panels: list[Panel] = []

    def all(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Names, and what makes each figure."""
        yield from self._returns()
        if isinstance(self.environment, BernoulliBandit):
            yield from self._pulls()
        if isinstance(self.environment, DenseNavigation):
            yield from self._trajectories()
        if self.encodes and self.environment.facts <= 2:
            yield from self._latents()

    def _returns(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        returns, optimum = self.table["returns"], optimum_of(self.table)
        title = f"Returns, {self.at}"
        yield "episodes", partial(plots.returns, returns, optimum, title, unit=self.unit)
        self.panels.append(
            (f"{self.unit.title()}s", lambda axes: plots.draw_returns(axes, returns, optimum, self.unit))
        )
        if self.encodes:  # a set of transitions
            horizon = self.environment.horizon
            yield "context", partial(plots.returns, returns, optimum, title, unit=self.unit, horizon=horizon)
        if optimum is not None:
            chance = self._chance()
            yield "regret", partial(plots.regret, returns, optimum, chance, f"Regret, {self.at}", unit=self.unit)
            self.panels.append(
                ("Regret", lambda axes: plots.draw_regret(axes, returns, optimum, chance, unit=self.unit))
            )

    def _chance(self) -> Tensor | None:
        """Expected reward of a random arm, for each task of the table."""
        if not isinstance(self.environment, BernoulliBandit):
            return None
        return self.probe.tasks.sample(self.table["index"].tolist()).task["arms"].mean(1)

    def _pulls(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        looked = self._look("arms", PULLED)
        if looked is not None:
            batch, trial = looked
            parts = (batch.task["arms"].cpu(), trial.action.T.cpu())
            yield "arms", partial(plots.pulls, *parts, batch.index.tolist(), f"Arms pulled, {self.at}")
            title = f"Arms pulled, mean of {len(batch)} tasks"
            self.panels.append((title, lambda axes: plots.draw_mean_pulls(axes, *parts)))

    def _trajectories(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        looked = self._look("trajectories", WALKED)
        if looked is not None:
            batch, trial = looked
            positions, returns = positions_of(trial, batch.episodes), trial.returns(batch.episodes).float().cpu()
            goals, radius = batch.task["goal"].float().cpu(), getattr(self.environment, "radius", None)
            parts = (positions, goals, returns, batch.index.tolist(), radius)
            yield "trajectories", partial(plots.trajectories, *parts, f"Trajectories, {self.at}")
            title = f"Task {int(batch.index[0])}, first episode light, last one dark"
            self.panels.append((title, lambda axes: plots.draw_trajectories(axes, positions[0], goals[0], radius)))

    def _latents(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        looked = self.guarded("latents", lambda: latents_of(self.probe, min(ENCODED, self.available)))
        if looked is not None:
            latents, facts, names = looked
            title = f"Latents of {len(latents)} tasks, {self.at}"
            yield "latents", partial(plots.latents, latents, facts, names, title)
            colours = plots.fact_colours(facts)
            panel = f"Latents, coloured by {' and '.join(names)}"
            self.panels.append((panel, lambda axes: plots.draw_latents(axes, latents, colours)))

    def _look(self, what: str, tasks: int) -> tuple[Environments, Trial] | None:
        """The trials of the first tasks, as they were tested."""

        def look() -> tuple[Environments, Trial]:
            learner: Any = self.probe.learner
            _, ready = self.probe.sample(range(min(tasks, self.available)))
            batch: Any = ready
            return batch, run_trial(batch, learner.agent())

        return self.guarded(what, look)


def optimum_of(table: dict[str, Tensor]) -> Tensor | None:
    """Expected return of an episode by each task's best policy, (T,), from the metrics of trials; None if unknown."""
    return table["of_optimum"][:, 1] / table["returns"].shape[1] if "of_optimum" in table else None


def positions_of(trial: Trial, episodes: int) -> Tensor:
    """Places on the plane that observations begin with, from the start of each episode: (N, E, horizon + 1, 2)."""
    before, after = (
        x[..., :2].float().cpu().unflatten(0, (episodes, -1)) for x in (trial.seen.observation, trial.reached)
    )
    return torch.cat([before[:, :1], after], 1).permute(2, 0, 1, 3)


def latents_of(probe: Probe, tasks: int) -> tuple[Tensor, Tensor, list[str]] | None:
    """Latents of the first tasks (T, L), what tells the tasks apart (T, facts), and the names of that.

    None where this learner has none, as PEARL without context.
    """
    learner: Any = probe.learner
    _, ready = probe.sample(range(tasks))
    batch: Any = ready
    latents, facts = learner.task_latents(batch), batch.environment.describe(batch.task).float().cpu()
    if latents is None:
        return None
    names = []
    for name, value in batch.task.items():
        if name != "number":
            size = value[0].numel()
            names += [name] if size == 1 else [f"{name} {1 + k}" for k in range(size)]
    return latents.float().cpu(), facts, names
