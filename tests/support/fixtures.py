"""Small stand-ins for what the tests cannot bring along: Omniglot, a tree of images, a server of files."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import app  # noqa: F401  first, as in a run: it makes pytorch_lightning importable beside a broken torchvision
from datamodules.images.omniglot import Omniglot

# A few characters of a few alphabets, of each kind that a protocol treats on its own. Gurmukhi is whole: the Vinyals
# split goes through it.
CHARACTERS = {
    "images_background": {"Armenian": 5, "Early_Aramaic": 5, "Greek": 6, "Latin": 5, "Tagalog": 3},
    "images_evaluation": {"Angelic": 5, "Gurmukhi": 45, "Kannada": 6},
}
DRAWERS = 4


def real_data() -> Path | None:
    """The folder with the real Omniglot (``omniglot-py``) and its published splits, where there is one."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("METABOLT_DATA", beside))
    return folder if folder.is_dir() else None


def drawing(alphabet: str, character: int, drawer: int) -> Image.Image:
    """A character as Omniglot has it: 105x105, one bit, black on white; three strokes that a drawer moves a little."""
    strokes = np.random.default_rng([*alphabet.encode(), character]).uniform(15, 90, (3, 4))
    strokes += np.random.default_rng([*alphabet.encode(), character, drawer]).uniform(-4, 4, (3, 4))
    image = Image.new("1", (105, 105), 1)
    for stroke in strokes:
        ImageDraw.Draw(image).line([float(v) for v in stroke], fill=0, width=3)
    return image


def fake_omniglot(folder: Path, drawers: int = DRAWERS, smallest: int = 1) -> type[Omniglot]:
    """Writes the two archives into ``folder``; the class that takes them for the whole of Omniglot.

    Args:
        folder: of the archives.
        drawers: of each character.
        smallest: characters that every alphabet has at least.
    """
    characters = {
        set_name: {alphabet: max(count, smallest) for alphabet, count in alphabets.items()}
        for set_name, alphabets in CHARACTERS.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    checksums, number = {}, 0
    for set_name, alphabets in characters.items():
        path = folder / f"{set_name}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{set_name}/", "")
            for alphabet, count in alphabets.items():
                for character in range(1, count + 1):
                    number += 1
                    for drawer in range(1, drawers + 1):
                        png = io.BytesIO()
                        drawing(alphabet, character, drawer).save(png, "PNG")
                        name = f"{set_name}/{alphabet}/character{character:02d}/{number:04d}_{drawer:02d}.png"
                        archive.writestr(name, png.getvalue())
                        archive.writestr(f"__MACOSX/{Path(name).parent}/._{Path(name).name}", b"a Mac's own")
        checksums[set_name] = hashlib.md5(path.read_bytes()).hexdigest()
    sizes = {"train": 50, "val": 10, "test": 20}
    return type(
        "FakeOmniglot",
        (Omniglot,),
        {"characters": characters, "drawers": drawers, "checksums": checksums, "maml_sizes": sizes},
    )


def image_tree(root: Path, counts: Mapping[str, int], size: tuple[int, int] = (20, 16)) -> Path:
    """Writes ``counts[name]`` PNGs into ``root/name`` for each name; every image has a colour of its own."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", size, (10 * number + 5, 10 * i + 5, 99)).save(root / name / f"{i:02d}.png")
    return root


class Mirror:
    """A server of files on the loopback.

    Attributes:
        url: its address, without a slash at the end.
        files: name to content; what is not here is a 404.
        cuts: for each request to come, in turn, the bytes after which the connection breaks; None does not break.
        ranges: whether it honours the Range header.
        asked: the Range header of each request for a file so far, or None.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.cuts, self.ranges = files, [], True
        self.asked: list[str | None] = []
        self.url = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.asked.append(wanted)
        content = self.files.get(request.path.lstrip("/"))
        if content is None:
            request.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if start >= len(content):
            request.send_error(416)
            return
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        cut = self.cuts.pop(0) if self.cuts else None
        request.wfile.write(content[start:] if cut is None else content[start : start + cut])


@contextmanager
def mirror(files: dict[str, bytes]) -> Iterator[Mirror]:
    """A running Mirror."""
    served = Mirror(files)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()


def dead_address() -> str:
    """An address of the loopback where nothing listens."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return f"http://127.0.0.1:{server.server_address[1]}"
