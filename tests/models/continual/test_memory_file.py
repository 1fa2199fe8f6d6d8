"""A task memory on disk."""

import errno
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.core.errors import ConfigError
from models.continual import memory_file, records
from models.continual.memory_file import FileStore, MemoryFile
from models.continual.records import Entries, Records

SIZE, FEATURES, TASK = 7, 3, 2
ROOT = Path(__file__).resolve().parents[3]


def opened(path: Path | None, size: int = SIZE, **settings) -> MemoryFile:
    return MemoryFile(path, size, FEATURES, TASK, torch.float64, **settings)


def entries(number: int, seed: int) -> Entries:
    g = torch.Generator().manual_seed(seed)
    x, task, loss = (torch.rand(*s, generator=g, dtype=torch.float64) for s in ((number, FEATURES), (TASK,), (number,)))
    return Entries(x, torch.arange(number) % 4, task, torch.tensor(seed), loss)


def content(file: MemoryFile) -> dict[str, list]:
    """All that is seen of a memory."""
    every = torch.arange(file.size)
    x, y = file.rows(every, torch.zeros((), dtype=torch.float64))
    task = np.where(file.held[:, None], file._columns["task"][file._row], 0)
    of_place = (file.held, file.experience, file.order, file.loss, x, y, torch.from_numpy(task))
    return {"sequence": [file.sequence], "of": [t.tolist() for t in of_place]}


def test_what_is_seen_is_what_the_checkpoint_saw(tmp_path):
    """Catches a record of the checkpoint that is overwritten, one from after it that is seen, and half of one.

    Random writes, checkpoints and ends without a word; at each end bytes of one version that no checkpoint counts on
    are turned. A record that is overwritten many times between two checkpoints is among them.
    """
    rng, path = random.Random(0), tmp_path / "m" / "records.bin"
    file = opened(path)
    file.clear()
    saved, seen, seed, size = None, None, 0, file._bytes
    for _ in range(150):
        act = rng.random()
        if act < 0.7:
            new = entries(rng.randrange(1, 5), seed := seed + 1)
            file.write(torch.tensor([rng.randrange(-1, SIZE) for _ in new.y]), new, 10 * seed)
        elif act < 0.85:
            saved, seen = file.state_dict(), content(file)
        elif saved is not None:
            free = set(range(2 * SIZE)) - {
                int(r) for r in range(2 * SIZE) if 0 < file._columns["sequence"][r] <= file.committed
            }
            if free and file.sequence > saved["sequence"]:
                file._columns["x"].view(np.uint8)[rng.choice(sorted(free)), rng.randrange(24)] ^= 255
            file = opened(path)  # nothing was closed
            file.load(saved, path)
            assert content(file) == seen
    assert path.stat().st_size == size and seen["of"][0] == [True] * SIZE


def test_what_is_gone_is_told(tmp_path):
    """Catches a memory that goes on with records that are not those of the checkpoint."""
    path = tmp_path / "records.bin"
    file = opened(path)
    file.clear()
    file.write(torch.arange(SIZE), entries(SIZE, 1), 0)
    first = file.state_dict()
    for seed in (2, 3):
        file.write(torch.arange(SIZE), entries(SIZE, seed), 0)
        last = file.state_dict()
    file.write(torch.tensor([0]), entries(1, 4), 0)
    with pytest.raises(ConfigError, match="is to be the run's last one"):
        opened(path).load(first, path)
    file = opened(path, writes=False)
    file.load(last, path)
    assert file.experience.tolist() == [3] * SIZE
    before = path.read_bytes()
    file.load(last, path)
    assert path.read_bytes() == before  # what only reads changes nothing
    writable = opened(path)
    writable._columns["x"][writable._columns["sequence"] == last["sequence"]] += 1
    with pytest.raises(ConfigError, match="bring back the file"):
        opened(path).load(last, path)
    with pytest.raises(ConfigError, match="leave keep"):
        opened(tmp_path / "other", size=5).load(last, path)
    with pytest.raises(ConfigError, match="check the folder"):
        opened(tmp_path / "none", writes=False)


