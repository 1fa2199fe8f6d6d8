"""Predictions for one's own pictures."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from app import predict as module
from app.predict import main
from datamodules import Glyphs, ImageMixture, Omniglot
from datamodules.images.multi_domain import Domain
from models import Conv4, ProtoNet
from models.networks.backbones import Backbone
from models.networks.batch_norm import BatchNormMode, normalize_by, recording
from tests.support.fixtures import real_data
from tests.support.processes import ROOT
from tests.support.trained import CLASSES, SIZE, picture, picture_tree, train, train_on_pictures

# Lightning calls what jsonargparse 5 will not have.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

SHOTS = {"red": 1, "green, [b]": 4, "blue": 2}  # unequal, and names that CSV and rich could trip over


class Stubborn(ProtoNet):
    """Has no mode but one."""

    def __init__(self, backbone: Backbone, batch_norm: BatchNormMode = "transductive", **others: Any) -> None:
        if batch_norm != "transductive":
            raise ValueError("transductive or nothing")
        super().__init__(backbone, batch_norm=batch_norm, **others)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by name. What they were trained on is gone."""
    folder = tmp_path_factory.mktemp("runs")
    root = picture_tree(folder / "tree", CLASSES)
    maml = ["--model.outputs", "2", "--model.inner_rate", "0.2", "--model.eval_inner_steps", "3"]
    checkpoints = {
        "protonet": train_on_pictures(folder, "protonet", "models.ProtoNet", root),
        "maml": train_on_pictures(folder, "maml", "models.MAML", root, *maml),
        "stubborn": train_on_pictures(folder, "stubborn", f"{__name__}.Stubborn", root),
    }
    shutil.rmtree(root)
    return checkpoints


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, Path]:
    """Folders of support and query pictures, of the size that the network takes."""
    picture_tree(tmp_path / "support", SHOTS)
    picture_tree(tmp_path / "query", dict.fromkeys(SHOTS, 3), first=10)
    return tmp_path / "support", tmp_path / "query"


def predict(checkpoint: Path, support: Path, query: Path, *flags: str) -> dict[str, Any]:
    """predictions.json."""
    out = support.parent / "out"
    main(["--ckpt_path", str(checkpoint), "--support", str(support), "--query", str(query), "--out", str(out), *flags])
    return json.loads((out / "predictions.json").read_text())


def probabilities(found: Mapping[str, Any]) -> np.ndarray:
    """(Q, ways), the classes sorted by name."""
    rows = [row["probabilities"] for row in found["predictions"]]
    return np.array([[row[name] for name in sorted(row)] for row in rows])


