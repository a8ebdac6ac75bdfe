"""Temporarily switch layers to training or evaluation mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_modes(modes: Sequence[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Context manager: put layers in training mode (True) or evaluation mode (False), and restore their modes on exit.

    The modes of a layer's children do not change.
    """
    changed = [(layer, training) for layer, training in modes if layer.training != training]
    try:
        for layer, training in changed:
            layer.training = training
        yield
    finally:
        for layer, training in changed:
            layer.training = not training


@contextmanager
def evaluation_mode(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Context manager: put these layers, but not their children, in evaluation mode. Restore their modes on exit.

    Example:
        >>> net = nn.Sequential(nn.Dropout())
        >>> with evaluation_mode(net.modules()):
        ...     net[0].training
        False
        >>> net[0].training
        True
    """
    with in_modes([(layer, False) for layer in layers]):
        yield
