"""Glyphs, the pictures that users bring, and the cache that all image data sets share."""

from __future__ import annotations

import errno
import logging
import os
import threading
import unicodedata
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

import app  # noqa: F401  first, as in a run: it makes pytorch_lightning importable beside a broken torchvision
from datamodules.core.streams import SPLITS
from datamodules.images import cache, glyphs
from datamodules.images.glyphs import INSTANCES, SCRIPTS, SIZE, Glyphs
from datamodules.images.omniglot import Omniglot
from datamodules.images.preprocessing import ink
from datamodules.images.tasks import ImageClasses


@pytest.fixture(scope="module")
def letters() -> list[glyphs.Letter]:
    return glyphs.draw_letters([script for scripts in SCRIPTS.values() for script in scripts])


@pytest.fixture(scope="module")
def selected(letters) -> list[glyphs.Letter]:
    return glyphs.select(letters)


@pytest.fixture(scope="module")
def data(selected, tmp_path_factory) -> Glyphs:
    """The real thing, prepared; the fixture shares the drawing and selection with the other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyphs, "draw_letters", lambda scripts: selected)
        patch.setattr(glyphs, "select", lambda drawn: drawn)
        data = Glyphs(root=str(tmp_path_factory.mktemp("data")), ways=5, shots=1, queries=5)
        data.prepare_data()
    return data


def chars(classes: ImageClasses) -> list[str]:
    return [chr(int(name.split("U+")[1].split()[0], 16)) for name in classes.names]


# --- what the letters are


def test_splits_share_no_script(data):
    """A script in two splits: meta-test letters would be drawn in a style that meta-training knows."""
    scripts = {split: set(data.classes(split).groups) for split in SPLITS}
    assert not scripts["train"] & scripts["test"]
    assert not scripts["train"] & scripts["val"]
    assert not scripts["val"] & scripts["test"]
    assert {s.upper() for group in scripts.values() for s in group} == {s for group in SCRIPTS.values() for s in group}


def test_splits_are_large_enough(data):
    """A selection that drops too much: no 20-way tasks, or a meta-training split smaller than the others."""
    sizes = {split: len(data.classes(split)) for split in SPLITS}
    assert sizes["train"] > 250
    assert sizes["test"] > 150
    assert sizes["val"] > 50
    assert sum(count >= 20 for count in Counter(data.classes("test").groups).values()) >= 5
    assert all((data.classes(split).counts == INSTANCES).all() for split in SPLITS)


def test_names_are_unique_and_tell_the_character(data):
    """Two classes of one name, or a name that does not say which character it is."""
    names = [name for split in SPLITS for name in data.classes(split).names]
    assert len(set(names)) == len(names)
    assert "Hebrew/U+05D0 hebrew letter alef" in names
    assert all(
        name.endswith(" " + unicodedata.name(char).lower())
        for split in SPLITS
        for name, char in zip(data.classes(split).names, chars(data.classes(split)), strict=True)
    )


def test_no_letter_with_a_diacritic(data):
    """Accented forms as classes of their own: a task could ask to tell e from é."""
    for split in SPLITS:
        for char in chars(data.classes(split)):
            assert unicodedata.normalize("NFD", char) == char
            assert " WITH " not in unicodedata.name(char)


@pytest.mark.parametrize("pair", ["iı", "ᐁᐌ", "ᑌᑘ", "بت", "حج", "سش", "ⵔⵙ"])
def test_detached_dots_make_no_class(data, pair):
    """Dots that Unicode counts as part of the letter, which no decomposition removes: W-series syllabics, Arabic."""
    assert sum(char in pair for split in SPLITS for char in chars(data.classes(split))) <= 1


@pytest.mark.parametrize("alike", ["AΑАᗅꓮ", "oOοΟоОօՕⵔߋ", "cCсСϹꓚ", "xXΧхХꓫⵝ𐌗", "TΤТꓔ𐌕", "PΡрРᑭ", "sSЅѕՏꓢ", "ԼLꓡ"])
def test_letters_that_look_the_same_are_one_class(data, letters, alike):
    """Latin, Greek and Cyrillic A as three classes, c and C as two: labels that nothing in the image can tell."""
    assert sum(chr(letter.code) in alike for letter in letters) > 1  # the fonts have them, selection drops them
    assert sum(char in alike for split in SPLITS for char in chars(data.classes(split))) <= 1


def closest_across_splits(letters: list[glyphs.Letter]) -> float:
    """The highest correlation of two clean drawings of different splits: another measure than that of selection."""
    split = np.array([next(s for s in SPLITS if letter.script in SCRIPTS[s]) for letter in letters])
    drawn = torch.from_numpy(np.stack([letter.faces[0] for letter in letters]))[:, None]
    vectors = torch.nn.functional.avg_pool2d(drawn, 4).flatten(1)
    vectors = vectors - vectors.mean(1, keepdim=True)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    return float((vectors @ vectors.T)[torch.from_numpy(split[:, None] != split)].max())


def test_no_near_duplicates_across_splits(letters, selected):
    """A meta-test letter drawn as a meta-training letter: the split would not measure generalisation."""
    assert closest_across_splits(letters) > 0.99  # so the test can fail
    assert closest_across_splits(selected) < 0.95


def test_unlikeness_counts_strokes_and_not_weight(letters):
    """A measure that drops E because of F, or keeps a letter because its double is slanted or bold."""
    by_char = {chr(letter.code): letter for letter in letters}
    distance = glyphs.unlikeness([by_char[char] for char in "EFAΑOQ"])
    assert torch.isfinite(distance).all()
    assert torch.equal(distance, distance.T)
    assert distance[0, 1] > glyphs._SAME_ACROSS
    assert distance[4, 5] > glyphs._SAME_ACROSS
    assert distance[2, 3] == 0
    regular, *others = by_char["R"].faces[:4]
    faces = [glyphs.Letter(82, "LATIN", face[None]) for face in (regular, *others)]
    assert glyphs.unlikeness(faces)[0].max() < glyphs._SAME_ACROSS


def test_no_missing_glyph_box(letters):
    """A face without the letter drawn all the same: its box for missing glyphs would be an instance of the class."""
    import matplotlib

    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    box = glyphs._draw(ImageFont.truetype(str(font), glyphs._EM, layout_engine=ImageFont.Layout.BASIC), "\U0010fffe")
    assert box is not None
    assert box.any()
    assert not any((face == box).all() for letter in letters for face in letter.faces)


# --- what the images are


def test_images_are_the_same_whatever_is_drawn_beside_them(data, selected):
    """Drawings that depend on a global random state, on the order or on the number of letters."""
    everything = data._all
    some = [*range(0, len(selected), 29)][::-1]
    torch.manual_seed(1)
    again = glyphs.render([selected[k] for k in some]).view(len(some), INSTANCES, 1, SIZE, SIZE)
    expected = everything.images.view(-1, INSTANCES, 1, SIZE, SIZE)[some]
    # Sums over batches of another size may round differently: one grey level.
    assert (again.int() - expected.int()).abs().max() <= 1


def test_two_renders_are_identical_to_the_byte(selected):
    """Any hidden state between two calls: the cache would differ between machines that build it."""
    assert torch.equal(glyphs.render(selected[:40]), glyphs.render(selected[:40]))


def test_strokes_are_bright_and_inside_the_image(data):
    """The wrong polarity, a letter cut at the border, an image that is empty or filled."""
    images = data._all.images
    assert images.shape[1:] == (1, SIZE, SIZE)
    assert images.dtype == torch.uint8
    for border in (images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]):
        assert not border.any()
    share = images.float().mean((1, 2, 3)) / 255
    assert images.flatten(1).amax(1).min() > 200
    assert share.min() > 0.01
    assert share.max() < 0.5


def test_strokes_are_not_broken(data, selected):
    """Thinning that eats hairlines: a letter of one part would be drawn as several."""
    single = [k for k, letter in enumerate(selected) if chr(letter.code) in "LCԱϪᑌⵎⵣᏚ6ᒧՒФЖ"]
    assert len(single) >= 4
    images = data._all.images.view(-1, INSTANCES, SIZE, SIZE)[single].flatten(0, 1)
    whole = (images > 60).float()
    body = glyphs._bodies(whole)
    assert (body.sum((1, 2)) >= 0.95 * whole.sum((1, 2))).float().mean() > 0.97


def test_pixels_alone_do_not_solve_a_task(data):
    """Variation lost (copies of one drawing) or overdone (nothing in common): 1-nearest-neighbour accuracy tells."""
    episodes = data.distribution("test").sample(range(400))
    support, query = (x.flatten(2).float() for x in (episodes.support_x, episodes.query_x))
    nearest = torch.cdist(query, support).argmin(-1)
    accuracy = (nearest == episodes.query_y).float().mean()
    assert 0.45 < accuracy < 0.7


# --- the data module


def test_a_second_run_reads_the_cache(data, monkeypatch):
    """A key that never matches: every run would draw the letters again."""
    monkeypatch.setattr(glyphs, "build_classes", lambda: pytest.fail("built again"))
    again = Glyphs(root=data.root)
    again.prepare_data()
    for split in SPLITS:
        assert torch.equal(again.classes(split).images, data.classes(split).images)
        assert again.classes(split).names == data.classes(split).names


def test_a_new_version_is_drawn_again(data, monkeypatch, tmp_path):
    """Images of an older version taken for the present ones."""
    small = data.classes("val").select([0, 20, 40])
    monkeypatch.setattr(glyphs, "build_classes", lambda: small)
    Glyphs(root=str(tmp_path)).prepare_data()
    newer = small.select([2, 1, 0])
    monkeypatch.setattr(glyphs, "build_classes", lambda: newer)
    assert Glyphs(root=str(tmp_path)).classes("val").names == small.names
    monkeypatch.setattr(glyphs, "VERSION", glyphs.VERSION + 1)
    assert Glyphs(root=str(tmp_path)).classes("val").names == newer.names


def test_to_store_keeps_a_stored_image(data):
    """A prediction on a picture of the data set itself that sees something else than training did."""
    images = data.classes("test").images[::97]
    full = images[images.flatten(1).amax(1) == 255]
    assert len(full) > 10
    for image in full:
        assert torch.equal(data.to_store(Image.fromarray(image[0].numpy())), image)
        assert torch.equal(data.to_store(Image.fromarray(255 - image[0].numpy())), image)


def test_every_stored_image_comes_back_as_it_is(data):
    """Catches a drawing of the data set that is taken for too small: of thousands, on either paper."""
    for split in SPLITS:
        for image in data.classes(split).images[::3]:
            for drawn in (image[0].numpy(), 255 - image[0].numpy()):
                assert torch.equal(data.to_store(Image.fromarray(drawn)), image)


# --- pictures of users


FONT = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def letter(char: str, height: int, place: tuple[float, float], page: tuple[int, int] = (400, 300)) -> Image.Image:
    """A letter whose capital is ``height`` pixels high, black on white, at shares of the room that is left."""
    ink_of = Image.new("L", page)
    ImageDraw.Draw(ink_of).text((40, 0), char, fill=255, font=ImageFont.truetype(FONT, round(height / 0.73)))
    ink_of = ink_of.crop(ink_of.getbbox())
    image = Image.new("L", page, 255)
    corner = [round(share * (room - own)) for share, room, own in zip(place, page, ink_of.size, strict=True)]
    image.paste(0, (corner[0], corner[1]), ink_of)
    return image


@pytest.mark.parametrize("height", [20, 60, 120])
@pytest.mark.parametrize("char", "AgRЖ")
def test_a_small_letter_is_seen_as_those_of_the_data_set(char: str, height: int):
    """Catches small or off-centre letters that a learner, which saw large ones alone, is sure of and wrong."""
    data = Glyphs()
    seen = data.to_store(letter(char, height, (0.5, 0.5)))
    for place in ((0.02, 0.03), (0.97, 0.4), (0, 1), (1, 1)):
        assert torch.equal(data.to_store(letter(char, height, place)), seen)
    spans = []
    for axis in (1, 2):
        at = (seen > 76).any(axis).flatten().nonzero().flatten()
        assert abs(int(at[0]) + int(at[-1]) + 1 - SIZE) <= 2
        spans.append(len(at))
    assert 18 <= max(spans) <= 21
    by_hand = ImageOps.invert(letter(char, 150, (0.5, 0.5)))
    by_hand = by_hand.crop(by_hand.getbbox())
    side = round(max(by_hand.size) / 0.69)
    page = Image.new("L", (side, side))
    page.paste(by_hand, ((side - by_hand.width) // 2, (side - by_hand.height) // 2))
    both = torch.stack([data.to_store(image).flatten().float() for image in (letter(char, height, (0, 0)), page)])
    assert torch.corrcoef(both)[0, 1] > 0.9


def test_only_what_asks_for_it_fills_the_frame():
    """Catches another frame for data sets that keep theirs, a dot or an empty page that fails."""
    image = letter("A", 40, (0.1, 0.9))
    assert torch.equal(Omniglot().to_store(image), ink(image))
    assert int((ink(image)[0] > 76).any(1).sum()) < 6
    assert not Glyphs().to_store(Image.new("L", (40, 40), 128)).any()
    dot = Image.new("L", (300, 200), 255)
    dot.putpixel((299, 0), 0)
    assert Glyphs().to_store(dot).max() == 255
    assert Glyphs().to_store(Image.new("L", (1, 1))).shape == (1, SIZE, SIZE)


def picture(width: int = 60, height: int = 60, paper=255, strokes=0, mode: str = "L") -> Image.Image:
    """A T with a thick bar at the top."""
    image = Image.new(mode, (width, height), paper)
    pen = ImageDraw.Draw(image)
    pen.rectangle([width * 0.2, height * 0.15, width * 0.8, height * 0.3], fill=strokes)
    pen.rectangle([width * 0.42, height * 0.15, width * 0.58, height * 0.85], fill=strokes)
    return image


EXPECTED = ink(picture())


def palette() -> Image.Image:
    image = picture(paper=1, strokes=2, mode="P")
    image.putpalette([9, 9, 9, 250, 250, 250, 0, 0, 0])
    return image


def transparent_palette() -> Image.Image:
    image = palette()
    image.putpalette([9, 9, 9, 0, 0, 0, 0, 0, 0])  # paper has the colour of ink, and only transparency tells them apart
    image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    "image",
    [
        picture(paper=0, strokes=255),
        picture(paper=(255, 250, 250), strokes=(10, 0, 90), mode="RGB"),
        picture(paper=(0, 0, 0, 0), strokes=(0, 0, 0, 255), mode="RGBA"),
        picture(paper=(255, 255, 255, 0), strokes=(0, 0, 0, 255), mode="RGBA"),
        picture(paper=(0, 0), strokes=(0, 255), mode="LA"),
        picture(paper=1, strokes=0, mode="1"),
        picture(paper=0, strokes=1, mode="1"),
        picture(paper=60_000, strokes=300, mode="I;16"),
        picture(paper=0.0, strokes=1.0, mode="F"),
        picture(paper=160, strokes=90),
        palette(),
        transparent_palette(),
    ],
    ids=["white on black", "colours", "clear black", "clear white", "LA", "1 bit", "1 bit inverse", "16 bits", "float",
         "faint", "palette", "clear palette"],
)  # fmt: skip
def test_ink_sees_the_same_letter_in_every_mode(image):
    """The wrong polarity, alpha read as black, a palette's indices or 16 bits read as grey, faint contrast."""
    assert EXPECTED[0, 6, 14] == 255
    assert EXPECTED[0, 20, 4] == 0
    assert (ink(image).int() - EXPECTED.int()).abs().max() <= 6


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (301, 7), (37, 91), (28, 28), (3, 5), (2000, 1999)])
@pytest.mark.parametrize("paper", [0, 255])
def test_ink_of_odd_sizes(size, paper):
    """A size that fails, is stretched to a square, or is padded with ink instead of paper."""
    result = ink(picture(*size, paper=paper, strokes=255 - paper))
    assert result.shape == (1, 28, 28)
    assert result.dtype == torch.uint8
    if min(size) >= 28:
        seen = result[0] > 60
        height, width = int(seen.any(1).sum()), int(seen.any(0).sum())
        assert height / width == pytest.approx(0.7 * size[1] / (0.6 * size[0]), rel=0.25)
        assert not result[0, :, 0].any()
        assert not result[0, -1].any()


