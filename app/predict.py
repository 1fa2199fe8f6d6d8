"""Classify one's own pictures: ``python -m app.predict --ckpt_path … --support DIR --query DIR``, without training.

``--support`` holds one folder for each class, with a few pictures in each, in folders or not: any number of classes
from two, of any size, not necessarily as many of each. ``--query`` holds the pictures to classify, in folders or not.
Files that are no pictures are left out, and said so.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import UnidentifiedImageError
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from app.cli.builder import quiet_lightning
from app.cli.failures import one_line_errors
from app.cli.from_checkpoint import FromCheckpoint, Options, Trained, open_checkpoint, restore
from app.runs.results import versions
from datamodules.core.episodes import Support
from datamodules.core.errors import ConfigError
from datamodules.core.files import write_atomically
from datamodules.images.files import UNREADABLE, below, open_picture, some, sorted_out, visible
from datamodules.images.tasks import ImageDataModule
from models.core.learner import MetaLearner
from models.core.shapes import fits

QUERY_BATCH = 256
QUERY_FOLDER = "query_folder"  # in predictions.json: absolute, by which predictions of it are found again
ROWS = 100  # of the table on the screen; the files hold all


class PredictionCLI(FromCheckpoint):
    """Builds the learner and the data module, which converts pictures; there is no run, and the data need not exist."""

    prog = "python -m app.predict"
    description = "Classify pictures; any key of the checkpoint's configuration can be given anew."

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None


@dataclass(frozen=True)
class Predictions:
    """What was predicted.

    Attributes:
        classes: names, each another one, in the order of their folders.
        shots: support pictures of each class.
        queries: names of the files, relative to the query folder.
        probabilities: (Q, ways) float32, rows of sum 1.
        labels: of each query, the class whose folder it lies in; None where its folders name no class.
    """

    classes: list[str]
    shots: list[int]
    queries: list[str]
    probabilities: Tensor
    labels: list[int | None]

    @property
    def predicted(self) -> list[int]:
        return self.probabilities.argmax(1).tolist()

    @property
    def right(self) -> tuple[int, int]:
        """Correct predictions, and queries whose class is known."""
        known = [(p, label) for p, label in zip(self.predicted, self.labels, strict=True) if label is not None]
        return sum(p == label for p, label in known), len(known)


def _name(path: Path) -> str:
    """A path as text that can be written; a name need not be valid Unicode."""
    return os.fsencode(path).decode("utf-8", "backslashreplace").replace(os.sep, "/")


def class_names(folders: Iterable[str]) -> list[str]:
    """Names of classes that can be written, each another one, of folders' names, which need not be valid Unicode."""
    names: list[str] = []
    for folder in folders:
        name = _name(Path(folder))
        while name in names:
            name += "'"
        names.append(name)
    return names


