"""What a run of a step may change besides gradients: buffers and random states, kept to be put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RandomState:
    """The global random state of the CPU and of one CUDA device.

    Example:
        >>> state = RandomState.now(torch.device("cpu"))
        >>> first = torch.rand(1)
        >>> state.restore()
        >>> bool(torch.rand(1) == first)
        True
    """

    device: torch.device
    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), cuda)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def buffers_of(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Every buffer, as the layer it belongs to, its name there, and the tensor."""
    return [
        (layer, name, buffer)
        for layer in module.modules()
        for name, buffer in layer._buffers.items()
        if buffer is not None
    ]


@contextmanager
def left_as_found_on_error(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Put buffers and random states back if what happens inside fails."""
    before = [(layer, name, buffer, buffer.detach().clone()) for layer, name, buffer in buffers_of(module)]
    random = RandomState.now(device)
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for layer, name, buffer, value in before:
                layer._buffers[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        random.restore()
        raise


class Rewind:
    """Lets code run again from the buffers and the random state of a moment, and leaves both as they are now.

    The buffers are exchanged for copies, not overwritten: graphs may have saved them.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.random = RandomState.now(device)
        self.buffers = [(layer, name, buffer.detach().clone()) for layer, name, buffer in buffers_of(module)]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        now, random = buffers_of(self.module), RandomState.now(self.random.device)
        try:
            for layer, name, before in self.buffers:
                layer._buffers[name] = before.clone()
            self.random.restore()
            yield
        finally:
            for layer, name, buffer in now:
                layer._buffers[name] = buffer
            random.restore()
