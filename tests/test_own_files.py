"""What a user brings along, outside of the project: a learner, a data module, and Metabolt as a library."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from app.runs.evaluation_record import Evaluation
from tests.support.processes import ROOT

# As a user writes it: a learner with a metric of its own, and tasks that nobody else has.
MINE = '''
import numpy as np
import torch
from torch import nn

from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Episodes, TaskDistribution
from datamodules.core.metric import Metric
from datamodules.core.streams import TaskStreams
from models.core.inner_loop import class_means
from models.core.learner import MetaLearner, Paper


class Means(MetaLearner):
    """Classifies by the nearest class mean of a learned linear map."""

    paper = Paper("A. User", "Means", "their desk", 2026, "https://example.org")
    tasks = frozenset({"classification"})
    own_metrics = {"spread": Metric("lower", "spread of the means")}

    def __init__(self, features: int = 4, **others):
        super().__init__(**others)
        self.map_of_inputs = nn.Linear(3, features)

    def adapt(self, support):
        z = self.map_of_inputs(support.x)
        return class_means(z, support)

    def predict(self, state, query_x):
        return -torch.cdist(self.map_of_inputs(query_x), state)

    def task_metrics(self, batch):
        return {"spread": self.map(lambda task: self.adapt(task.support).std(), batch)}


class Clouds(TaskDistribution):
    def __init__(self, seed, split):
        self.seed, self.split = seed, split

    def sample(self, indices):
        rng = TaskStreams(self.seed, self.split, indices)
        centre, noise = rng.normal(2, 3), rng.normal(2, 6, 3) * 0.5
        x = torch.from_numpy(centre[:, :, None] + noise).float()
        y = torch.arange(2).repeat_interleave(3).expand(len(x), -1)
        own, asked = x[:, :, :3].flatten(1, 2), x[:, :, 3:].flatten(1, 2)
        return Episodes(own, y, asked, y, torch.as_tensor(np.asarray(indices, np.int64)), ways=2)


class CloudTasks(EpisodicDataModule):
    def __init__(self, meta_batch_size: int = 4, test_tasks: int = 40, seed: int = 0):
        super().__init__(meta_batch_size, 20, test_tasks, 10, 0, seed)

    def task_shape(self):
        return {"ways": 2, "shots": 3, "queries": 3}

    def build(self, split):
        return Clouds(self.seed, split)
'''
CONFIG = """
name: mine
model: {class_path: mine.Means, init_args: {features: 5}}
data: {class_path: mine.CloudTasks}
trainer: {max_steps: 6, val_check_interval: 3, accelerator: cpu}
wandb: "off"
"""


def called(folder: Path, *words: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "150"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_learner_and_data_of_ones_own_do_all_that_ours_do(tmp_path: Path):
    """Catches a list of learners, data or metrics somewhere in the project that a user's own are not in."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "mine.yaml").write_text(CONFIG)
    train = (str(ROOT / "train.py"), "--config", "mine.yaml")
    assert "spread" in called(tmp_path, *train)
    called(tmp_path, *train, "--name", "other", "--trainer.max_steps", "3")
    called(tmp_path, *train, "--name", "other", "--ckpt_path", "last")
    run, other = tmp_path / "runs" / "mine", tmp_path / "runs" / "other"
    weights = [torch.load(r / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for r in (run, other)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert (run / "results.png").is_file()
    again = ("-m", "app.evaluate", "--ckpt_path", "runs/mine/checkpoints/last.ckpt", "--tasks", "15")
    assert "spread" in called(tmp_path, *again)
    called(
        tmp_path, "-m", "app.evaluate", "--ckpt_path", "runs/mine/checkpoints/last.ckpt", "--data", "mine.CloudTasks"
    )
    told = called(tmp_path, "-m", "app.compare", "runs/mine", "runs/other")
    assert "spread" in told and "Paired differences" in told
    assert Evaluation.load(run).declared["spread"].better == "lower"
    assert json.loads((run / "results.json").read_text())["ways"] == 2


def test_pictures_of_ones_own_are_classified_by_a_learner_of_ones_own(tmp_path: Path):
    """Catches a prediction that only the project's own learners can make."""
    from PIL import Image

    (tmp_path / "mine.py").write_text(
        MINE.replace("nn.Linear(3,", "nn.Linear(64,")
        .replace("support.x)", "support.x.flatten(1))")
        .replace("self.map_of_inputs(query_x)", "self.map_of_inputs(query_x.flatten(1))")
    )
    for part, count in (("train", 20), ("support", 3), ("query", 3)):
        for k in range(count):
            for n in range(4):
                path = tmp_path / part / f"class{k:02d}" / f"{n}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), 12 * k + n).save(path)
    data = "{class_path: datamodules.ImageFolder, init_args: {root: train, size: 8, channels: 1, ways: 2, queries: 1"
    data += ", meta_batch_size: 2, val_tasks: 4, test_tasks: 4}}"
    (tmp_path / "mine.yaml").write_text(CONFIG.replace("{class_path: mine.CloudTasks}", data))
    called(tmp_path, str(ROOT / "train.py"), "--config", "mine.yaml", "--pictures", "false")
    folders = ("--support", "support", "--query", "query")
    told = called(tmp_path, "-m", "app.predict", "--ckpt_path", "runs/mine/checkpoints/last.ckpt", *folders)
    assert "class02" in told


README = (ROOT / "README.md").read_text()
LIBRARY = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "models" in block]


@pytest.mark.parametrize("block", LIBRARY, ids=range(len(LIBRARY)))
def test_the_library_as_the_readme_has_it(block: str, tmp_path: Path):
    """Catches lines of the page that do not run as they stand, in a folder with the run that they name."""
    checkpoint = tmp_path / "runs" / "quickstart" / "checkpoints" / "best.ckpt"
    train = (str(ROOT / "train.py"), "--config", str(ROOT / "configs" / "quickstart.yaml"))
    small = ("--config", str(ROOT / "configs" / "overlays" / "debug.yaml"), "--data.init_args.root", str(ROOT / "data"))
    if "ckpt" in block:
        called(tmp_path, *train, *small, "--trainer.accelerator", "cpu", "--wandb", "off", "--pictures", "false")
        assert checkpoint.is_file()
    called(tmp_path, "-c", block)


def test_the_readme_shows_the_library():
    """Catches a page without these lines."""
    assert len(LIBRARY) == 2
