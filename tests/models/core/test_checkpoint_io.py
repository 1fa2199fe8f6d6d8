"""Checkpoints are what was written, or are refused."""

from __future__ import annotations

import hashlib
import random
import zipfile
from pathlib import Path

import pytest
import torch

from datamodules.core.errors import ConfigError
from models.core.checkpoint_io import VERSION, AtomicCheckpointIO, identity, load_checkpoint


def content(seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {"state_dict": {"w": torch.rand(50, 20, generator=g), "b": torch.rand(20, generator=g)}, "config": "a: 1"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    AtomicCheckpointIO().save_checkpoint(content(), tmp_path / "x.ckpt")
    return tmp_path / "x.ckpt"


def test_it_is_an_archive_that_torch_reads_as_it_is(path: Path):
    """Catches a file that only we can read."""
    assert torch.load(path, weights_only=True)["config"] == "a: 1"
    assert zipfile.ZipFile(path).testzip() is None
    assert torch.equal(load_checkpoint(path)["state_dict"]["w"], content()["state_dict"]["w"])


def test_an_identity_is_of_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches two checkpoints that pass for one, one that passes for two, and a seal that is not taken as it is."""
    names = [tmp_path / f"{name}.ckpt" for name in "abc"]
    for name, seed in zip(names, (0, 0, 1), strict=True):
        AtomicCheckpointIO().save_checkpoint(content(seed), name)
    first, same, other = map(identity, names)
    assert first == same != other
    assert first == hashlib.sha256(names[0].read_bytes()[: -len("metabolt sha256 ") - 66] + b"\0\0").hexdigest()
    torch.save(content(), tmp_path / "plain.ckpt")
    assert identity(tmp_path / "plain.ckpt") == hashlib.sha256((tmp_path / "plain.ckpt").read_bytes()).hexdigest()
    (tmp_path / "empty.ckpt").write_bytes(b"")
    assert identity(tmp_path / "empty.ckpt") == hashlib.sha256().hexdigest()
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("hashed what is sealed"))
    assert identity(names[2]) == other


@pytest.mark.parametrize("flips", [1, 3, 20])
def test_flipped_bits_are_refused(path: Path, flips: int):
    """Catches weights that rotted on the disk and are trusted: wherever in the file, each of 150 times."""
    whole = path.read_bytes()
    for trial in range(50):
        rng, damaged = random.Random(1000 * flips + trial), bytearray(whole)
        for place in rng.sample(range(8 * len(whole)), flips):
            damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match="another file"):
            load_checkpoint(path)


def test_every_bit_of_the_end_counts(path: Path):
    """Catches a damaged seal that makes the file pass for one without."""
    whole = path.read_bytes()
    for place in range(8 * (len(whole) - 120), 8 * len(whole)):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ConfigError):
            load_checkpoint(path)


def test_truncations_are_refused(path: Path):
    """Catches a copy that was cut off."""
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError):
            load_checkpoint(path)


def test_a_checkpoint_of_another_program_is_read_by_its_parts_checksums(tmp_path: Path):
    """Catches a refusal of what torch.save wrote, and damage to it that is taken."""
    torch.save(content(), tmp_path / "plain.ckpt")
    assert load_checkpoint(tmp_path / "plain.ckpt")["config"] == "a: 1"
    damaged = bytearray((tmp_path / "plain.ckpt").read_bytes())
    place = damaged.find(content()["state_dict"]["w"].numpy().tobytes()[:16])
    damaged[place + 5] ^= 4
    (tmp_path / "plain.ckpt").write_bytes(damaged)
    with pytest.raises(ConfigError, match="damaged"):
        load_checkpoint(tmp_path / "plain.ckpt")


def test_what_a_gpu_wrote_loads_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches a Trainer's load that asks for the device that wrote: storages are tagged with it here."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    AtomicCheckpointIO().save_checkpoint(content() | {VERSION: "2.0.0"}, tmp_path / "gpu.ckpt")
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(tmp_path / "gpu.ckpt", weights_only=True)
    loaded = AtomicCheckpointIO().load_checkpoint(tmp_path / "gpu.ckpt")
    assert loaded["state_dict"]["w"].device.type == "cpu"