def stack(root: Path, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of the folders and their labels, read without any of the code under test."""
    files = [(k, file) for k, name in enumerate(names) for file in sorted((root / name).iterdir())]
    x = np.stack([np.asarray(Image.open(file)) for _, file in files]).transpose(0, 3, 1, 2) / 255
    return torch.tensor(x, dtype=torch.float32), torch.tensor([k for k, _ in files])


def backbone(checkpoint: Path, prefix: str) -> tuple[Conv4, dict[str, torch.Tensor]]:
    """A backbone with a checkpoint's weights, and all the weights."""
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    network = Conv4(in_channels=3, hidden=4, image_size=SIZE, downsample="pool").eval()
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    network.load_state_dict(own)
    return network, weights


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def test_protonet_takes_the_nearest_class_mean(runs, pictures) -> None:
    """Labels that go to other classes, means that weigh pictures and not classes, another scale or normalisation."""
    found = predict(runs["protonet"], *pictures)
    names = sorted(SHOTS)
    network, _ = backbone(runs["protonet"], "backbone.")
    (support_x, support_y), (query_x, _) = stack(pictures[0], names), stack(pictures[1], names)
    with torch.no_grad(), normalize_by("running"):
        z, queries = network(support_x).double().numpy(), network(query_x).double().numpy()
    means = np.stack([z[support_y.numpy() == k].mean(0) for k in range(len(names))])
    logits = -((queries[:, None] - means) ** 2).sum(-1)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    expected = weights / weights.sum(1, keepdims=True)
    assert expected.std(0).min() > 1e-3  # there is something to tell apart
    np.testing.assert_allclose(probabilities(found), expected, atol=2e-5)
    for row, p in zip(found["predictions"], expected, strict=True):
        assert row["prediction"] == names[p.argmax()]
        assert row["probability"] == pytest.approx(p.max(), abs=2e-5)
    assert found["support"] == SHOTS


def test_maml_adapts_to_the_support_set(runs, pictures) -> None:
    """Steps, rate or parameters of another inner loop, a head of the trained ways, statistics of other pictures."""
    found = predict(runs["maml"], *pictures)
    names = sorted(SHOTS)
    network, weights = backbone(runs["maml"], "learner.backbone.")
    head = torch.nn.Linear(network.out_features, 3)
    with torch.no_grad():  # three classes on a head for two: the third starts from the mean of the others
        for name, parameter in head.named_parameters():
            value = weights[f"learner.head.{name}"]
            parameter.copy_(torch.cat([value, value.mean(0, keepdim=True)]))
    learner = torch.nn.Sequential(network, head)
    (support_x, support_y), (query_x, _) = stack(pictures[0], names), stack(pictures[1], names)
    adapted = [*network.convs.parameters(), *head.parameters()]
    for _ in range(3):
        with normalize_by("batch"):
            # Every class counts alike, whatever its shots.
            losses = F.cross_entropy(learner(support_x), support_y, reduction="none")
            loss = torch.stack([losses[support_y == k].mean() for k in support_y.unique()]).mean()
            gradient = torch.autograd.grad(loss, adapted)
        with torch.no_grad():
            for parameter, g in zip(adapted, gradient, strict=True):
                parameter -= 0.2 * g
    statistics: dict[Any, Any] = {}
    with torch.no_grad():
        with normalize_by("batch"), recording(statistics):
            learner(support_x)
        with normalize_by(statistics):
            expected = learner(query_x).softmax(-1).numpy()
    assert expected.std(0).min() > 1e-3
    np.testing.assert_allclose(probabilities(found), expected, atol=1e-4)


def test_maml_predicts_one_by_one_unless_told_otherwise(runs, pictures, caplog) -> None:
    """A prediction of one's own picture that depends on the others, without a word, or no way to ask for that."""
    support, query = pictures
    together = predict(runs["maml"], support, query)
    assert (together["batch_norm"], together["transductive"]) == ("support", False)
    assert sum("--batch_norm transductive" in record.message for record in caplog.records) == 1
    one = predict(runs["maml"], support, query / "blue" / "11.png")
    np.testing.assert_allclose(probabilities(one)[0], probabilities(together)[1], atol=1e-5)
    caplog.clear()
    trained = predict(runs["maml"], support, query, "--batch_norm", "transductive")
    assert (trained["batch_norm"], trained["transductive"]) == ("transductive", True)
    assert sum("depends on the other queries" in record.message for record in caplog.records) == 1
    one = predict(runs["maml"], support, query / "blue" / "11.png", "--model.batch_norm=transductive")
    assert abs(probabilities(one)[0] - probabilities(trained)[1]).max() > 1e-3


def test_a_learner_that_cannot_but_be_transductive(runs, pictures, caplog) -> None:
    """A learner that refuses the support set's statistics and ends the prediction, or is not called transductive."""
    found = predict(runs["stubborn"], *pictures)
    assert (found["batch_norm"], found["transductive"]) == ("transductive", True)
    assert sum("depends on the other queries" in record.message for record in caplog.records) == 1


def test_settings_reach_the_learner(runs, pictures) -> None:
    """Options of adaptation that change nothing."""
    usual, none, many = (
        probabilities(predict(runs["maml"], *pictures, *flags))
        for flags in ([], *(["--inner_steps", steps] for steps in ("0", "6")))
    )
    assert abs(usual - none).max() > 1e-3 < abs(usual - many).max()
    rate = predict(runs["maml"], *pictures, "--inner_steps", "6", "--model.init_args.inner_rate", "0")
    np.testing.assert_allclose(probabilities(rate), none, atol=1e-6)


def test_the_order_of_files_and_classes_does_not_matter(runs, pictures, tmp_path: Path) -> None:
    """Pictures that go to the class of a neighbour in some order of names."""
    found = predict(runs["protonet"], *pictures)
    renamed = {"blue": "zz", "green, [b]": "a a", "red": "Ü"}
    for root in ("support", "query"):
        for old, new in renamed.items():
            (tmp_path / "again" / root / new).mkdir(parents=True)
            for i, file in enumerate(sorted((tmp_path / root / old).iterdir(), reverse=True)):
                shutil.copy(file, tmp_path / "again" / root / new / f"{i}.PNG")
    again = predict(runs["protonet"], tmp_path / "again" / "support", tmp_path / "again" / "query")
    usual = {}
    for row in found["predictions"]:
        name, file = row["query"].split("/")
        usual[renamed[name], int(file[:2])] = {renamed[k]: p for k, p in row["probabilities"].items()}
    for row in again["predictions"]:
        name, file = row["query"].split("/")
        assert row["probabilities"] == pytest.approx(usual[name, 12 - int(file[0])], abs=1e-5)


def test_queries_in_pieces(runs, pictures, monkeypatch) -> None:
    """Pictures that are lost or exchanged where there are more than one piece of them."""
    whole = predict(runs["protonet"], *pictures)
    monkeypatch.setattr(module, "QUERY_BATCH", 2)
    pieces = predict(runs["protonet"], *pictures)
    assert [row["query"] for row in pieces["predictions"]] == [row["query"] for row in whole["predictions"]]
    np.testing.assert_allclose(probabilities(pieces), probabilities(whole), atol=1e-5)


def test_what_is_written(runs, pictures, tmp_path: Path, capsys) -> None:
    """Files that disagree, probabilities that are none, names that break CSV or are taken for markup."""
    found = predict(runs["protonet"], *pictures)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["predictions.csv", "predictions.json"]
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found["predictions"]) == 9
    for row, same in zip(rows, found["predictions"], strict=True):
        assert [row["query"], row["prediction"], row["label"]] == [same["query"], same["prediction"], same["label"]]
        p = {name: float(row[f"p({name})"]) for name in SHOTS}
        assert p == pytest.approx(same["probabilities"], abs=1e-5)
        assert sum(p.values()) == pytest.approx(1, abs=1e-5)
        assert float(row["probability"]) == max(p.values())
    assert (found["algorithm"], found["checkpoint"]) == ("ProtoNet", str(runs["protonet"]))
    assert "green, [b]" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_out_is_in_the_run_by_default(runs, pictures) -> None:
    """Predictions that go nowhere, or over a file of the run."""
    support, query = pictures
    run = runs["protonet"].parent.parent
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    main(["--ckpt_path", str(runs["protonet"]), "--support", str(support), "--query", str(query)])
    assert (run / "predictions" / "query" / "predictions.json").is_file()
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_accuracy_of_what_is_labelled(runs, pictures, tmp_path: Path, capsys) -> None:
    """Queries counted as wrong, or right, whose class nobody said; a label from a folder above the queries."""
    support, query = pictures
    found = predict(runs["protonet"], support, query)
    right = sum(row["prediction"] == row["label"] for row in found["predictions"])
    assert (found["labelled"], found["accuracy"]) == (9, pytest.approx(right / 9))
    assert f"({right} of 9 labelled queries)" in capsys.readouterr().out
    assert all(row["query"].startswith(row["label"] + "/") for row in found["predictions"])

    (query / "unsure").mkdir()
    shutil.move(query / "blue" / "10.png", query / "unsure" / "10.png")
    shutil.move(query / "blue" / "11.png", query / "11.png")
    (query / "red" / "more").mkdir()
    shutil.move(query / "red" / "12.png", query / "red" / "more" / "12.png")
    found = predict(runs["protonet"], support, query)
    labels = {row["query"]: row["label"] for row in found["predictions"]}
    assert found["labelled"] == 7
    assert (labels["unsure/10.png"], labels["11.png"], labels["red/more/12.png"]) == (None, None, "red")

    found = predict(runs["protonet"], support, query / "red")  # flat: nobody said that these are red
    assert (found["labelled"], found["accuracy"]) == (0, None)


