"""Omniglot: a small stand-in for what happens to files, the real data, where it is, for what they hold."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from datamodules.core.errors import DataError
from datamodules.core.streams import SPLITS
from datamodules.images import omniglot
from datamodules.images.omniglot import HELD_OUT, SIZE, SMALL, Omniglot
from datamodules.images.tasks import ImageDataModule
from tests.support.fixtures import CHARACTERS, DRAWERS, dead_address, drawing, fake_omniglot, mirror, real_data

PROTOCOLS = ("maml", "vinyals", "alphabets", "minimal")
# sha256 of the sorted lines "<split> <alphabet>/<character>" of the split as published, 1623 of them.
VINYALS_SHA256 = "98331359844bc0c2a633a0b7d269789e1b1ca0e03d235c186f765ba51de81bbf"

needs_real_data = pytest.mark.skipif(real_data() is None, reason="no real Omniglot here: set METABOLT_DATA")


@pytest.fixture(autouse=True)
def _away_from_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


@pytest.fixture(scope="session")
def real_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of our own that the real archives are linked into: the cache must not land beside them."""
    root = tmp_path_factory.mktemp("real")
    (root / "omniglot-py").symlink_to(real_data() / "omniglot-py")
    return root


def extract(folder: Path) -> None:
    for path in list(folder.glob("*.zip")):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
        path.unlink()


# ----------------------------------------------------------------------------------------------------------- protocols


def alphabets(names: list[str]) -> set[str]:
    return {name.split("/")[0] for name in names}


def test_the_table_of_characters_is_the_published_one() -> None:
    """A slip in the table that every protocol and the completeness check are made from."""
    counts = {set_name: (len(table), sum(table.values())) for set_name, table in omniglot.CHARACTERS.items()}
    assert counts == {"images_background": (30, 964), "images_evaluation": (20, 659)}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_splits_have_the_published_sizes_and_are_disjoint(protocol: str) -> None:
    """A protocol that trains on what it tests on, or whose sizes are not those of the papers."""
    names = Omniglot(protocol=protocol).split_names()
    sizes = {"maml": [1100, 100, 423], "vinyals": [1028, 172, 423], "alphabets": [792, 172, 659]}
    assert [len(names[split]) for split in SPLITS] == sizes.get(protocol, [136, 150, 659])
    assert len(set().union(*names.values())) == sum(map(len, names.values()))


def test_vinyals_split_is_the_published_list() -> None:
    """One character in the wrong split: results that are compared with those of another benchmark."""
    names = Omniglot(protocol="vinyals").split_names()
    lines = sorted(f"{split} {name}" for split in SPLITS for name in names[split])
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == VINYALS_SHA256


@needs_real_data
@pytest.mark.parametrize("split", SPLITS)
def test_vinyals_split_against_the_lists_themselves(split: str) -> None:
    """A checksum above that was taken from our own list, not from the published one."""
    lists = json.loads((real_data() / "splits" / f"omniglot_vinyals_{split}.json").read_text())
    published = [f"{a}/{c}" for table in lists.values() for a, characters in table.items() for c in characters]
    assert sorted(Omniglot(protocol="vinyals").split_names()[split]) == sorted(published)


def test_alphabets_are_split_as_lake_does() -> None:
    """Evaluation alphabets in meta-training or -validation, or validation on alphabets that were trained on."""
    for protocol in ("alphabets", "minimal"):
        names = {split: alphabets(n) for split, n in Omniglot(protocol=protocol).split_names().items()}
        assert names["test"] == omniglot.CHARACTERS["images_evaluation"].keys()
        assert names["train"] | names["val"] <= omniglot.CHARACTERS["images_background"].keys()
        assert not names["train"] & names["val"]
        assert names["train"] == set(SMALL) if protocol == "minimal" else names["val"] == set(HELD_OUT)


def test_maml_split_follows_the_seed() -> None:
    """A split that ignores the seed, or that differs between two runs of one seed."""
    first, again, other = (Omniglot(protocol="maml", seed=seed).split_names() for seed in (0, 0, 1))
    assert first == again
    shared = len(set(first["test"]) & set(other["test"]))
    assert 70 < shared < 150  # of 423; 110 are expected of two independent draws
    # On every platform and version: a checkpoint must not meet its training characters in another's test split.
    assert first["test"][:2] == ["Greek/character13", "Old_Church_Slavonic_(Cyrillic)/character05"]


