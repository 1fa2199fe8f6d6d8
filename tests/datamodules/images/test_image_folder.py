"""A tree of image files as a task distribution."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image, ImageDraw

from datamodules.core.errors import DataError
from datamodules.core.streams import SPLITS
from datamodules.images import image_folder
from datamodules.images.image_folder import ImageFolder
from datamodules.images.tasks import ImageDataModule
from tests.support.fixtures import image_tree
from tests.support.processes import ROOT

TEN = {f"class{i}": 4 + i % 3 for i in range(10)}
SMALL = {"ways": 2, "shots": 1, "queries": 2, "size": 8}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten classes of 4 to 6 images."""
    return image_tree(tmp_path / "tree", TEN)


def folder(root: Path, **settings) -> ImageFolder:
    return ImageFolder(root=str(root), **{**SMALL, **settings})


def one_line(caught: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_image_arrives_under_its_class(root: Path) -> None:
    """Images in another order than their classes and counts, mixed colours, a file or class that is left out."""
    data = folder(root, fractions=(0.5, 0.3, 0.2))
    data.prepare_data()
    seen = {}
    for split in SPLITS:
        classes = data.classes(split)
        assert classes.images.dtype == torch.uint8 and classes.images.shape[1:] == (3, 8, 8)
        for k, name in enumerate(classes.names):
            seen[name] = int(classes.counts[k])
            images = classes.images[classes.starts[k] : classes.starts[k] + classes.counts[k]]
            number = int(name.removeprefix("class"))
            for i, image in enumerate(images):  # the colours that image_tree gave them
                assert image.flatten(1).unique(dim=1).flatten().tolist() == [10 * number + 5, 10 * i + 5, 99]
    assert seen == TEN
    episodes = data.distribution("train").sample(range(3))
    assert episodes.support_x.shape == (3, 2, 3, 8, 8) and episodes.query_x.shape == (3, 4, 3, 8, 8)


def test_fractions_split_the_classes_by_seed(root: Path) -> None:
    """Shares that are not what was asked for, a class in two splits or in none, a split that ignores the seed."""
    splits = [folder(root, seed=seed).split_names() for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]
    assert [len(splits[0][split]) for split in SPLITS] == [6, 2, 2]
    assert sorted(name for names in splits[0].values() for name in names) == sorted(TEN)


def test_lists_split_the_classes(root: Path, tmp_path: Path) -> None:
    """Lists, in the configuration or in a file, that are ignored, padded with other classes or doubled."""
    (tmp_path / "test.txt").write_text("class7\n\n  class8\r\nclass7\n", encoding="utf-8")
    data = folder(
        root,
        train_classes=["class1", "class0", "class1"],
        val_classes=["class2", "class3"],
        test_classes=str(tmp_path / "test.txt"),
    )
    data.prepare_data()
    names = {split: data.classes(split).names for split in SPLITS}
    assert names == {"train": ["class1", "class0"], "val": ["class2", "class3"], "test": ["class7", "class8"]}


@pytest.mark.parametrize("fractions", [(0.5, 0.5, 0.5), (1.2, -0.2, 0.0)])
def test_fractions_that_are_no_shares_are_refused(fractions: tuple[float, float, float]) -> None:
    """Classes that are silently left out of all splits."""
    with pytest.raises(ValueError, match=r"fractions are .* of sum 1"):
        ImageFolder(fractions=fractions)


def test_some_lists_only_are_refused() -> None:
    """Fractions for one split and a list for another, which would overlap."""
    with pytest.raises(ValueError, match=r"val_classes and test_classes must be given too"):
        ImageFolder(train_classes=["a"])


# -------------------------------------------------------------------------------------------------------------- images


def test_images_are_scaled_without_distortion_and_antialiased(root: Path) -> None:
    """A squeezed image, one that is cropped off its middle, or aliasing."""
    wide = Image.new("RGB", (400, 200), "black")
    ImageDraw.Draw(wide).ellipse((120, 20, 280, 180), fill="white")
    stored = folder(root, size=20, channels=1).to_store(wide)[0].float() / 255
    assert stored.shape == (20, 20)
    rows, columns = (torch.nonzero(stored.sum(d) > 0.5).flatten() for d in (1, 0))
    assert (rows[0], rows[-1]) == (columns[0], columns[-1]) == (2, 17)  # a circle of 160 of 200 pixels, in the middle
    stripes = np.tile(np.uint8([[0, 255]]), (200, 100))  # too fine for 20 pixels: grey, not black or white
    stored = folder(root, size=20, channels=1).to_store(Image.fromarray(stripes)).float()
    assert stored[..., 1:-1].sub(127.5).abs().max() < 20


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16"])
def test_every_kind_of_file_is_read(tmp_path: Path, mode: str, channels: int) -> None:
    """Palette, transparent, 16-bit or one-bit images that fail, turn black or turn white."""
    if mode == "I;16":
        image = Image.fromarray(np.full((9, 9), 200 * 257, np.uint16))
    else:
        image = Image.new("RGB", (9, 9), (200, 200, 200)).convert(mode)
    stored = ImageFolder(size=4, channels=channels).to_store(image)
    assert stored.shape == (channels, 4, 4) and stored.dtype == torch.uint8
    assert abs(stored.float().mean() - (255 if mode == "1" else 200)) < (60 if mode == "1" else 4)


def test_transparency_is_seen_on_white(tmp_path: Path) -> None:
    """A drawing on a transparent ground that is stored as black on black; Pillow's warning about palettes."""
    drawing = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    drawing.paste((0, 0, 0, 255), (0, 0, 4, 8))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 0, 0, 0])
    palette.paste(0, (0, 0, 4, 8))
    palette.save(tmp_path / "p.png", transparency=bytes([255, 0]))
    for image in (drawing, Image.open(tmp_path / "p.png")):
        stored = ImageFolder(size=8).to_store(image)
        assert stored[:, 4, 1].tolist() == [0, 0, 0] and stored[:, 4, 6].tolist() == [255, 255, 255]
        image.close()


