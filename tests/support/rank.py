"""One of two processes that another started: trains one learner after the other, each in a process group of its own."""

from __future__ import annotations

import json
import os
import sys

import app  # noqa: F401  (before anything imports torchmetrics)
from app.cli.builder import main

if __name__ == "__main__":
    for line in sys.stdin:
        port, flags = json.loads(line)
        os.environ["MASTER_PORT"] = port
        os.environ["WORLD_SIZE"] = "2"  # Lightning forgets it at the end of a run
        main(flags)