def test_any_picture_is_taken(runs, pictures) -> None:
    """Sizes, modes and formats that pictures come in, and files that systems leave among them."""
    support, query = pictures
    shutil.rmtree(query)
    query.mkdir()
    for number, mode in enumerate(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"]):
        image = picture("red", number, 20 + 7 * number)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256)
        else:
            image = image.convert("L").convert(mode) if mode in ("LA", "F") else image.convert(mode)
        image.save(query / f"{mode.replace(';', '')}.{'tiff' if mode in ('CMYK', 'F') else 'png'}")
    picture("blue", 1, 50).save(query / "photo.JPG")
    picture("blue", 1, 50).save(query / "moving.gif")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._photo.JPG"):
        (query / name).write_bytes(b"junk")
        (support / "red" / name).write_bytes(b"junk")
        (support / name).write_bytes(b"junk")
    (support / ".cache").mkdir()
    found = predict(runs["protonet"], support, query)
    assert len(found["predictions"]) == 11
    assert found["support"] == SHOTS
    assert np.isfinite(probabilities(found)).all()


def test_deep_pictures_are_told_apart(runs, pictures) -> None:
    """Queries of 12 bits, or of fractions, that all turn black and get one and the same answer."""
    support, query = pictures
    found = {}
    for kind, most, dtype in (("8", 255, np.uint8), ("12", 4095, np.uint16), ("float", 1, np.float32)):
        shutil.rmtree(query)
        query.mkdir()
        for name in SHOTS:
            grey = np.asarray(picture(name, 10).convert("L")) / 255
            grey = np.where(grey == grey.max(), 1, grey)  # white is in the picture
            values = grey * most if kind == "float" else np.rint(grey * most)
            Image.fromarray(values.astype(dtype)).save(query / f"{name}.tiff")
        found[kind] = probabilities(predict(runs["protonet"], support, query))
    assert found["8"].std(0).min() > 1e-3
    np.testing.assert_allclose(found["12"], found["8"], atol=5e-3)
    np.testing.assert_allclose(found["float"], found["8"], atol=5e-3)


