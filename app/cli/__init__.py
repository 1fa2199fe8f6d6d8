"""The command line: parser, building from a configuration or from a checkpoint."""

import contextlib
import os
import sys

# A learner or data module of the user's own is found by name where the command is called from, as by ``python -m``.
with contextlib.suppress(FileNotFoundError):
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
