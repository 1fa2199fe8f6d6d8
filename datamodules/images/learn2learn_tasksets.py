"""learn2learn's tasksets and benchmarks, as episodes that are indexed and reproducible like all others."""
# ruff: noqa: NPY002  (learn2learn draws from the global generators)

from __future__ import annotations

import contextlib
import importlib.util
import io
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from numbers import Number
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.core.episodes import Episodes, TaskDistribution
from datamodules.core.errors import DataError
from datamodules.core.streams import SPLITS, TaskStreams
from datamodules.images.tasks import ImageDataModule

Benchmark = Literal["omniglot", "mini-imagenet", "tiered-imagenet", "cifarfs", "fc100"]

# What each benchmark reads under the root, for those who have no network or find a link dead.
FILES: dict[str, str] = {
    "omniglot": "omniglot-py/images_background.zip and images_evaluation.zip, and the folders extracted from them",
    "mini-imagenet": "mini-imagenet-cache-train.pkl, -validation.pkl and -test.pkl",
    "tiered-imagenet": "tiered-imagenet/{train,val,test}_images_png.pkl and {train,val,test}_labels.pkl",
    "cifarfs": "cifarfs/cifar100/data and cifarfs/cifar100/splits/bertinetto",
    "fc100": "FC100_train.pickle, FC100_val.pickle and FC100_test.pickle",
}


@contextlib.contextmanager
def seeded(word: int) -> Iterator[None]:
    """Python's, NumPy's and torch's (CPU) global generators seeded from a 64-bit word, and afterwards as before."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(word)
    np.random.seed([word & 0xFFFFFFFF, word >> 32])
    torch.default_generator.manual_seed(word)  # torch.manual_seed would reseed the accelerators too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    # Importing learn2learn imports gym, which prints a notice; both use what NumPy and setuptools have deprecated.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def import_learn2learn() -> Any:
    """The package, imported on first use.

    Raises:
        DataError: it is not installed, or cannot be imported.
    """
    if importlib.util.find_spec("learn2learn") is None:
        raise DataError(
            "learn2learn is not installed: use Python 3.12 or older and pip install -r requirements.txt, or another "
            "data module"
        )
    try:
        with _quietly():
            import learn2learn
    except Exception as error:
        raise DataError(f"learn2learn cannot be imported ({_line(error)}): install it again") from error
    return learn2learn


class TasksetEpisodes(TaskDistribution):
    """The tasks of one learn2learn taskset by index; episode i is a pure function of (seed, split, i).

    learn2learn draws from the global generators and remembers what it drew. Here they are seeded from
    (seed, split, i) around every draw and put back after it, and nothing is remembered: ``num_tasks`` of the taskset
    has no effect. Which class gets which label, and which of its samples are the support, is drawn anew, so that
    neither depends on the taskset's transforms.

    Args:
        taskset: a learn2learn ``Taskset`` whose tasks have ``shots + queries`` samples of each of ``ways`` classes.
        ways, shots, queries: classes per task; support and query samples per class.
        seed, split: of the episodes.

    Raises:
        DataError: its labels are not numbers, or, in ``sample``, a task is not as described above.
    """

    seed: int

    def __init__(self, taskset: Any, ways: int, shots: int, queries: int, *, seed: int, split: str) -> None:
        self.taskset, self.ways, self.shots, self.queries = taskset, ways, shots, queries
        self.seed, self.split = seed, split
        # The transforms, not the taskset, say which dataset a task's indices are of: they may differ.
        drawn_from = next((t.dataset for t in _transforms(taskset) if hasattr(t, "dataset")), taskset.dataset)
        self.label_of = drawn_from.indices_to_labels
        if other := [label for label in drawn_from.labels if not isinstance(label, Number)]:
            raise DataError(
                f"the {split} taskset has the label {other[0]!r}: give numbers (target_transform), for learn2learn "
                "orders other labels by hashes that each process has its own of"
            )

    def sample(self, indices: Sequence[int]) -> Episodes:
        rng = TaskStreams(self.seed, self.split, indices)
        words = rng.bits()
        label = rng.choice(self.ways, self.ways)
        samples = rng.choice(self.shots + self.queries, self.shots + self.queries, self.ways)
        tasks = [
            self._task(int(i), int(words[t]), torch.from_numpy(label[t]), torch.from_numpy(samples[t]))
            for t, i in enumerate(indices)
        ]
        x = torch.stack([x for x, _ in tasks])
        labels = torch.arange(self.ways)
        return Episodes(
            support_x=x[:, :, : self.shots].flatten(1, 2),
            support_y=labels.repeat_interleave(self.shots).expand(len(tasks), -1),
            query_x=x[:, :, self.shots :].flatten(1, 2),
            query_y=labels.repeat_interleave(self.queries).expand(len(tasks), -1),
            index=torch.as_tensor(np.asarray(indices, np.int64)),
            ways=self.ways,
            task={"classes": torch.stack([classes for _, classes in tasks])},
        )

    def _task(self, index: int, word: int, label: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """The samples (ways, shots + queries, *input) of one task, by label, and the data's own labels (ways,)."""
        name = f"task {index} of the {self.split} taskset"
        try:
            with seeded(word):
                description = self.taskset.sample_task_description()
                x, y = self.taskset.get_task(description)
        except ValueError as error:  # random.sample, where a class or the dataset is too small
            raise DataError(f"learn2learn cannot draw {name} ({_line(error)}): lower ways, shots or queries") from error
        drawn = [d.index for d in description]
        if len(set(drawn)) < len(drawn):
            raise DataError(f"{name} has a sample twice, so a query could be in the support set: replacement=False")
        _, which = y.unique(return_inverse=True)
        counts = which.bincount().tolist()
        if counts != [self.shots + self.queries] * self.ways:
            raise DataError(
                f"{name} has {counts} samples of its classes, not {self.shots} shots + {self.queries} queries of each "
                f"of {self.ways}: make tasks of train_ways, train_samples, test_ways and test_samples as given"
            )
        rows = which.argsort(stable=True).view(self.ways, -1)[label].gather(1, samples)
        return x[rows].float(), torch.tensor([self.label_of[drawn[row]] for row in rows[:, 0].tolist()])


