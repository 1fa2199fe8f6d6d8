"""One file per task distribution; each data module is found here by name."""

import app  # noqa: F401  (prepares torchvision and memory before torchmetrics is imported)
from datamodules.base import DataError, EpisodicDataModule
from datamodules.glyphs import Glyphs
from datamodules.image_folder import ImageFolder
from datamodules.images import ImageDataModule
from datamodules.learn2learn_tasksets import Learn2LearnTasksets
from datamodules.mixture import Domain, ImageMixture
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
)

__all__ = [
    "DATA",
    "DataError",
    "Domain",
    "EpisodicDataModule",
    "FourFamily",
    "Glyphs",
    "HarderSinusoid",
    "ImageDataModule",
    "ImageFolder",
    "ImageMixture",
    "Learn2LearnTasksets",
    "Linear",
    "Omniglot",
    "Sinusoid",
]
