"""MuJoCo's half-cheetah on tasks, as environments of gymnasium. Imported where they are made."""

from __future__ import annotations

import functools
from typing import Any

import mujoco
import numpy as np
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.spaces import Box


@functools.cache
def load(path: str, width: int, height: int) -> mujoco.MjModel:
    """The model, which never changes and so is shared: it takes longer to load than an episode to simulate."""
    told = mujoco.get_mju_user_warning()
    # A newer MuJoCo warns of an older spelling in gymnasium's file, into a log in the working directory.
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        model = mujoco.MjModel.from_xml_path(path)
    finally:
        mujoco.set_mju_user_warning(told)
    model.vis.global_.offwidth = max(model.vis.global_.offwidth, width)
    model.vis.global_.offheight = max(model.vis.global_.offheight, height)
    return model


class Cheetah(HalfCheetahEnv):
    """Gymnasium's HalfCheetah-v5 with another reward, and the observations of PEARL's released code: 20 numbers.

    They are the positions of root and joints but for the first (8: height in m, then angles in rad), all velocities
    (9: m/s and rad/s) and the place of the torso (3, m). Actions are 6 torques; a step is 5 of the simulation, 0.05 s.

    Args:
        width, height: of pictures.
        **arguments: see HalfCheetahEnv.
    """

    def __init__(self, width: int = 240, height: int = 160, **arguments: Any) -> None:
        super().__init__(width=width, height=height, **arguments)
        self.observation_space = Box(-np.inf, np.inf, (20,), np.float64)

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        model = load(self.fullpath, self.width, self.height)
        return model, mujoco.MjData(model)

    def _get_obs(self) -> np.ndarray:
        return np.concatenate([self.data.qpos[1:], self.data.qvel, self.get_body_com("torso")])

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        before = self.data.qpos[0]
        self.do_simulation(action, self.frame_skip)
        velocity = (self.data.qpos[0] - before) / self.dt
        reward = float(self.progress(velocity) - 0.05 * np.square(action, dtype=np.float64).sum())
        return self._get_obs(), reward, False, False, {}

    def progress(self, velocity: float) -> float:
        """The part of the reward that is the task's; velocity in m/s."""
        raise NotImplementedError


class HalfCheetahVelocityEnv(Cheetah):
    """To run at a velocity, uniform in [0, 3] m/s: the reward is the negative distance to it."""

    goal = 0.0

    def sample_task(self, rng: np.random.Generator) -> dict[str, float]:
        return {"velocity": rng.uniform(0.0, 3.0)}

    def set_task(self, task: dict[str, float]) -> None:
        self.goal = task["velocity"]

    def progress(self, velocity: float) -> float:
        return -abs(velocity - self.goal)


class HalfCheetahDirectionEnv(Cheetah):
    """To run forwards (1) or backwards (-1), each half of the time: the reward is the velocity in that direction."""

    direction = 1.0

    def sample_task(self, rng: np.random.Generator) -> dict[str, float]:
        return {"direction": rng.choice([-1.0, 1.0])}

    def set_task(self, task: dict[str, float]) -> None:
        self.direction = task["direction"]

    def progress(self, velocity: float) -> float:
        return self.direction * velocity
