"""Losses at displaced parameters: move theta temporarily, sum gradients, and build a loss from the sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_hessian.curvature.graph import without_hooks
from lightning_hessian.curvature.sharding import is_dtensor, local
from lightning_hessian.curvature.vectors import copies, groups

Move = Callable[[Sequence[Tensor], float], None]
"""(v, distance) -> None: move the tensors to theta + distance v."""

T = TypeVar("T")


@contextmanager
def displaced(tensors: Sequence[Tensor]) -> Iterator[Move]:
    """Context manager: move leaf tensors in place inside, and restore them bit for bit on exit.

    It keeps one copy, because theta + s v - 2 s v + s v differs from theta in floating point. With sharded tensors
    each process moves its own shard.

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
        before = copies(parts)

    def move(v: Sequence[Tensor], distance: float) -> None:
        with _writable(parts):
            for group in groups(parts):  # not in place: two parameters may share their memory
                moved = torch._foreach_add(before[group], list(v[group]), alpha=distance)
                torch._foreach_copy_(parts[group], moved)
        torch.clear_autocast_cache()  # it caches casts of the old weights

    try:
        yield move
    finally:
        with _writable(parts):
            torch._foreach_copy_(parts, before)
        torch.clear_autocast_cache()


def at_distances(
    tensors: Sequence[Tensor], v: Sequence[Tensor], distances: Sequence[float], evaluate: Callable[[], T]
) -> list[T]:
    """Call ``evaluate()`` at theta + distance v for each distance. Return the results.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> at_distances([w], [torch.ones(2)], [0.5, -0.5], lambda: w.square().sum().item())
        [8.5, 2.5]
    """
    results = []
    with displaced(tensors) as move:
        for distance in distances:
            move(v, distance)
            results.append(evaluate())
    return results


@contextmanager
def _writable(parts: Sequence[Tensor]) -> Iterator[None]:
    """Write without bumping version counters: earlier graphs may have saved these tensors, which are restored later."""
    with torch.no_grad(), ExitStack() as stack:
        for part in parts:
            stack.enter_context(torch.autograd._unsafe_preserve_version_counter(part))
        yield


def loss_gradient(
    loss: Tensor,
    tensors: Sequence[Tensor],
    scale: float = 1.0,
    by_backward: bool = False,
    keep_graph: bool = False,
    watched: Sequence[Tensor] = (),
) -> list[Tensor | None]:
    """Return the gradient of a loss and free its graph. The entry of an unused tensor is None.

    Args:
        loss: a scalar with its graph.
        tensors: leaf tensors that require grad.
        scale: multiplies the loss before the backward pass and divides the gradient after it (for float16).
        by_backward: use ``backward()`` instead of ``torch.autograd.grad``. Reentrant checkpoints and sharded
            parameters need it. The tensors' ``.grad`` is restored afterwards.
        keep_graph: do not free the graph.
        watched: further leaves, whose hooks are called with their gradients.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> loss_gradient(w.square().sum(), [w])
        [tensor([2., 4.])]
    """
    scaled = loss if scale == 1 else loss * scale
    with without_hooks(tensors):  # hooks are meant for the training gradient only
        if by_backward:
            found = _gradient_by_backward(scaled, tensors, keep_graph)
        else:
            leaves = [*tensors, *watched]
            every = torch.autograd.grad(scaled, leaves, retain_graph=keep_graph, allow_unused=True)
            found = [*every[: len(tensors)]]
    return found if scale == 1 else [None if gradient is None else gradient / scale for gradient in found]


def _gradient_by_backward(loss: Tensor, tensors: Sequence[Tensor], keep_graph: bool) -> list[Tensor | None]:
    before = [tensor.grad for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.grad = None
        loss.backward(retain_graph=keep_graph)
        return [tensor.grad for tensor in tensors]
    finally:
        for tensor, gradient in zip(tensors, before, strict=True):
            tensor.grad = gradient


class GradientSum:
    """Accumulate sum_k w_k L_k and its gradient, one loss at a time, without keeping any loss's graph.

    Args:
        tensors: leaf tensors that require grad.

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
        self._scale = 1.0  # a common factor of the summed gradients: saves multiplying the first one

    def add(self, weight: float, value: Tensor, gradient: list[Tensor | None]) -> None:
        """Add one weighted loss.

        Args:
            weight: the weight of the loss.
            value: the value of the loss, without a graph.
            gradient: the gradient of the loss, one entry per tensor. This method sets each entry to None once it is
                summed, so that its memory is freed early.
        """
        if self._value is None:
            self._scale, self._value = weight, torch.zeros_like(value)
        share = weight / self._scale
        for group in groups(self.tensors):
            parts, gradient[group] = gradient[group], [None] * len(gradient[group])
            self._gradients[group] = _plus(self._gradients[group], parts, share)
        self._value = self._value + weight * value

    @property
    def value(self) -> Tensor:
        """The accumulated value."""
        assert self._value is not None
        return self._value

    def gradients(self) -> list[Tensor | None]:
        """Return the accumulated gradient, one entry per tensor."""
        return [g if g is None or self._scale == 1 else g * self._scale for g in self._gradients]

    def loss(self) -> Tensor:
        """Return a scalar with the accumulated value and gradient. It can be differentiated once."""
        value = self.value
        used = [(t, g) for t, g in zip(self.tensors, self._gradients, strict=True) if g is not None]
        self._gradients = []
        return _PrecomputedGradient.apply(value, [g for _, g in used], self._scale, *(t for t, _ in used))


def _plus(summed: list[Tensor | None], parts: list[Tensor | None], share: float) -> list[Tensor | None]:
    """summed + share * parts, where None is zero. Not in place: autograd may return one tensor as several gradients."""
    result, both = list(summed), []
    for i, (old, part) in enumerate(zip(summed, parts, strict=True)):
        if part is not None and old is None:
            result[i] = part if share == 1 else part * share
        elif part is not None and old is not None:
            both.append((i, old, part))
    places, olds, news = map(list, zip(*both, strict=True)) if both else ([], [], [])
    for i, value in zip(places, _added(olds, news, share), strict=True):
        result[i] = value
    return result


def _added(olds: list[Tensor], news: list[Tensor], share: float) -> Sequence[Tensor]:
    if not olds or any(map(is_dtensor, news)):  # not in one call with other tensors
        return [torch.add(old, part, alpha=share) for old, part in zip(olds, news, strict=True)]
    return torch._foreach_add(olds, news, alpha=share)


class _PrecomputedGradient(torch.autograd.Function):
    """A value with a precomputed gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], scale: float, *tensors: Tensor) -> Tensor:
        ctx.gradients, ctx.scale = gradients, scale
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError(
                "The loss's gradient was precomputed and is gone after the first backward(). Call backward() only once."
            )
        gradients, ctx.gradients = ctx.gradients, None
        factor = factor * ctx.scale
        for group in groups(gradients):  # which frees the memory of one group after the other
            gradients[group] = _times(gradients[group], factor)
        return None, None, None, *gradients


def _times(tensors: list[Tensor], factor: Tensor) -> Sequence[Tensor]:
    if any(map(is_dtensor, tensors)):  # not in one call with other tensors
        return [tensor * factor for tensor in tensors]
    return torch._foreach_mul(tensors, factor)
