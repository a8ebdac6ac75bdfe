"""Layers in training or evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_modes(modes: Sequence[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Each layer inside in training mode (True) or evaluation mode (False), and afterwards in its own.

    A layer's children are left alone.
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
    """Each of these layers in evaluation mode inside, and afterwards in its own mode; their children are left alone.

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
