"""The benchmark of learners on streams, small."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks import streams
from datamodules import Digits, TransformedStreams
from models import MLP, OnlineSGD
from models.continual.learner import stream_metrics


@pytest.fixture
def data(monkeypatch) -> TransformedStreams:
    grid = streams.grid(rate=(0.0, 0.3), glances=(2,))
    monkeypatch.setattr(streams, "LEARNERS", {"online": (OnlineSGD, {"batch": 5}, grid)})
    return TransformedStreams(Digits(8), experiences=2, shots=40, queries=40)


def test_settings_are_chosen_on_validation_streams_and_nothing_is_measured_twice(data, tmp_path, monkeypatch):
    """Catches a choice by the test, streams counted by batch, and a record that is not read when it goes on."""
    args = argparse.Namespace(learners="online", settings=None, val_streams=2, streams=3, batch=2)
    path = tmp_path / "measured" / "streams.csv"
    ((name, chosen, row),) = streams.compared(streams.Record(path), data, args)
    assert (name, chosen, row["split"], row["streams"]) == ("online", {"rate": 0.3, "glances": 2}, "test", "3")
    learner = OnlineSGD(MLP(64, (100, 100)), batch=5, rate=0.3, glances=2).eval()
    with torch.no_grad():
        found = stream_metrics(learner.followed(data.on_device(data.distribution("test").sample(range(3)))))
    for metric in streams.MEASURED:
        assert float(row[metric]) == pytest.approx(found[metric].mean().item(), abs=1e-3)
    assert [r["split"] for r in streams.Record(path).rows] == ["val", "val", "test"]

    monkeypatch.setattr(OnlineSGD, "update", None)  # whatever is measured now fails
    again = list(streams.compared(streams.Record(path), data, args))
    assert again == [(name, chosen, row)] and len(streams.Record(path).rows) == 3
    streams.write(again, data, tmp_path / "table.csv")
    head, line = (tmp_path / "table.csv").read_text().splitlines()
    assert head.startswith("learner,chosen,RA,LA,BTI,") and line.startswith('online,"rate 0.3, glances 2",')
