"""Run a step without side effects: random states, buffers, logs and metrics are restored afterwards.

There are two ways. During training, a step is *rewound* (:class:`Snapshot`, :func:`silenced`): it runs again on the
module itself. A function that takes a module, such as ``verify``, uses an *independent copy* instead
(:func:`independent_copy`).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_hessian.curvature.vectors import copies


@dataclass(frozen=True)
class RandomState:
    """The global random state of the CPU (PyTorch's, NumPy's and Python's) and of one CUDA device.

    Example:
        >>> state = RandomState.now(torch.device("cpu"))
        >>> first = torch.rand(1)
        >>> with state.rewound():
        ...     bool(torch.rand(1) == first)
        True
        >>> bool(torch.rand(1) == first)
        False
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

    @contextmanager
    def rewound(self) -> Iterator[None]:
        """Context manager: run code from this random state, and restore the previous state on exit."""
        before = RandomState.now(self.device)
        self.restore()
        try:
            yield
        finally:
            before.restore()


def random_state_kept(device: torch.device) -> Any:
    """Return a context manager that restores the random state on exit."""
    return RandomState.now(device).rewound()


def seed_all(seed: int, device: torch.device) -> None:
    """Seed the same generators as :class:`RandomState`: the global ones of the CPU and of one CUDA device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class Snapshot:
    """A module's buffers and the random states at one point in time.

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
        found = _buffers_of(module)
        values = copies([buffer for _, _, buffer in found])
        self.buffers = [(*one, value) for one, value in zip(found, values, strict=True)]

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Context manager: restore buffers and random states if the code inside raises."""
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
        """Context manager: run code from the snapshot's state, and restore the current state on exit.

        The buffers are replaced by copies, not overwritten: graphs may have saved them.
        """
        now = _buffers_of(self.module)
        try:
            again = copies([value for *_, value in self.buffers])
            for (layer, name, _, _), value in zip(self.buffers, again, strict=True):
                layer._buffers[name] = value
            with self.random.rewound():
                yield
        finally:
            for layer, name, buffer in now:
                layer._buffers[name] = buffer


def _buffers_of(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Return (layer, name in the layer, tensor) for each buffer."""
    return [
        (layer, name, buffer)
        for layer in module.modules()
        for name, buffer in layer._buffers.items()
        if buffer is not None
    ]


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """Context manager: disable ``self.log`` and updates of torchmetrics, because the step was counted already."""
    replaced: list[tuple[nn.Module, str, Any]] = []

    def replace(layer: nn.Module, name: str, by: Any) -> None:
        replaced.append((layer, name, layer.__dict__.get(name)))
        layer.__dict__[name] = by

    for layer in module.modules():
        if isinstance(layer, LightningModule):
            replace(layer, "log", _nothing)
            replace(layer, "log_dict", _nothing)
        elif isinstance(layer, Metric):
            # A metric without updates has no value to repeat, so a copy of it runs instead.
            twin = copy.deepcopy(layer) if layer._update_count == 0 else None
            replace(layer, "update", _nothing if twin is None else twin.update)
            replace(layer, "forward", _last_forward(layer) if twin is None else twin.forward)
            replace(layer, "compute", _last_compute(layer) if twin is None else twin.compute)
            replace(layer, "reset", _nothing if twin is None else twin.reset)
    try:
        yield
    finally:
        for layer, name, before in reversed(replaced):
            if before is None:
                del layer.__dict__[name]
            else:
                layer.__dict__[name] = before


def _last_forward(metric: Metric) -> Callable[..., Any]:
    return lambda *args, **kwargs: _or_nan(metric._forward_cache)


def _last_compute(metric: Metric) -> Callable[[], Any]:
    return lambda: _or_nan(metric._computed)


def _or_nan(value: Any) -> Any:
    return torch.nan if value is None else value


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Accept any arguments and do nothing."""


_task_loss_alone = ContextVar("_task_loss_alone", default=False)


@contextmanager
def without_penalties() -> Iterator[None]:
    """Context manager: training steps inside compute the task loss only."""
    token = _task_loss_alone.set(True)
    try:
        yield
    finally:
        _task_loss_alone.reset(token)


def penalties_are_off() -> bool:
    """Return whether :func:`without_penalties` is active."""
    return _task_loss_alone.get()


def independent_copy(module: nn.Module) -> nn.Module:
    """Deep-copy a module. The copy keeps its Trainer, which user code may read, but does not log to it."""
    trainer = getattr(module, "_trainer", None)
    twin = copy.deepcopy(module)
    if isinstance(twin, LightningModule):
        twin._trainer = trainer
        for method in ("log", "log_dict"):
            setattr(twin, method, _nothing)
    return twin
