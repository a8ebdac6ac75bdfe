"""What a run of a step may change besides gradients, kept to be put back: buffers, random states, modes."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RandomState:
    """The global random state of the CPU (PyTorch's, NumPy's and Python's) and of one CUDA device.

    Example:
        >>> state = RandomState.now(torch.device("cpu"))
        >>> first = torch.rand(1)
        >>> state.restore()
        >>> bool(torch.rand(1) == first)
        True
    """

    device: torch.device
    cpu: Tensor
    numpy: Any
    python: Any
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), np.random.get_state(), random.getstate(), cuda)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        np.random.set_state(self.numpy)
        random.setstate(self.python)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def seed_all(seed: int, device: torch.device) -> None:
    """Seed what :class:`RandomState` keeps: the global random states of the CPU and of one CUDA device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class Snapshot:
    """The buffers and the random states of a moment.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> snapshot = Snapshot(layer, torch.device("cpu"))
        >>> layer(torch.ones(3, 2))[0].detach(), layer.running_mean
        (tensor([0., 0.]), tensor([0.1000, 0.1000]))
        >>> with snapshot.rewound():
        ...     layer.running_mean
        tensor([0., 0.])
        >>> layer.running_mean
        tensor([0.1000, 0.1000])
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.random = RandomState.now(device)
        self.buffers = [(layer, name, buffer, buffer.detach().clone()) for layer, name, buffer in _buffers_of(module)]

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Put everything back if what happens inside fails."""
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for layer, name, buffer, value in self.buffers:
                    layer._buffers[name] = buffer
                    if buffer.layout != torch.strided or not torch.equal(buffer, value):
                        buffer.copy_(value)
            self.random.restore()
            raise

    @contextmanager
    def rewound(self) -> Iterator[None]:
        """Run code again from that moment; afterwards everything is as it was before this.

        The buffers are exchanged for copies, not overwritten: graphs may have saved them.
        """
        now, states = _buffers_of(self.module), RandomState.now(self.random.device)
        try:
            for layer, name, _, value in self.buffers:
                layer._buffers[name] = value.clone()
            self.random.restore()
            yield
        finally:
            for layer, name, buffer in now:
                layer._buffers[name] = buffer
            states.restore()


def _buffers_of(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Every buffer, as the layer it belongs to, its name there, and the tensor."""
    return [
        (layer, name, buffer)
        for layer in module.modules()
        for name, buffer in layer._buffers.items()
        if buffer is not None
    ]


@contextmanager
def evaluation_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Each of these modules in evaluation mode inside, and in its own afterwards; their children are left alone."""
    before = [(module, module.training) for module in modules]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training
