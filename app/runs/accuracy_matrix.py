"""What several learners had on the same tasks, as a matrix."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.runs.directory import TASKS_CSV
from app.runs.evaluation_record import Evaluation, refuse_other_tasks
from datamodules.core.errors import ConfigError
from models.core.metrics import FINGERPRINT
from models.task_embedding.collaborative_filtering import MatrixFactorization
from models.task_embedding.recommendation import error_of_measuring

LEAST_TASKS = 20  # that something is learned from


@dataclass(frozen=True)
class Matrix:
    """What learners had on the same tasks.

    Attributes:
        evaluations: of each learner.
        names: of the learners.
        accuracy: (N, T) float64, nan where a learner predicted nothing.
        queries: of a task.
    """

    evaluations: list[Evaluation]
    names: list[str]
    accuracy: Tensor
    queries: int

    @classmethod
    def load(cls, folders: Sequence[Path], names: list[str]) -> Matrix:
        """From the folders of tests, and names for them.

        Raises:
            ConfigError: they are not of the same tasks, not of classification, or too few.
        """
        evaluations = [Evaluation.load(folder) for folder in folders]
        refuse_other_tasks(evaluations)
        for one in evaluations:
            if "accuracy" not in one.metrics:
                raise ConfigError(f"{one.folder} is not a test of classification: give runs that have an accuracy")
            if (seen := one.metrics["accuracy"].isfinite()).sum() < 0.5 * len(seen):
                raise ConfigError(
                    f"the learner of {one.folder} predicted nothing on {int((~seen).sum())} of {len(seen)} tasks: "
                    "leave that folder out"
                )
        accuracy = torch.stack([one.metrics["accuracy"].double() for one in evaluations])
        if (tasks := accuracy.shape[1]) < LEAST_TASKS:
            raise ConfigError(f"these were tested on {tasks} tasks, too few to learn from: give {LEAST_TASKS} or more")
        about = evaluations[0].about
        return cls(evaluations, names, accuracy, about["ways"] * about["queries"])

    @property
    def about(self) -> dict[str, Any]:
        """What makes the tasks, see ``evaluation_record.about``."""
        return self.evaluations[0].about

    def measuring(self, accuracy: Tensor) -> float:
        """The mean variance of the errors that entries have for being measured by few queries."""
        return error_of_measuring(accuracy, self.queries).nanmean().item()

    def task_names(self) -> list[str]:
        """Of each task its number, and its classes where the test left their names."""
        first = self.evaluations[0]
        numbers = [str(n) for n in first.facts["index"].tolist()]
        try:
            with (first.folder / TASKS_CSV).open(newline="") as file:
                of_tasks = {row["task"]: row["classes"] for row in csv.DictReader(file)}
        except (OSError, LookupError, ValueError, csv.Error):  # it is for people, and may be gone
            return numbers
        return [f"{n}: {of_tasks[n]}" if n in of_tasks else n for n in numbers]

    def factors_npz(self, model: MatrixFactorization) -> bytes:
        """Embeddings of these tasks, and what they are of, as the content of a file."""
        one, content = self.evaluations[0], io.BytesIO()
        facts = {n: one.facts[n].numpy() for n in ("index", FINGERPRINT) if n in one.facts}
        np.savez_compressed(
            content,
            **facts,
            factors=model.factors.numpy(),
            covariances=model.factor_covariances.numpy(),
            learners=np.array(self.names),
            learner_factors=model.row_factors.numpy(),
            learner_biases=model.row_biases.numpy(),
        )
        return content.getvalue()
