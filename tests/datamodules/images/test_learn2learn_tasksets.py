"""learn2learn's tasksets as episodes: indexed, reproducible, split into support and query, and imported only on use."""
# ruff: noqa: NPY002  (learn2learn draws from the global generators)

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch.utils.data import TensorDataset

import app  # noqa: F401  before anything imports pytorch_lightning
from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Episodes, episode_loader
from datamodules.core.errors import DataError
from datamodules.core.streams import SPLITS
from datamodules.images import learn2learn_tasksets
from datamodules.images.learn2learn_tasksets import Learn2LearnTasksets, import_learn2learn
from tests.support.fixtures import drawing, real_data
from tests.support.processes import ROOT

needs_learn2learn = pytest.mark.skipif(
    importlib.util.find_spec("learn2learn") is None, reason="learn2learn is not installed (Python 3.13 or newer)"
)

CLASSES, INSTANCES = 8, 9  # of each split


class Noisy(TensorDataset):
    """Its samples are (class, instance, three random numbers of Python, NumPy and torch), so that all three matter."""

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        x, y = super().__getitem__(i)
        return torch.cat([x, torch.tensor([random.random(), np.random.rand(), float(torch.rand(()))])]), int(y)


def first_of_each(dataset: Any, samples: int) -> Callable[[list], list]:
    """A transform that keeps the first samples of each class, in the data's order."""

    def keep(description: list) -> list:
        of_class = itertools.groupby(description, key=lambda d: dataset.indices_to_labels[d.index])
        return [d for _, group in of_class for d in itertools.islice(group, samples)]

    return keep


def toy(
    train_ways: int, train_samples: int, test_ways: int, test_samples: int, root: str, *, kind: str = "usual"
) -> SimpleNamespace | tuple:
    """Three tasksets over classes 0-7, 100-107 and 200-207; ``kind`` says what is unusual about them."""
    import learn2learn
    from learn2learn.data import FilteredMetaDataset, MetaDataset, Taskset
    from learn2learn.data import transforms as t

    made = []
    every = [base + k for base in (0, 100, 200) for k in range(CLASSES)]
    labels = torch.tensor(every).repeat_interleave(INSTANCES)
    instance = torch.arange(INSTANCES).repeat(len(every))
    whole = MetaDataset(Noisy(torch.stack([labels, instance], 1).float(), labels))
    for base, ways, samples in (
        (0, train_ways, train_samples),
        (100, test_ways, test_samples),
        (200, test_ways, test_samples),
    ):
        own = FilteredMetaDataset(whole, [base + k for k in range(CLASSES)])
        source = whole if kind in ("leaking sampler", "leaking classes") else own
        if kind == "in order":
            chosen = [t.NWays(source, n=ways), first_of_each(source, samples)]
        elif kind == "leaking sampler":
            chosen = [t.FusedNWaysKShots(source, n=ways, k=samples)]
        else:
            chosen = [t.NWays(source, n=ways), t.KShots(source, k=samples, replacement=kind == "replacement")]
        loaded = [t.LoadData(source)]
        ordered = [] if kind == "in order" else [t.RemapLabels(source), t.ConsecutiveLabels(source)]
        cached = 1 if kind == "cached" else -1
        if kind == "words":
            own.labels = [f"class {label}" for label in own.labels]
        made.append(Taskset(own, [*chosen, *loaded, *ordered], num_tasks=cached))
    if kind == "two":
        return made[:2]
    return learn2learn.vision.benchmarks.BenchmarkTasksets(*made)


class Factory:
    """What a class_path names: an object that is called for the tasksets."""

    def __init__(self, kind: str = "usual") -> None:
        self.kind = kind

    def __call__(self, **settings: Any) -> Any:
        return toy(**settings, kind=self.kind)


def module(kind: str = "usual", **settings: Any) -> Learn2LearnTasksets:
    sizes = {"ways": 3, "shots": 2, "queries": 4, "train_ways": 4, "train_shots": 1, "train_queries": 2}
    return Learn2LearnTasksets(tasksets=functools.partial(toy, kind=kind), **{**sizes, **settings})


def same(a: Episodes, i: int, b: Episodes, j: int) -> bool:
    fields = ("support_x", "support_y", "query_x", "query_y", "index")
    return all(torch.equal(getattr(a, f)[i], getattr(b, f)[j]) for f in fields) and torch.equal(
        a.task["classes"][i], b.task["classes"][j]
    )


