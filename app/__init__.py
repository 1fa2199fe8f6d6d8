"""Everything that is neither an algorithm nor data: command line, run directory, callbacks, evaluation, prediction."""

from app.runtime import prepare

prepare()  # before anything imports torchmetrics, and so before pytorch_lightning
