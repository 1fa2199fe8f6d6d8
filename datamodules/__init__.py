"""One file per task distribution; each data module is found here by name."""

import app  # noqa: F401  (prepares torchvision and memory before torchmetrics is imported)
from datamodules.bandits import Bandits
from datamodules.base import DataError, EpisodicDataModule
from datamodules.environments import EnvironmentDataModule
from datamodules.glyphs import Glyphs
from datamodules.gymnasium_tasks import GymnasiumTasks
from datamodules.half_cheetah import HalfCheetahDirection, HalfCheetahVelocity
from datamodules.image_folder import ImageFolder
from datamodules.images import ImageDataModule
from datamodules.learn2learn_tasksets import Learn2LearnTasksets
from datamodules.mdps import TabularMDPs
from datamodules.mixture import Domain, ImageMixture
from datamodules.navigation import PointRobot
from datamodules.omniglot import Omniglot
from datamodules.regression import FourFamily, HarderSinusoid, Linear, Sinusoid

DATA: tuple[type[EpisodicDataModule], ...] = (
    Glyphs,
    Omniglot,
    ImageFolder,
    ImageMixture,
    Learn2LearnTasksets,
    Sinusoid,
    HarderSinusoid,
    Linear,
    FourFamily,
    Bandits,
    TabularMDPs,
    PointRobot,
    GymnasiumTasks,
    HalfCheetahVelocity,
    HalfCheetahDirection,
)

__all__ = [
    "DATA",
    "Bandits",
    "DataError",
    "Domain",
    "EnvironmentDataModule",
    "EpisodicDataModule",
    "FourFamily",
    "Glyphs",
    "GymnasiumTasks",
    "HalfCheetahDirection",
    "HalfCheetahVelocity",
    "HarderSinusoid",
    "ImageDataModule",
    "ImageFolder",
    "ImageMixture",
    "Learn2LearnTasksets",
    "Linear",
    "Omniglot",
    "PointRobot",
    "Sinusoid",
    "TabularMDPs",
]
