"""What is seen of trials in environments: which data the pictures of reinforcement learning are made of."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from app.dashboard.view import Figures, View
from app.plots import reinforcement as plots
from app.runs.probe import Probe
from datamodules.reinforcement.environments import Environments
from models.reinforcement.trials import Trial

PULLED, WALKED, ENCODED = 200, 6, 200  # tasks behind the pictures of arms, of trajectories and of latents


def trials(view: View) -> Figures:
    """The figures of a split's trials."""
    return TrialFigures(view).all()


class TrialFigures:
    """The figures of a split's trials.

    Args:
        view: its table has ``returns`` (T, E) of each task, where the best policy is known ``of_optimum`` (T, 2), of a
            learner with beliefs their deviations, ``beliefs`` (T, steps, L), and ``reward_errors`` (T, steps).
    """

    def __init__(self, view: View) -> None:
        self.probe, self.table, self.at, self.guarded, self.panels = (
            *(view.probe, view.table, view.at, view.guard, view.panels),
        )
        self.learner: Any = view.probe.learner
        self.environment = view.probe.tasks.environment
        self.available = view.probe.available
        self.unit = "pull" if self.environment.looks == "arms" else "episode"

    def all(self) -> Figures:
        """Names, and what makes each figure."""
        yield from self._returns()
        if self.environment.looks == "arms":
            yield from self._pulls()
        if self.environment.looks == "plane":
            yield from self._trajectories()
        if "beliefs" in self.table:
            yield from self._beliefs()
        if self.learner.has_latents and self.environment.facts <= 2:
            yield from self._latents()

    def _returns(self) -> Figures:
        returns, optimum = self.table["returns"], optimum_of(self.table)
        title = f"Returns in {self.environment.title}, {self.at}"
        yield "episodes", partial(plots.returns, returns, optimum, title, unit=self.unit)
        self.panels.append(
            (f"{self.unit.title()}s", lambda axes: plots.draw_returns(axes, returns, optimum, self.unit))
        )
        if self.learner.has_latents:  # a set of transitions
            horizon = self.environment.horizon
            yield "context", partial(plots.returns, returns, optimum, title, unit=self.unit, horizon=horizon)
        if optimum is not None:
            chance = self._chance()
            yield "regret", partial(plots.regret, returns, optimum, chance, f"Regret, {self.at}", unit=self.unit)
            self.panels.append(
                ("Regret", lambda axes: plots.draw_regret(axes, returns, optimum, chance, unit=self.unit))
            )

    def _chance(self) -> Tensor | None:
        """Expected return of random actions, for each task of the table."""
        return self.environment.chance(self.probe.tasks.sample(self.table["index"].tolist()).task)

    def _pulls(self) -> Figures:
        looked = self._look("arms", PULLED)
        if looked is not None:
            batch, trial = looked
            parts = (batch.task["arms"].cpu(), trial.action.T.cpu())
            yield "arms", partial(plots.pulls, *parts, batch.index.tolist(), f"Arms pulled, {self.at}")
            title = f"Arms pulled, mean of {len(batch)} tasks"
            self.panels.append((title, lambda axes: plots.draw_mean_pulls(axes, *parts)))

    def _trajectories(self) -> Figures:
        looked = self._look("trajectories", WALKED)
        if looked is not None:
            batch, trial = looked
            positions, returns = positions_of(trial, batch.episodes), trial.returns(batch.episodes).float().cpu()
            goals, radius = batch.task["goal"].float().cpu(), self.environment.radius
            parts = (positions, goals, returns, batch.index.tolist(), radius)
            yield "trajectories", partial(plots.trajectories, *parts, f"Trajectories, {self.at}")
            title = f"Task {int(batch.index[0])}, first episode light, last one dark"
            self.panels.append((title, lambda axes: plots.draw_trajectories(axes, positions[0], goals[0], radius)))

    def _beliefs(self) -> Figures:
        deviations, errors = self.table["beliefs"], self.table.get("reward_errors")
        episodes = self.table["returns"].shape[1]
        yield "beliefs", partial(plots.beliefs, deviations, errors, episodes, f"Beliefs about the task, {self.at}")
        self.panels.append(("Beliefs", lambda axes: plots.draw_beliefs(axes, deviations, episodes)))

    def _latents(self) -> Figures:
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
            _, ready = self.probe.sample(range(min(tasks, self.available)))
            batch: Any = ready
            return batch, self.learner.shown_trial(batch)

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
        size = value[0].numel()
        names += [name] if size == 1 else [f"{name} {1 + k}" for k in range(size)]
    return latents.float().cpu(), facts, names
