"""Configurations that give only what differs from another one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from app.cli.base_configs import load, over, whole, with_bases
from datamodules.core.errors import ConfigError
from tests.support.processes import ROOT, build

CONFIGS = ROOT / "configs"


def write(path: Path, **content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_configuration_lies_over_its_base_and_that_over_its_own(tmp_path: Path):
    """Catches layers in the wrong order, mappings replaced whole, lists merged, and paths from another folder."""
    write(tmp_path / "a.yaml", x=1, deep={"one": 1, "two": [1, 2], "three": None})
    write(tmp_path / "in" / "b.yaml", base="../a.yaml", y=2, deep={"two": [3]})
    last = write(tmp_path / "in" / "c.yaml", base="b.yaml", x=3, deep={"three": {"four": 4}})
    assert whole(last) == {"x": 3, "y": 2, "deep": {"one": 1, "two": [3], "three": {"four": 4}}}


def test_another_class_does_not_take_over_settings():
    """Catches settings of the base's optimizer given to another one, which does not have them."""
    below = {"class_path": "A", "init_args": {"x": 1, "y": 2}}
    assert over(below, {"class_path": "B", "init_args": {"x": 3}}) == {"class_path": "B", "init_args": {"x": 3}}
    assert over(below, {"init_args": {"x": 3}}) == {"class_path": "A", "init_args": {"x": 3, "y": 2}}
    assert over(below, None) is None


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"a": {"base": "b.yaml"}, "b": {"base": "a.yaml"}}, "its own base"),
        ({"a": {"base": "a.yaml"}}, "its own base"),
        ({"a": {"base": "nothing.yaml"}}, "there is no file .*nothing.yaml"),
        ({"a": {"base": 3}}, "a.yaml is 3"),
        ({"a": {"base": "b.yaml"}, "b": "a text"}, "b.yaml is no configuration"),
        ({"a": {"base": "b.yaml"}, "b": None}, "b.yaml cannot be read"),
    ],
)
def test_what_is_wrong_with_a_base_names_the_file(files: dict, what: str, tmp_path: Path, capsys):
    """Catches an endless walk from base to base, and errors that do not say in which file the mistake is."""
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text("x: [" if content is None else yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=what):
        whole(tmp_path / "a.yaml")
    from app.cli.builder import main

    with pytest.raises(SystemExit) as stopped:
        main(["--config", str(tmp_path / "a.yaml")])
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("trainer: null", "trainer is null in a.yaml: give it settings"),
        ("trainer: [1]", r"trainer is \[1\] in a.yaml: give it settings"),
        ("model:", "model is null in a.yaml: give it a class_path"),
        ("data: {class_path: x, init_args: }", "data.init_args is null in a.yaml: give it settings"),
        ("x: [{init_args: [1]}]", r"x.0.init_args is \[1\] in a.yaml"),
        ("a: &a [*a]", "a.0 in a.yaml holds itself"),
        ("a: " + "[" * 3000 + "]" * 3000, "a.yaml holds too many values inside one another"),
        ("", "a.yaml is empty"),
        ("# nothing", "a.yaml is empty"),
        ("a text", "a.yaml is no configuration"),
        ("name: x\ntrainer:\n  max_steps: 1\n  max_steps: 2\n", "a.yaml gives max_steps twice, again in line 4"),
    ],
    ids=lambda text: text[:20],
)
def test_what_a_configuration_cannot_hold_names_file_and_key(content: str, what: str, tmp_path: Path, monkeypatch):
    """Catches an error of the program, or settings of which the last wins, for what a user wrote into a file."""
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(content)
    with pytest.raises(ConfigError, match=what):
        with_bases(["--config", "a.yaml"])
    with pytest.raises(ConfigError, match=what):
        with_bases(["--config=a.yaml"])


def test_a_merge_may_repeat_what_it_overrides(tmp_path: Path):
    """Catches a key that is refused as given twice, once of its own and once by way of an alias."""
    path = tmp_path / "a.yaml"
    path.write_text("a: &a {x: 1}\nb: &b {<<: *a, x: 2, y: 3}\nc: {<<: *b, x: 4}\nd: [*b, *b]\n")
    assert load(path)["c"] == {"x": 4, "y": 3}


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    """Catches a command that hangs on a configuration that nobody writes."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe is no regular file"):
        with_bases(["--config", str(tmp_path / "pipe")])


def test_flags_and_files_without_a_base_stay_as_they_are(tmp_path: Path):
    """Catches arguments that are reordered, dropped, or taken for files."""
    plain, based = write(tmp_path / "a.yaml", x=1), write(tmp_path / "b.yaml", base="a.yaml", y=2)
    args = ["--config", str(plain), "--name", "--config", "--x=1", "--config", "{x: 1}"]
    assert with_bases(args) == args
    assert with_bases(["--config=" + str(based), "--y", "3"])[2:] == ["--y", "3"]
    assert yaml.safe_load(with_bases(["--config", str(based)])[1]) == {"x": 1, "y": 2}


def test_flags_win_over_a_configuration_with_a_base(tmp_path: Path):
    """Catches a base that is laid over what is given after it."""
    path = CONFIGS / "optimization/maml/omniglot-5way-1shot-short.yaml"
    cli = build("--config", str(path), "--model.init_args.inner_rate", "0.123", "--runs", str(tmp_path))
    assert cli.model.inner_rate == 0.123
    assert cli.trainer.max_steps == yaml.safe_load(path.read_text())["trainer"]["max_steps"]
    assert "base:" not in cli.yaml()


# A base gives keys, and takes none away: this one has fewer domains.
WHOLE = {CONFIGS / "task_embedding/hsml/domains-5way-1shot-short.yaml"}


@pytest.mark.parametrize(
    "path", sorted({*CONFIGS.rglob("*-short.yaml")} - WHOLE), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_short_configurations_repeat_nothing_of_their_base(path: Path):
    """Catches a short configuration that is a copy, and so does not follow when its parent is corrected."""
    content = yaml.safe_load(path.read_text())
    below = whole(path.parent / content.pop("base"))

    def repeats(below: object, above: object, key: str = "") -> list[str]:
        if isinstance(below, dict) and isinstance(above, dict) and over(below, above) is not above:
            return [r for k, v in above.items() if k in below for r in repeats(below[k], v, f"{key}.{k}")]
        return [key] if below == above else []

    assert repeats(below, content) == []