def test_another_run_goes_on_from_a_copy(tmp_path):
    """Catches a run that goes on in a folder of its own with nothing, or changes the file that it comes from."""
    file = opened(tmp_path / "a")
    file.clear()
    file.write(torch.arange(4), entries(4, 1), 0)
    saved, before = file.state_dict(), (tmp_path / "a").read_bytes()
    other = opened(tmp_path / "b")
    other.load(saved, tmp_path / "a")
    assert content(other) == content(file)
    other.write(torch.arange(4), entries(4, 2), 4)
    assert (tmp_path / "a").read_bytes() == before
    assert other.experience.tolist()[:4] == [2] * 4


def test_is_the_memory_in_the_state(tmp_path, monkeypatch):
    """Catches a search, a count or a write that differs by a bit from those of tensors, blocks of keys left out."""
    monkeypatch.setattr(memory_file, "BLOCK", 3)
    monkeypatch.setattr(records, "BLOCK", 4)
    rng, like = random.Random(1), torch.zeros((), dtype=torch.float64)
    file = opened(tmp_path / "m")
    file.clear()
    store = FileStore(file, torch.zeros(SIZE, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), like)
    plain = Records.empty(SIZE, FEATURES, TASK, 4, like)
    for seed in range(20):
        new = entries(3, seed)
        for by, to in (("feature", new.x), ("embedding", new.task[None])):
            found = [memory.nearest(to, by, 4) for memory in (store, plain)]
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        place, there, _ = found[0]
        assert all(torch.equal(a, b) for a, b in zip(store.at(place), plain.at(place), strict=True))
        where = torch.tensor([rng.randrange(-1, SIZE) for _ in range(3)])
        met = plain.met + 1
        store, plain = (memory.counted(place, there).put(where, new, met) for memory in (store, plain))
        for name in ("experience", "order", "loss", "used", "held", "met"):
            assert torch.equal(getattr(store, name), getattr(plain, name)), name


def test_search_is_exact(monkeypatch):
    """Catches neighbours that are lost between blocks; against sorted distances of all keys."""
    monkeypatch.setattr(memory_file, "BLOCK", 64)
    file = opened(None, 1000)
    file.clear()
    new = entries(900, 5)
    file.write(torch.arange(900), new, 0)
    to = entries(3, 6).x
    place, there, distance = file.nearest(to, "feature", 25)
    truth = torch.cdist(new.x, to).amin(1)
    assert there.all() and set(place.tolist()) == set(truth.argsort()[:25].tolist())
    torch.testing.assert_close(distance, truth[place].square())


def test_errors_in_one_line(tmp_path, monkeypatch):
    """Catches a full disk that ends the process at a later write, and a traceback for a package that is not there."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(memory_file, "allocate", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        opened(tmp_path / "m")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match="pip install faiss-cpu, or give exact"):
        opened(None, search="faiss")


WRITER = """
import sys
from pathlib import Path
import torch
from tests.models.continual.test_memory_file import SIZE, entries, opened
file = opened(Path(sys.argv[1]))
file.clear()
for seed in range(10**6):
    file.write(torch.randint(SIZE, (3,), generator=torch.Generator().manual_seed(seed)), entries(3, seed), 3 * seed)
    if seed % 5 == 0:
        saved = file.state_dict()
        print(seed, saved["sequence"], saved["digest"], flush=True)
"""


def test_survives_a_kill(tmp_path):
    """Catches a record that a kill leaves half, against the same writes in a memory of this process."""
    path = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.2 + 0.1 * random.random())
    process.kill()
    *_, last = [line for line in process.communicate()[0].splitlines(keepends=True) if line.endswith("\n")]
    number, sequence, digest = map(int, last.split())
    twin = opened(None)
    twin.clear()
    for seed in range(number + 1):
        place = torch.randint(SIZE, (3,), generator=torch.Generator().manual_seed(seed))
        twin.write(place, entries(3, seed), 3 * seed)
    file = opened(path)
    file.load({"sequence": sequence, "digest": digest, "shape": file.shape}, path)
    assert content(file) == content(twin)