@needs_learn2learn
@pytest.mark.parametrize("kind", ["usual", "in order", "leaking sampler", "cached"])
def test_support_and_query_are_other_samples_of_the_labelled_classes(kind: str):
    """Would catch a sample in both sets, a label that means two classes, wrong counts, or classes of another split."""
    data = module(kind)
    for split, base, ways, shots, queries in (("train", 0, 4, 1, 2), ("val", 100, 3, 2, 4), ("test", 200, 3, 2, 4)):
        episodes = data.distribution(split).sample(range(100))
        assert episodes.support_x.shape == (100, ways * shots, 5)
        assert episodes.support_x.dtype == torch.float32
        assert episodes.query_x.shape == (100, ways * queries, 5)
        assert episodes.ways == ways
        assert episodes.support_y.dtype == episodes.query_y.dtype == torch.int64
        for t in range(100):
            for label in range(ways):
                s = episodes.support_x[t][episodes.support_y[t] == label]
                q = episodes.query_x[t][episodes.query_y[t] == label]
                assert len(s) == shots
                assert len(q) == queries
                drawn = torch.cat([s, q])
                assert drawn[:, 0].unique().tolist() == [float(episodes.task["classes"][t, label])]
                assert len(drawn[:, 1].unique()) == shots + queries
            assert len(episodes.task["classes"][t].unique()) == ways
        seen = episodes.task["classes"].unique().tolist()
        assert seen == [base + k for k in range(CLASSES)]


@needs_learn2learn
@pytest.mark.parametrize("kind", ["usual", "in order"])
def test_labels_and_support_are_drawn_evenly(kind: str):
    """Would catch labels in the order of the data's own, or a support set that is always a class's first samples."""
    episodes = module(kind).distribution("test").sample(range(1500))
    for k in range(CLASSES):
        at = (episodes.task["classes"] == 200 + k).float().sum(0)
        assert (at / at.sum() - 1 / 3).abs().max() < 0.09  # about 560 tasks: 4.5 standard deviations
    instances = 6 if kind == "in order" else INSTANCES  # that transform gives no others
    counts = episodes.support_x[:, ::2, 1].flatten().long().bincount(minlength=instances)
    assert len(counts) == instances
    assert (counts / counts.sum() - 1 / instances).abs().max() < 0.025


@needs_learn2learn
@pytest.mark.parametrize("kind", ["usual", "cached"])
def test_a_task_is_a_function_of_seed_split_and_index(kind: str):
    """Would catch the taskset's cache, the order of drawing or a global generator deciding what a task is."""
    alone = module(kind).distribution("train").sample([7])
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    other = module(kind)
    other.distribution("test").sample([7])
    other.distribution("train").taskset.sample()
    for indices in ([9, 7], [7, 7], [1, 2, 7]):
        assert same(other.distribution("train").sample(indices), indices.index(7), alone, 0)
    assert not same(other.distribution("train").sample([8]), 0, alone, 0)
    assert not same(module(kind, seed=1).distribution("train").sample([7]), 0, alone, 0)
    in_val, in_test = (other.distribution(s).sample(range(20)).task["classes"] % 100 for s in ("val", "test"))
    assert not torch.equal(in_val, in_test)


def digest(episodes: Episodes) -> str:
    tensors = (episodes.support_x, episodes.query_x, episodes.query_y, episodes.task["classes"])
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


@needs_learn2learn
def test_tasks_are_the_same_in_another_process_whose_import_is_silent():
    """Would catch tasks that depend on a process's hash seed or history, and gym's notice in every log."""
    code = (
        f"import sys; sys.path[:0] = [r'{ROOT}']; import app, warnings\n"
        "warnings.simplefilter('error')\n"
        "from tests.datamodules.images.test_learn2learn_tasksets import digest, module\n"
        "print(digest(module().distribution('val').sample([4, 11])))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip() == digest(module().distribution("val").sample([4, 11]))


@needs_learn2learn
def test_tasks_are_the_same_in_a_worker():
    """Would catch tasks that depend on the seed that a DataLoader gives each worker."""
    distribution = module().distribution("val")
    here = distribution.sample([4, 11])
    for j, episodes in enumerate(episode_loader(distribution, [[4], [11]], 2, workers=1, pin_memory=False)):
        assert same(episodes, 0, here, j)


@needs_learn2learn
def test_sampling_leaves_the_global_generators_alone():
    """Would catch a model's dropout or initialisation that changes with how many tasks were drawn."""
    fine, failing = module().distribution("train"), module(ways=9).distribution("test")
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    fine.sample(range(5))
    with pytest.raises(DataError):
        failing.sample([0])
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1][1])
    assert np.random.get_state()[2] == states[1][2]
    assert torch.equal(torch.get_rng_state(), states[2])


