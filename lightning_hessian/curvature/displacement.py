"""Losses at displaced parameters: theta moved for a while, gradients summed, a loss that has their sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_hessian.curvature.graph import without_hooks
from lightning_hessian.curvature.sharding import local

Move = Callable[[Sequence[Tensor], float], None]
"""(v, distance) -> None: put the tensors at theta + distance v."""

T = TypeVar("T")


@contextmanager
def displaced(tensors: Sequence[Tensor]) -> Iterator[Move]:
    """Inside, leaf tensors can be moved in place; afterwards they are what they were, bit for bit.

    (theta + s v - 2 s v + s v is not theta in floating point, so one copy is kept.) Of sharded tensors each process
    moves its own part.

    Example:
        >>> w = torch.tensor([0.1, 0.2], requires_grad=True)
        >>> with displaced([w]) as move:
        ...     move([torch.tensor([1.0, -1.0])], 0.5)
        ...     w.tolist()
        [0.6000000238418579, -0.30000001192092896]
        >>> w.tolist()
        [0.10000000149011612, 0.20000000298023224]
    """
    with torch.no_grad():
        parts = [local(tensor) for tensor in tensors]
        before = [part.clone() for part in parts]

    def move(v: Sequence[Tensor], distance: float) -> None:
        with _writable(parts):
            for part, old, towards in zip(parts, before, v, strict=True):
                torch.add(old, towards, alpha=distance, out=part)
        torch.clear_autocast_cache()  # it holds weights as they were

    try:
        yield move
    finally:
        with _writable(parts):
            torch._foreach_copy_(parts, before)
        torch.clear_autocast_cache()


def at_both_ends(
    tensors: Sequence[Tensor], v: Sequence[Tensor], distance: float, evaluate: Callable[[], T]
) -> tuple[T, T]:
    """What ``evaluate()`` gives at theta + distance v, and then at theta - distance v.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> at_both_ends([w], [torch.ones(2)], 0.5, lambda: w.square().sum().item())
        (8.5, 2.5)
    """
    with displaced(tensors) as move:
        move(v, distance)
        ahead = evaluate()
        move(v, -distance)
        behind = evaluate()
    return ahead, behind


@contextmanager
def _writable(parts: Sequence[Tensor]) -> Iterator[None]:
    """Write without a trace: what comes back bit for bit may be saved in graphs that were made before."""
    with torch.no_grad(), ExitStack() as stack:
        for part in parts:
            stack.enter_context(torch.autograd._unsafe_preserve_version_counter(part))
        yield


def loss_gradient(
    loss: Tensor, tensors: Sequence[Tensor], scale: float = 1.0, by_backward: bool = False
) -> list[Tensor | None]:
    """The gradient of a loss, whose graph is freed; None for a tensor that has no part in it.

    Args:
        loss: a scalar with its graph.
        tensors: leaves that require a gradient.
        scale: multiply the loss by this before it is differentiated, and divide the gradient by it (float16).
        by_backward: differentiate by ``backward()``, not ``torch.autograd.grad``: reentrant checkpoints and sharded
            parameters need it. The tensors' own gradients are left alone all the same.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> loss_gradient(w.square().sum(), [w])
        [tensor([2., 4.])]
    """
    scaled = loss if scale == 1 else loss * scale
    with without_hooks(tensors):  # hooks are for the gradient that is trained on
        if by_backward:
            found = _gradient_by_backward(scaled, tensors)
        else:
            found = list(torch.autograd.grad(scaled, list(tensors), allow_unused=True))
    return found if scale == 1 else [None if gradient is None else gradient / scale for gradient in found]


def _gradient_by_backward(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    before = [tensor.grad for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.grad = None
        loss.backward()
        return [tensor.grad for tensor in tensors]
    finally:
        for tensor, gradient in zip(tensors, before, strict=True):
            tensor.grad = gradient


class GradientSum:
    """sum_k w_k L_k and its gradient, of losses that are seen one after the other; no loss's graph is kept.

    Args:
        tensors: leaves that require a gradient.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> total = GradientSum([w])
        >>> for weight in (0.5, -0.25):
        ...     loss = (w**2).sum()
        ...     total.add(weight, loss.detach(), loss_gradient(loss, [w]))
        >>> loss = total.loss()
        >>> loss.backward()
        >>> loss.item(), w.grad
        (1.25, tensor([0.5000, 1.0000]))
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self._value: Tensor | None = None
        self._gradients: list[Tensor | None] = [None] * len(self.tensors)
        self._unit = 1.0  # the gradients are summed in units of this, so that the first need not be multiplied

    def add(self, weight: float, value: Tensor, gradient: list[Tensor | None]) -> None:
        """Add ``weight`` times a loss.

        Args:
            weight: its weight.
            value: its value, without a graph.
            gradient: its gradient, tensor by tensor. The list is emptied: each part is freed as soon as it is summed.
        """
        if self._value is None:
            self._unit, self._value = weight, torch.zeros_like(value)
        share = weight / self._unit
        for i in range(len(gradient)):
            part, gradient[i] = gradient[i], None
            summed = self._gradients[i]
            if part is not None:
                # Not in place: autograd may hand out one tensor as several gradients.
                if summed is not None:
                    self._gradients[i] = torch.add(summed, part, alpha=share)
                else:
                    self._gradients[i] = part if share == 1 else part * share
        self._value = self._value + weight * value

    def loss(self) -> Tensor:
        """A scalar of this value that has this gradient; it can be differentiated once."""
        assert self._value is not None
        used = [(t, g) for t, g in zip(self.tensors, self._gradients, strict=True) if g is not None]
        self._gradients = []
        return _PrecomputedGradient.apply(self._value, [g for _, g in used], self._unit, *(t for t, _ in used))


class _PrecomputedGradient(torch.autograd.Function):
    """A value whose gradient was computed before."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], unit: float, *tensors: Tensor) -> Tensor:
        ctx.gradients, ctx.unit = gradients, unit
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("The loss's gradient was computed in its passes and is gone after the first backward().")
        gradients, ctx.gradients = ctx.gradients, None
        factor = factor * ctx.unit
        return None, None, None, *(gradients.pop(0) * factor for _ in range(len(gradients)))