class Learn2LearnTasksets(ImageDataModule):
    """A learn2learn benchmark, or any tasksets made with learn2learn. Give one of ``benchmark`` and ``tasksets``.

    Samples are what the taskset's own transforms return, as float32: nothing is normalised here. Images are read and
    transformed one at a time, so sampling is some hundred times slower than from the other data modules; ``workers``
    helps, and the defaults ask for fewer evaluation tasks.

    Of learn2learn 0.2.0's Omniglot, the train, validation and test tasksets all draw from all 1,623 characters; here
    each draws from its own 1,100, 100 and 423, chosen by ``seed``. Its rotation, meant to be of each class, turns all
    classes of a task alike; that is left as it is.

    Args:
        benchmark: name of a learn2learn benchmark, which learn2learn downloads to ``root``.
        tasksets: called with train_ways, train_samples, test_ways, test_samples and root (samples are shots + queries
            per class), returns the train, validation and test ``learn2learn.data.Taskset``; a function's import path,
            or a class_path whose objects can be called.
        val_tasks, test_tasks: see EpisodicDataModule.
        common: see ImageDataModule.

    Raises:
        ValueError: both or neither of ``benchmark`` and ``tasksets``, shots that vary, or unlabelled images.
    """

    def __init__(
        self,
        benchmark: Benchmark | None = None,
        tasksets: Callable[..., Any] | None = None,
        val_tasks: int = 200,
        test_tasks: int = 600,
        **common: Any,
    ) -> None:
        super().__init__(val_tasks=val_tasks, test_tasks=test_tasks, **common)
        if (benchmark is None) == (tasksets is None):
            raise ValueError(f"give one of benchmark ({', '.join(FILES)}) and tasksets")
        if self.max_train_shots is not None:
            raise ValueError("max_train_shots is given, but a learn2learn taskset has as many shots in every task")
        if self.unlabelled:
            raise ValueError("unlabelled images are asked for, but all of a learn2learn taskset's have labels")
        if benchmark is not None and benchmark not in FILES:
            raise ValueError(f"benchmark is {benchmark!r} but must be one of {', '.join(FILES)}")
        self.benchmark = benchmark
        self.tasksets = tasksets
        self._made: dict[str, Any] | None = None

    def prepare_data(self) -> None:
        # On one process, which downloads and indexes; the others then find the files.
        self._by_split()

    def build(self, split: str) -> TasksetEpisodes:
        train = split == "train"
        return TasksetEpisodes(
            self._by_split()[split],
            self.train_ways if train else self.ways,
            self.train_shots if train else self.shots,
            self.train_queries if train else self.queries,
            seed=self.seed,
            split=split,
        )

    def normalize(self, images: Tensor) -> Tensor:
        """What the taskset's transforms returned, unchanged."""
        return images

    def to_store(self, image: Any) -> Tensor:
        raise DataError("a learn2learn taskset does not say how it reads a picture: predict with another data module")

    def _by_split(self) -> dict[str, Any]:
        if self._made is None:
            given = tuple(self._make())
            if [callable(getattr(t, "sample_task_description", None)) for t in given] != [True] * len(SPLITS):
                kinds = ", ".join(type(t).__name__ for t in given)
                raise DataError(f"tasksets returned ({kinds}) but must return three learn2learn.data.Taskset")
            made: dict[str, Any] = dict(zip(SPLITS, given, strict=True))
            for taskset in given:
                _keep_to_own_classes(taskset)
            _refuse_shared_classes(made)
            self._made = made
        return self._made

    def _make(self) -> Sequence[Any]:
        learn2learn = import_learn2learn()
        settings = {
            "train_ways": self.train_ways,
            "train_samples": self.train_shots + self.train_queries,
            "test_ways": self.ways,
            "test_samples": self.shots + self.queries,
            "root": self.root,
        }
        with seeded(self.seed & (2**64 - 1)):  # learn2learn splits Omniglot's characters with the global generator
            if self.tasksets is not None:
                return self.tasksets(**settings)
            assert self.benchmark is not None
            root = Path(self.root).expanduser()
            try:
                root.mkdir(parents=True, exist_ok=True)  # learn2learn makes the last folder only
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return learn2learn.vision.benchmarks.get_tasksets(self.benchmark, **settings)
            except Exception as error:
                raise DataError(
                    f"learn2learn cannot prepare {self.benchmark} ({_line(error)}): connect to the network, or put "
                    f"{FILES[self.benchmark]} in {root.resolve()}; remove what an interrupted download left there"
                ) from error


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