@needs_learn2learn
@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("leaking classes", {}, "train and val tasksets share 24 classes"),
        ("replacement", {"queries": 20}, "has a sample twice"),
        ("words", {}, "label 'class 0': give numbers"),
        ("two", {}, r"returned \(Taskset, Taskset\) but must return three"),
        ("usual", {"queries": 8}, "cannot draw task 0 of the test taskset .*lower ways, shots or queries"),
        ("usual", {"ways": 9}, "cannot draw task 0 of the test taskset"),
    ],
)
def test_tasksets_that_cannot_serve_are_refused_in_one_line(kind: str, settings: dict, message: str):
    """Would catch test classes met in training, queries in the support set, or an error without a cure."""
    data = module(kind, **settings)
    with pytest.raises(DataError, match=message) as error:
        (data.distribution("train"), data.distribution("test").sample([0]))
    assert "\n" not in str(error.value)


@needs_learn2learn
def test_tasks_of_another_size_are_refused():
    """Would catch a factory that ignores the settings, so that labels and counts would be wrong without a word."""
    data = Learn2LearnTasksets(tasksets=lambda **_: toy(3, 4, 3, 4, ""), ways=3, shots=2, queries=4)
    with pytest.raises(DataError, match=r"has \[4, 4, 4\] samples of its classes, not 2 shots \+ 4 queries"):
        data.distribution("test").sample([0])


def test_settings_name_one_source():
    """Would catch a run on a benchmark although the user gave tasksets, or a misspelt name noticed late."""
    with pytest.raises(ValueError, match="give one of benchmark"):
        Learn2LearnTasksets()
    with pytest.raises(ValueError, match="give one of benchmark"):
        Learn2LearnTasksets(benchmark="omniglot", tasksets=toy)
    with pytest.raises(ValueError, match=r"miniimagenet.*mini-imagenet"):
        Learn2LearnTasksets(benchmark="miniimagenet")


@pytest.mark.parametrize(
    "tasksets",
    [f"{__name__}.toy", {"class_path": f"{__name__}.Factory", "init_args": {"kind": "cached"}}],
    ids=["function", "class_path"],
)
def test_tasksets_can_be_named_in_a_configuration(tasksets: Any):
    """Would catch a factory that can be given from Python alone, not from a YAML."""
    parser = ArgumentParser()
    parser.add_argument("--data", type=EpisodicDataModule)
    init = {"tasksets": tasksets, "ways": 3, "queries": 2, "seed": 4}
    name = "datamodules.Learn2LearnTasksets"
    data = parser.instantiate(parser.parse_object({"data": {"class_path": name, "init_args": init}})).data
    assert callable(data.tasksets)
    assert (data.ways, data.queries, data.seed) == (3, 2, 4)
    if importlib.util.find_spec("learn2learn"):
        assert data.distribution("val").sample([0]).query_x.shape == (1, 6, 5)


def test_without_learn2learn_the_cure_is_named(monkeypatch: pytest.MonkeyPatch):
    """Would catch an ImportError's traceback on Python 3.13, where learn2learn cannot be installed."""
    monkeypatch.setattr(learn2learn_tasksets.importlib.util, "find_spec", lambda name: None)
    for data in (Learn2LearnTasksets(benchmark="omniglot"), Learn2LearnTasksets(tasksets=toy)):
        with pytest.raises(DataError, match=r"not installed: use Python 3.12 or older") as error:
            data.prepare_data()
        assert "\n" not in str(error.value)


