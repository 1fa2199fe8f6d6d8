"""What may fail without ending a run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any


def one_line(error: BaseException) -> str:
    """What an error says, on one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:160] + " …"


class Guard:
    """Calls actions whose failure costs a line in the log, the first time, and not the run.

    Args:
        log: where the line goes.
    """

    def __init__(self, log: logging.Logger) -> None:
        self.log = log
        self._failed: set[str] = set()

    def __call__(self, what: str, action: Callable[[], Any]) -> Any:
        """The action's result, or None."""
        try:
            return action()
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                self.log.warning("%s not made, the run goes on: %s: %s", what, type(error).__name__, one_line(error))
            return None
