"""The replay buffer: what it holds, what a checkpoint may count on, and what it refuses."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from datamodules.core.errors import ConfigError
from models.reinforcement.replay_buffer import Replay

TASKS, HORIZON, WIDTH = 4, 3, 5


def buffer(file: Path | None, **changed) -> Replay:
    shape = {"tasks": TASKS, "horizon": HORIZON, "width": WIDTH, "dtype": torch.float32} | changed
    return Replay(file, **shape)


def collected(*counts: tuple[int, int, int], seed: int = 0) -> list[tuple[int, torch.Tensor, int]]:
    """Tasks, their episodes and how many are context."""
    g = torch.Generator().manual_seed(seed)
    return [(task, torch.randn(n, HORIZON, WIDTH, generator=g), context) for task, n, context in counts]


def fill(replay: Replay, what: list[tuple[int, torch.Tensor, int]]) -> Replay:
    for part in what:
        replay.append(*part)
    return replay


SOME = ((2, 4, 4), (0, 1, 1), (2, 300, 2), (1, 5, 3), (0, 2, 1), (2, 1, 1), (3, 2, 2))


def everything(replay: Replay, task: int, rows: int, context: bool = False) -> torch.Tensor:
    """Each row of a task once, by draws in the middle of its share."""
    draws = (torch.arange(rows, dtype=torch.float64)[None] + 0.5) / rows
    return (replay.context if context else replay.rows)(torch.tensor([task]), draws)[0]


@pytest.mark.parametrize("place", [None, "run/replay/episodes.bin"])
def test_rows_are_those_that_a_list_would_hold(place, tmp_path):
    """Catches rows of other tasks, of another order or lost, and a context that keeps older or extra episodes."""
    what = collected(*SOME)
    replay = fill(buffer(place and tmp_path / place), what)
    assert len(replay) == sum(n for _, n, _ in SOME)
    for task in range(TASKS):
        rows = torch.cat([episodes for t, episodes, _ in what if t == task]).flatten(0, 1)
        torch.testing.assert_close(everything(replay, task, len(rows)), rows, rtol=0, atol=0)
        episodes, context = next((e, c) for t, e, c in reversed(what) if t == task)
        expected = episodes[:context].flatten(0, 1)
        torch.testing.assert_close(everything(replay, task, len(expected), True), expected, rtol=0, atol=0)
    replay.close()


def test_draws_at_their_limits_and_several_tasks_at_once():
    """Catches a draw near 1 that reads the next task's rows, and tasks of a batch that share places."""
    what = collected(*SOME)
    replay = fill(buffer(None), what)
    tasks, ends = torch.tensor([0, 2, 0]), torch.tensor([[0.0, 1 - 2.0**-53]] * 3, dtype=torch.float64)
    for i, task in enumerate(tasks.tolist()):
        rows = torch.cat([episodes for t, episodes, _ in what if t == task]).flatten(0, 1)
        torch.testing.assert_close(replay.rows(tasks, ends)[i], rows[[0, -1]], rtol=0, atol=0)
        last = next(e[:c].flatten(0, 1) for t, e, c in reversed(what) if t == task)
        torch.testing.assert_close(replay.context(tasks, ends)[i], last[[0, -1]], rtol=0, atol=0)
    replay.close()


def continued(tmp_path: Path, source: str = "a.bin") -> tuple[Replay, Replay]:
    """A buffer that went on, and one that came back from a checkpoint in between and did the same then."""
    what, later = collected(*SOME), collected((1, 2, 1), (3, 7, 2), seed=1)
    whole = fill(buffer(tmp_path / "a.bin"), what)
    state = whole.state_dict()
    fill(whole, later)
    again = buffer(tmp_path / source)
    again.load(state, tmp_path / "a.bin")
    return whole, fill(again, later)


@pytest.mark.parametrize("source", ["a.bin", "another/run.bin"])
def test_goes_on_from_a_checkpoint_in_its_own_run_or_another(source, tmp_path):
    """Catches a buffer that counts rows written after its checkpoint, or forgets which task or context rows are of."""
    whole, again = continued(tmp_path, source)
    states = whole.state_dict(), again.state_dict()
    for name in ("task", "context"):
        assert torch.equal(states[0][name], states[1][name])
    assert states[0]["checksum"] == states[1]["checksum"]
    assert (tmp_path / source).read_bytes() == (tmp_path / "a.bin").read_bytes()
    for task in range(TASKS):
        assert torch.equal(everything(whole, task, 50), everything(again, task, 50))
        assert torch.equal(everything(whole, task, 9, True), everything(again, task, 9, True))