def _transforms(taskset: Any) -> list[Any]:
    return [] if callable(taskset.task_transforms) else list(taskset.task_transforms)


def _source(dataset: Any) -> Any:
    """The dataset at the bottom of learn2learn's wrappers."""
    while type(dataset).__name__ in ("MetaDataset", "FilteredMetaDataset"):
        dataset = dataset.dataset
    return dataset


def _keep_to_own_classes(taskset: Any) -> None:
    """Make a fused sampler, built on more classes than its taskset's dataset holds, draw from the latter alone."""
    own = set(getattr(taskset.dataset, "labels", ()))
    transforms = _transforms(taskset)
    for i, transform in enumerate(transforms):
        labels = getattr(transform, "filter_labels", None)
        if labels is None or own.issuperset(labels) or _source(transform.dataset) is not _source(taskset.dataset):
            continue
        transforms[i] = import_learn2learn().data.transforms.FusedNWaysKShots(
            transform.dataset,
            n=transform.n,
            k=transform.k,
            replacement=transform.replacement,
            filter_labels=[label for label in labels if label in own],
        )
        taskset.task_transforms = transforms


def _refuse_shared_classes(tasksets: dict[str, Any]) -> None:
    """Raise a DataError where two tasksets can draw the same class of the same data."""
    reach: list[tuple[str, Any, set[Any]]] = []
    for split, taskset in tasksets.items():
        drawing = [t for t in _transforms(taskset) if hasattr(t, "dataset")]
        if not drawing:
            continue
        classes = set(drawing[0].dataset.labels)
        for transform in drawing:
            for name in ("labels", "filter_labels"):
                classes &= set(getattr(transform, name, classes))
        source = _source(drawing[0].dataset)
        for other, its_source, its_classes in reach:
            if its_source is source and (shared := classes & its_classes):
                raise DataError(
                    f"the {other} and {split} tasksets share {len(shared)} classes, such as {min(shared)}: build the "
                    "transforms of each on its own FilteredMetaDataset"
                )
        reach.append((split, source, classes))