def test_overlap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check of the splits that is gone."""
    data = fake_omniglot(tmp_path)(root=str(tmp_path), protocol="alphabets")
    names = data.split_names()
    monkeypatch.setattr(data, "split_names", lambda: names | {"test": [*names["test"], names["train"][0]]})
    with pytest.raises(DataError, match=r"class 'Greek/character01' is in both train and test"):
        data.classes("test")


@pytest.mark.parametrize(
    ("protocol", "rotations", "within"),
    [("maml", "random", False), ("vinyals", "classes", False), ("alphabets", "none", True), ("minimal", "none", True)],
)
def test_rotations_and_alphabets_of_the_tasks(tmp_path: Path, protocol: str, rotations: str, within: bool) -> None:
    """Test tasks without the rotations that the papers' have, or tasks across alphabets that should be within one."""
    fake = fake_omniglot(tmp_path)
    data = fake(root=str(tmp_path), protocol=protocol, ways=3, queries=2)
    for split in SPLITS:
        tasks = data.distribution(split)
        assert tasks.rotations == rotations
        groups = np.array(tasks.classes.groups)[
            data.distribution(split).sample(range(20)).task["classes"] % len(tasks.classes)
        ]
        assert all(len(set(g)) == 1 for g in groups) == within
    other = fake(root=str(tmp_path), protocol=protocol, ways=3, queries=2, rotations="classes")
    assert {other.distribution(split).rotations for split in SPLITS} == {"classes"}
    trained = fake(root=str(tmp_path), protocol=protocol, ways=3, queries=2, train_rotations="classes")
    assert [trained.distribution(split).rotations for split in SPLITS] == ["classes", rotations, rotations]


def test_training_passes_over_alphabets_that_are_too_small(tmp_path: Path) -> None:
    """20-way training within alphabets that is impossible because of four small ones; a test split that shrinks."""
    fake = fake_omniglot(tmp_path)
    data = fake(root=str(tmp_path), protocol="alphabets", ways=5, queries=2)
    assert set(data.distribution("train").classes.groups) == {"Greek", "Latin"}  # not Tagalog's 3
    data = fake(root=str(tmp_path), protocol="alphabets", ways=5, train_ways=6, queries=2)
    assert set(data.distribution("train").classes.groups) == {"Greek"}
    assert set(data.distribution("test").classes.groups) == {"Angelic", "Gurmukhi", "Kannada"}
    data = fake(root=str(tmp_path), protocol="alphabets", ways=6, train_ways=3, queries=2)
    assert "Tagalog" in data.distribution("train").classes.groups
    with pytest.raises(DataError, match=r"group 'Angelic' \(test\) has 5 classes"):
        data.distribution("test")


def test_tasks_within_alphabets_know_theirs(tmp_path: Path) -> None:
    """A task whose group is not its characters' alphabet, other tasks than without the option said where a protocol has
    it already, an alphabet's number that differs by split, and small alphabets that end a test of random characters."""
    fake = fake_omniglot(tmp_path)
    data = fake(root=str(tmp_path), protocol="maml", ways=4, queries=2, within_alphabets=True, rotations="none")
    for split in SPLITS:
        tasks = data.distribution(split)
        fact, names = tasks.task_groups
        drawn = tasks.sample(range(30))
        assert drawn.task_groups == (fact, names) and names == tuple(data.groups)
        assert min(tasks.classes.groups.count(names[n]) for n in drawn.groups.tolist()) >= 4
        for ids, group in zip(drawn.task["classes"], drawn.groups, strict=True):
            assert {tasks.group_names[k] for k in ids.tolist()} == {names[int(group)]}
    plain = fake(root=str(tmp_path), protocol="alphabets", ways=4, queries=2)
    asked = fake(root=str(tmp_path), protocol="alphabets", ways=4, queries=2, within_alphabets=True)
    some, same = (d.distribution("val").sample(range(10)).task for d in (plain, asked))
    assert some.keys() == same.keys() == {"classes", "group"}
    assert all(torch.equal(some[name], same[name]) for name in some)
    across = fake(root=str(tmp_path), protocol="alphabets", ways=4, queries=2, within_alphabets=False)
    assert across.distribution("test").sample([0]).groups is None


