"""Check that a step gives the same loss when it is run again. Otherwise further runs are meaningless."""

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
    """Check that a step gives the same loss when it is run again.

    Args:
        module: the module that the step belongs to.
        rerun: runs the step again and returns the loss.
        loss: the loss of the previous run.
        by: the penalty or method that needs several runs, for the error message.

    Returns:
        The names of the attributes (except counters) that the run changed, although the loss is the same.

    Raises:
        MisconfigurationException: the loss differs. The error names the changed attributes.
    """
    before = _attributes_of(module)
    again = rerun()
    after = _attributes_of(module)
    changed = sorted(name for name, value in after.items() if before.get(name) != value)
    if not same_loss(loss, again):
        found = f" Attributes that the run changed: {', '.join(changed[:8])}." if changed else ""
        raise MisconfigurationException(
            "The training step gives another loss when it is run again on the same batch with the same parameters, "
            f"buffers and random numbers. {by} needs several runs, and each would evaluate a different function. The "
            f"step keeps its own state (a hidden state, a memory bank, a random generator).{found} Register the state "
            "as a buffer (`self.register_buffer`), which is restored, or use a penalty that runs the step once, such "
            "as HessianTrace()."
        )
    return [name for name in changed if not isinstance(after[name], int)]


def same_loss(loss: Tensor, again: Tensor) -> bool:
    """Return whether two runs gave the same loss."""
    if loss.device.type != "cpu":  # some kernels vary their order of summation
        return torch.allclose(loss, again, rtol=1e-3, equal_nan=True)
    return torch.equal(loss.detach().nan_to_num(), again.detach().nan_to_num())


_LIGHTNING_ATTRIBUTES = frozenset(vars(LightningModule()))


def _attributes_of(module: nn.Module) -> dict[str, Any]:
    """Map the name of each attribute of a module's layers to a fingerprint of its current value."""
    return {
        f"{prefix}.{name}" if prefix else name: _fingerprint(value)
        for prefix, layer in module.named_modules()
        if not isinstance(layer, Metric)
        for name, value in vars(layer).items()
        if name not in _LIGHTNING_ATTRIBUTES
    }


@dataclass(frozen=True, eq=False)
class _Reference:
    """Equal to the same, unmodified object only. Holds a reference, so that no other object can reuse the address."""

    value: Any
    version: int | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Reference) and self.value is other.value and self.version == other.version


def _fingerprint(value: Any, depth: int = 3) -> Any:
    if isinstance(value, Tensor):
        return _Reference(value, None if value.is_inference() else value._version)
    if isinstance(value, torch.Generator):
        return bytes(value.get_state().tolist())
    if depth and type(value) is dict:
        return {key: _fingerprint(part, depth - 1) for key, part in value.items()}
    if depth and type(value) in (list, tuple, deque):
        return [_fingerprint(part, depth - 1) for part in value]
    return value if isinstance(value, int | float | str | bytes) else _Reference(value)


@contextmanager
def parameters_unchanged(module: nn.Module) -> Iterator[None]:
    """Context manager: refuse a step that changes a parameter. Each further run would change it again.

    Raises:
        MisconfigurationException: a parameter changed. The error names it.
    """
    before: list[tuple[str, Tensor, int]] = [(name, p, p._version) for name, p in module.named_parameters()]
    yield
    for name, parameter, version in before:
        if parameter._version != version:
            raise MisconfigurationException(
                f"The training step changes the parameter {name!r}. The step runs several times here, and each run "
                "would change it again. Change it in `on_train_batch_end` (for example moving averages of weights). Or "
                "train with a penalty that runs the step once (HessianTrace(), HessianNorm()), and measure with "
                "CurvatureMonitor(loss=...)."
            )


@contextmanager
def layers_without_gradients(module: nn.Module, parameters: Sequence[Tensor]) -> Iterator[set[str]]:
    """Context manager: collect the names of layers that own given parameters and run under ``torch.no_grad()``.

    Example:
        >>> layer = nn.Sequential(nn.Linear(2, 2))
        >>> with layers_without_gradients(layer, list(layer.parameters())) as found, torch.no_grad():
        ...     y = layer(torch.ones(1, 2))
        >>> found
        {'0'}
    """
    found: set[str] = set()
    wanted = {id(parameter) for parameter in parameters}

    def on_forward(name: str) -> Callable[..., None]:
        return lambda layer, args: None if torch.is_grad_enabled() or _in_checkpoint() else found.add(name)

    handles = [
        layer.register_forward_pre_hook(on_forward(name))
        for name, layer in module.named_modules()
        if any(id(parameter) in wanted for parameter in layer.parameters(recurse=False))
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _in_checkpoint() -> bool:
    """Return whether a reentrant checkpoint is on the stack. Its first run has gradients disabled."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
