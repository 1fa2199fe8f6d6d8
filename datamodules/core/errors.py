"""What a user can mend, said in one line: errors, and checks of settings."""

from __future__ import annotations


class DataError(Exception):
    """The data cannot serve the configuration; the message is one line that names the cure."""


def at_least(minimum: int, **settings: float | None) -> None:
    """Refuse settings below a minimum, before any work; None passes.

    Raises:
        ValueError: naming the setting, its value and the minimum.
    """
    for name, value in settings.items():
        if value is not None and value < minimum:
            raise ValueError(f"{name} is {value} but must be at least {minimum}")


class ConfigError(Exception):
    """The configuration cannot work; the message is one line that names the cure."""