def test_what_a_killed_run_left_behind_the_checkpoint_is_overwritten(tmp_path):
    """Catches half-written rows beyond a checkpoint's that are taken for later ones."""
    what = collected(*SOME)
    file = tmp_path / "a.bin"
    first = fill(buffer(file), what[:4])
    state = first.state_dict()
    first.close()
    with file.open("ab") as f:
        f.write(os.urandom(77))
    again = buffer(file)
    again.load(state, file)
    fill(again, what[4:])
    plain = fill(buffer(tmp_path / "b.bin"), what)
    assert file.read_bytes()[: (tmp_path / "b.bin").stat().st_size] == (tmp_path / "b.bin").read_bytes()
    for task in range(TASKS):
        assert torch.equal(everything(again, task, 50), everything(plain, task, 50))


def test_a_buffer_of_many_megabytes_ends_where_its_checkpoint_says(tmp_path):
    """Catches parts of a long file that are read beyond the checkpoint's rows, which its checksum then refuses."""
    file, wide = tmp_path / "a.bin", 50_000
    first = buffer(file, width=wide)
    first.append(1, torch.randn(30, HORIZON, wide), 3)
    state = first.state_dict()
    first.append(0, torch.randn(30, HORIZON, wide), 0)
    first.close()
    again = buffer(tmp_path / "b.bin", width=wide)
    again.load(state, file)
    assert (tmp_path / "b.bin").read_bytes() == file.read_bytes()[: 30 * HORIZON * wide * 4]
    again.close()


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda b: b[:-1], "it ends after"),
        (lambda b: b[:40] + bytes([b[40] ^ 1]) + b[41:], "its checksum is another"),
        (lambda b: os.urandom(len(b)), "its checksum is another"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_not_the_checkpoints_is_refused(damage, why, tmp_path):
    """Catches a truncated, changed, foreign or missing buffer that a resumed run would learn from."""
    file = tmp_path / "a.bin"
    replay = fill(buffer(file), collected(*SOME))
    state = replay.state_dict()
    replay.close()
    content = file.read_bytes()
    file.unlink()
    if damage is not None:
        file.write_bytes(damage(content))
    with pytest.raises(ConfigError, match=f"not the replay buffer of the checkpoint .*{why}.*start a new run"):
        buffer(tmp_path / "b.bin").load(state, file)
    file.write_bytes(content)
    buffer(tmp_path / "c.bin").load(state, file)


@pytest.mark.parametrize("change", [{"tasks": 5}, {"horizon": 1}, {"width": 3}, {"dtype": torch.float64}])
def test_a_buffer_of_other_tasks_is_refused(change, tmp_path):
    """Catches rows that are read as what they are not, after the data's settings changed."""
    state = fill(buffer(tmp_path / "a.bin"), collected(*SOME)).state_dict()
    with pytest.raises(ConfigError, match="leave data and precision as they were"):
        buffer(tmp_path / "b.bin", **change).load(state, tmp_path / "a.bin")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_is_one_line():
    """Catches a full disk that ends in a traceback, or kills the process by a signal."""
    with pytest.raises(ConfigError, match=r"/dev/full \(No space left on device\): free some space, then go on"):
        fill(buffer(Path("/dev/full")), collected(*SOME))


def test_what_cannot_be_made_safe_is_one_line(tmp_path, monkeypatch):
    """Catches a checkpoint that counts on rows which the disk does not hold, and a folder that cannot be written."""
    replay = fill(buffer(tmp_path / "a.bin"), collected(*SOME))
    replay.sync()

    def full(fd):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"a.bin \(Input/output error\): check the folder"):
        replay.sync()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="check the folder"):
        buffer(tmp_path / "file" / "episodes.bin")


class Reluctant:
    """A file that takes a few bytes at a time, as one on an almost full disk may."""

    def __init__(self, file) -> None:
        self.file = file

    def write(self, content) -> int:
        return self.file.write(content[:7])

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_short_writes_are_completed():
    """Catches rows that end where the system took less than it was given."""
    what = collected((1, 3, 3), (0, 2, 2))
    replay = buffer(None)
    replay._file = Reluctant(replay._file)
    fill(replay, what)
    assert torch.equal(everything(replay, 1, 9), what[0][1].flatten(0, 1))
    assert torch.equal(everything(replay, 0, 6), what[1][1].flatten(0, 1))
