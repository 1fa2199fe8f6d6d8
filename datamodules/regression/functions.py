"""Few-shot regression: every task is a function of one variable, observed at a few points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Episodes, TaskDistribution
from datamodules.core.errors import at_least
from datamodules.core.streams import TaskStreams

Range = tuple[float, float]
TaskGroups = tuple[str, tuple[str, ...]]
Family = Literal["sinusoid", "line", "quadratic", "cubic"]


class FunctionFamily(Protocol):
    """A distribution over functions of one variable."""

    def parameters(self, rng: TaskStreams) -> dict[str, np.ndarray]:
        """What tells the drawn functions apart, by name, each (T,)."""
        ...

    def function(self, task: dict[str, Tensor], x: Tensor) -> Tensor:
        """The functions themselves, without noise; see RegressionTasks.function."""
        ...

    def deviation(self, task: dict[str, Tensor]) -> Tensor:
        """Standard deviation of the noise of one observation, (T,)."""
        ...


@dataclass(frozen=True)
class Sinusoids:
    """y = A sin(w x - phase), each parameter uniform in its range.

    Attributes:
        amplitude, phase, frequency: ranges of A, of the phase (radians) and of w (radians per unit of x).
        noise: standard deviation of an observation's noise, in amplitudes of its function.
    """

    amplitude: Range
    phase: Range
    frequency: Range
    noise: float

    def parameters(self, rng: TaskStreams) -> dict[str, np.ndarray]:
        ranges = {"amplitude": self.amplitude, "phase": self.phase, "frequency": self.frequency}
        return {name: rng.uniform(low, high) for name, (low, high) in ranges.items()}

    def function(self, task: dict[str, Tensor], x: Tensor) -> Tensor:
        amplitude, phase, frequency = (task[name][..., None, None] for name in ("amplitude", "phase", "frequency"))
        return amplitude * torch.sin(frequency * x - phase)

    def deviation(self, task: dict[str, Tensor]) -> Tensor:
        return self.noise * task["amplitude"]


@dataclass(frozen=True)
class Lines:
    """y = a x + b, slope a and intercept b standard normal.

    Attributes:
        noise: standard deviation of an observation's noise, in units of y.
    """

    noise: float

    def parameters(self, rng: TaskStreams) -> dict[str, np.ndarray]:
        return {"slope": rng.normal(), "intercept": rng.normal()}

    def function(self, task: dict[str, Tensor], x: Tensor) -> Tensor:
        return task["slope"][..., None, None] * x + task["intercept"][..., None, None]

    def deviation(self, task: dict[str, Tensor]) -> Tensor:
        return torch.full_like(task["slope"], self.noise)


FAMILIES: tuple[Family, ...] = ("sinusoid", "line", "quadratic", "cubic")
"""Kinds of functions, by the numbers that ``Episodes.task["family"]`` has."""
_COEFFICIENTS = ("amplitude", "frequency", "phase", "cube", "square", "slope", "intercept")


@dataclass(frozen=True)
class FourFamilies:
    """Sinusoids, lines, quadratics and cubics, a kind drawn for each task, with the coefficients of HSML's benchmark.

    y = amplitude sin(frequency x) + phase + cube x³ + square x² + slope x + intercept, where 0 is what a kind lacks.

    Attributes:
        families: kinds that are drawn, each as often as the others.
        phase: "outside" the sine, added to it; or "inside", A sin(w x - phase).
        noise: standard deviation of an observation's noise, in units of y.
    """

    families: Sequence[Family]
    phase: Literal["outside", "inside"]
    noise: float

    # By kind, what is uniform in which range.
    ranges: ClassVar[dict[Family, dict[str, Range]]] = {
        "sinusoid": {"amplitude": (0.1, 5.0), "frequency": (0.8, 1.2), "phase": (0.0, 2 * math.pi)},
        "line": {"slope": (-3.0, 3.0), "intercept": (-3.0, 3.0)},
        "quadratic": {"square": (-0.2, 0.2), "slope": (-2.0, 2.0), "intercept": (-3.0, 3.0)},
        "cubic": {"cube": (-0.1, 0.1), "square": (-0.2, 0.2), "slope": (-2.0, 2.0), "intercept": (-3.0, 3.0)},
    }

    def parameters(self, rng: TaskStreams) -> dict[str, np.ndarray]:
        family = np.array([FAMILIES.index(f) for f in self.families])[rng.integers(len(self.families))]
        drawn: dict[str, np.ndarray] = {"family": family}
        for name in _COEFFICIENTS:
            low, high = np.array([self.ranges[f].get(name, (0.0, 0.0)) for f in FAMILIES]).T[:, family]
            drawn[name] = low + (high - low) * rng.uniform()
        return drawn

    def function(self, task: dict[str, Tensor], x: Tensor) -> Tensor:
        amplitude, frequency, phase, cube, square, slope, intercept = (task[n][..., None, None] for n in _COEFFICIENTS)
        polynomial = ((cube * x + square) * x + slope) * x + intercept
        if self.phase == "inside":
            return amplitude * torch.sin(frequency * x - phase) + polynomial
        return amplitude * torch.sin(frequency * x) + phase + polynomial

    def deviation(self, task: dict[str, Tensor]) -> Tensor:
        return torch.full_like(task["slope"], self.noise)


MODES = ("sinusoid", "line", "quadratic", "tanh", "absolute")
"""Kinds of functions, by the numbers that ``Episodes.task["family"]`` has."""
Mode = Literal["sinusoid", "line", "quadratic", "tanh", "absolute"]


@dataclass(frozen=True)
class FiveFamilies:
    """Sinusoids, lines, quadratics, tanh and absolute values, a kind drawn for each task: MMAML's benchmark.

    y = a f(x - c) + b, with f the sine, identity, square, tanh or absolute value.

    Attributes:
        families: kinds that are drawn, each as often as the others.
        noise: standard deviation of an observation's noise, in units of y.
    """

    families: Sequence[Mode]
    noise: float

    # By kind, what is uniform in which range: a, c and b. The quadratic's a has either sign.
    ranges: ClassVar[dict[Mode, tuple[Range, Range, Range]]] = {
        "sinusoid": ((0.1, 5.0), (0.0, math.pi), (0.0, 0.0)),
        "line": ((-3.0, 3.0), (0.0, 0.0), (-3.0, 3.0)),
        "quadratic": ((0.02, 0.15), (-3.0, 3.0), (-3.0, 3.0)),
        "tanh": ((-3.0, 3.0), (-3.0, 3.0), (-3.0, 3.0)),
        "absolute": ((-3.0, 3.0), (-3.0, 3.0), (-3.0, 3.0)),
    }

    def parameters(self, rng: TaskStreams) -> dict[str, np.ndarray]:
        family = np.array([MODES.index(f) for f in self.families])[rng.integers(len(self.families))]
        low, high = np.array([self.ranges[f] for f in MODES]).transpose(2, 0, 1)[:, family]
        scale, centre, offset = (low + (high - low) * rng.uniform(0.0, 1.0, 3)).T
        sign = np.where((rng.uniform() < 0.5) & (family == MODES.index("quadratic")), -1.0, 1.0)
        return {"family": family, "scale": sign * scale, "centre": centre, "offset": offset}

    def function(self, task: dict[str, Tensor], x: Tensor) -> Tensor:
        scale, centre, offset, family = (task[n][..., None, None] for n in ("scale", "centre", "offset", "family"))
        z = x - centre
        kinds = (z.sin(), z, z.square(), z.tanh(), z.abs())
        return scale * sum((family == k) * f for k, f in enumerate(kinds)) + offset

    def deviation(self, task: dict[str, Tensor]) -> Tensor:
        return torch.full_like(task["scale"], self.noise)


class RegressionTasks(TaskDistribution):
    """Functions of a family, each observed at uniformly drawn points; episode i is a pure function of (seed, split, i).

    Args:
        family: of the functions.
        shots, queries: points of the support set and of the query set; the noise is on both.
        x_range: the points are uniform in it.
        grid: the query set's are evenly spaced in it instead, both ends included; the support sets stay the same.
        tasks: number of functions; episode i observes function i mod ``tasks``, at points of its own. None: every
            episode has its own function.
        seed, split: of the episodes.
        task_groups: see TaskDistribution.
    """

    seed: int
    x_range: Range

    def __init__(
        self,
        family: FunctionFamily,
        shots: int,
        queries: int,
        *,
        x_range: Range,
        grid: bool = False,
        tasks: int | None,
        seed: int,
        split: str,
        task_groups: TaskGroups | None = None,
    ) -> None:
        self.task_groups = task_groups
        self.family, self.shots, self.queries = family, shots, queries
        self.x_range, self.grid, self.tasks = x_range, grid, tasks
        self.seed, self.split = seed, split

    def function(self, task: dict[str, Tensor], x: Tensor) -> Tensor:
        """The true functions, without noise, to plot predictions against.

        Args:
            task: ``Episodes.task``, tensors (T,), or one task's scalars.
            x: (T, N, 1), or (N, 1) for all tasks alike.

        Returns:
            (T, N, 1); (N, 1) for one task.
        """
        return self.family.function(task, x)

    def sample(self, indices: Sequence[int]) -> Episodes:
        index = np.asarray(indices, np.int64)
        rng = TaskStreams(self.seed, self.split, index)
        drawn = self.family.parameters(rng)  # always: the points below must not reuse a function's random numbers
        if self.tasks is not None:
            drawn = self.family.parameters(TaskStreams(self.seed, self.split, index % self.tasks))
        task = {name: torch.from_numpy(value) for name, value in drawn.items()}
        task = {name: value.float() if value.is_floating_point() else value for name, value in task.items()}
        points = self.shots + self.queries
        x = torch.from_numpy(rng.uniform(*self.x_range, points, 1)).float()
        if self.grid:
            x[:, self.shots :, 0] = torch.linspace(*self.x_range, self.queries)
        noise = torch.from_numpy(rng.normal(points, 1)).float()
        y = self.function(task, x) + self.family.deviation(task)[:, None, None] * noise
        return Episodes(
            support_x=x[:, : self.shots],
            support_y=y[:, : self.shots],
            query_x=x[:, self.shots :],
            query_y=y[:, self.shots :],
            index=torch.from_numpy(index),
            task=task,
            task_groups=self.task_groups,
        )


class RegressionDataModule(EpisodicDataModule):
    """Few-shot regression. A subclass names the family of functions.

    Args:
        family: of the functions.
        shots: points of the support set.
        queries: points of the query set in meta-validation and meta-test.
        train_shots: shots in meta-training (None: the same).
        train_queries: queries in meta-training; MAML's code takes as many as shots (None: the same as queries).
        train_tasks: number of meta-training functions, each met again and again at new points (None: no limit).
        x_range: the points are uniform in it.
        grid: meta-validation and meta-test measure on evenly spaced queries from one end of x_range to the other.
        meta_batch_size, val_tasks, test_tasks, eval_batch_size, workers, seed: see EpisodicDataModule.
    """

    kind = "regression"
    task_groups: ClassVar[TaskGroups | None] = None

    def __init__(
        self,
        family: FunctionFamily,
        shots: int = 10,
        queries: int = 100,
        train_shots: int | None = None,
        train_queries: int | None = 10,
        train_tasks: int | None = None,
        x_range: Range = (-5.0, 5.0),
        grid: bool = False,
        meta_batch_size: int = 25,
        val_tasks: int = 600,
        test_tasks: int = 10_000,
        eval_batch_size: int = 100,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(meta_batch_size, val_tasks, test_tasks, eval_batch_size, workers, seed)
        at_least(1, shots=shots, queries=queries, train_shots=train_shots)
        at_least(1, train_queries=train_queries, train_tasks=train_tasks)
        in_order(x_range=x_range)
        self.family = family
        self.shots, self.queries = shots, queries
        self.train_shots = train_shots or shots
        self.train_queries = train_queries or queries
        self.train_tasks = train_tasks
        self.x_range, self.grid = x_range, grid

    def task_shape(self) -> dict[str, int]:
        return {"shots": self.shots, "queries": self.queries}

    def build(self, split: str) -> RegressionTasks:
        train = split == "train"
        return RegressionTasks(
            self.family,
            self.train_shots if train else self.shots,
            self.train_queries if train else self.queries,
            x_range=self.x_range,
            grid=self.grid and not train,
            tasks=self.train_tasks if train else None,
            seed=self.seed,
            split=split,
            task_groups=self.task_groups,
        )


class Sinusoid(RegressionDataModule):
    """y = A sin(w x - phase), as in MAML (Finn et al., ICML 2017): w = 1 and no noise unless set otherwise.

    Args:
        amplitude, phase, frequency: ranges that A, the phase (radians) and w (radians per unit of x) are uniform in.
        noise: standard deviation of an observation's noise, in amplitudes of its function.
        common: see RegressionDataModule.
    """

    def __init__(
        self,
        amplitude: Range = (0.1, 5.0),
        phase: Range = (0.0, math.pi),
        frequency: Range = (1.0, 1.0),
        noise: float = 0.0,
        **common: Any,
    ) -> None:
        in_order(amplitude=amplitude, phase=phase, frequency=frequency)
        super().__init__(Sinusoids(amplitude, phase, frequency, standard_deviation(noise)), **common)


class HarderSinusoid(Sinusoid):
    """As in Bayesian MAML (Yoon et al., NeurIPS 2018): any phase and frequency, noise, and few training functions.

    Args:
        amplitude, phase, frequency, noise: see Sinusoid.
        train_tasks: number of meta-training functions, 100 or 1,000 in the paper (None: no limit).
        common: see RegressionDataModule.
    """

    def __init__(
        self,
        amplitude: Range = (0.1, 5.0),
        phase: Range = (0.0, 2 * math.pi),
        frequency: Range = (0.5, 2.0),
        noise: float = 0.01,
        train_tasks: int | None = 1000,
        **common: Any,
    ) -> None:
        super().__init__(amplitude, phase, frequency, noise, train_tasks=train_tasks, **common)


class Linear(RegressionDataModule):
    """y = a x + b, slope and intercept standard normal: the family whose best predictor is known in closed form.

    Args:
        noise: standard deviation of an observation's noise, in units of y.
        common: see RegressionDataModule.
    """

    def __init__(self, noise: float = 0.0, **common: Any) -> None:
        super().__init__(Lines(standard_deviation(noise)), **common)


class FourFamily(RegressionDataModule):
    """Sinusoids, lines, quadratics and cubics: the benchmark of HSML (Yao et al., ICML 2019), without noise.

    Args:
        families: kinds that tasks are drawn from; their numbers in ``Episodes.task["family"]`` stay those of all four.
        phase: whether a sinusoid's phase is added "outside" of the sine or subtracted "inside" of it.
        noise: standard deviation of an observation's noise, in units of y.
        common: see RegressionDataModule.
    """

    task_groups = ("family", FAMILIES)

    def __init__(
        self,
        families: Sequence[Family] = FAMILIES,
        # The released code, which the published results are of, adds it to the sine; inside is what a phase is.
        phase: Literal["outside", "inside"] = "outside",
        noise: float = 0.0,
        **common: Any,
    ) -> None:
        if not families or len(set(families)) < len(families):
            raise ValueError(f"families are {list(families)} but must be one or more, each once")
        super().__init__(FourFamilies(families, phase, standard_deviation(noise)), **common)


class FiveFamily(RegressionDataModule):
    """Sinusoids, lines, quadratics, tanh and absolute values: the benchmark of MMAML (Vuorio et al., NeurIPS 2019).

    The noise is on queries too, so that no squared error can be below its variance, 0.09; ``mse`` is with it.

    Args:
        families: kinds that tasks are drawn from; their numbers in ``Episodes.task["family"]`` stay those of all five.
        noise: standard deviation of an observation's noise, in units of y.
        common: see RegressionDataModule.
    """

    task_groups = ("family", MODES)

    def __init__(self, families: Sequence[Mode] = MODES, noise: float = 0.3, **common: Any) -> None:
        if not families or len(set(families)) < len(families):
            raise ValueError(f"families are {list(families)} but must be one or more, each once")
        super().__init__(FiveFamilies(families, standard_deviation(noise)), **common)


def in_order(**ranges: Range) -> None:
    """Refuse ranges that are none, by the names of their settings.

    Raises:
        ValueError: naming the setting.
    """
    for name, (low, high) in ranges.items():
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ValueError(f"{name} is [{low}, {high}] but must be two finite numbers, the lower one first")


def standard_deviation(noise: float) -> float:
    """The setting ``noise`` as it is.

    Raises:
        ValueError: it is no standard deviation.
    """
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise is {noise} but is a standard deviation: it must be finite and at least 0")
    return noise
