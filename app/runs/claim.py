"""Whose a run directory is: one start of a run has it for itself, however many start at once."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "claim.json"
VARIABLE = "METABOLT_START"  # the token, for the processes that a run starts
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
        together = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1
        names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID")
        known = [os.environ[name] for name in names if together and name in os.environ]
        token = os.environ.get(VARIABLE) or "-".join(known) or secrets.token_hex(8)
        return cls(token, socket.gethostname(), os.getpid(), _born(os.getpid()))

    @property
    def alive(self) -> bool:
        """Whether its process runs; of another machine that is not known, and taken to be so."""
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return not self.born or _born(self.pid) == self.born


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

    Raises:
        OSError: it cannot be made, or written to.
    """
    own = Start.own()
    folder.mkdir(parents=True, exist_ok=True)
    for _ in range(100):  # each turn somebody else was quicker
        try:
            # Whole from the beginning: whoever sees it can read it.
            part = folder / f".{FILE}.{own.pid}.{secrets.token_hex(4)}"
            part.write_text(json.dumps(asdict(own)))
            try:
                os.link(part, folder / FILE)
            finally:
                part.unlink()
            _mine.add(folder)
            return True
        except FileExistsError:
            other = holder(folder)
            if other is not None and other.token == own.token:
                return True
            if other is not None and other.alive:
                return False
            # Left behind by a start that ended; only one of those who want it moves it away.
            stale = folder / f".{FILE}.stale.{secrets.token_hex(4)}"
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder / FILE, stale)
                stale.unlink()
    return False


def release_unused() -> None:
    """Give back directories that this process claimed and left nothing in, of runs that could not be."""
    for folder in _mine:
        with contextlib.suppress(OSError):
            if [path.name for path in folder.iterdir()] == [FILE]:
                (folder / FILE).unlink()
                folder.rmdir()
    _mine.clear()


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
