"""Commands, and what they share: command line, runs, plots, dashboard."""

import datamodules.core  # noqa: F401  (prepares torchvision and memory before torchmetrics is imported)
