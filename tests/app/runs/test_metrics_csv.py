"""metrics.csv keeps what was logged, and is not written over where it cannot be read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from app.cli.builder import main
from app.runs.metrics_csv import MetricsCSV
from datamodules.core.errors import ConfigError
from tests.support.toy import command


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("a;b\n1;2\n", "its first line names no column step"),
        ("step,a\n1,2\n1.0,2\n", "line 3 has '1.0' for its step"),
        ("step,a\n,2\n", "line 2 has '' for its step"),
        ("step,a\n1,2,3\n", "line 2 has more values than columns"),
        ("step,a\n1,é\n".encode("latin-1"), "can't decode"),
    ],
)
def test_a_file_that_was_edited_is_left_as_it_is(content: str | bytes, what: str, tmp_path: Path):
    """Catches an error of the program, and rows that are lost, where a spreadsheet saved the file."""
    path = tmp_path / "metrics.csv"
    path.write_bytes(before := content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=re.escape(what)) as refused:
        MetricsCSV(tmp_path)
    assert "move" in str(refused.value) and path.read_bytes() == before


def test_rows_are_gone_on_with(tmp_path: Path):
    """Catches rows of an earlier part that are lost or come twice, and a test that is not the last step's."""
    (tmp_path / "metrics.csv").write_text("step,a\n1,2\n3,4\n5,6\n")
    tested = MetricsCSV(tmp_path)
    tested.log_metrics({"b": 7.0}, 0)
    tested.save()
    assert tested.path.read_text().split() == ["step,a,b", "1,2,", "3,4,", "5,6,7.0"]
    resumed = MetricsCSV(tmp_path)
    resumed.start_at(3)
    resumed.log_metrics({"a": 8.0}, 4)
    resumed.save()
    assert resumed.path.read_text().split() == ["step,a", "1,2", "3,4", "4,8.0"]


def test_a_run_whose_metrics_cannot_be_read_is_refused_before_any_work(tmp_path: Path, capsys):
    """Catches a test that is computed, and then lost because its figures cannot be added."""
    main(command("ProtoNet", tmp_path, steps=2))
    run = tmp_path / "protonet"
    (run / "metrics.csv").write_text("a;b\n")
    (run / "results.json").unlink()
    for flags in (("--stage", "test"), ("--ckpt_path", "last")):
        with pytest.raises(SystemExit) as stopped:
            main(command("ProtoNet", tmp_path, *flags, steps=4))
        assert stopped.value.code == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert "metrics.csv cannot be read" in said[-1] and not any("Restoring" in line for line in said)
    assert (run / "metrics.csv").read_text() == "a;b\n"
