"""What all tests share."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core a worker; and what is small is slower by more

import pytest
import torch

import app  # noqa: F401  (before anything imports torchmetrics)


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector is not to go through it in every test."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from the same random state and leaves threads and default type as they were."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_default_dtype(torch.float32)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