def test_photo_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    """Photos of a phone that lie on their side."""
    photo = Image.new("L", (8, 8), 0)
    photo.paste(255, (0, 0, 8, 2))  # bright at the top of the sensor
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    photo.save(tmp_path / "a.jpg", exif=exif, quality=100)
    with Image.open(tmp_path / "a.jpg") as image:
        stored = ImageFolder(size=8, channels=1).to_store(image)[0]
    assert stored[:, 7].min() > 200 and stored[:, 0].max() < 50


def test_all_file_types_and_no_others(tmp_path: Path) -> None:
    """A suffix in capitals, or a type that is not read; notes and hidden files taken for images."""
    for i in range(10):
        place = tmp_path / f"c{i}"
        place.mkdir()
        for name in ("a.jpg", "b.JPEG", "c.png", "d.bmp", "e.webp"):
            Image.new("RGB", (6, 6), (i, i, i)).save(place / name)
        (place / "notes.txt").write_text("no image")
        (place / ".hidden.png").write_bytes(b"no image")
    (tmp_path / ".git").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "readme.png").write_bytes(b"in no class")
    data = folder(tmp_path)
    data.prepare_data()
    assert sorted(data._all.names) == [f"c{i}" for i in range(10)]
    assert set(data._all.counts) == {5}


