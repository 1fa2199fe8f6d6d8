"""A queue of long trainings, one after another, with what stands and what is left: ``python -m benchmarks.campaign``.

``benchmarks/campaign.yaml`` lists configurations in their order. Each is trained to its end at the lowest priority,
what was begun goes on from its last checkpoint, and what is done is skipped. Every result is a file of
``docs/results/``, made of what the run itself left. Stop it at any moment, by Ctrl-C, SIGTERM or a kill: started
again, it ends with the same results. While a file ``measuring`` is in the folder of the runs, nothing is trained.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from app.cli.base_configs import whole
from datamodules.core.errors import ConfigError
from datamodules.core.files import write_atomically
from models.core.checkpoint_io import CHECKPOINTS, load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
MEASURING = "measuring"
POLL_SECONDS, TOLD_SECONDS = 0.5, 300.0
STOP_SECONDS = 120.0  # waited for a training to finish its step and save
PR_SET_PDEATHSIG = 1  # prctl.h
OMNIGLOT = "datamodules.Omniglot"  # somewhere in the data of an entry


@dataclass(frozen=True)
class Entry:
    """A training of the queue.

    Attributes:
        config: below ``configs/``, without its suffix.
        flags: of train.py, over the configuration.
        published: what the paper has, as it is written there.
        note: what makes the result another than the published one's.
        label: what the learner is called with these settings; None for its class.
        metric: that ``published`` is of, which the result and the curve show; None for the headline metric.
    """

    config: str
    flags: tuple[str, ...] = ()
    published: str | None = None
    note: str = ""
    label: str | None = None
    metric: str | None = None

    @property
    def file(self) -> Path:
        return ROOT / "configs" / f"{self.config}.yaml"

    @property
    def settings(self) -> dict[str, Any]:
        return whole(self.file)

    def flag(self, name: str) -> str | None:
        """What a flag says, the last one where there are several."""
        return dict(zip(self.flags, self.flags[1:], strict=False)).get(name)

    @property
    def name(self) -> str:
        return self.flag("--name") or str(self.settings["name"])

    @property
    def steps(self) -> int:
        """Meta-updates of the whole training; 0 for what is tested as it is."""
        if self.settings.get("stage") == "test":
            return 0
        return int(self.flag("--trainer.max_steps") or self.settings["trainer"]["max_steps"])


@dataclass
class Queue:
    """Trainings, and where they and their results are.

    Attributes:
        entries: in their order.
        runs: folder of their runs.
        results: folder of their results, one file each.
        root: folder of Omniglot's archives; None for the configurations' own.
        threads: that a training computes with.
    """

    entries: list[Entry]
    runs: Path
    results: Path
    root: Path | None = None
    threads: int = 1

    def run_dir(self, entry: Entry) -> Path:
        return self.runs / entry.name

    def row(self, entry: Entry) -> Path:
        return self.results / f"{entry.name}.json"

    def reached(self, entry: Entry) -> int:
        """Meta-updates that its last checkpoint has."""
        file = self.run_dir(entry) / CHECKPOINTS / "last.ckpt"
        try:
            return int(load_checkpoint(file)["global_step"]) if file.is_file() else 0
        except (ConfigError, KeyError):
            return 0  # damaged: train.py says so

    def done(self, entry: Entry) -> bool:
        """Whether its result stands, of the whole training."""
        try:
            row = json.loads(self.row(entry).read_text())
        except (OSError, ValueError):
            return False
        return row["meta_updates"] >= entry.steps and row["flags"] == list(entry.flags)

    def command(self, entry: Entry) -> list[str]:
        """Arguments of the interpreter."""
        own = ["--runs", str(self.runs), "--wandb", "off", "--trainer.accelerator", "cpu"]
        own += ["--ckpt_path", "last"] if entry.steps else []
        if self.root is not None and OMNIGLOT in json.dumps(entry.settings["data"]):
            own += ["--data.init_args.root", str(self.root)]
        return ["train.py", "--config", str(entry.file.relative_to(ROOT)), *entry.flags, *own]

    def keep(self, entry: Entry) -> bool:
        """Make a result out of what the run left; whether it is that of the whole training."""
        try:
            content = json.loads((self.run_dir(entry) / "results.json").read_text())
        except (OSError, ValueError):
            return False
        if content["meta_steps"] < entry.steps and self.reached(entry) < entry.steps:
            return False
        shown = entry.metric or next(iter(content["metrics"]))
        row = {
            "name": entry.name,
            "configuration": f"configs/{entry.config}.yaml",
            "flags": list(entry.flags),
            "command": shlex.join(["python", "train.py", "--config", f"configs/{entry.config}.yaml", *entry.flags]),
            "published": entry.published,
            "note": entry.note,
            "label": entry.label,
            "meta_updates": entry.steps,
            "selected_at": content["meta_steps"],
            **{k: content.get(k) for k in ("algorithm", "data", "ways", "shots", "queries", "episodes")},
            **{k: content.get(k) for k in ("tasks", "seed", "transductive", "batch_norm")},
            "metrics": {shown: content["metrics"][shown], **content["metrics"]},
            **{k: content.get(k) for k in ("training", "device", "processor", "versions", "finished")},
            "curve": curve(self.run_dir(entry) / "metrics.csv", shown),
        }
        write_atomically(self.row(entry), json.dumps(row, indent=2) + "\n")
        return True


def curve(path: Path, metric: str) -> dict[str, Any] | None:
    """A metric of meta-validation along a training, by meta-updates: its means and half-widths; None: there is none."""
    try:
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get(f"val/{metric}")]
    except OSError:
        return None
    points = [[int(r["step"]) + 1, float(r[f"val/{metric}"]), float(r[f"val/{metric}_ci95"])] for r in rows]
    return {"metric": metric, "points": points} if points else None


def load(path: Path) -> list[Entry]:
    """The entries of a list.

    Raises:
        ConfigError: it cannot be read, or names a configuration that is not there, or one twice.
    """
    try:
        listed = yaml.safe_load(path.read_text())
        entries = [Entry(**{**e, "flags": tuple(map(str, e.get("flags", ())))}) for e in listed]
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no list of trainings ({' '.join(str(error).split())}): correct it") from error
    for entry in entries:
        if not entry.file.is_file():
            raise ConfigError(f"{path} names {entry.config}, but there is no {entry.file}: correct it")
    names = [entry.name for entry in entries]
    if twice := next((n for i, n in enumerate(names) if n in names[:i]), None):
        raise ConfigError(f"{path} has two trainings named {twice}, which would share a folder: give each once")
    return entries


def show(queue: Queue, console: Console) -> None:
    """What stands and what is left."""
    table = Table(title=f"{sum(map(queue.done, queue.entries))} of {len(queue.entries)} done", title_justify="left")
    for column in ("training", "meta-updates", "result", "published"):
        table.add_column(column, justify="left" if column == "training" else "right", overflow="fold")
    for entry in queue.entries:
        result = ""
        if queue.done(entry):
            row = json.loads(queue.row(entry).read_text())
            name, value = next(iter(row["metrics"].items()))
            result = f"{name} {value['mean']:.4f} ± {value['ci95'] or float('nan'):.4f}"
        reached = entry.steps if result else queue.reached(entry)
        table.add_row(entry.name, f"{reached:,} / {entry.steps:,}", result, entry.published or "")
    console.print(table)


class Stopped(Exception):
    """The queue was told to stop."""


class Runner:
    """Runs the trainings of a queue one at a time; SIGTERM and Ctrl-C let the one that runs save and end.

    Args:
        queue: of trainings.
        console: where progress is told.
    """

    def __init__(self, queue: Queue, console: Console) -> None:
        self.queue, self.console = queue, console
        self.stop = False

    def __call__(self) -> list[Entry]:
        """Those that failed.

        Raises:
            Stopped: by a signal.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "stop", True))
        failed = []
        for entry in self.queue.entries:
            if self.queue.done(entry) or self.queue.keep(entry):
                continue
            if not self.train(entry):
                failed.append(entry)
        return failed

    def train(self, entry: Entry) -> bool:
        """Train and test one to its end, with pauses where something is measured; whether its result stands."""
        while True:
            self.wait_while_measuring()
            self.console.print(f"{entry.name}: going on from {self.queue.reached(entry):,} of {entry.steps:,}")
            code = self.run(entry)
            if code == 0 and self.queue.keep(entry):
                self.console.print(f"{entry.name}: done, {self.queue.row(entry)}")
                return True
            if self.stop:
                raise Stopped
            if code != 128 + signal.SIGTERM:  # it was not stopped to wait
                self.console.print(
                    f"{entry.name}: failed with code {code}, see {self.log(entry)}; going on with the next"
                )
                return False

    def log(self, entry: Entry) -> Path:
        return self.queue.runs / f"{entry.name}.log"

    def run(self, entry: Entry) -> int:
        """The exit code of train.py, which is told to stop where the queue is, or something is measured."""
        self.queue.runs.mkdir(parents=True, exist_ok=True)
        threads = str(self.queue.threads)
        env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        with open(self.log(entry), "a") as log:
            process = subprocess.Popen(
                [sys.executable, *self.queue.command(entry)],
                cwd=ROOT, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, preexec_fn=at_lowest_priority,
            )  # fmt: skip
            told, asked = time.monotonic(), 0.0
            while process.poll() is None:
                now = time.monotonic()
                if not asked and (self.stop or self.measuring.exists()):
                    process.terminate()
                    asked = now
                elif asked and now - asked > STOP_SECONDS:
                    process.kill()  # what was saved before is whole
                if now - told > TOLD_SECONDS:
                    told = now
                    self.console.print(f"{entry.name}: {last_line(self.log(entry))}")
                time.sleep(POLL_SECONDS)
        return 128 + signal.SIGTERM if asked and process.returncode != 0 else process.returncode

    @property
    def measuring(self) -> Path:
        return self.queue.runs / MEASURING

    def wait_while_measuring(self) -> None:
        if self.measuring.exists():
            self.console.print(f"waiting until {self.measuring} is gone")
        while self.measuring.exists() and not self.stop:
            time.sleep(POLL_SECONDS)
        if self.stop:
            raise Stopped