def test_what_becomes_of_the_pictures_is_told(runs, pictures, caplog) -> None:
    """Pictures that are cropped, or turned into small drawings without their colours, without a word."""
    words = "the middle square of each in colour, scaled to 16×16 pixels"
    assert predict(runs["protonet"], *pictures)["pictures"] == words
    assert [record.message for record in caplog.records].count(f"pictures are seen as {words}") == 1
    drawings = "drawings of 28×28 pixels, bright strokes on black, whatever their colours"
    assert Omniglot().stored_form == drawings
    drawings += ", enlarged and centred where the ink spans less than 52 %"
    assert Glyphs().stored_form == drawings
    domains = {"drawn": Domain(Glyphs(), rotate=90, invert=True), "other": Domain(Glyphs())}
    assert ImageMixture(domains).stored_form == f"{drawings}, turned by 90°, inverted (as the domain 'drawn')"


def _one_class(support: Path, query: Path) -> None:
    for name in ("red", "blue"):
        shutil.rmtree(support / name)


def _cut(support: Path, query: Path) -> None:
    whole = (query / "red" / "10.png").read_bytes()
    (query / "red" / "10.png").write_bytes(whole[:300])


def _no_queries(support: Path, query: Path) -> None:
    shutil.rmtree(query)
    (query / "red").mkdir(parents=True)
    (query / ".DS_Store").write_text("")


def _empty_class(support: Path, query: Path) -> None:
    (support / "grey").mkdir()
    (support / "grey" / ".DS_Store").write_text("")


def _only_text(support: Path, query: Path) -> None:
    (support / "grey").mkdir()
    (support / "grey" / "notes.txt").write_text("none yet")


def _loose(support: Path, query: Path) -> None:
    picture("red", 0).save(support / "loose.png")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_one_class, "only one class, green, [b]: a task needs at least two"),
        (lambda s, q: [shutil.rmtree(folder) for folder in s.iterdir()], "no class folders"),
        (_empty_class, "grey holds no picture: put one into it"),
        (_only_text, "grey holds no picture: put one into it"),
        (lambda s, q: (q / "green.png").write_text("words"), "query/green.png is not a picture: remove it"),
        (_cut, "query/red/10.png cannot be read"),
        (_no_queries, "query holds no pictures"),
        (_loose, "loose.png lies in no class's folder"),
        (lambda s, q: shutil.rmtree(s), "there is no folder"),
        (lambda s, q: shutil.rmtree(q), "there is no folder"),
    ],
)
def test_folders_that_cannot_be(runs, pictures, capsys, spoil: Callable[[Path, Path], Any], words: str) -> None:
    """A traceback, a guess, or a message without the file and the cure."""
    spoil(*pictures)
    support, query = map(str, pictures)
    args = ["--ckpt_path", str(runs["protonet"]), "--support", support, "--query", query]
    assert words in refused(capsys, *args)