def test_twelve_hundred_characters_train_where_none_are_held_out(tmp_path: Path) -> None:
    """1,200 characters and 423, as splits without validation have them, that are not the protocol's own."""
    names = Omniglot(protocol="maml").split_names()
    data = fake_omniglot(tmp_path)(root=str(tmp_path), protocol="maml", train_on_val=True)
    own = data.split_names()
    assert len(names["train"] + names["val"]) == 1200 and len(names["test"]) == 423
    assert sorted(data.classes("train").names) == sorted(own["train"] + own["val"])
    assert data.classes("test").names == own["test"] and not data.selects


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("layout", ["", "omniglot", "omniglot-py"])
@pytest.mark.parametrize("extracted", [False, True])
def test_every_layout_gives_the_same_images(tmp_path: Path, layout: str, extracted: bool) -> None:
    """A layout that is not found, or one whose drawings come in another order."""
    fake = fake_omniglot(tmp_path / "data" / layout)
    if extracted:
        extract(tmp_path / "data" / layout)
    data = fake(root=str(tmp_path / "data"), protocol="alphabets", download=False)
    data.prepare_data()
    everything = data._all
    assert everything.names[:2] == ["Armenian/character01", "Armenian/character02"]
    assert everything.groups == [name.split("/")[0] for name in everything.names]
    assert Counter(everything.groups) == CHARACTERS["images_background"] | CHARACTERS["images_evaluation"]
    assert (everything.counts == DRAWERS).all()
    for name, drawer in (("Greek/character04", 2), ("Gurmukhi/character45", DRAWERS)):
        row = everything.names.index(name) * DRAWERS + drawer - 1
        picture = drawing(name.split("/")[0], int(name[-2:]), drawer).convert("L")
        small = 255 - np.asarray(picture.resize((28, 28), Image.Resampling.LANCZOS))
        np.testing.assert_array_equal(everything.images[row, 0].numpy(), small)


def test_strokes_are_bright_on_black(tmp_path: Path) -> None:
    """The polarity of the files kept: every paper but Reptile's inverts, and a user's picture is stored inverted."""
    data = fake_omniglot(tmp_path)(root=str(tmp_path))
    images = data.classes("test").images
    assert images.dtype == torch.uint8 and images.shape[1:] == (1, 28, 28)
    assert images.float().median() == 0
    assert images.max() > 200
    stored = data.to_store(drawing("Gurmukhi", 42, 1).convert("L"))
    assert stored.dtype == torch.uint8 and stored.shape == (1, 28, 28)
    # Not the same image, ink() finds paper and strokes by itself, but nearly: a query is like what was trained on.
    both = np.corrcoef(
        stored.flatten(), data._all.images[data._all.names.index("Gurmukhi/character42") * DRAWERS].flatten()
    )
    assert both[0, 1] > 0.95


def test_the_second_run_opens_no_archive(tmp_path: Path) -> None:
    """Images packed again in every run, or that need the archives when they are packed."""
    fake = fake_omniglot(tmp_path)
    before = fake(root=str(tmp_path)).classes("val").images
    for path in tmp_path.glob("*.zip"):
        path.unlink()
    assert (tmp_path / "omniglot" / "omniglot-28.bin").is_file()
    assert torch.equal(fake(root=str(tmp_path), download=False).classes("val").images, before)


