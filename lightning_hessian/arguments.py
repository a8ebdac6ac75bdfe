"""Argument checks. Each error names the setting, its value and what it must be."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import SupportsFloat


def is_whole(value: object) -> bool:
    """Return whether the value is an int. A bool does not count."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether the value is a number, or a tensor with one. A bool does not count."""
    if not isinstance(value, SupportsFloat) or isinstance(value, bool):
        return False
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError):  # a tensor with several numbers
        return False
    return True


def choice(name: str, value: object, of: Sequence[str]) -> None:
    """Raise a ValueError unless the value is one of the choices.

    Example:
        >>> choice("norm", "l3", ["linf", "l2"])
        Traceback (most recent call last):
        ValueError: norm='l3' is unknown. Choose one of linf, l2.
    """
    if value not in of:
        raise ValueError(f"{name}={value!r} is unknown. Choose one of {', '.join(of)}.")


def whole_number(name: str, value: object, least: int | None = None, meaning: str = "") -> None:
    """Raise a ValueError unless the value is a whole number of at least ``least``.

    Example:
        >>> whole_number("iterations", -1, 0, "the number of matrix-vector products")
        Traceback (most recent call last):
        ValueError: iterations=-1 must be a whole number of at least 0: the number of matrix-vector products.
    """
    if not is_whole(value) or (least is not None and value < least):  # type: ignore[operator]
        at_least = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name}={value!r} must be a whole number{at_least}{f': {meaning}' if meaning else ''}.")


def positive_or_none(name: str, value: object, meaning: str) -> None:
    """Raise a ValueError unless the value is None or a positive, finite number."""
    if value is not None and not (is_number(value) and 0 < float(value) < math.inf):  # type: ignore[arg-type]
        raise ValueError(f"{name}={value!r} must be a positive number, {meaning}, or None.")


def count_or_all(name: str, value: object, exact: str) -> None:
    """Raise a ValueError unless the value is at least 1, or -1, which selects ``exact``."""
    if not is_whole(value) or (value < 1 and value != -1):  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1, or -1 for {exact}.")


def writable_directory(name: str, path: Path) -> None:
    """Create the directory. Raise a ValueError unless files can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"{name}={str(path)!r} cannot be written ({error}). Choose a directory in which files can be created."
        ) from error