def test_checkpoints_and_settings_that_cannot_be(runs, pictures, tmp_path: Path, capsys) -> None:
    """A traceback for what is no checkpoint, no classifier of pictures, or no setting."""
    support, query = map(str, pictures)
    folders = ["--support", support, "--query", query]
    (tmp_path / "text.ckpt").write_text("hello")
    assert "is not a" in refused(capsys, "--ckpt_path", str(tmp_path / "text.ckpt"), *folders)
    assert "no checkpoint at" in refused(capsys, "--ckpt_path", str(tmp_path / "none.ckpt"), *folders)
    for flags, words in (
        (["--device", "cuda:99"], "give --device cpu"),
        (["--inner_steps", "2"], "leave out --inner_steps"),
        (["--batch_norm", "batch"], "invalid choice: 'batch'"),
        (["--data.size", "32"], "inputs are 3×32×32 but the network takes 3×16×16"),
        (["--model.init_args.distence", "cosine"], "did you mean"),
        (["--out", str(tmp_path / "text.ckpt")], "give another --out"),
    ):
        assert words in refused(capsys, "--ckpt_path", str(runs["protonet"]), *folders, *flags), flags
    sinusoid = train(
        tmp_path,
        "sinusoid",
        "models.MAML",
        *("--model.outputs", "1", "--model.backbone", "models.MLP", "--data", "datamodules.Sinusoid"),
        *("--data.val_tasks", "4", "--data.test_tasks", "4", "--trainer.max_steps", "20"),
    )
    assert "trained on Sinusoid, not on pictures" in refused(capsys, "--ckpt_path", str(sinusoid), *folders)


def test_names_that_are_no_unicode(runs, pictures) -> None:
    """A traceback for a file name that an old archive brought along."""
    support, query = pictures
    try:
        (query / "red" / "10.png").rename(Path(str(query)) / "caf\udce9.png")
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names")
    found = predict(runs["protonet"], support, query)
    assert [row["query"] for row in found["predictions"]].count("caf\\xe9.png") == 1
    assert len(found["predictions"]) == 9


def test_class_folders_that_look_alike_stay_apart(runs, pictures) -> None:
    """Catches classes that become one where names that are no Unicode are read, and labels of the wrong one."""
    support, query = pictures
    try:
        for root in pictures:
            for name, bad in (("red", b"a\xff"), ("blue", b"a\xfe"), ("green, [b]", b"a\\xff")):
                (root / name).rename(root / os.fsdecode(bad))
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names")
    found = predict(runs["protonet"], support, query)
    assert found["support"] == {"a\\xfe": 2, "a\\xff": 4, "a\\xff'": 1}
    assert found["labelled"] == 9
    by_folder = {"a\\xfe": 2, "a\\xff": 4, "a\\xff'": 1}
    assert Counter(row["label"] for row in found["predictions"]) == dict.fromkeys(by_folder, 3)
    with open(support.parent / "out" / "predictions.csv", newline="") as file:
        assert len(set(next(csv.reader(file)))) == 7


def test_query_folders_of_one_name_keep_their_predictions(runs, pictures, tmp_path: Path) -> None:
    """Catches predictions that those of another folder overwrite, and one folder more for each repetition."""
    support, query = pictures
    places = [tmp_path / part / name for part, name in (("a", "q"), ("b", "q"), ("a", "q.v1"), ("a", "q.v2"))]
    for place in places:
        shutil.copytree(query, place)
    places.append(places[0] / "red" / "10.png")
    folder = runs["protonet"].parent.parent / "predictions"
    shutil.rmtree(folder, ignore_errors=True)
    for place in (*places, *places):
        main(["--ckpt_path", str(runs["protonet"]), "--support", str(support), "--query", str(place)])
    found = {p.name: json.loads((p / "predictions.json").read_text())["query_folder"] for p in folder.iterdir()}
    names = ("q", "q-2", "q.v1", "q.v2", "10.png")
    assert found == {name: str(place.resolve()) for name, place in zip(names, places, strict=True)}
    (folder / "q" / "predictions.json").write_text("[]")  # whose it is nobody knows
    main(["--ckpt_path", str(runs["protonet"]), "--support", str(support), "--query", str(places[0])])
    assert (folder / "q" / "predictions.json").read_text() == "[]"
    assert (folder / "q-3" / "predictions.json").is_file()


