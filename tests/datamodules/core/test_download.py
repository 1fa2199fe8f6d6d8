"""The downloader against a server on the loopback that breaks, lies and is not there."""

from __future__ import annotations

import hashlib
import random
import threading
from pathlib import Path

import pytest

from datamodules.core import download as module
from datamodules.core.download import DownloadError, download, user_cache, writable_folder
from tests.support.fixtures import dead_address, mirror

CONTENT = random.Random(0).randbytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_file_arrives_whole_and_alone(tmp_path: Path) -> None:
    """A wrong name or content, a .part or lock left behind, a folder that is not made."""
    with mirror({"a.zip": CONTENT}) as m:
        path = download([f"{m.url}/a.zip"], tmp_path / "new" / "a.zip", MD5)
    assert path == tmp_path / "new" / "a.zip"
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["a.zip"]
    assert m.asked == [None]


def test_broken_transfer_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """An early end of the connection taken for the end of the file, or a start from the first byte again."""
    with mirror({"a.zip": CONTENT}) as m:
        m.cuts = [100_000, 50_000]
        path = download([f"{m.url}/a.zip"], tmp_path / "a.zip", MD5)
    assert path.read_bytes() == CONTENT
    assert m.asked == [None, "bytes=100000-", "bytes=150000-"]


def test_more_breaks_than_attempts_are_fine_while_bytes_arrive(tmp_path: Path) -> None:
    """A limit on the number of breaks of a slow line, in place of one on breaks that bring nothing."""
    with mirror({"a.zip": CONTENT}) as m:
        m.cuts = [20_000] * 10
        assert download([f"{m.url}/a.zip"], tmp_path / "a.zip", MD5).read_bytes() == CONTENT


def test_mirror_that_sends_nothing_is_given_up(tmp_path: Path) -> None:
    """An endless loop on a server that accepts, announces a length and breaks at once."""
    with mirror({"a.zip": CONTENT}) as m:
        m.cuts = [0] * 50
        with pytest.raises(DownloadError, match=r"stopped after 0 of 300000 bytes"):
            download([f"{m.url}/a.zip"], tmp_path / "a.zip", MD5)
    assert len(m.asked) == module.ATTEMPTS


def test_run_that_was_killed_is_resumed_by_the_next(tmp_path: Path) -> None:
    """A .part file that is ignored or overwritten."""
    (tmp_path / "a.zip.part").write_bytes(CONTENT[:123_456])
    with mirror({"a.zip": CONTENT}) as m:
        path = download([f"{m.url}/a.zip"], tmp_path / "a.zip", MD5)
    assert path.read_bytes() == CONTENT
    assert m.asked == ["bytes=123456-"]
    assert names(tmp_path) == ["a.zip"]


def test_run_killed_before_the_rename_needs_no_byte(tmp_path: Path) -> None:
    """A complete .part file, for which a server answers 416, that is taken for a failure."""
    (tmp_path / "a.zip.part").write_bytes(CONTENT)
    with mirror({"a.zip": CONTENT}) as m:
        assert download([f"{m.url}/a.zip"], tmp_path / "a.zip", MD5).read_bytes() == CONTENT
    assert m.asked == ["bytes=300000-"]


@pytest.mark.parametrize("stale", [b"x" * 1000, b"x" * 400_000], ids=["shorter", "longer"])
def test_stale_part_is_thrown_away(tmp_path: Path, stale: bytes) -> None:
    """A .part file of another file that makes every further run fail on its checksum."""
    (tmp_path / "a.zip.part").write_bytes(stale)
    with mirror({"a.zip": CONTENT}) as m:
        assert download([f"{m.url}/a.zip"], tmp_path / "a.zip", MD5).read_bytes() == CONTENT
    assert m.asked == [f"bytes={len(stale)}-", None]


def test_server_without_ranges_is_not_appended(tmp_path: Path) -> None:
    """The whole file, sent with status 200, put behind the part that is already there."""
    (tmp_path / "a.zip.part").write_bytes(CONTENT[:1000])
    with mirror({"a.zip": CONTENT}) as m:
        m.ranges = False
        assert download([f"{m.url}/a.zip"], tmp_path / "a.zip", MD5).read_bytes() == CONTENT
    assert len(m.asked) == 1  # right at once, not after a failed checksum


def test_wrong_checksum_is_refused_and_removed(tmp_path: Path) -> None:
    """A wrong file that gets its name, or whose remains are resumed for ever."""
    message = rf"wrong checksum, not {MD5}; removed .*a\.zip\.part"
    page = b"<html>sign in to the hotel's network</html>"
    with mirror({"a.zip": page}) as m, pytest.raises(DownloadError, match=message) as caught:
        download([f"{m.url}/a.zip"], tmp_path / "a.zip", MD5)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_mirrors_are_tried_in_turn(tmp_path: Path) -> None:
    """A mirror that is down, has no such file or another one that ends the download."""
    with mirror({}) as empty, mirror({"a.zip": b"another"}) as other, mirror({"a.zip": CONTENT}) as good:
        urls = [f"{url}/a.zip" for url in (dead_address(), empty.url, other.url, good.url)]
        assert download(urls, tmp_path / "a.zip", MD5).read_bytes() == CONTENT
    assert [len(m.asked) for m in (empty, other, good)] == [1, 1, 1]


def test_next_mirror_goes_on_where_the_last_stopped(tmp_path: Path) -> None:
    """What one mirror gave thrown away when it breaks down."""
    with mirror({"a.zip": CONTENT}) as first, mirror({"a.zip": CONTENT}) as second:
        first.cuts = [70_000] + [0] * 10
        download([f"{first.url}/a.zip", f"{second.url}/a.zip"], tmp_path / "a.zip", MD5)
    assert second.asked == ["bytes=70000-"]


def test_error_names_every_mirror_and_why(tmp_path: Path) -> None:
    """An error that hides the reason of all mirrors but the last, or of several lines."""
    dead = dead_address()
    with mirror({}) as empty, pytest.raises(DownloadError) as caught:
        download([f"{dead}/a.zip", f"{empty.url}/a.zip"], tmp_path / "a.zip", MD5)
    message = str(caught.value)
    assert message.startswith("cannot download a.zip: ") and "\n" not in message
    assert dead in message and "refused" in message
    assert empty.url in message and "HTTP 404" in message
    assert names(tmp_path) == []


def test_no_mirrors_are_an_error(tmp_path: Path) -> None:
    """An empty list that ends without file or error."""
    with pytest.raises(DownloadError, match="no mirrors"):
        download([], tmp_path / "a.zip", MD5)


@pytest.mark.skipif(module.fcntl is None, reason="no file locks on this platform")
def test_two_at_once_fetch_it_once(tmp_path: Path) -> None:
    """Two runs of a sweep that write into one .part file."""
    paths: list[Path] = []
    with mirror({"a.zip": CONTENT}) as m:
        fetch = lambda: paths.append(download([f"{m.url}/a.zip"], tmp_path / "a.zip", MD5))  # noqa: E731
        threads = [threading.Thread(target=fetch) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(paths) == 16
    assert len(m.asked) == 1
    assert names(tmp_path) == ["a.zip"]
    assert paths[0].read_bytes() == CONTENT


def test_user_cache_stands_in_for_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies on a read-only data folder, or moves elsewhere from one that it could write."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert writable_folder(tmp_path / "data" / "new") == tmp_path / "data" / "new"
    (tmp_path / "file").touch()
    assert writable_folder(tmp_path / "file" / "below") == user_cache() == tmp_path / "cache" / "metabolt"
    assert names(tmp_path / "data" / "new") == []