def test_cache_goes_to_the_user_where_root_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only data set that cannot be used, or is packed in every run."""
    fake = fake_omniglot(tmp_path / "data")
    home = tmp_path / "user-cache" / "metabolt"
    # Permission bits mean nothing to a test that runs as root.
    monkeypatch.setattr(omniglot, "writable_folder", lambda folder: home)
    fake(root=str(tmp_path / "data")).prepare_data()
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["images_background.zip", "images_evaluation.zip"]
    for path in (tmp_path / "data").glob("*.zip"):
        path.unlink()
    fake(root=str(tmp_path / "data"), download=False).prepare_data()
    # And a cache that is already beside the data is used there.
    os.renames(home / "omniglot", tmp_path / "data" / "omniglot")
    fake(root=str(tmp_path / "data"), download=False).prepare_data()
    assert not home.exists()


def test_incomplete_archive_is_named_with_what_it_lacks(tmp_path: Path) -> None:
    """Training on half of the data; a checksum of the published file that is asked of a user's own archive."""
    fake = fake_omniglot(tmp_path)
    for number, (character, problem) in enumerate(
        [("Latin/character03", "Latin/character03 has 0 drawings, not 4"), ("Greek/character06", "Greek/character06")]
    ):
        fewer = tmp_path / f"fewer{number}"
        fewer.mkdir()
        (fewer / "images_evaluation.zip").symlink_to(tmp_path / "images_evaluation.zip")
        with (
            zipfile.ZipFile(tmp_path / "images_background.zip") as whole,
            zipfile.ZipFile(fewer / "images_background.zip", "w") as half,
        ):
            for name in whole.namelist():
                if character not in name:
                    half.writestr(name, whole.read(name))
        with pytest.raises(DataError, match=rf"images_background\.zip is no complete copy.*: {problem}.*; remove it"):
            fake(root=str(fewer), download=False).prepare_data()
        assert not (fewer / "omniglot" / "omniglot-28.bin").exists()


def test_more_characters_than_there_are_is_refused(tmp_path: Path) -> None:
    """Another data set of the same layout taken for Omniglot."""
    fake = fake_omniglot(tmp_path)
    with zipfile.ZipFile(tmp_path / "images_background.zip", "a") as archive:
        archive.writestr("images_background/Latin/character06/9999_01.png", b"")
    with pytest.raises(DataError, match=r"Latin/character06 is none of its characters"):
        fake(root=str(tmp_path)).prepare_data()


def test_broken_copy_beside_a_whole_one_is_passed_over(tmp_path: Path) -> None:
    """A truncated archive that hides a good copy; and, alone, an error that is not one line with the cure."""
    fake = fake_omniglot(tmp_path / "omniglot-py")
    content = (tmp_path / "omniglot-py" / "images_background.zip").read_bytes()
    (tmp_path / "images_background.zip").write_bytes(content[: len(content) // 2])
    fake(root=str(tmp_path)).prepare_data()
    (tmp_path / "omniglot-py" / "images_background.zip").unlink()
    (tmp_path / "omniglot" / "omniglot-28.bin").unlink()
    with pytest.raises(DataError, match=r"images_background\.zip is no complete copy.*; remove it") as caught:
        fake(root=str(tmp_path)).prepare_data()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("extracted", [False, True])
def test_damaged_drawing_is_named(tmp_path: Path, extracted: bool) -> None:
    """A traceback from the depths of Pillow or zipfile for a file that a user can replace."""
    fake = fake_omniglot(tmp_path)
    archive = tmp_path / "images_evaluation.zip"
    with zipfile.ZipFile(archive) as whole:
        member = whole.getinfo(next(n for n in whole.namelist() if "Kannada/character05" in n and "MACOSX" not in n))
    if extracted:
        extract(tmp_path)
        broken = tmp_path / member.filename
        broken.write_bytes(broken.read_bytes()[:60])
    else:
        content = bytearray(archive.read_bytes())
        content[member.header_offset + 30 + len(member.filename) + 60] ^= 1
        archive.write_bytes(content)
    name = Path(member.filename).name
    with pytest.raises(DataError, match=rf"{name} in .*images_evaluation.* is damaged \(.*\); remove it"):
        fake(root=str(tmp_path)).prepare_data()


def _png(*chunks: tuple[bytes, bytes]) -> bytes:
    pack = lambda kind, data: len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")  # noqa: E731
    return b"\x89PNG\r\n\x1a\n" + b"".join(pack(*chunk) for chunk in chunks)


def _header(side: int) -> tuple[bytes, bytes]:
    return b"IHDR", side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])


HOSTILE = {
    "encrypted": None,
    "unknown compression": None,
    "zeros": bytes(1 << 26),
    "many pixels": _png(_header(60_000), (b"IDAT", zlib.compress(bytes(1000)))),
    "long text": _png(_header(105), (b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 26))), (b"IDAT", b"")),
}


