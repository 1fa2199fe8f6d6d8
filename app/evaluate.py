"""Evaluate a checkpoint, all that is needed: ``python -m app.evaluate --ckpt_path runs/x/checkpoints/best.ckpt``.

The checkpoint carries its whole configuration. What is given here wins over it: another number of ways, another data
set, or any key of the configuration (``--model.init_args.inner_rate 0.1``).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_only

from app.cli.builder import quiet_lightning
from app.cli.failures import one_line_errors
from app.cli.from_checkpoint import SHORT, FromCheckpoint, Options, Trained, open_checkpoint, restore
from app.compare import comparison_dir, difference, labels, write_comparison
from app.dashboard.callback import Dashboard
from app.runs.directory import CONFIG, EVALUATIONS, RESULTS, TASKS_CSV, TASKS_NPZ, slug
from app.runs.evaluation_record import Evaluation, refuse_other_settings, settings
from app.runs.leaks import refuse_leaks, trained_classes
from app.runs.recorder import Recorder
from app.runs.results import print_results, results, write_results
from datamodules.core.errors import ConfigError
from datamodules.core.files import write_atomically
from models.core.checkpoint_io import CHECKPOINTS
from models.core.metrics import as_results
from models.core.shapes import fits
from models.core.task_kinds import KINDS


class EvaluationCLI(FromCheckpoint):
    """A run of the meta-test alone, in a folder of its own and without dashboards.

    Args:
        trained, options, keys: see FromCheckpoint.
        words: what is evaluated, for the folder's name.
        control: what stands in for the tasks' own embeddings; None: nothing.
    """

    prog = "python -m app.evaluate"
    description = "Evaluate a checkpoint; any key of its configuration can be given anew."

    def __init__(
        self,
        trained: Trained,
        options: argparse.Namespace,
        keys: Sequence[str],
        words: Sequence[str],
        control: str | None = None,
    ) -> None:
        # The control first: a folder's name has an end.
        self.words, self.control = [*([control] if control else []), *words], control
        super().__init__(trained, options, keys)

    def choose_folder(self, stage: str) -> tuple[Path, Path | None]:
        if self.options.out is not None:
            out = self.options.out
            if (out / CHECKPOINTS).is_dir():
                raise ConfigError(f"{out} is the folder of a run, whose results would be lost: give another --out")
            return out, self.trained.path
        # The same evaluation goes to the same folder again, another one of the same words to the next.
        base = folder = self.trained.run_dir / EVALUATIONS / slug([self.trained.path.stem, *self.words])
        text, n = self.yaml(), 1
        while (folder / CONFIG).is_file() and (folder / CONFIG).read_text() != text:
            n += 1
            folder = base.with_name(f"{base.name}-{n}")
        return folder, self.trained.path

    def loggers(self, callbacks: list[pl.Callback]) -> list[Any]:
        recorder = Recorder(self.run_dir, self.setting("open_set_tasks"))
        dashboard = Dashboard(self.run_dir, recorder, pictures=self.setting("pictures"))
        trained = frozenset() if self.setting("allow_overlap") else trained_classes(self.trained.content)
        callbacks += [ReadyTasks(self.options.seed, trained), recorder, dashboard]
        return []


class ReadyTasks(pl.Callback):
    """Gives the meta-test tasks another seed, and sees whether they fit the network, before any is computed.

    Args:
        seed: of the tasks; None leaves the data's. The split of classes stays that of the training either way:
            another one would test on classes that were trained on.
        trained: classes that must not be among those of the tasks, see ``leaks``.
    """

    def __init__(self, seed: int | None, trained: frozenset[int] = frozenset()) -> None:
        self.seed, self.trained = seed, trained

    def setup(self, trainer: Any, pl_module: pl.LightningModule, stage: str) -> None:
        tasks = trainer.datamodule.distribution("test")
        if self.seed is not None:
            if tasks.seed is None:
                raise ConfigError(f"the tasks of {type(trainer.datamodule).__name__} have no seed: leave out --seed")
            tasks.seed = self.seed
        refuse_leaks(self.trained, trainer.datamodule, "test", "the checkpoint's learner")
        inputs = getattr(tasks.sample([0]), "support_x", None)
        if inputs is not None:
            fits(pl_module, inputs[0])


@rank_zero_only
def _begin(folder: Path, configuration: str) -> None:
    """Leave the configuration, once nothing is left of a test with another one: results.json, written last, first."""
    path = folder
    try:
        for path in (folder / name for name in (RESULTS, TASKS_NPZ, TASKS_CSV)):
            path.unlink(missing_ok=True)
        path = folder / CONFIG
        write_atomically(path, configuration)
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error.strerror}): give --out a folder that can be written") from error


@rank_zero_only
def write_evaluation(cli: EvaluationCLI, command: str) -> None:
    """results.json and the closing table."""
    data = cli.datamodule
    assert data is not None
    facts = {
        **({"control": cli.control} if cli.control else {}),
        "seed": data.seed if cli.options.seed is None else cli.options.seed,
        "checkpoint": str(cli.trained.path),
        "checkpoint_sha256": cli.trained.identity,
        "meta_steps": int(cli.trained.content.get("global_step", 0)),
        "command": command,
    }
    content = results(cli.model, data, cli.model.stage_metrics("test").everything(), facts)
    write_results(content, cli.run_dir / RESULTS)
    print_results(content, as_results(cli.model.all_metrics()), cli.run_dir, [f"per task: {cli.run_dir / TASKS_CSV}"])


def evaluate(cli: EvaluationCLI, command: str) -> None:
    """Run the meta-test of one checkpoint.

    Args:
        cli: built from it.
        command: for results.json.

    Raises:
        ConfigError, DataError: what the user can mend.
    """
    restore(cli.model, cli.trained)
    if cli.control:
        cli.model.control(cli.control)
    _begin(cli.run_dir, cli.yaml())  # first: a folder that cannot be written is told before the work
    cli.set_threads()
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    write_evaluation(cli, command)


def finished(cli: EvaluationCLI) -> bool:
    """Whether just this evaluation is there: to its end, of the same configuration and the same checkpoint."""
    folder = cli.run_dir
    try:
        told = json.loads((folder / RESULTS).read_text())
        of_this = told["checkpoint_sha256"] == cli.trained.identity
        same = of_this and (folder / CONFIG).read_text() == cli.yaml()
        return same and Evaluation.load(folder).about["seed"] == _settings(cli)["seed"]
    except (OSError, ValueError, LookupError, TypeError, ConfigError):  # none, or none that can be read
        return False


def _settings(cli: EvaluationCLI) -> dict[str, Any]:
    return settings(cli.datamodule, cli.options.seed)


def compare(options: argparse.Namespace, keys: Sequence[str], words: Sequence[str], command: str) -> None:
    """Run the meta-test of several checkpoints, but for those that are there, and compare them.

    Args:
        options: as ``Options`` reads them.
        keys: flags of the configuration.
        words: of the evaluations' folders.
        command: for results.json and comparison.json.

    Raises:
        ConfigError, DataError: what the user can mend; other tasks before any is computed.
    """
    if options.out is not None and (options.out / CHECKPOINTS).is_dir():
        raise ConfigError(f"{options.out} is the folder of a run, whose results would be lost: give another --out")
    alone = argparse.Namespace(**vars(options) | {"out": None})
    clis = []
    for path in options.ckpt_path:
        trained = open_checkpoint(Path(path))
        clis.append(EvaluationCLI(trained, alone, keys, words))
        controls = clis[-1].model.controls if options.controls else ()
        clis += [EvaluationCLI(trained, alone, keys, words, control) for control in controls]
    if options.controls and len(clis) == len(options.ckpt_path):
        raise ConfigError(
            f"{type(clis[0].model).__name__} does not depend on a task embedding that could be exchanged: leave out "
            "--controls"
        )
    folders = [cli.run_dir for cli in clis]
    if twice := next((folder for i, folder in enumerate(folders) if folder in folders[:i]), None):
        raise ConfigError(f"two checkpoints would be evaluated in {twice}: give each once")
    refuse_other_settings([_settings(cli) for cli in clis], [str(cli.trained.path) for cli in clis])
    for cli in clis:
        if finished(cli):
            rank_zero_info(f"{cli.trained.path} is evaluated already, in {cli.run_dir}: remove that to do it again")
        else:
            evaluate(cli, command)
    out = comparison_dir(folders) if options.out is None else options.out
    evaluations = [Evaluation.load(folder) for folder in folders]
    write_comparison(evaluations, out, command)
    if options.controls:
        for line in verdicts(clis, evaluations):
            rank_zero_info(line)


def loss_by(control: Evaluation, own: Evaluation, metric: str) -> tuple[float, float, bool]:
    """What a learner loses by a control, with the half-width of its interval, and whether the task embedding matters.

    Paired by task, and positive where the control is worse. An embedding that loses no more than chance is decorative.

    Args:
        control, own: evaluations on the same tasks.
        metric: what is lost.
    """
    declared = own.declared[metric]
    mean, half = difference(declared, own.metrics[metric], control.metrics[metric])
    loss = mean if declared.better == "higher" else -mean
    return loss, half, loss > half


def verdicts(clis: Sequence[EvaluationCLI], evaluations: Sequence[Evaluation]) -> list[str]:
    """What each learner loses with its controls, in a line each: an embedding that loses nothing is decorative."""
    lines = []
    names = labels([one.folder for one in evaluations])
    for place, cli in enumerate(clis):
        if cli.control is None:
            continue
        own = max(i for i in range(place) if clis[i].control is None)
        assert cli.datamodule is not None
        name = KINDS[cli.datamodule.kind].headline
        declared = evaluations[own].declared[name]
        loss, half, matters = loss_by(evaluations[place], evaluations[own], name)
        what = "matters" if matters else "is decorative: it loses nothing"
        text = declared.text(loss if declared.better == "higher" else -loss, half, signed=True)
        lines.append(f"{names[own]}: own - {cli.control} {text} of {name}; the task embedding {what}")
    return lines


def main(args: Sequence[str] | None = None) -> None:
    """``python -m app.evaluate``."""
    args = sys.argv[1:] if args is None else list(args)
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    quiet_lightning()
    what = "Evaluate a checkpoint, which is all that is needed, on meta-test tasks; compare several on the same ones."
    parser = Options(EvaluationCLI.prog, what, several=True)
    parser.add_argument("--ways", type=int, help="Classes per task.")
    parser.add_argument("--shots", type=int, help="Support examples per class.")
    parser.add_argument("--queries", type=int, help="Queries per class.")
    parser.add_argument("--episodes", type=int, help="Episodes of a trial in an environment.")
    parser.add_argument("--tasks", type=int, help="Number of meta-test tasks.")
    parser.add_argument(
        "--controls",
        action="store_true",
        help="Evaluate a learner with task embeddings also with other tasks' and with a constant one, and compare.",
    )
    parser.add_argument("--seed", type=int, help="Seed of the tasks; which classes are tested on stays the same.")
    options, keys = parser.split(args)
    words = [w for o in ("seed", "data", *SHORT) if (v := getattr(options, o)) is not None for w in (o, str(v))] + keys
    command = shlex.join([*EvaluationCLI.prog.split(), *args])
    with one_line_errors(options.debug):
        if len(options.ckpt_path) > 1 or options.controls:
            compare(options, keys, words, command)
        else:
            evaluate(EvaluationCLI(open_checkpoint(Path(options.ckpt_path[0])), options, keys, words), command)


if __name__ == "__main__":
    main()
