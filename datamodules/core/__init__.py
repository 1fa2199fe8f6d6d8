"""Episodes, streams of chance, downloads, errors, and what a process needs at its start."""

from datamodules.core.runtime import prepare

prepare()  # before anything imports torchmetrics, and so before pytorch_lightning
