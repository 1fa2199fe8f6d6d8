"""A task memory on disk: records in memory-mapped arrays of fixed size, whole or not there whenever a process ends."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.core.errors import ConfigError
from models.continual.records import BLOCK, By, Entries, chosen, count, nearest_of

FILE = "memory/records.bin"  # in a run's folder
Search = Literal["exact", "faiss"]
_HEAD = 4096  # bytes before the arrays: what they are, as text
_MAGIC = "metabolt task memory 1"


class Filed(NamedTuple):
    """What of a memory on disk is in the state of the stream, and so in its checkpoints.

    Attributes:
        sequence: records written so far, () int64: what the file has beyond them is not seen.
        used: how often each place's record was retrieved, (M,) int64.
        met: examples of each class so far, (classes,) int64.
    """

    sequence: Tensor
    used: Tensor
    met: Tensor


class MemoryFile:
    """M places for records, of 2 M records' bytes, all of which the file takes from the beginning.

    Each place has two versions of its record, each with its sequence number and a checksum of all its bytes; there is
    no journal. The record of a place is that version with the greatest number, up to the number that is gone on from,
    whose checksum is right. What the last checkpoint counts on is never overwritten: a record goes to the place's other
    version, or over one that is newer than that checkpoint. So a process may be killed at any moment, also within a
    record: who goes on from the checkpoint sees what was there when it was written. A checkpoint before the last one
    may count on what is gone, which a checksum over all records tells.

    Args:
        path: of the file; None is one that no other process finds.
        size: M.
        features, embedding: numbers of a record's feature and of its task embedding.
        dtype: of both, float32 or float64.
        search: "exact" goes through all keys, "faiss" asks ``faiss.IndexFlatL2``, whose sums are rounded otherwise.
        writes: whether records are written; otherwise the file is there and stays as it is.

    Raises:
        ConfigError: no room for it, or it cannot be written or read; faiss is not installed.
    """

    def __init__(
        self,
        path: Path | None,
        size: int,
        features: int,
        embedding: int,
        dtype: torch.dtype = torch.float32,
        search: Search = "exact",
        writes: bool = True,
    ) -> None:
        self.path, self.size, self._writes = path, size, writes
        kind = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
        self.shape = {"places": size, "features": features, "embedding": embedding, "type": str(kind)}
        columns = {
            **{name: (np.dtype(np.int64), ()) for name in ("sequence", "checksum", "y", "experience", "order")},
            **{"loss": (np.dtype(np.float64), ()), "x": (kind, (features,)), "task": (kind, (embedding,))},
        }
        self._bytes = _HEAD + sum(2 * size * k.itemsize * int(np.prod(s)) for k, s in columns.values())
        self._faiss = faiss_of(search)
        self._index: dict[By, Any] = {}
        self._open(path)
        self._columns, place = {}, _HEAD
        for name, (of, shape) in columns.items():
            whole = (2 * size, *shape)  # version by version
            self._columns[name] = np.ndarray(whole, of, self._map, place)
            place += self._columns[name].nbytes

    def clear(self) -> None:
        """Begin with nothing, whatever the file has."""
        self._see(0)
        self._wipe()

    def _wipe(self) -> None:
        """Have nothing in the file that is not seen, whose number one that is written later may have, too."""
        self._columns["sequence"][:] = self._numbers

    def _open(self, path: Path | None) -> None:
        try:
            if path is not None and not self._writes:
                self._file: Any = open(path, "rb")  # noqa: SIM115
                self._map = np.memmap(self._file, np.uint8, "c", shape=(self._bytes,))  # what is changed is not written
                return
            if path is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)  # noqa: SIM115
            # All of its bytes now: on a full disk a map ends the process without a word.
            allocate(self._file.fileno(), self._bytes)
            self._file.seek(0)
            self._file.write(json.dumps({"file": _MAGIC, **self.shape}).encode().ljust(_HEAD))
            self._map = np.memmap(self._file, np.uint8, "r+", shape=(self._bytes,))
        except (OSError, ValueError) as error:  # a map of what is shorter
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            cure = "free some space, or lower keep" if full else "check the folder"
            why = error.strerror if isinstance(error, OSError) else "it has another size"
            where = path or tempfile.gettempdir()
            raise ConfigError(f"could not open the task memory {where} ({why}): {cure}") from error

    def close(self) -> None:
        self._columns, self._index = {}, {}
        del self._map
        self._file.close()

    # What is seen ---------------------------------------------------------------------------------------------------

    def _see(self, sequence: int) -> None:
        """Find each place's record as it was after so many were written. The file stays as it is."""
        numbers = self._columns["sequence"].copy()
        numbers[numbers > sequence] = 0
        for row in np.flatnonzero(numbers).tolist():
            if self._sum(row) != self._columns["checksum"][row]:
                numbers[row] = 0
        self._numbers = numbers  # of what is whole
        numbers = numbers.reshape(2, self.size)
        version = numbers.argmax(0)
        self._row = version * self.size + np.arange(self.size)  # of each place's record
        self.held = torch.from_numpy(numbers.max(0, initial=0) > 0)
        kept = {n: np.where(self.held, self._columns[n][self._row], 0) for n in ("experience", "order", "loss")}
        self.experience, self.order, self.loss = (torch.from_numpy(kept[n]) for n in ("experience", "order", "loss"))
        self._index = {}
        self.sequence = self.committed = self._pending = sequence

    def _sum(self, row: int) -> int:
        """The checksum of a version of a record."""
        total = 0
        for name, column in self._columns.items():
            if name != "checksum":
                total = zlib.crc32(column[row].tobytes(), total)
        return total

    def digest(self) -> int:
        """A checksum of all records and of where they are."""
        sums = np.where(self.held.numpy(), self._columns["checksum"][self._row], -1)
        return zlib.crc32(sums.tobytes())

    def write(self, place: Tensor, entries: Entries, first: int) -> None:
        """Put entries (N,) at places (N,), one after another, -1 for none; ``first`` is the order of the first."""
        self.committed = self._pending  # whoever writes again has written the checkpoint
        column = self._columns
        x, task = (t.detach().cpu().numpy() for t in (entries.x, entries.task))
        for k, p in enumerate(place.tolist()):
            if p < 0:
                continue
            self.sequence += 1
            row = int(self._row[p])
            if self.held[p] and column["sequence"][row] <= self.committed:
                row = (row + self.size) % (2 * self.size)  # the other version
            column["sequence"][row] = 0  # until it is whole
            column["x"][row], column["task"][row], column["y"][row] = x[k], task, int(entries.y[k])
            column["experience"][row], column["order"][row] = int(entries.experience), first + k
            column["loss"][row] = float(entries.loss[k])
            column["sequence"][row] = self.sequence
            column["checksum"][row] = self._sum(row)
            self._row[p], self.held[p] = row, True
            self.experience[p], self.order[p] = int(entries.experience), first + k
            self.loss[p] = float(entries.loss[k])
            for by, index in self._index.items():
                ids = np.array([p])
                index.remove_ids(ids)
                index.add_with_ids(self._keys(by)[row : row + 1].astype(np.float32), ids)

    def rows(self, place: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Features (R, features) and labels (R,) at places (R,), as ``like``; 0 where nothing is."""
        row, there = self._row[place.cpu().numpy()], self.held[place.cpu()]
        x = torch.from_numpy(self._columns["x"][row]).where(there[:, None], 0)
        return x.to(like), torch.from_numpy(self._columns["y"][row]).where(there, 0).to(like.device)

    def _keys(self, by: By) -> np.ndarray:
        return self._columns["x" if by == "feature" else "task"]

    def distances(self, to: Tensor, by: By) -> Tensor:
        """Of each place's key the least squared distance to any of (K, d), (M,)."""
        blocks = np.split(self._row, range(BLOCK, self.size, BLOCK))
        return torch.cat([nearest_of(torch.from_numpy(self._keys(by)[rows]).to(to), to) for rows in blocks])

    def nearest(self, to: Tensor, by: By, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """See ``records.Store.nearest``."""
        held = self.held.to(to.device)
        if self._faiss is None:
            distance = self.distances(to, by)
            place, there = chosen(distance, held, number)
            return place, there, distance[place]
        if by not in self._index:
            self._index[by] = self._faiss.IndexIDMap2(self._faiss.IndexFlatL2(self._keys(by).shape[1]))
            some = np.flatnonzero(self.held.numpy())
            self._index[by].add_with_ids(self._keys(by)[self._row[some]].astype(np.float32), some)
        distance, place = self._index[by].search(to.detach().cpu().numpy().astype(np.float32), number)
        best: dict[int, float] = {}
        for p, d in zip(place.ravel().tolist(), distance.ravel().tolist(), strict=True):
            best[p] = min(d, best.get(p, d))
        best.pop(-1, None)
        ordered = sorted(sorted(best, key=lambda p: best[p])[:number])
        none = [p for p in range(self.size) if p not in best][: min(number, self.size) - len(ordered)]
        found = torch.tensor([*ordered, *none])
        there = torch.arange(len(found)) < len(ordered)
        far = torch.tensor([*(best[p] for p in ordered), *[torch.inf] * len(none)])
        return found.to(to.device), there.to(to.device), far.to(to)

    # What a checkpoint keeps ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint counts on from here on; the disk has it.

        Raises:
            ConfigError: the disk does not take it.
        """
        try:
            if self._writes:
                self._map.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            raise ConfigError(
                f"could not write the task memory {self.path} ({error.strerror}): check the disk"
            ) from error
        self._pending = self.sequence
        return {"sequence": self.sequence, "digest": self.digest(), "shape": self.shape}

    def load(self, state: dict[str, Any], source: Path | None) -> None:
        """Go on from a checkpoint's state, and from this file or a copy of another run's.

        Raises:
            ConfigError: that does not hold those records.
        """
        where = source or self.path
        if state["shape"] != self.shape:
            raise ConfigError(
                f"the checkpoint's task memory is of {state['shape']}, the run's of {self.shape}: leave keep, backbone "
                "and precision as they were, or start a new run"
            )
        if source is not None and source != self.path:
            try:
                content = np.memmap(source, np.uint8, "r")
            except (OSError, ValueError):
                content = np.zeros(0, np.uint8)
            if content.size == self._bytes:
                self._map[_HEAD:] = content[_HEAD:]
        self._see(state["sequence"])
        if self.digest() != state["digest"]:
            raise ConfigError(
                f"{where} is not the task memory of the checkpoint, which is to be the run's last one: bring back the "
                "file that was beside it, or start a new run"
            )
        self._wipe()


class FileStore:
    """A memory on disk together with what of it is in the state, see ``records.Store``.

    Args:
        file: the records.
        used, met: see Filed.
        like: a tensor of the device and precision that is computed in.
    """

    def __init__(self, file: MemoryFile, used: Tensor, met: Tensor, like: Tensor) -> None:
        self.file, self.used, self.met, self.like = file, used, met, like
        device = like.device
        self.experience, self.order = file.experience.to(device, copy=True), file.order.to(device, copy=True)
        self.loss, self.held = file.loss.to(like), file.held.to(device, copy=True)

    @property
    def kept(self) -> Filed:
        return Filed(torch.tensor(self.file.sequence, device=self.used.device), self.used, self.met)

    def nearest(self, to: Tensor, by: By, number: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.file.nearest(to, by, number)

    def at(self, place: Tensor) -> tuple[Tensor, Tensor]:
        return self.file.rows(place, self.like)

    def counted(self, place: Tensor, there: Tensor) -> FileStore:
        return FileStore(self.file, count(self.used, place, there), self.met, self.like)

    def put(self, place: Tensor, entries: Entries, met: Tensor) -> FileStore:
        self.file.write(place, entries, int(self.met.sum()))
        used = self.used.clone()
        used[place[place >= 0]] = 0
        return FileStore(self.file, used, met, self.like)


def allocate(file: int, size: int) -> None:
    """Give a file so many bytes of the disk, if it has not got them: zeros where there was nothing."""
    if os.fstat(file).st_size == size:
        return
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    os.ftruncate(file, size)


def faiss_of(search: Search) -> Any:
    """The module that searches; None for the exact search.

    Raises:
        ConfigError: it is not installed.
    """
    if search == "exact":
        return None
    try:
        import faiss  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError("search is faiss, which is not installed: pip install faiss-cpu, or give exact") from None
    return faiss
