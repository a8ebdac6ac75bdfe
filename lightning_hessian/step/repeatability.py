"""Does a step give the same loss when it is run again? Further runs of it are worth nothing otherwise."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import Metric


def check_repeatable(module: nn.Module, rerun: Callable[[], Tensor], loss: Tensor, by: str) -> list[str]:
    """See that a step gives the same loss when it is run again.

    Args:
        module: the module whose step it is.
        rerun: runs the step again and returns the loss.
        loss: the loss of the run before.
        by: what needs several runs, for the error.

    Returns:
        The attributes (but for counters) that the run has changed, though the loss is the same.

    Raises:
        MisconfigurationException: the loss is another one; attributes that have changed are named.
    """
    before = _attributes_of(module)
    again = rerun()
    after = _attributes_of(module)
    changed = sorted(name for name, value in after.items() if before.get(name) != value)
    if not same_loss(loss, again):
        found = f" Attributes that the run has changed: {', '.join(changed[:8])}." if changed else ""
        raise MisconfigurationException(
            "The training step gives another loss when it is run again on the same batch with the same parameters, "
            f"buffers and random numbers, and {by} needs several runs: each would be of another function. The step "
            f"keeps a state of its own (a hidden state, a memory bank, a random generator).{found} Register what it "
            "keeps as a buffer (`self.register_buffer`), which is rewound, or use a penalty that runs the step once, "
            "such as HessianTrace()."
        )
    return [name for name in changed if not isinstance(after[name], int)]


def same_loss(loss: Tensor, again: Tensor) -> bool:
    """Whether two runs gave the same loss."""
    if loss.device.type != "cpu":  # some kernels add in another order each time
        return torch.allclose(loss, again, rtol=1e-3, equal_nan=True)
    return torch.equal(loss.detach().nan_to_num(), again.detach().nan_to_num())


_LIGHTNINGS = frozenset(vars(LightningModule()))


def _attributes_of(module: nn.Module) -> dict[str, Any]:
    """What identifies the present value of each attribute of a module's layers, by the attribute's name."""
    return {
        f"{prefix}.{name}" if prefix else name: _identity(value)
        for prefix, layer in module.named_modules()
        if not isinstance(layer, Metric)
        for name, value in vars(layer).items()
        if name not in _LIGHTNINGS
    }


@dataclass(frozen=True, eq=False)
class _Object:
    """Equal where it is the same object, unchanged; it is held, so that no other one can take its place in memory."""

    value: Any
    version: int | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Object) and self.value is other.value and self.version == other.version


def _identity(value: Any, depth: int = 3) -> Any:
    if isinstance(value, Tensor):
        return _Object(value, None if value.is_inference() else value._version)
    if isinstance(value, torch.Generator):
        return bytes(value.get_state().tolist())
    if depth and type(value) is dict:
        return {key: _identity(part, depth - 1) for key, part in value.items()}
    if depth and type(value) in (list, tuple, deque):
        return [_identity(part, depth - 1) for part in value]
    return value if isinstance(value, int | float | str | bytes) else _Object(value)


@contextmanager
def parameters_unchanged(module: nn.Module) -> Iterator[None]:
    """Refuse a step that changes a parameter inside: run several times, it would change it as often.

    Raises:
        MisconfigurationException: the parameter is named.
    """
    before: list[tuple[str, Tensor, int]] = [(name, p, p._version) for name, p in module.named_parameters()]
    yield
    for name, parameter, version in before:
        if parameter._version != version:
            raise MisconfigurationException(
                f"The training step changes the parameter {name!r}, and is run several times here, which would "
                "change it as often. Change it in `on_train_batch_end` (moving averages of weights, for example); "
                "or train with method='autograd', and measure with CurvatureMonitor(loss=...)."
            )


@contextmanager
def layers_without_gradients(module: nn.Module, parameters: Sequence[Tensor]) -> Iterator[set[str]]:
    """The names of the layers that own some of the parameters and are called under ``torch.no_grad()`` inside.

    Example:
        >>> layer = nn.Sequential(nn.Linear(2, 2))
        >>> with layers_without_gradients(layer, list(layer.parameters())) as found, torch.no_grad():
        ...     y = layer(torch.ones(1, 2))
        >>> found
        {'0'}
    """
    found: set[str] = set()
    wanted = {id(parameter) for parameter in parameters}

    def look(name: str) -> Callable[..., None]:
        return lambda layer, args: None if torch.is_grad_enabled() or _in_checkpoint() else found.add(name)

    handles = [
        layer.register_forward_pre_hook(look(name))
        for name, layer in module.named_modules()
        if any(id(parameter) in wanted for parameter in layer.parameters(recurse=False))
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _in_checkpoint() -> bool:
    """Whether a reentrant checkpoint is on the stack, whose first run has no gradients."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