def test_ink_keeps_thin_strokes_of_large_pictures():
    """A hairline of a photo that is averaged away."""
    image = Image.new("L", (900, 900), 255)
    ImageDraw.Draw(image).line([(100, 450), (800, 450)], fill=0, width=2)
    assert ink(image).max() == 255


def test_ink_of_an_empty_picture_is_empty():
    """A division by the contrast of nothing."""
    for paper in (0, 128, 255):
        assert not ink(Image.new("L", (40, 40), paper)).any()


def test_ink_turns_a_photo_the_right_way_up(tmp_path):
    """The orientation of a camera ignored: the letter would lie on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the viewer has to turn by 90° clockwise
    picture().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=exif)
    with Image.open(tmp_path / "photo.png") as photo:
        assert (ink(photo).int() - EXPECTED.int()).abs().max() <= 6


def test_ink_is_smoothed():
    """Nearest-neighbour shrinking: strokes would be jagged or lost, unlike the stored images."""
    image = picture(333, 333)
    values = ink(image).unique()
    assert len(values) > 4


# --- the cache


def some_classes(first: int = 0) -> ImageClasses:
    images = torch.arange(first, first + 5 * 12, dtype=torch.uint8).view(5, 1, 3, 4)
    return ImageClasses(images, np.array([2, 3]), ["Ünïcode/ⵣ", 'quote " and\nnewline'], ["a", "b"])


def same(a: ImageClasses, b: ImageClasses) -> bool:
    return (
        torch.equal(a.images, b.images)
        and a.counts.tolist() == b.counts.tolist()
        and a.counts.dtype == b.counts.dtype
        and a.names == b.names
        and a.groups == b.groups
    )


KEY = {"name": "test", "version": 1, "sizes": (28, 28)}


def never() -> ImageClasses:
    pytest.fail("built again")


def test_cache_gives_back_what_was_built(tmp_path, caplog):
    """A round trip that loses or changes something, or a cache that is not used."""
    path = tmp_path / "deep" / "folder" / "x.bin"
    assert same(cache.load_or_build(path, KEY, some_classes), some_classes())
    loaded = cache.load_or_build(path, KEY, never)
    assert same(loaded, some_classes())
    loaded.images.add_(1)  # of memory of its own
    assert same(cache.load_or_build(path, KEY, never), some_classes())
    assert not caplog.records
    assert [p.name for p in path.parent.iterdir()] == ["x.bin"]


def test_cache_holds_no_images(tmp_path):
    """An empty data set that cannot be read back."""
    empty = ImageClasses(torch.zeros(0, 1, 3, 4, dtype=torch.uint8), np.zeros(0, np.int64), [], [])
    cache.load_or_build(tmp_path / "x", KEY, lambda: empty)
    assert same(cache.load_or_build(tmp_path / "x", KEY, never), empty)


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGE = {
    "empty": lambda data: b"",
    "half of the seal": lambda data: data[:40],
    "half of the header": lambda data: data[:150],
    "half of the images": lambda data: data[:-30],
    "last byte missing": lambda data: data[:-1],
    "one byte more": lambda data: data + b"\0",
    "a bit of the images": lambda data: flip(data, len(data) - 7),
    "a bit of a name": lambda data: flip(data, data.index(b"quote")),
    "a bit of the checksum": lambda data: flip(data, 30),
    "zeros after a crash": lambda data: bytes(len(data)),
    "another file": lambda data: b"PK\3\4" + data,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_cache_rebuilds_a_damaged_file(tmp_path, caplog, damage):
    """A truncated or altered file that is trusted, or that stops the run."""
    path = tmp_path / "x.bin"
    cache.load_or_build(path, KEY, some_classes)
    path.write_bytes(damage(path.read_bytes()))
    assert same(cache.load_or_build(path, KEY, lambda: some_classes(100)), some_classes(100))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert str(path) in caplog.text
    assert caplog.records[0].getMessage().count("\n") == 0
    assert same(cache.load_or_build(path, KEY, never), some_classes(100))  # and it is whole again


@pytest.mark.parametrize("changed", [{"version": 2}, {"sizes": (28, 29)}, {"more": 1}])
def test_cache_rebuilds_for_another_key(tmp_path, caplog, changed):
    """Images of other settings taken for those that the run asks for; the warning says which setting it was."""
    path = tmp_path / "x.bin"
    cache.load_or_build(path, KEY, some_classes)
    assert same(cache.load_or_build(path, KEY | changed, lambda: some_classes(9)), some_classes(9))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert next(iter(changed)) in caplog.text
    assert same(cache.load_or_build(path, KEY | changed, never), some_classes(9))


def test_cache_survives_a_full_disk(tmp_path, caplog, monkeypatch):
    """A full disk that stops the run, replaces a good file by half of one, or is left with the half-written file."""
    path = tmp_path / "x.bin"
    cache.load_or_build(path, KEY, some_classes)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert same(cache.load_or_build(path, KEY | {"version": 2}, lambda: some_classes(7)), some_classes(7))
    assert os.strerror(errno.ENOSPC) in caplog.records[-1].getMessage()
    assert all(record.levelno == logging.WARNING and "\n" not in record.getMessage() for record in caplog.records)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_cache_goes_on_where_it_cannot_write(tmp_path, caplog):
    """A folder that cannot be made (or is read-only) that stops the run."""
    (tmp_path / "file").write_text("not a folder")
    result = cache.load_or_build(tmp_path / "file" / "x.bin", KEY, some_classes)
    assert same(result, some_classes())
    assert caplog.records
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_letters_are_drawn_once_where_the_root_is_read_only(tmp_path, monkeypatch):
    """Letters drawn again by every run: they are kept in the user's cache instead."""
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(glyphs, "build_classes", some_classes)
    first = glyphs.Glyphs(root=str(tmp_path / "file"))
    first.prepare_data()
    monkeypatch.setattr(glyphs, "build_classes", never)
    assert same(glyphs.Glyphs(root=str(tmp_path / "file"))._all, some_classes())