def test_what_predict_opens_is_packed_and_the_rest_is_told(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Classes of .tif, .gif or .jfif files, of files without a suffix or of folders within, that vanish; what is left
    out without a word; a pipe that is waited at, and a link to a folder above that is followed for ever."""
    image = Image.new("L", (6, 6), 77)
    kinds = {"tif": "TIFF", "gif": "GIF", "jfif": "JPEG", "ppm": "PPM"}
    for suffix, kind in kinds.items():
        (root / suffix).mkdir()
        for i in range(4):
            image.save(root / suffix / f"{i}.{suffix}", kind)
    (root / "nested" / "left" / "deep").mkdir(parents=True)
    for i in range(2):
        image.save(root / "nested" / "left" / f"{i}.png")
        image.save(root / "nested" / "left" / "deep" / f"{i}.png")
    (root / "bare").mkdir()
    for i in range(4):
        image.save(root / "bare" / str(i), "PNG")
    (root / "class0" / "notes.txt").write_text("no image")
    os.mkfifo(root / "class1" / "pipe")
    (root / "class2" / "above").symlink_to(root / "class2")
    data = folder(root)
    with caplog.at_level(logging.INFO):
        data.prepare_data()
    assert dict(zip(data._all.names, data._all.counts, strict=True)) == TEN | dict.fromkeys(
        [*kinds, "nested", "bare"], 4
    )
    told = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert told == [f"left out of {root}: 2 that hold no image of a class (class0/notes.txt, class1/pipe)"]


def test_cache_follows_folders_within_classes(root: Path) -> None:
    """An image that moves from one folder within a class to another and is packed from where it was."""
    first = root / "class0" / "00.png"
    (root / "class0" / "in").mkdir()
    before = folder(root)
    before.prepare_data()
    first.rename(root / "class0" / "in" / "zz.png")
    after = folder(root)
    after.prepare_data()
    assert torch.equal(after._all.images, after._pack().images)


def test_splits_are_no_classes(tmp_path: Path) -> None:
    """A tree of train/, val/ and test/ folders that becomes three classes of everything."""
    for split in ("train", "val", "test"):
        image_tree(tmp_path / split, TEN)
    with pytest.raises(DataError, match=r"are splits, not classes \(test, train, val\): set root") as caught:
        folder(tmp_path).prepare_data()
    one_line(caught)


def test_large_jpeg_is_stored_as_its_full_decoding_would_be(tmp_path: Path) -> None:
    """The fast path for large photos that is coarse: stored images unlike what a user's picture becomes."""
    waves = 128 + 100 * np.sin(np.add.outer(np.arange(800), np.arange(1000)) / 4)
    photo = Image.fromarray(waves.astype(np.uint8)).convert("RGB")
    image_tree(tmp_path, TEN)
    photo.save(tmp_path / "class0" / "00.jpg", quality=95)
    data = folder(tmp_path, size=128)
    data.prepare_data()
    stored = data._all.images[data._all.starts[data._all.names.index("class0")]].float()
    assert stored.std() > 30
    assert (stored - data.to_store(photo).float()).abs().max() < 12


# --------------------------------------------------------------------------------------------------------------- cache


def test_images_are_opened_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that is not used, or not shared by settings that do not change an image."""
    folder(root).prepare_data()
    monkeypatch.setattr(image_folder.Image, "open", lambda *_: pytest.fail("an image was opened again"))
    folder(root, seed=3, ways=2, queries=3, fractions=(0.4, 0.3, 0.3)).prepare_data()
    assert [p.name for p in root.iterdir() if p.is_file()] == [".metabolt-8x3.bin"]


@pytest.mark.parametrize("change", ["added", "removed", "changed", "renamed", "size", "channels"])
def test_cache_follows_the_tree(root: Path, change: str, caplog: pytest.LogCaptureFixture) -> None:
    """Training on images that are no longer those of the folder, or not of the size asked for."""
    folder(root).prepare_data()
    settings: dict = {}
    first = root / "class0" / "00.png"
    if change == "added":
        Image.new("RGB", (5, 5), (1, 2, 3)).save(root / "class0" / "zz.png")
    elif change == "removed":
        first.unlink()
    elif change == "changed":  # same length, as an editor that saves in place
        before = first.stat()
        first.write_bytes((root / "class0" / "01.png").read_bytes().ljust(before.st_size)[: before.st_size])
        os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    elif change == "renamed":
        first.rename(root / "class0" / "zz.png")
    else:
        settings = {"size": 6} if change == "size" else {"channels": 1}
    with caplog.at_level(logging.WARNING):
        data = folder(root, **settings)
        data.prepare_data()
    fresh = data._pack()
    assert torch.equal(data._all.images, fresh.images) and (data._all.counts == fresh.counts).all()
    assert ("another tree" in caplog.text) == (not settings)  # other sizes have caches of their own


def test_cache_goes_to_the_user_where_root_cannot_be_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only tree that cannot be used, or two trees that share one cache file."""
    monkeypatch.setattr(image_folder, "writable_folder", lambda _: tmp_path / "home")
    other = image_tree(tmp_path / "other", dict.fromkeys(TEN, 3))
    for place in (root, other, root):
        data = folder(place)
        data.prepare_data()
        assert data._all.counts.sum() == sum(TEN.values() if place == root else [30])
    assert len(list((tmp_path / "home").iterdir())) == 2
    assert not [p for p in root.iterdir() if p.is_file()]


# -------------------------------------------------------------------------------------------------------------- errors


def test_no_such_folder(tmp_path: Path) -> None:
    """A typing error in root that becomes a traceback, or a new empty folder."""
    with pytest.raises(DataError, match=r"there is no folder .*nowhere: set root") as caught:
        folder(tmp_path / "nowhere").prepare_data()
    one_line(caught)
    assert not (tmp_path / "nowhere").exists()


def test_folder_without_classes(tmp_path: Path) -> None:
    """Images that lie in root itself, without a word about where they belong."""
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(
        DataError, match=r"holds no images in folders: put those of each class into a folder of its own"
    ) as caught:
        folder(tmp_path).prepare_data()
    one_line(caught)


def test_too_few_images_name_the_class_and_the_split(tmp_path: Path) -> None:
    """A class of the test split that stops a run after the training, or an index error inside it."""
    image_tree(tmp_path, {**TEN, "class5": 2})
    lists = {"train_classes": ["class0", "class1"], "val_classes": ["class2", "class3"]}
    data = folder(tmp_path, **lists, test_classes=["class4", "class5"])
    with pytest.raises(DataError, match=r"class 'class5' \(test\) has 2 images .* 1 shots \+ 2 queries") as caught:
        data.prepare_data()
    one_line(caught)
    assert not list(tmp_path.glob(".metabolt*"))  # found before an image was opened


def test_fewer_classes_than_ways_name_the_split(root: Path) -> None:
    """Tasks with a class twice, or an error that does not say which split is short."""
    with pytest.raises(
        DataError, match=r"the val split has 2 classes but a task needs 3: .* lower ways to 2"
    ) as caught:
        folder(root, ways=3).prepare_data()
    one_line(caught)
    with pytest.raises(
        DataError, match=r"the val split has 0 classes but a task needs 2: give the split more classes$"
    ):
        folder(root, fractions=(0.8, 0.0, 0.2)).prepare_data()
    folder(root, ways=2, train_ways=6).prepare_data()  # the ways of meta-training are its own


def test_overlapping_lists_name_the_class(root: Path) -> None:
    """Meta-testing on a class that was trained on."""
    data = folder(
        root, train_classes=["class0", "class1"], val_classes=["class2", "class3"], test_classes=["class4", "class0"]
    )
    with pytest.raises(DataError, match=r"class 'class0' is in both train and test: leave it in one") as caught:
        data.prepare_data()
    one_line(caught)


def test_unknown_class_of_a_list(root: Path) -> None:
    """A KeyError, or a class that is left out in silence."""
    data = folder(
        root, train_classes=["class0", "class1"], val_classes=["class2", "klass3"], test_classes=["class4", "class5"]
    )
    with pytest.raises(DataError, match=r"val_classes names 'klass3', which is no folder with images in") as caught:
        data.prepare_data()
    one_line(caught)


def test_list_file_that_is_not_there(root: Path, tmp_path: Path) -> None:
    """A traceback for a wrong path."""
    with pytest.raises(DataError, match=r"train_classes is the file .*none\.txt, which cannot be read") as caught:
        folder(root, train_classes=str(tmp_path / "none.txt"), val_classes=[], test_classes=[]).prepare_data()
    one_line(caught)


@pytest.mark.parametrize("content", ["nothing", "text", "half"])
def test_unreadable_image_is_named(root: Path, content: str) -> None:
    """Which one of 60,000 files is broken; half an image that is padded with grey."""
    broken = root / "class3" / "02.png"
    whole = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(whole).save(broken)
    half = broken.read_bytes()[:2000]
    broken.write_bytes({"nothing": b"", "text": b"not an image", "half": half}[content])
    with pytest.raises(DataError, match=r"class3.02\.png cannot be read \(.*\): replace or remove it") as caught:
        folder(root).prepare_data()
    one_line(caught)
    assert not list(root.glob(".metabolt*"))


def test_settings_reach_it_from_the_command_line(root: Path) -> None:
    """Class lists, in both forms, or sizes that LightningCLI's parser refuses or does not see."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    settings = [f"root={root}", "size=8", "channels=1", "ways=2", "queries=1", "fractions=[0.5,0.3,0.2]"]
    lists = ["train_classes=[class0,class1]", "val_classes=val.txt", "test_classes=[class4,class5]"]
    parsed = parser.parse_args(["--data=datamodules.ImageFolder", *(f"--data.init_args.{s}" for s in settings + lists)])
    data = ImageFolder(**parsed.data.init_args)
    assert (data.size, data.channels, list(data.fractions)) == (8, 1, [0.5, 0.3, 0.2])
    assert data.lists == {"train": ["class0", "class1"], "val": "val.txt", "test": ["class4", "class5"]}


PACKS = """
import sys
from datamodules import ImageFolder
data = ImageFolder(root=sys.argv[1], size=8, ways=2, queries=2)
sys.stdin.readline()
data.prepare_data()
print(data.classes("train").images.sum().item())
"""


def test_processes_pack_one_folder_at_once(root: Path) -> None:
    """Catches a cache that one process reads while another writes it, and parts that are left behind."""
    command = [sys.executable, "-c", PACKS, str(root)]
    several = [subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, stderr=-1, text=True) for _ in range(3)]
    for process in several:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    told = [process.communicate(timeout=120) for process in several]
    assert [process.returncode for process in several] == [0, 0, 0], told
    assert len({out for out, _ in told}) == 1 and float(told[0][0]) > 0
    assert not [path for path in root.rglob("*") if path.name.endswith(".part")]