def test_what_is_no_picture_is_left_out_and_said(runs, pictures, caplog) -> None:
    """Catches a folder refused for a note in it, a file that goes without a word, and one line for each of many."""
    support, query = pictures
    before = predict(runs["protonet"], support, query)
    assert not any("left out" in record.message for record in caplog.records)
    for name in ("red/notes.txt", "list.csv", "blue/empty"):
        (support / name).write_text("")
    for number in range(5):
        (query / "red" / f"notes{number}.txt").write_text("words")
    found = predict(runs["protonet"], support, query)
    assert (found["support"], found["predictions"]) == (SHOTS, before["predictions"])
    assert [record.message for record in caplog.records if "left out" in record.message] == [
        f"left out of {support}: 3 that are no pictures (blue/empty, list.csv, red/notes.txt)",
        f"left out of {query}: 5 that are no pictures (red/notes0.txt, red/notes1.txt, red/notes2.txt, …)",
    ]


def test_pictures_in_folders_within_a_class(runs, pictures) -> None:
    """Catches a class refused for folders in it, which training takes, or pictures in them that are lost."""
    support, query = pictures
    before = predict(runs["protonet"], support, query)
    for name in SHOTS:
        (support / name / "more" / "of it").mkdir(parents=True)
        for file in sorted((support / name).glob("*.png"))[:2]:
            file.rename(support / name / "more" / "of it" / file.name)
    found = predict(runs["protonet"], support, query)
    assert found["support"] == SHOTS
    np.testing.assert_allclose(probabilities(found), probabilities(before), atol=1e-5)


def test_the_command(tmp_path: Path) -> None:
    """A module that does not run, or whose exit code a script could not tell from success."""
    folders = ["--support", str(tmp_path), "--query", "none"]
    command = [sys.executable, "-m", "app.predict", "--ckpt_path", "none", *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no class folders" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(real_data() is None, reason="the real Omniglot is not here")
def test_drawings_of_omniglot(tmp_path: Path) -> None:
    """Drawings from files, of any size, that the learner sees otherwise than the same drawings of the data set."""
    root = real_data()
    assert root is not None
    checkpoint = train(
        tmp_path,
        "omniglot",
        "models.ProtoNet",
        *("--model.backbone", "models.Conv4", "--model.backbone.hidden", "16", "--model.backbone.downsample", "pool"),
        *("--data", "datamodules.Omniglot", "--data.root", str(root), "--data.train_ways", "20"),
        *("--data.train_queries", "3", "--data.meta_batch_size", "1", "--data.val_tasks", "20"),
        *("--data.test_tasks", "20", "--trainer.max_steps", "60"),
    )
    # The same characters and drawers, as the data set has them.
    stored = Omniglot(root=str(root)).classes("test")
    classes = [stored.names.index(f"Tengwar/character{k:02d}") for k in range(1, 6)]
    network = Conv4(hidden=16, downsample="pool").eval()
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("backbone."): w for name, w in weights.items() if "backbone." in name})
    with torch.no_grad(), normalize_by("running"):
        drawings = [stored.images[stored.starts[k] : stored.starts[k] + 12].float() / 255 for k in classes]
        z = torch.stack([network(drawn) for drawn in drawings])  # (classes, drawers, features)
    distance = (z[:, 2:, None] - z[:, :2].mean(1)).square().sum(-1)
    expected = (-distance).softmax(-1).flatten(0, 1).numpy()
    accuracy = (expected.argmax(1) == np.arange(5).repeat(10)).mean()

    rng = np.random.default_rng(0)
    with zipfile.ZipFile(root / "omniglot-py" / "images_evaluation.zip") as archive:
        for name in archive.namelist():
            match = re.search(r"/Tengwar/character0([1-5])/\d+_(\d\d)\.png$", name)
            if match is None or int(match[2]) > 12:
                continue
            with archive.open(name) as opened, Image.open(opened) as drawing:
                size = int(rng.integers(60, 400))
                odd = drawing.convert("L").resize((size, size), Image.Resampling.BICUBIC)
                for folder, image in (("odd", odd), ("own", drawing)):
                    part = "query" if match[2] > "02" else "support"
                    path = tmp_path / folder / part / match[1] / f"{match[2]}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    image.save(path)
    for folder in ("own", "odd"):
        found = predict(checkpoint, tmp_path / folder / "support", tmp_path / folder / "query")
        assert found["labelled"] == 50
        assert abs(probabilities(found) - expected).mean() < 0.05
        assert found["accuracy"] == pytest.approx(accuracy, abs=0.15)
        assert found["accuracy"] > 0.35  # by chance 0.2