@needs_learn2learn
@pytest.mark.parametrize("benchmark", learn2learn_tasksets.FILES)
def test_without_a_network_the_place_of_the_files_is_named(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Would catch a traceback of urllib3 where a user needs to know which files to put where."""

    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("Network is unreachable")

    import_learn2learn()
    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    root = tmp_path / "a" / "new" / "folder"
    with pytest.raises(DataError, match=f"cannot prepare {benchmark}") as error:
        Learn2LearnTasksets(benchmark=benchmark, root=str(root)).prepare_data()
    assert learn2learn_tasksets.FILES[benchmark] in str(error.value)
    assert str(root) in str(error.value)
    assert "\n" not in str(error.value)


def omniglot_layout(root: Path) -> None:
    """1,623 characters under ``root``, as torchvision extracts them; real ones, where there are, and links to them.

    One character of each alphabet is extracted and the others link to it: 32,460 files would take most of the test's
    time. learn2learn's index is written too, for building it opens every image.
    """
    folder = root / "omniglot-py"
    for set_name, count in (("images_background", 964), ("images_evaluation", 659)):
        (folder / set_name).mkdir(parents=True)
        names = [f"Generated/character{k:03d}" for k in range(count)]
        images = [f"{set_name}/{names[0]}/0000_{drawer:02d}.png" for drawer in range(20)]
        data = real_data()
        if data is None:
            (folder / images[0]).parent.mkdir(parents=True)
            for drawer, image in enumerate(images):
                drawing("Generated", 0, drawer).save(folder / image)
        else:
            with zipfile.ZipFile(data / "omniglot-py" / f"{set_name}.zip") as archive:
                images = [name for name in archive.namelist() if name.endswith(".png")]
                names = sorted({"/".join(name.split("/")[1:3]) for name in images})
                archive.extractall(folder, [name for name in images if name.split("/")[2] == "character01"])
        assert len(names) == count
        for name in names:
            if not (folder / set_name / name).exists():
                first = next(iter(sorted((folder / set_name / name).parent.iterdir())))
                (folder / set_name / name).symlink_to(first, target_is_directory=True)
    of_index = {i: i // 20 for i in range(1623 * 20)}
    of_label = {k: list(range(20 * k, 20 * k + 20)) for k in range(1623)}
    index = {"labels_to_indices": of_label, "indices_to_labels": of_index, "labels": list(of_label)}
    (root / "omniglot-bookkeeping.pkl").write_bytes(pickle.dumps(index))


@needs_learn2learn
def test_the_omniglot_benchmark_keeps_its_splits_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Would catch learn2learn 0.2.0's train taskset drawing test characters, or a split that is not the seed's."""
    omniglot_layout(tmp_path)
    from torchvision.datasets import Omniglot

    # Zips that were packed again do not have the published MD5; the folders are what is read.
    monkeypatch.setattr(Omniglot, "_check_integrity", lambda self: (tmp_path / "omniglot-py").is_dir())
    settings = {"benchmark": "omniglot", "root": str(tmp_path), "ways": 5, "queries": 3}
    data = Learn2LearnTasksets(**settings)
    data.prepare_data()
    drawing = {split: data.distribution(split).taskset.task_transforms[0] for split in ("train", "val", "test")}
    allowed = {split: set(sampler.filter_labels) for split, sampler in drawing.items()}
    assert {split: len(labels) for split, labels in allowed.items()} == {"train": 1100, "val": 100, "test": 423}
    for a, b in itertools.combinations(allowed.values(), 2):
        assert not a & b
    for split in drawing:
        episodes = data.distribution(split).sample(range(12))
        assert set(episodes.task["classes"].flatten().tolist()) <= allowed[split]
        assert episodes.support_x.shape == (12, 5, 1, 28, 28)
        assert episodes.query_x.shape == (12, 15, 1, 28, 28)
        assert episodes.support_x.dtype == torch.float32
        assert episodes.support_x.min() == 0
        assert 0.5 < episodes.support_x.max() <= 1
        on_device = data.on_device(episodes)
        assert torch.equal(on_device.support_x, episodes.support_x)
    again, other = data._make(), Learn2LearnTasksets(**settings, seed=1)._make()
    assert set(again.test.dataset.labels) == allowed["test"] != set(other.test.dataset.labels)
    with pytest.raises(DataError, match="share 1623 classes"):  # as learn2learn makes them
        learn2learn_tasksets._refuse_shared_classes(dict(zip(SPLITS, other, strict=True)))


WHO_IMPORTS = """
import builtins, importlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(root))
packages, optional, found = ("app", "datamodules", "models"), ("learn2learn", "torchvision", "gym"), []
original = builtins.__import__
def spy(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if level == 0 and name.split(".")[0] in optional and importer.split(".")[0] in packages:
        found.append(f"{importer} imports {name}")
    return original(name, globals, locals, fromlist, level)
builtins.__import__ = spy
importlib.import_module("app")
for package in packages:
    for file in sorted((root / package).rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if parts[-1] != "__main__":
            importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
found += [f"{name} was imported" for name in ("learn2learn", "gym") if name in sys.modules]
print("\\n".join(found))
"""


def test_nothing_imports_learn2learn_or_torchvision_before_it_is_used():
    """Would catch an import that slows every start, or fails where neither is installed.

    torchmetrics imports torchvision by itself wherever it is installed, so that what counts is who asks for it.
    """
    result = subprocess.run([sys.executable, "-c", WHO_IMPORTS, str(ROOT)], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""