@pytest.mark.parametrize(
    ("kind", "reason"), list(zip(HOSTILE, ["encrypted", "", "larger than", "bomb", "large"], strict=True))
)
def test_hostile_member_is_named(tmp_path: Path, kind: str, reason: str) -> None:
    """A member with a password, of a compression that Python lacks, or that unpacks to gigabytes of zeros, pixels or
    text, which ends in a traceback or takes all memory."""
    fake = fake_omniglot(tmp_path)
    archive = tmp_path / "images_evaluation.zip"
    with zipfile.ZipFile(archive) as whole:
        contents = {name: whole.read(name) for name in whole.namelist()}
    name = next(n for n in contents if "Kannada/character05" in n and "MACOSX" not in n)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as whole:
        for member, content in contents.items():
            whole.writestr(member, HOSTILE[kind] or content if member == name else content)
        local = whole.getinfo(name).header_offset
    if HOSTILE[kind] is None:
        raw = bytearray(archive.read_bytes())
        central = raw.rindex(name.encode(), 0, raw.rindex(b"PK\x05\x06")) - 46
        shift, value = (0, 1) if kind == "encrypted" else (2, 97)
        raw[local + 6 + shift], raw[central + 8 + shift] = value, value
        archive.write_bytes(raw)
    with pytest.raises(DataError, match=rf"{Path(name).name} in .* is damaged \(.*{reason}.*\); remove it") as caught:
        fake(root=str(tmp_path)).prepare_data()
    assert "\n" not in str(caught.value)


def test_a_pipe_is_no_archive(tmp_path: Path) -> None:
    """A named pipe in the place of an archive, of its lock or of the cache, at which a run waits for ever."""
    fake = fake_omniglot(tmp_path)
    (tmp_path / "omniglot").mkdir()
    os.mkfifo(tmp_path / "omniglot" / f"omniglot-{SIZE}.bin")
    fake(root=str(tmp_path)).prepare_data()  # built again
    archive = tmp_path / "images_evaluation.zip"
    (tmp_path / "omniglot" / f"omniglot-{SIZE}.bin").unlink()
    archive.unlink()
    os.mkfifo(archive)
    with pytest.raises(DataError, match=r"images_evaluation\.zip is no complete copy"):
        fake(root=str(tmp_path)).prepare_data()
    archive.unlink()
    os.mkfifo(tmp_path / "omniglot" / "images_evaluation.zip.lock")
    with pytest.raises(DataError, match=r"images_evaluation\.zip\.lock is no regular file"):
        fake(root=str(tmp_path)).prepare_data()


# ------------------------------------------------------------------------------------------------------------ download


def served(tmp_path: Path) -> tuple[type[Omniglot], dict[str, bytes]]:
    fake = fake_omniglot(tmp_path / "server")
    return fake, {path.name: path.read_bytes() for path in (tmp_path / "server").iterdir()}


def test_download_from_the_first_mirror_that_works(tmp_path: Path) -> None:
    """A first run that needs more than the command, or that downloads again in the second."""
    fake, files = served(tmp_path)
    with mirror(files) as m:
        m.cuts = [5000]  # the connection breaks once, and the transfer goes on from there
        mirrors = [dead_address(), f"{m.url}/"]
        data = fake(root=str(tmp_path / "data"), mirrors=mirrors, ways=3, queries=2)
        data.prepare_data()
        assert m.asked == [None, "bytes=5000-", None]
        fake(root=str(tmp_path / "data"), mirrors=mirrors).prepare_data()
        assert len(m.asked) == 3
    assert data.distribution("train").sample([0]).support_x.shape == (1, 3, 1, 28, 28)
    folder = tmp_path / "data" / "omniglot"
    assert sorted(p.name for p in folder.iterdir()) == [
        "images_background.zip",
        "images_evaluation.zip",
        "omniglot-28.bin",
    ]


def test_no_network_is_one_line_that_says_where_to_put_the_archives(tmp_path: Path) -> None:
    """A user behind a firewall with a traceback and no way on."""
    url = dead_address()
    with pytest.raises(DataError) as caught:
        Omniglot(root=str(tmp_path), mirrors=[url]).prepare_data()
    message = str(caught.value)
    assert "\n" not in message
    assert url in message
    assert f"put images_background.zip of https://github.com/brendenlake/omniglot (python/) into {tmp_path}" in message


