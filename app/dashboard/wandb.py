"""Weights & Biases, on line or off."""

from __future__ import annotations

import json
import logging
import netrc
import os
import secrets
import shutil
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pytorch_lightning.loggers.logger import DummyExperiment, rank_zero_experiment
from pytorch_lightning.loggers.wandb import WandbLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from app.runs.guard import one_line
from datamodules.core.files import write_atomically

log = logging.getLogger(__name__)
Mode = Literal["auto", "online", "offline", "off"]
STATE = "wandb.json"
INIT_SECONDS, FINISH_SECONDS = 20.0, 120.0  # waited for the network before going on without it


class WandbRun(WandbLogger):
    """Lightning's logger, for a run that goes on: under the same id after a resume, off line where there is no network.

    Nothing is imported or written before Lightning asks for the run, by when all processes have joined. Whatever fails
    here is told in one line, and the training goes on with metrics.csv alone.

    Args:
        mode: "auto" is online with an API key and offline without one; "online", "offline".
        project, name: under which W&B shows the run.
        run_dir: holds ``wandb/`` and, in ``wandb.json``, the run's id.
        config: the complete configuration.
    """

    def __init__(self, mode: Mode, project: str, name: str, run_dir: Path, config: dict[str, Any]) -> None:
        super().__init__(name=name, project=project, save_dir=run_dir)
        self.mode: Mode = mode
        self.project, self.run_name, self.run_dir, self.config = project, name, run_dir, config
        self.url: str | None = None
        self.tasks_seen = 0.0
        self._first_step = 0
        self._broken = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None and not self._broken:
            try:
                self._start()
            except Exception as error:
                self._give_up(error)
        return DummyExperiment() if self._experiment is None else self._experiment

    def _start(self) -> None:
        import wandb

        mode = _mode(self.mode)
        if mode == "off":
            self._broken = True
            return
        state = self._read_state()
        self.tasks_seen, self._first_step = state.get("tasks_seen", 0.0), state.get("step", 0)
        name = state.get("id") or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        self._write_state(name)  # before the run, so that one that is killed at once is still found
        folder = self.run_dir / "wandb"
        before = set(folder.glob("*"))
        try:
            self._experiment = self._open(name, mode)
        except Exception as error:
            if mode == "offline":
                raise
            log.warning(
                "W&B cannot be reached, the run is kept offline in %s and can be synced later: %s",
                folder,
                one_line(error),
            )
            wandb.teardown()  # lets go of the run's id
            for attempt in set(folder.glob("run-*")) - before:
                shutil.rmtree(attempt, ignore_errors=True)  # nothing was logged to it
            self._experiment = self._open(name, "offline")
        self._experiment.define_metric("*", step_metric="tasks_seen")
        self.url = None if self._experiment.settings.mode != "online" else self._experiment.url

    def _open(self, name: str, mode: Literal["online", "offline"]) -> Any:
        import wandb

        wanted = {
            "silent": True,
            "console": "off",  # the progress bar is not for a log file
            "init_timeout": INIT_SECONDS,
            "finish_timeout": FINISH_SECONDS,
            "finish_timeout_raises": True,
        }
        known = type(wandb.Settings()).model_fields
        chosen = {k: v for k, v in wanted.items() if k in known and f"WANDB_{k.upper()}" not in os.environ}
        wandb.setup(wandb.Settings(silent=True))
        return wandb.init(
            project=self.project,
            name=self.run_name,
            id=name,
            resume="allow",
            dir=str(self.run_dir),
            mode=mode,
            config=self.config,
            allow_val_change=True,  # a resumed run may be given more steps
            reinit="create_new",
            settings=wandb.Settings(**chosen),
        )

    def _read_state(self) -> dict[str, Any]:
        try:
            return json.loads((self.run_dir / STATE).read_text())
        except (OSError, ValueError):
            return {}

    def _write_state(self, name: str) -> None:
        state = {"id": name, "step": self._first_step, "tasks_seen": self.tasks_seen}
        write_atomically(self.run_dir / STATE, json.dumps(state) + "\n")

    def _give_up(self, error: Exception) -> None:
        self._broken, self._experiment = True, None
        log.warning("W&B does not work, going on without it: %s", one_line(error))

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        pass  # the configuration is there from the start, and whole

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.write({k: v for k, v in metrics.items() if k != "epoch"}, step)  # the stream of tasks has no epochs

    @rank_zero_only
    def write(self, values: dict[str, Any], step: int | None = None) -> None:
        """Log values of any kind that W&B knows, beside the number of tasks seen.

        Steps never go back, also over resumes: W&B ignores what is logged to a step that it has passed.
        """
        run = self.experiment
        if self._experiment is None:
            return
        self.tasks_seen = float(values.get("tasks_seen", self.tasks_seen))
        try:
            run.log(
                values | {"tasks_seen": self.tasks_seen}, step=max(step or 0, run.step, self._first_step), commit=True
            )
        except Exception as error:
            self._give_up(error)

    @rank_zero_only
    def remember(self) -> None:
        """Keep how far the run is, for what is logged to it after a resume."""
        if self._experiment is not None:
            try:
                self._first_step = max(self._first_step, self._experiment.step)
                self._write_state(self._experiment.id)
            except OSError as error:
                log.warning("could not write %s: %s", self.run_dir / STATE, error.strerror)

    @rank_zero_only
    def close(self, exit_code: int = 0) -> None:
        """End the session; the run itself can be resumed."""
        if self._experiment is None:
            return
        self.remember()
        run, self._experiment = self._experiment, None
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            log.warning("W&B has not got everything, all of it is in %s: %s", self.run_dir / "wandb", one_line(error))

    def hints(self) -> list[str]:
        """How to look at the run: one line per way."""
        if self._broken:
            return []
        if self.url:
            return [f"W&B: {self.url}"]
        folder = self.run_dir / "wandb"
        return [f"look: wandb leet {folder}/latest-run", f"upload to W&B: wandb sync {folder}/offline-run-*"]


def wandb_logger(mode: Mode, project: str, name: str, run_dir: Path, config: dict[str, Any]) -> WandbRun | None:
    """The logger of a run, or None where W&B is off or not installed; arguments as ``WandbRun``."""
    if mode == "off":
        return None
    try:
        return WandbRun(mode, project, name, run_dir, config)
    except ModuleNotFoundError:
        if rank_zero_only.rank == 0:
            log.warning("wandb is not installed, going on with metrics.csv (--wandb off says so)")
        return None


def _mode(asked: Mode) -> Literal["online", "offline", "off"]:
    """What ``asked`` means here: by WANDB_MODE where it is set, else by whether there is an API key."""
    if asked == "offline":
        return "offline"
    environment = os.environ.get("WANDB_MODE", "")
    if asked == "auto" and environment in ("disabled", "offline", "dryrun"):
        return "off" if environment == "disabled" else "offline"
    if has_key():
        return "online"
    if asked == "online":
        log.warning("there is no W&B API key (wandb login, or WANDB_API_KEY): the run is kept offline")
    return "offline"


def has_key() -> bool:
    """Whether an API key for W&B is in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    hosts = {"api.wandb.ai", urlsplit(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url).hostname}
    for path in [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]:
        try:
            known = netrc.netrc(os.path.expanduser(path)).hosts if path else {}
        except (OSError, netrc.NetrcParseError):
            continue
        if hosts & set(known):
            return True
    return False
