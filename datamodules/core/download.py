"""Files from the network: resumed after an interruption, verified before they get their name."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

try:
    import fcntl
except ImportError:  # Windows: two processes that download the same file at once may both have to start again
    fcntl = None

TIMEOUT_S = 30.0
ATTEMPTS = 3  # of one mirror, in a row, that bring nothing new
BLOCK = 1 << 16


class DownloadError(Exception):
    """No mirror gave the file; the message is one line that says why, mirror by mirror."""


def user_cache() -> Path:
    """Metabolt's folder in the user's cache: that of the platform, or of XDG_CACHE_HOME."""
    if home := os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA"):
        return Path(home) / "metabolt"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "metabolt"


def writable_folder(folder: Path) -> Path:
    """``folder``, made where it is missing, if it can be written; the user's cache otherwise."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # permission bits do not tell: read-only mounts, network drives
            return folder
    except OSError:
        return user_cache()


def download(urls: Sequence[str], path: Path, md5: str) -> Path:
    """Fetches ``path`` from the first of ``urls`` that gives a file of this checksum.

    What has arrived is kept in ``path``.part and resumed, by the next mirror or the next run. Processes that want the
    same file wait for the one that fetches it.

    Returns:
        ``path``, complete and verified.

    Raises:
        DownloadError: no mirror gave it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, lock = path.with_name(path.name + ".part"), path.with_name(path.name + ".lock")
    for place in (path, part, lock):
        if _irregular(place):  # a pipe would be waited at for ever
            raise DownloadError(f"cannot download {path.name}: {place} is no regular file")
    reasons = []
    with _alone(lock):
        if path.exists():  # fetched while this process waited
            return path
        for url in urls:
            if not (reason := _fetch(url, part, md5)):
                os.replace(part, path)
                return path
            reasons.append(f"{url}: {reason}")
    raise DownloadError(f"cannot download {path.name}: " + ("; ".join(reasons) or "no mirrors are given"))


def _fetch(url: str, part: Path, md5: str) -> str:
    """Completes ``part`` from one mirror; returns what went wrong, or nothing."""
    begun = _size(part) > 0
    failures = 0
    while failures < ATTEMPTS:
        before = _size(part)
        try:
            reason = _transfer(url, part)
        except urllib.error.HTTPError as error:
            return f"HTTP {error.code} {error.reason}"
        except urllib.error.URLError as error:  # no connection; another try would only wait for it again
            return str(error.reason)
        except (HTTPException, OSError) as error:
            reason = str(error) or type(error).__name__
        if reason:
            failures = 0 if _size(part) > before else failures + 1
            continue
        if _md5(part) == md5:
            return ""
        part.unlink()
        if not begun:
            return f"wrong checksum, not {md5}; removed {part}"
        begun = False  # the bytes of an earlier run may be the wrong ones: once more, from the start
    return reason


def _transfer(url: str, part: Path) -> str:
    """One request for what ``part`` lacks; returns what went wrong, or nothing."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if have and error.code == 416:  # nothing comes after what is there: the checksum tells whether that is all
            return ""
        raise
    with response:
        if response.status != 206:  # a server without ranges sends the whole file
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with open(part, "ab" if have else "wb") as file, _progress() as bar:
            shown = bar.add_task(part.stem, total=total, completed=have)
            while block := response.read(BLOCK):
                file.write(block)
                bar.advance(shown, len(block))
    # A connection that the server closes early looks like the end of the file.
    return f"the transfer stopped after {_size(part)} of {total} bytes" if total and _size(part) < total else ""


def _irregular(place: Path) -> bool:
    try:
        return not stat.S_ISREG(place.stat().st_mode)
    except OSError:  # not there; another process may have removed it just now
        return False


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Keeps other processes out until the end of the block; the kernel lets go when a process dies."""
    if fcntl is None:
        yield
        return
    while True:
        with open(lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Who held the lock removed the file at the end; another process may have made a new one since.
            try:
                current = os.path.samestat(os.fstat(file.fileno()), lock.stat())
            except FileNotFoundError:
                continue
            if current:
                try:
                    yield
                finally:
                    lock.unlink()
                return