def test_download_false_asks_nobody(tmp_path: Path) -> None:
    """A cluster node without network that waits for one."""
    with mirror({}) as m, pytest.raises(DataError, match=r"download is false: put images_background\.zip"):
        Omniglot(root=str(tmp_path), mirrors=[m.url], download=False).prepare_data()
    assert m.asked == []


def test_download_of_another_file_is_refused(tmp_path: Path) -> None:
    """A changed archive of a mirror that is trained on: only a user's own copy goes without the checksum."""
    _, files = served(tmp_path)
    with mirror(files) as m, pytest.raises(DataError, match=r"wrong checksum, not 68d2efa1b9178cc56df9314c21c6e718"):
        Omniglot(root=str(tmp_path / "data"), mirrors=[m.url]).prepare_data()


def test_settings_reach_it_from_the_command_line() -> None:
    """A parameter, its own or its base's, that LightningCLI's parser does not see."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    settings = ["protocol=minimal", "shots=5", "mirrors=[http://a.example/x]", "download=false"]
    parsed = parser.parse_args(["--data=datamodules.Omniglot", *(f"--data.init_args.{s}" for s in settings)])
    data = Omniglot(**parsed.data.init_args)
    assert (data.protocol, data.shots, data.mirrors, data.download) == ("minimal", 5, ["http://a.example/x"], False)


# ------------------------------------------------------------------------------------------------------- the real data


@needs_real_data
def test_real_data_is_packed_whole(real_root: Path) -> None:
    """A real archive that is refused or read in another order than its names say."""
    data = Omniglot(root=str(real_root), protocol="alphabets", ways=20, queries=1, download=False)
    data.prepare_data()
    everything = data._all
    assert everything.images.shape == (1623 * 20, 1, 28, 28)
    assert set(everything.counts) == {20}
    with zipfile.ZipFile(real_root / "omniglot-py" / "images_evaluation.zip") as archive:
        name = next(n for n in archive.namelist() if "Tibetan/character42" in n and n.endswith("_07.png"))
        with archive.open(name) as file:
            picture = Image.open(file).convert("L")
    stored = everything.images[everything.names.index("Tibetan/character42") * 20 + 6, 0]
    expected = 255 - np.asarray(picture.resize((28, 28), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(stored.numpy(), expected)
    ink = data.to_store(picture)[0].float()
    assert np.corrcoef(ink.flatten(), stored.flatten())[0, 1] > 0.95


@needs_real_data
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_real_data_gives_20_way_tasks_in_every_split(real_root: Path, protocol: str) -> None:
    """A protocol whose smallest alphabet, or validation, cannot give the tasks that the papers report."""
    data = Omniglot(root=str(real_root), protocol=protocol, ways=20, shots=1, queries=15, download=False)
    for split in SPLITS:
        tasks = data.distribution(split)
        episodes = tasks.sample(range(3))
        assert episodes.support_x.shape == (3, 20, 1, 28, 28)
        assert all(len(set(row.tolist())) == 20 for row in episodes.task["classes"])
    assert len(data.distribution("test").class_names) == {"maml": 423, "vinyals": 1692}.get(protocol, 659)


@needs_real_data
def test_real_characters_are_told_apart_by_their_drawings(real_root: Path) -> None:
    """Drawings under the wrong character: the nearest support image would then be right by chance only."""
    tasks = Omniglot(root=str(real_root), protocol="alphabets", download=False, queries=5).distribution("test")
    episodes = tasks.sample(range(200))
    support, query = (x.flatten(2).float() for x in (episodes.support_x, episodes.query_x))
    nearest = torch.cdist(query, support).argmin(-1)
    accuracy = (episodes.support_y.gather(1, nearest) == episodes.query_y).float().mean()
    assert accuracy > 0.3  # 0.2 by chance, 0.39 as measured


def test_the_last_training_may_take_the_validation_characters_along(tmp_path: Path):
    """Would catch test characters among them, or validation characters left out."""
    data = fake_omniglot(tmp_path)(protocol="vinyals", root=str(tmp_path), train_on_val=True)
    plain = fake_omniglot(tmp_path)(protocol="vinyals", root=str(tmp_path))
    names = {split: set(plain.classes(split).names) for split in ("train", "val", "test")}
    assert set(data.classes("train").names) == names["train"] | names["val"]
    assert set(data.classes("test").names) == names["test"]
