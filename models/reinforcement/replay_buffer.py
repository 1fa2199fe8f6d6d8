"""Transitions that are learned from again: episodes, appended to a file that outlives the process."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.core.errors import ConfigError

_NEVER = torch.iinfo(torch.int64).max
FILE = "replay/episodes.bin"  # in a run's folder


class Replay:
    """Episodes of finitely many tasks, in the order in which they were added; each has the same room.

    Nothing is ever changed or dropped: a file that once held the first n episodes holds them for good. So a checkpoint
    needs no copy of them, only how many there were and their checksum, and whatever a killed run left beyond those is
    overwritten. Rows are read through a map of the file, but written as to any file: on a full disk a map ends the
    process without a word.

    Args:
        file: None keeps the episodes where no other process finds them.
        tasks: their number.
        horizon: transitions of an episode, at most.
        width: numbers of a transition.
        dtype: of them.
    """

    def __init__(self, file: Path | None, tasks: int, horizon: int, width: int, dtype: torch.dtype) -> None:
        self.path, self.tasks, self.horizon, self.width, self.dtype = file, tasks, horizon, width, dtype
        self._task: list[int] = []  # of every episode
        self._episodes = torch.zeros(tasks, 1, dtype=torch.int64)  # of every task, as many as ``_count`` has
        self._count = torch.zeros(tasks, dtype=torch.int64)
        self._ends = torch.zeros(tasks, 1, dtype=torch.int64)  # the transitions of a task up to each of its episodes
        self._length: list[int] = []  # of every episode
        self._context = torch.zeros(tasks, 2, dtype=torch.int64)  # of every task: first episode of it, and how many
        self._checksum = 0
        self._rows = torch.empty(0, width, dtype=dtype)
        try:
            if file is None:
                self._file: Any = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._refused(error) from error

    def __len__(self) -> int:
        return len(self._task)

    def close(self) -> None:
        self._rows = self._rows[:0].clone()
        self._file.close()

    def append(self, task: int, episodes: Tensor, context: int, lengths: Tensor | None = None) -> None:
        """Add episodes (E, horizon, width) of a task; the first ``context`` of them are its context from now on.

        What comes after ``lengths`` (E,) transitions of an episode, where it ended early, is never drawn.

        Raises:
            ConfigError: the disk is full, or the file cannot be written.
        """
        content = episodes.detach().to("cpu", self.dtype).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        self._write(len(self) * self._episode_bytes, content)
        self._checksum = zlib.crc32(content, self._checksum)
        self._context[task] = torch.tensor([len(self), context])
        self._add([task] * len(episodes), [self.horizon] * len(episodes) if lengths is None else lengths.tolist())

    def rows(self, task: Tensor, draws: Tensor) -> Tensor:
        """Transitions of tasks (T,), (T, n, width), each at random: by uniform numbers (T, n) in [0, 1)."""
        ends = self._ends[task]
        step = _integers(draws, ends.gather(1, self._count[task, None] - 1))
        place, within = _find(ends, step)
        return self._at(self._episodes[task[:, None], place] * self.horizon + within)

    def context(self, task: Tensor, draws: Tensor) -> Tensor:
        """The same of each task's context."""
        first, episodes = self._context[task].unbind(1)
        # The newest episodes of a task follow one another; of a task with fewer the last one stands for more.
        places = first[:, None] + torch.arange(int(episodes.max())).clamp(max=episodes[:, None] - 1)
        lengths = torch.tensor(self._length)[places] * (torch.arange(places.shape[1]) < episodes[:, None])
        ends = lengths.cumsum(1)
        place, within = _find(ends, _integers(draws, ends[:, -1:]))
        return self._at((first[:, None] + place) * self.horizon + within)

    def sync(self) -> None:
        """Have the disk hold what a checkpoint counts on.

        Raises:
            ConfigError: it cannot.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from error

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "task": torch.tensor(self._task, dtype=torch.int32),
            "length": torch.tensor(self._length, dtype=torch.int32),
            "context": self._context.clone(),
            "checksum": self._checksum,
            "shape": [self.tasks, self.horizon, self.width, str(self.dtype)],
        }

    def load(self, state: dict[str, Any], source: Path) -> None:
        """Go on from a checkpoint's state and the file that was beside it, be it this one or of another run.

        Raises:
            ConfigError: the file is not there, does not hold those episodes, or they are of other tasks.
        """
        shape = [self.tasks, self.horizon, self.width, str(self.dtype)]
        if state["shape"] != shape:
            raise ConfigError(
                f"the checkpoint's replay buffer is of [tasks, horizon, numbers, type] {state['shape']}, the run's of "
                f"{shape}: leave data and precision as they were, or start a new run"
            )
        size = len(state["task"]) * self._episode_bytes
        why, checksum, done = "", 0, 0
        try:
            with open(source, "rb") as file:
                while done < size and (part := file.read(min(2**24, size - done))):
                    checksum = zlib.crc32(part, checksum)
                    if source != self.path:
                        self._write(done, part)
                    done += len(part)
            if done < size:
                why = f"it ends after {done} of {size} bytes" if done else "there is none"
            elif checksum != state["checksum"]:
                why = "its checksum is another"
        except OSError as error:
            why = str(error.strerror)
        if why:
            raise ConfigError(
                f"{source} is not the replay buffer of the checkpoint ({why}): bring back the file that was beside it, "
                "or start a new run"
            )
        self._task, self._length, self._count = [], [], torch.zeros_like(self._count)
        self._checksum, self._context = checksum, state["context"].clone()
        self._add(state["task"].tolist(), state["length"].tolist())

    @property
    def _episode_bytes(self) -> int:
        return self.horizon * self.width * self.dtype.itemsize

    def _write(self, place: int, content: bytes) -> None:
        left = memoryview(content)
        try:
            self._file.seek(place)
            while left:  # what is almost full takes less than it is given
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._refused(error) from error

    def _add(self, tasks: list[int], lengths: list[int]) -> None:
        for t, length in zip(tasks, lengths, strict=True):
            count = int(self._count[t])
            if count == self._episodes.shape[1]:
                self._episodes = torch.cat([self._episodes, torch.zeros_like(self._episodes)], 1)
                self._ends = torch.cat([self._ends, torch.full_like(self._ends, _NEVER)], 1)
            self._episodes[t, count] = len(self._task)
            self._ends[t, count] = length + (self._ends[t, count - 1] if count else 0)
            self._ends[t, count + 1 :] = _NEVER
            self._count[t] += 1
            self._task.append(t)
            self._length.append(length)
        if self._task:
            # Copied on write: nobody changes the file by way of its rows.
            mapped = mmap.mmap(self._file.fileno(), len(self) * self._episode_bytes, access=mmap.ACCESS_COPY)
            self._rows = torch.frombuffer(mapped, dtype=self.dtype).view(-1, self.width)

    def _at(self, place: Tensor) -> Tensor:
        return self._rows.index_select(0, place.flatten()).view(*place.shape, self.width)

    def _refused(self, error: OSError) -> ConfigError:
        cure = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the folder"
        where = self.path or tempfile.gettempdir()
        return ConfigError(
            f"could not write the replay buffer to {where} ({error.strerror}): {cure}, then go on with --ckpt_path last"
        )


class RecentTrials:
    """The newest trials of a run, which checkpoints hold whole: a ring, where each takes the place of the oldest.

    Args:
        capacity: trials that are kept.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.added = capacity, 0
        self._rows = torch.empty(0)

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def append(self, trials: Tensor) -> None:
        """Add trials (N, steps, numbers), the oldest first.

        Raises:
            ConfigError: those before were of another shape.
        """
        trials = trials.detach().cpu()
        if not self.added:
            self._rows = trials.new_empty(0, *trials.shape[1:])
        if trials.shape[1:] != self._rows.shape[1:]:
            raise ConfigError(
                f"the checkpoint's trials are of [steps, numbers] {list(self._rows.shape[1:])}, the run's of "
                f"{list(trials.shape[1:])}: leave the data as it was, or start a new run"
            )
        first = max(0, len(trials) - self.capacity)
        place = (self.added + torch.arange(first, len(trials))) % self.capacity
        self.added += len(trials)
        if len(self) > len(self._rows):  # memory is made as it is needed
            self._rows = torch.cat([self._rows, self._rows.new_empty(len(self) - len(self._rows), *trials.shape[1:])])
        self._rows[place] = trials[first:].to(self._rows)

    def at(self, places: Tensor) -> Tensor:
        """Trials at places (B,) in [0, len): (B, steps, numbers)."""
        return self._rows[places]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"added": self.added, "capacity": self.capacity, "rows": self._rows.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; with another capacity, with the newest that it has room for."""
        rows, added = state["rows"], state["added"]
        oldest_first = rows.roll(-(added % state["capacity"]), 0) if added > state["capacity"] else rows
        self.added, self._rows = 0, torch.empty(0)
        if state["capacity"] == self.capacity:
            self.added, self._rows = added, rows.clone()
        elif added:
            self.append(oldest_first)


def _find(ends: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the episodes, that end at (T, E), steps (T, n) fall into, and where within it."""
    place = torch.searchsorted(ends, step, right=True)
    before = torch.where(place > 0, ends.gather(1, (place - 1).clamp(min=0)), 0)
    return place, step - before


def _integers(draws: Tensor, below: Tensor) -> Tensor:
    """Uniform integers in [0, below) from uniform numbers in [0, 1)."""
    return (draws * below).long().clamp(max=below - 1)
