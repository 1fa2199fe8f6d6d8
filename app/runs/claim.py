"""Whose a run directory is: one start of a run has it for itself, however many start at once."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from datamodules.core.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FILE = "claim.json"
VARIABLE = "METABOLT_START"  # the token, for the processes that a run starts
SILENCE = 120.0  # seconds without a sign of life, after which a start on another machine counts as ended
_mine: set[Path] = set()


@dataclass(frozen=True)
class Start:
    """A start of a run, by one process or by many that train together.

    Attributes:
        token: the same in all of its processes, and of no other start.
        host, pid: of the process that wrote it.
        born: when that process began, as the system counts; 0 where it does not tell.
    """

    token: str
    host: str
    pid: int
    born: int

    @classmethod
    @functools.cache
    def own(cls) -> Start:
        """This process's; those that Lightning, torchrun or SLURM start together share the token."""
        return cls(_token(os.environ), socket.gethostname(), os.getpid(), _born(os.getpid()))

    @property
    def alive(self) -> bool:
        """Whether its process runs; asked on its own machine."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return not self.born or _born(self.pid) == self.born


def _token(env: Mapping[str, str]) -> str:
    """What the processes of one start have in common, and other starts of the same job do not.

    A job's number alone does not tell: a loop in one allocation of SLURM starts many runs, and two machines may each
    run a torchrun of their own with all defaults.
    """
    if VARIABLE in env:
        return env[VARIABLE]
    if "TORCHELASTIC_RUN_ID" in env and count(env, "WORLD_SIZE") > 1:
        if count(env, "GROUP_WORLD_SIZE") > 1:  # several machines meet at one address
            return "-".join([env["TORCHELASTIC_RUN_ID"], env.get("MASTER_ADDR", ""), env.get("MASTER_PORT", "")])
        return f"{socket.gethostname()}-{os.getppid()}-{_born(os.getppid())}"  # the torchrun that started them
    if count(env, "SLURM_STEP_NUM_TASKS") > 1 and "SLURM_STEP_ID" in env:  # of srun, not of the allocation
        return f"{env.get('SLURM_JOB_ID')}-{env['SLURM_STEP_ID']}"
    if "MASTER_ADDR" in env and ("NODE_RANK" in env or "GROUP_RANK" in env):  # started by hand, one on each machine
        return f"{env['MASTER_ADDR']}-{env.get('MASTER_PORT', '')}"
    return secrets.token_hex(8)


def count(env: Mapping[str, str], variable: str) -> int:
    """How many processes or machines a variable of the environment says that there are; 1 where it is not set.

    Raises:
        ConfigError: it is no number of them.
    """
    text = env.get(variable, "1")
    if not text.isdecimal():
        raise ConfigError(f"the environment has {variable}={text!r}, which is no number: correct or unset it")
    return int(text)


def _born(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    return 0


def holder(folder: Path) -> Start | None:
    """Who has a directory; None where nobody has, or what is written there cannot be read."""
    try:
        return Start(**json.loads((folder / FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def claim(folder: Path) -> bool:
    """Take a directory for this start, unless another that still runs has it; whether it is this start's now.

    On the machine of the other its process is asked for. On another machine it counts as running as long as its claim
    is renewed, so that a job that was moved elsewhere goes on after ``SILENCE`` seconds.

    Raises:
        OSError: it cannot be made, or written to.
    """
    own = Start.own()
    with _alone(folder):
        # Whole from the beginning: whoever sees it can read it.
        part = folder / f".{FILE}.{own.pid}.{secrets.token_hex(4)}"
        part.write_text(json.dumps(asdict(own)))
        now = part.stat().st_mtime  # by the clock of the disk, which the claim's age goes by too
        try:
            if (folder / FILE).exists():
                other = holder(folder)
                if other is not None and other.token == own.token:
                    return True
                if other is not None and (other.alive if other.host == own.host else not _silent(folder, now)):
                    return False
                (folder / FILE).unlink()  # left behind by a start that ended
            os.link(part, folder / FILE)
        except FileExistsError:  # where files cannot be locked, somebody else was quicker
            return False
        finally:
            part.unlink()
    _mine.add(folder)
    _renew()
    return True


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other start looks at the claim of a directory meanwhile; makes the directory."""
    path = folder / f".{FILE}.lock"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = open(path, "w")  # noqa: SIM115 (closed below, after the file is gone)
        except FileNotFoundError:  # somebody gave the directory back just now
            continue
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX)
            try:
                current = path.stat().st_ino == os.fstat(file.fileno()).st_ino
            except FileNotFoundError:
                current = False
            if not current:
                continue  # who had the lock took the file away: lock the new one
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            file.close()


def _silent(folder: Path, now: float) -> bool:
    with contextlib.suppress(OSError):
        return now - (folder / FILE).stat().st_mtime > SILENCE
    return False  # gone by now: look again


@functools.cache
def _renew() -> None:
    """From now on this process's claims are touched while it lives."""

    def beat() -> None:
        while True:
            time.sleep(SILENCE / 6)
            for folder in tuple(_mine):
                with contextlib.suppress(OSError):
                    os.utime(folder / FILE)

    threading.Thread(target=beat, daemon=True, name="claims").start()


def release() -> None:
    """Give back what this process claimed, and remove directories of runs that could not be, with nothing in them."""
    while _mine:
        folder = _mine.pop()
        with contextlib.suppress(OSError):
            if holder(folder) == Start.own():
                (folder / FILE).unlink()
            folder.rmdir()  # refused where there is anything in it


@contextlib.contextmanager
def shared_with_children() -> Iterator[None]:
    """Processes that are started inside belong to this start."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = Start.own().token
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
