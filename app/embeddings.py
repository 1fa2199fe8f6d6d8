"""How much of the tasks is in a learner's embeddings of them: ``python -m app.embeddings runs/x``, from its test.

A linear probe for every fact of the meta-test tasks, fitted on every second task and measured on the others. A fact
that is a quantity is regressed: R² is 1 where the embedding determines it, about 0 where it does not know it. A fact
that is a kind (the family of a function, the alphabet, the domain) is told by logistic regression, beside how often the
commonest kind is right. Facts are those that the test recorded, each that is one number and not always the same, or
what ``--facts`` makes of them: ``--facts "amplitude * cos(phase)" "amplitude * sin(phase)"``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from app.cli.failures import one_line_errors
from app.runs.evaluation_record import Evaluation
from datamodules.core.errors import ConfigError
from datamodules.core.files import write_atomically
from models.core.metrics import FINGERPRINT

FUNCTIONS = {name: getattr(np, name) for name in ("sin", "cos", "tan", "exp", "log", "sqrt", "abs")} | {"pi": np.pi}


def explained_variance(embedding: np.ndarray, fact: np.ndarray) -> float:
    """R² of the linear regression with an intercept of a fact (T,) on embeddings (T, d).

    Fitted on tasks 0, 2, … and measured on tasks 1, 3, …, about their own mean; not a number where that does not vary.
    """
    inputs = np.column_stack([np.ones(len(fact)), embedding]).astype(np.float64)
    fact = np.asarray(fact, np.float64)
    weights = np.linalg.lstsq(inputs[::2], fact[::2], rcond=None)[0]
    others = fact[1::2]
    total = np.square(others - others.mean()).sum() if len(others) else 0.0
    return float(1 - np.square(others - inputs[1::2] @ weights).sum() / total) if total else float("nan")


def told_kinds(embedding: np.ndarray, kind: np.ndarray) -> tuple[float, float]:
    """The accuracy of logistic regression of a kind (T,) on embeddings (T, d), and that of the commonest kind alone.

    Fitted on tasks 0, 2, …, with embeddings of mean 0 and variance 1 there, and measured on tasks 1, 3, ….
    """
    from sklearn.linear_model import LogisticRegression  # takes a second to import
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known, counts = np.unique(kind[::2], return_counts=True)
    commonest = float((kind[1::2] == known[counts.argmax()]).mean())
    if len(known) < 2:
        return commonest, commonest
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return float(probe.fit(embedding[::2], kind[::2]).score(embedding[1::2], kind[1::2])), commonest


def value_of(expression: str, facts: Mapping[str, np.ndarray]) -> np.ndarray:
    """What an expression of facts and functions comes to of each task, (T,).

    Raises:
        ConfigError: it is none, or of what is not known of the tasks.
    """
    known = {**FUNCTIONS, **facts}
    try:
        code = compile(expression, "--facts", "eval")
        if unknown := [name for name in code.co_names if name not in known]:
            raise ConfigError(
                f"--facts {expression!r} is of {unknown[0]}, which is not known of these tasks: give an expression of "
                f"{', '.join(sorted(facts))} and {', '.join(sorted(FUNCTIONS))}"
            )
        value = np.asarray(eval(code, {"__builtins__": {}}, known), np.float64)
        return np.broadcast_to(value, (len(next(iter(facts.values()))),))
    except (SyntaxError, TypeError, ValueError, ArithmeticError, NameError) as error:
        raise ConfigError(f"--facts {expression!r} is no expression of the facts of tasks: {error}") from error


def explained(evaluation: Evaluation, expressions: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """Of each expression; without any, of each fact that is one number and not the same for all tasks.

    Returns:
        by its text "R²", or of a kind "accuracy" and "commonest".

    Raises:
        ConfigError: the learner has no embedding of a task, or an expression cannot be computed.
    """
    if evaluation.embedding is None:
        raise ConfigError(
            f"{evaluation.folder} has no embeddings of the tasks: test a learner that has some, as models.CAVIA"
        )
    facts = {name: value.numpy() for name, value in evaluation.facts.items() if value.dim() == 1}
    facts = {name: value for name, value in facts.items() if name not in ("index", FINGERPRINT)}
    chosen = list(expressions) or [name for name, value in facts.items() if np.ptp(value) > 0]
    if not chosen:
        raise ConfigError(f"{evaluation.folder} knows no numbers of its tasks that an embedding could tell")
    embedding = evaluation.embedding.numpy()

    def probed(text: str) -> dict[str, float]:
        if text in facts and np.issubdtype(facts[text].dtype, np.integer):
            return dict(zip(("accuracy", "commonest"), told_kinds(embedding, facts[text]), strict=True))
        return {"R²": explained_variance(embedding, value_of(text, facts))}

    return {text: probed(text) for text in chosen}


def told_text(told: Mapping[str, float]) -> str:
    """What a probe came to, as people read it."""
    if "R²" in told:
        return f"R² {told['R²']:.4f}"
    return f"{100 * told['accuracy']:.2f} % (commonest {100 * told['commonest']:.2f} %)"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    summary, details = str(__doc__).split("\n\n", 1)
    parser = argparse.ArgumentParser(prog="python -m app.embeddings", description=summary, epilog=details)
    parser.add_argument("folders", nargs="+", type=Path, help="of runs or of evaluations")
    parser.add_argument("--facts", nargs="+", default=[], help="expressions of what is known of the tasks")
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    options = parser.parse_args(arguments)
    with one_line_errors():
        found = {str(folder): explained(Evaluation.load(folder), options.facts) for folder in options.folders}
        table = Table(title="Linear probes of embeddings of tasks", title_justify="left")
        for column in ("run", "fact"):
            table.add_column(column, overflow="fold")
        table.add_column("told", justify="right")
        for folder, of_folder in found.items():
            for text, told in of_folder.items():
                table.add_row(folder, text, told_text(told))
        Console().print(table)
        if options.out is not None:
            write_atomically(options.out, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
