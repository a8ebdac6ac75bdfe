"""Checks of arguments: an error names the setting, its value, and what it must be."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import SupportsFloat


def is_whole(value: object) -> bool:
    """Whether the value is an int; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether ``float(value)`` is a number that the user can have meant; True and False are none."""
    return isinstance(value, SupportsFloat) and not isinstance(value, bool)


def choice(name: str, value: object, of: Sequence[str]) -> None:
    """Raise a ValueError unless the value is one of a few words.

    Example:
        >>> choice("norm", "l3", ["linf", "l2"])
        Traceback (most recent call last):
        ValueError: norm='l3' is unknown. Choose one of linf, l2.
    """
    if value not in of:
        raise ValueError(f"{name}={value!r} is unknown. Choose one of {', '.join(of)}.")


def whole_number(name: str, value: object, least: int | None = None, meaning: str = "") -> None:
    """Raise a ValueError unless the value is a whole number, large enough.

    Example:
        >>> whole_number("iterations", -1, 0, "the products that the search spends")
        Traceback (most recent call last):
        ValueError: iterations=-1 must be a whole number of at least 0: the products that the search spends.
    """
    if not is_whole(value) or (least is not None and value < least):  # type: ignore[operator]
        at_least = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name}={value!r} must be a whole number{at_least}{f': {meaning}' if meaning else ''}.")


def positive_or_none(name: str, value: object, meaning: str) -> None:
    """Raise a ValueError unless the value is None or a positive, finite number."""
    if value is not None and not (is_number(value) and 0 < float(value) < math.inf):  # type: ignore[arg-type]
        raise ValueError(f"{name}={value!r} must be a positive number, {meaning}, or None.")


def count_or_all(name: str, value: object, exact: str) -> None:
    """Raise a ValueError unless the value is at least 1, or -1, which asks for ``exact``."""
    if not is_whole(value) or (value < 1 and value != -1):  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1, or -1 for {exact}.")


def writable_directory(name: str, path: Path) -> None:
    """Make the directory, and raise a ValueError unless files can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"{name}={str(path)!r} cannot be written ({error}). Name a directory in which files can be made."
        ) from error
