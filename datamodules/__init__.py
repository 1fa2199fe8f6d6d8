"""One file per task distribution; each data module is found here by name."""

from datamodules.continual.class_streams import ClassStreams
from datamodules.continual.instance_streams import InstanceStreams
from datamodules.continual.osaka import OsakaStreams
from datamodules.continual.rainbow import RainbowImages
from datamodules.continual.returning_streams import ReturningStreams
from datamodules.continual.transformed_streams import TransformedStreams
from datamodules.core.base import EpisodicDataModule
from datamodules.core.episodes import Episodes, Support
from datamodules.core.errors import DataError
from datamodules.images.digits import Digits
from datamodules.images.glyphs import Glyphs
from datamodules.images.image_folder import ImageFolder
from datamodules.images.learn2learn_tasksets import Learn2LearnTasksets
from datamodules.images.multi_domain import Domain, ImageMixture
from datamodules.images.omniglot import Omniglot
from datamodules.images.tasks import ImageDataModule
from datamodules.regression.functions import FiveFamily, FourFamily, HarderSinusoid, Linear, Sinusoid
from datamodules.regression.gaussian_processes import GaussianProcesses
from datamodules.regression.quadratics import Quadratics
from datamodules.reinforcement.bandits import Bandits
from datamodules.reinforcement.environments import EnvironmentDataModule
from datamodules.reinforcement.gymnasium_tasks import GymnasiumTasks
from datamodules.reinforcement.half_cheetah import HalfCheetahDirection, HalfCheetahVelocity
from datamodules.reinforcement.mdps import TabularMDPs
from datamodules.reinforcement.navigation import PointRobot

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
    GaussianProcesses,
    FiveFamily,
    Quadratics,
    Bandits,
    TabularMDPs,
    PointRobot,
    GymnasiumTasks,
    HalfCheetahVelocity,
    HalfCheetahDirection,
    ClassStreams,
    InstanceStreams,
    Digits,
    TransformedStreams,
    RainbowImages,
    OsakaStreams,
    ReturningStreams,
)

__all__ = [
    "DATA",
    "Bandits",
    "ClassStreams",
    "DataError",
    "Digits",
    "Domain",
    "EnvironmentDataModule",
    "Episodes",
    "EpisodicDataModule",
    "FiveFamily",
    "FourFamily",
    "GaussianProcesses",
    "Glyphs",
    "GymnasiumTasks",
    "HalfCheetahDirection",
    "HalfCheetahVelocity",
    "HarderSinusoid",
    "ImageDataModule",
    "ImageFolder",
    "ImageMixture",
    "InstanceStreams",
    "Learn2LearnTasksets",
    "Linear",
    "Omniglot",
    "OsakaStreams",
    "PointRobot",
    "Quadratics",
    "RainbowImages",
    "ReturningStreams",
    "Sinusoid",
    "Support",
    "TabularMDPs",
    "TransformedStreams",
]