def support_files(root: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """The picture files of each class, by the name of its folder, both sorted; and files that are no pictures.

    Raises:
        ConfigError: what keeps the folder from being a support set.
    """
    if not root.is_dir():
        raise ConfigError(f"there is no folder {_name(root)}: --support takes a folder with one folder for each class")
    found: dict[str, list[Path]] = {}
    left: list[Path] = []
    for entry in visible(root):
        pictures, others = sorted_out(below(entry) if entry.is_dir() else [entry])
        left += others
        if entry.is_dir():
            found[entry.name] = pictures
            if not pictures:
                raise ConfigError(f"class folder {_name(entry)} holds no picture: put one into it, or remove it")
        elif pictures:
            raise ConfigError(f"{_name(entry)} lies in no class's folder: move it into one, or away")
    if len(found) < 2:
        has = f"only one class, {_name(Path(next(iter(found))))}" if found else "no class folders"
        raise ConfigError(f"{_name(root)} has {has}: a task needs at least two folders, one for each class")
    return found, left


def query_files(root: Path) -> tuple[list[Path], list[Path]]:
    """The picture files below a folder, sorted, and the other files; or the one file that is given.

    Raises:
        ConfigError: there are none.
    """
    if root.is_file():
        return [root], []
    if not root.is_dir():
        raise ConfigError(f"there is no folder {_name(root)}: --query takes the folder of the pictures to classify")
    found, left = sorted_out(below(root))
    if not found:
        raise ConfigError(f"{_name(root)} holds no pictures: put those to classify into it")
    return found, left


def read(files: Sequence[Path], data: ImageDataModule) -> Tensor:
    """Pictures as the backbone sees them, (N, C, H, W) float32.

    Raises:
        ConfigError: a file that is no picture, or is damaged.
    """
    pictures = []
    for file in files:
        try:
            with open_picture(file) as image:
                pictures.append(data.to_store(image))
        except UnidentifiedImageError as error:
            raise ConfigError(f"{_name(file)} is not a picture: remove it, or save it as PNG or JPEG") from error
        except UNREADABLE as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{_name(file)} cannot be read ({reason}): replace or remove it") from error
    return data.normalize(torch.stack(pictures))


@torch.inference_mode()
def predict(
    learner: MetaLearner, data: ImageDataModule, support: Path, query: Path, device: str = "cpu"
) -> Predictions:
    """Adapt to the pictures in one folder and classify those in another.

    Args:
        learner: with its trained weights.
        data: converts the pictures; it need not be prepared.
        support: a folder with one folder for each class.
        query: a folder, or one picture.
        device: where it is computed.

    Raises:
        ConfigError: what is wrong with the folders or the pictures.
    """
    by_class, no_support = support_files(support)
    files, no_queries = query_files(query)
    for root, left in ((support, no_support), (query, no_queries)):
        if left:
            rank_zero_info(f"left out of {_name(root)}: {len(left)} that are no pictures ({some(left, root)})")
    classes, shots = class_names(by_class), [len(members) for members in by_class.values()]
    try:
        learner = learner.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # torch has both for a device that is not there
        raise ConfigError(f"device {device!r} cannot be used here: give --device cpu") from error
    support_x = read([file for members in by_class.values() for file in members], data).to(device)
    support_y = torch.arange(len(classes), device=device).repeat_interleave(torch.tensor(shots, device=device))
    rank_zero_info(f"pictures are seen as {data.stored_form}")
    fits(learner, support_x)
    state = learner.adapt(Support(support_x, support_y, len(classes)))
    # In pieces where a prediction does not depend on the other queries, to bound memory.
    step = len(files) if learner.transductive else QUERY_BATCH
    pieces = [files[i : i + step] for i in range(0, len(files), step)]
    logits = torch.cat([learner.predict(state, read(piece, data).to(device)) for piece in pieces])
    relative = [file.relative_to(query) if query.is_dir() else Path(file.name) for file in files]
    number = {folder: k for k, folder in enumerate(by_class)}
    labels = [next((number[part] for part in reversed(path.parts[:-1]) if part in number), None) for path in relative]
    probabilities = logits.float().softmax(-1).cpu()
    return Predictions(classes, shots, [_name(path) for path in relative], probabilities, labels)


def as_csv(predictions: Predictions) -> str:
    """One line for each query: the prediction, its probability, the label where it is known, all probabilities."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["query", "prediction", "probability", "label", *(f"p({name})" for name in predictions.classes)])
    for query, k, row, label in _rows(predictions):
        known = "" if label is None else predictions.classes[label]
        writer.writerow([query, predictions.classes[k], f"{row[k]:.6g}", known, *(f"{p:.6g}" for p in row)])
    return text.getvalue()


def as_json(predictions: Predictions, facts: dict[str, Any]) -> str:
    """The same with what it was made from, ready to be written."""
    names = predictions.classes
    correct, known = predictions.right
    content = {
        **facts,
        "support": dict(zip(names, predictions.shots, strict=True)),
        "accuracy": correct / known if known else None,
        "labelled": known,
        "predictions": [
            {
                "query": query,
                "prediction": names[k],
                "probability": row[k],
                "label": None if label is None else names[label],
                "probabilities": dict(zip(names, row, strict=True)),
            }
            for query, k, row, label in _rows(predictions)
        ],
        "versions": versions(),
    }
    return json.dumps(content, indent=2) + "\n"


def _rows(predictions: Predictions) -> list[tuple[str, int, list[float], int | None]]:
    p = predictions
    return list(zip(p.queries, p.predicted, p.probabilities.tolist(), p.labels, strict=True))


def show(predictions: Predictions, console: Console | None = None) -> None:
    """The table of predictions, and their accuracy where labels are known."""
    console = console or Console()
    names = predictions.classes
    correct, known = predictions.right
    table = Table(title=f"{len(names)} classes, {sum(predictions.shots)} support pictures", title_justify="left")
    table.add_column("query", overflow="fold")
    table.add_column("prediction", overflow="fold")
    table.add_column("probability", justify="right")
    table.add_column("next", overflow="fold")
    if known:
        table.add_column("right")
    for query, k, row, label in _rows(predictions)[:ROWS]:
        second = max((j for j in range(len(names)) if j != k), key=row.__getitem__)
        cells = [query, names[k], f"{100 * row[k]:.1f} %", f"{names[second]} {100 * row[second]:.1f} %"]
        if known:
            cells.append("" if label is None else "✓" if label == k else "✗")
        table.add_row(*map(Text, cells))  # Text, not str: brackets in a name are no markup
    console.print(table)
    if len(predictions.queries) > ROWS:
        console.print(f"… and {len(predictions.queries) - ROWS} more", highlight=False)
    if known:
        console.print(
            f"accuracy: {100 * correct / known:.1f} % ({correct} of {known} labelled queries)", highlight=False
        )


def build(trained: Trained, options: argparse.Namespace, keys: Sequence[str]) -> tuple[MetaLearner, ImageDataModule]:
    """The learner with its weights, and the data module.

    A learner that was trained with batch norm by the queries' own statistics takes the support set's here, unless told
    otherwise: one's own pictures come one by one, or all of one class, where the queries' own statistics mislead.

    Raises:
        ConfigError: not a classifier of pictures.
    """
    told = options.batch_norm is not None or any(key.split("=")[0].endswith(".batch_norm") for key in keys)
    trained_so = (trained.config["model"].get("init_args") or {}).get("batch_norm") == "transductive"
    cli = None
    if trained_so and not told:
        with suppress(ConfigError):  # some learners have no such mode
            cli = PredictionCLI(trained, argparse.Namespace(**vars(options) | {"batch_norm": "support"}), keys)
    cli = cli or PredictionCLI(trained, options, keys)
    learner, data = cli.model, cli.datamodule
    if not isinstance(data, ImageDataModule):
        name = type(data).__name__
        raise ConfigError(
            f"{trained.path} was trained on {name}, not on pictures: give a checkpoint that classifies them "
            "(python -m app.evaluate tests this one)"
        )
    if learner.transductive:
        rank_zero_info("all queries are predicted together: a prediction depends on the other queries")
    elif trained_so and not told:
        rank_zero_info(
            "trained with batch norm by the queries' statistics, used here by the support set's, so that no prediction "
            "depends on the other queries (--batch_norm transductive: as trained)"
        )
    restore(learner, trained)
    return learner, data


def own_folder(predictions: Path, query: Path) -> Path:
    """Where predictions of a query folder are left: over its own of before, beside those of another of the name.

    Args:
        predictions: the folder of all of a run.
        query: a folder, or one picture.
    """
    query = query.resolve()
    base = folder = predictions / (query.name or "queries")
    number = 1
    while _query_of(folder) not in (None, _name(query)):
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def _query_of(folder: Path) -> Any:
    """Whose predictions are in a folder; None where there are none."""
    try:
        return json.loads((folder / "predictions.json").read_text())[QUERY_FOLDER]
    except OSError:
        return None
    except (ValueError, LookupError, TypeError):  # somebody else's file
        return ""


def main(args: Sequence[str] | None = None) -> None:
    """``python -m app.predict``."""
    args = sys.argv[1:] if args is None else list(args)
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    quiet_lightning()
    parser = Options(PredictionCLI.prog, "Classify pictures with a few examples of each class, without training.")
    parser.add_argument("--support", required=True, help="Folder with one folder of pictures for each class.")
    parser.add_argument("--query", required=True, help="Folder of the pictures to classify, or one picture.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps.")
    options, keys = parser.split(args)
    with one_line_errors(options.debug):
        support, query = Path(options.support), Path(options.query)
        # What is wrong with the folders shows before anything is loaded.
        support_files(support)
        query_files(query)
        trained = open_checkpoint(Path(options.ckpt_path))
        learner, data = build(trained, options, keys)
        predictions = predict(learner, data, support, query, options.device)
        out = options.out or own_folder(trained.run_dir / "predictions", query)
        facts = {
            "checkpoint": str(trained.path),
            "algorithm": type(learner).__name__,
            "batch_norm": learner.batch_norm,
            "transductive": learner.transductive,
            "pictures": data.stored_form,
            "support_folder": _name(support.resolve()),
            QUERY_FOLDER: _name(query.resolve()),
        }
        show(predictions)
        try:
            write_atomically(out / "predictions.csv", as_csv(predictions))
            write_atomically(out / "predictions.json", as_json(predictions, facts))
        except OSError as error:
            raise ConfigError(f"cannot write into {_name(out)} ({error.strerror}): give another --out") from error
        files = ", ".join(f"{_name(out)}/predictions.{kind}" for kind in ("csv", "json"))
        Console().print(Text(f"written: {files}"), soft_wrap=True)


if __name__ == "__main__":
    main()