def test_cache_interrupted_leaves_nothing(tmp_path, monkeypatch):
    """Ctrl-C while writing: neither a file that the next run trusts nor one that fills the disk."""

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.load_or_build(tmp_path / "x.bin", KEY, some_classes)
    assert not list(tmp_path.iterdir())


def test_cache_ignores_the_part_of_a_killed_process(tmp_path):
    """A half-written file of another process taken for the cache, or in the way of writing it."""
    (tmp_path / ".x.bin.1.0.part").write_bytes(b"half")
    assert same(cache.load_or_build(tmp_path / "x.bin", KEY, some_classes), some_classes())
    assert same(cache.load_or_build(tmp_path / "x.bin", KEY, never), some_classes())


def test_cache_is_built_by_several_at_once(tmp_path):
    """Ranks of one run that write into each other's file."""
    path, together, results = tmp_path / "x.bin", threading.Barrier(4), []

    def build() -> ImageClasses:
        together.wait(10)  # all have found no file
        return some_classes()

    threads = [threading.Thread(target=lambda: results.append(cache.load_or_build(path, KEY, build))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(same(result, some_classes()) for result in results)
    assert same(cache.load_or_build(path, KEY, never), some_classes())
    assert list(tmp_path.iterdir()) == [path]


def test_cache_refuses_what_it_cannot_hold(tmp_path):
    """Float images written as bytes: the file would never be read again."""
    floats = ImageClasses(torch.zeros(1, 1, 2, 2), np.array([1]), ["a"], ["g"])
    with pytest.raises(TypeError, match="uint8"):
        cache.load_or_build(tmp_path / "x.bin", KEY, lambda: floats)
