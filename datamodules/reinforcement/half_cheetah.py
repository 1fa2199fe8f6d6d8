"""MuJoCo's half-cheetah, which is to run at a velocity or in a direction."""

from __future__ import annotations

from typing import Any

from datamodules.reinforcement.gymnasium_tasks import GymnasiumTasks

ENVS = "datamodules.reinforcement.half_cheetah_envs"


class HalfCheetahVelocity(GymnasiumTasks):
    """Goal velocities, uniform in [0, 3] m/s, as in the released code of PEARL (Rakelly et al., ICML 2019).

    The reward is -|v - goal| - 0.05 |action|². Observed are 20 numbers (8 positions of root and joints without the
    first, 9 velocities, 3 of the torso's place), actions are 6 torques in [-1, 1]; see half_cheetah_envs.Cheetah.

    Args:
        horizon: steps of an episode, 0.05 s each.
        episodes: of a trial.
        train_tasks: number of meta-training velocities, 100 in the released code.
        test_tasks: of meta-test velocities, 30 there.
        val_tasks: of meta-validation velocities.
        processes, unscaled: see GymnasiumTasks; the published figures are of what the simulation gives.
        **common: see EnvironmentDataModule.

    Raises:
        DataError: gymnasium or mujoco is not installed.
    """

    def __init__(
        self,
        horizon: int = 200,
        episodes: int = 2,
        train_tasks: int | None = 100,
        test_tasks: int = 30,
        val_tasks: int = 30,
        processes: int = 0,
        unscaled: bool = False,
        **common: Any,
    ) -> None:
        settings: dict[str, Any] = {"train_tasks": train_tasks, "test_tasks": test_tasks, "val_tasks": val_tasks}
        settings["unscaled"] = unscaled
        super().__init__(f"{ENVS}.HalfCheetahVelocityEnv", horizon, episodes, processes, **settings, **common)


class HalfCheetahDirection(GymnasiumTasks):
    """Forwards or backwards, as in MAML (Finn et al., ICML 2017) and the released code of PEARL.

    The reward is the velocity in the task's direction, m/s, less 0.05 |action|². Observations and actions as for
    HalfCheetahVelocity.

    Args:
        horizon: steps of an episode, 0.05 s each.
        episodes: of a trial.
        test_tasks, val_tasks: each is one of the two directions.
        processes, unscaled: see GymnasiumTasks; the published figures are of what the simulation gives.
        **common: see EnvironmentDataModule.

    Raises:
        DataError: gymnasium or mujoco is not installed.
    """

    def __init__(
        self,
        horizon: int = 200,
        episodes: int = 2,
        test_tasks: int = 30,
        val_tasks: int = 30,
        processes: int = 0,
        unscaled: bool = False,
        **common: Any,
    ) -> None:
        settings: dict[str, Any] = {"test_tasks": test_tasks, "val_tasks": val_tasks}
        settings["unscaled"] = unscaled
        super().__init__(f"{ENVS}.HalfCheetahDirectionEnv", horizon, episodes, processes, **settings, **common)
