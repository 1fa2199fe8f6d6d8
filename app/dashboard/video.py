"""A trial on film, where the environments can be rendered."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from datamodules.core.files import write_atomically
from datamodules.reinforcement.environments import Environment, Environments, Facts, Step

SECONDS, FRAMES = 15.0, 150  # most that rendering may take, about; most frames
WIDTH, STRIP = 320, 16  # of the film's frames; of the text above each


class Film(Environment):
    """An environment that acts as another, of whose first row it keeps pictures.

    Args:
        shown: the other one; it has ``render``, see GymnasiumEnvironment.
        steps: of the trials to come, which say how many steps a picture stands for.

    Attributes:
        frames: pictures with a line of text.
        stride: steps between two.
    """

    def __init__(self, shown: Any, steps: int) -> None:
        self.shown, self.steps = shown, steps
        self.horizon, self.facts, self.revealed = shown.horizon, shown.facts, shown.revealed
        self.observation_size, self.actions, self.discrete = shown.observation_size, shown.actions, shown.discrete
        self.start_draws, self.step_draws = shown.start_draws, shown.step_draws
        self.frames: list[Image.Image] = []
        self.stride = 0
        self.episode = self.at = 0
        self.total = 0.0

    def start(self, task: Facts, draws: Tensor) -> Any:
        state = self.shown.start(task, draws)
        self.episode, self.at, self.total = self.episode + 1, 0, 0.0
        self._keep()
        return state

    def observe(self, task: Facts, state: Any) -> Tensor:
        return self.shown.observe(task, state)

    def step(self, task: Facts, state: Any, action: Tensor, draws: Tensor) -> Step:
        step = self.shown.step(task, state, action, draws)
        self.at, self.total = self.at + 1, self.total + float(step.reward[0])
        if self.at % self.stride == 0 or self.at == self.horizon:
            self._keep()
        return step

    def optimum(self, task: Facts) -> Tensor | None:
        return self.shown.optimum(task)

    def describe(self, task: Facts) -> Tensor:
        return self.shown.describe(task)

    def _keep(self) -> None:
        if len(self.frames) > 2 * FRAMES:  # trials were more than was said
            return
        if not self.stride:
            self.shown.render()  # the first one opens what draws
            began = time.monotonic()
            self.shown.render()
            affordable = min(SECONDS / max(time.monotonic() - began, 1e-6), FRAMES)
            self.stride = max(1, -(-self.steps // int(max(affordable, 10))))
        text = f"episode {self.episode}  step {self.at}  return {self.total:.1f}"
        self.frames.append(frame(self.shown.render(), text))


def frame(picture: np.ndarray, text: str) -> Image.Image:
    """A picture (height, width, 3) uint8, brought to a width and with text above."""
    image = Image.fromarray(picture)
    height = max(1, round(image.height * WIDTH / image.width))
    whole = Image.new("RGB", (WIDTH, height + STRIP), "white")
    whole.paste(image.resize((WIDTH, height)), (0, STRIP))
    ImageDraw.Draw(whole).text((4, 2), text, fill="black")
    return whole


def film(learner: Any, batch: Environments) -> tuple[list[Image.Image], float] | None:
    """Frames of what a learner does in evaluation, and how many there are to a second; None where nothing renders.

    Args:
        learner: in evaluation mode; its metrics of "val" tasks are lost.
        batch: the task to film, on the learner's device.
    """
    shown: Any = batch.environment.rendering()
    if shown is None:
        return None
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo draws without a screen, but has to be told
    filmed = Film(shown, batch.episodes * shown.horizon)
    try:
        # The evaluation itself, as each learner has it; under a stage whose metrics nobody asks for after a test.
        learner.evaluation_step(dataclasses.replace(batch, environment=filmed), "val")
    finally:
        learner.stage_metrics("val").reset()
        shown.close()
    return filmed.frames, shown.fps / filmed.stride


def save(frames: list[Image.Image], fps: float, path: Path) -> None:
    """As a GIF that repeats; frames (width, height) of one size."""
    file = io.BytesIO()
    first, *others = frames
    # Viewers take less than 20 ms between frames for a mistake.
    first.save(file, "GIF", save_all=True, append_images=others, duration=max(20, round(1000 / fps)), loop=0)
    write_atomically(path, file.getvalue())