def at_lowest_priority() -> None:
    """In the training's process: yield to everything else, and end with the queue, however that ends."""
    os.nice(19)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def last_line(path: Path) -> str:
    """Of a log."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 2000))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def main(args: list[str] | None = None) -> int:
    """``python -m benchmarks.campaign``."""
    parser = argparse.ArgumentParser("python -m benchmarks.campaign", description=__doc__, allow_abbrev=False)
    parser.add_argument("--list", type=Path, default=ROOT / "benchmarks" / "campaign.yaml", help="the trainings")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "campaign", help="folder of the runs")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results", help="folder of the results")
    parser.add_argument("--root", type=Path, help="folder of Omniglot's archives")
    parser.add_argument("--threads", type=int, default=1, help="that a training computes with")
    parser.add_argument("--status", action="store_true", help="print what stands and what is left, and train nothing")
    options = parser.parse_args(args)
    console = Console()
    try:
        runs, results = options.runs.resolve(), options.results.resolve()
        root = None if options.root is None else options.root.resolve()
        queue = Queue(load(options.list), runs, results, root, options.threads)
        show(queue, console)
        if options.status:
            return 0
        runs.mkdir(parents=True, exist_ok=True)
        with open(runs / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(f"another queue trains in {runs}: wait for it, or give another --runs") from error
            failed = Runner(queue, console)()
        show(queue, console)
        return 1 if failed else 0
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except Stopped:
        console.print("stopped; what was trained is saved: start again to go on")
        return 128 + signal.SIGTERM


if __name__ == "__main__":
    sys.exit(main())
