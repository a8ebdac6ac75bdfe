"""Curvature from ordinary gradients: parameters moved for a while, gradients summed, a loss that has their sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Move = Callable[[Sequence[Tensor], float], None]
"""(v, step) -> None: put the tensors at theta + step v."""


@contextmanager
def movable(tensors: Sequence[Tensor]) -> Iterator[Move]:
    """Inside, leaf tensors can be moved in place; afterwards they are what they were, bit for bit.

    (theta + s v - 2 s v + s v is not theta in floating point, so one copy is kept.) Of sharded tensors each process
    moves its own part.

    Example:
        >>> w = torch.tensor([0.1, 0.2], requires_grad=True)
        >>> with movable([w]) as move:
        ...     move([torch.tensor([1.0, -1.0])], 0.5)
        ...     w.tolist()
        [0.6000000238418579, -0.30000001192092896]
        >>> w.tolist()
        [0.10000000149011612, 0.20000000298023224]
    """
    with torch.no_grad():
        parts = [local(tensor) for tensor in tensors]
        before = [part.clone() for part in parts]

    def move(v: Sequence[Tensor], step: float) -> None:
        with torch.no_grad():
            torch._foreach_copy_(parts, before)
            torch._foreach_add_(parts, list(v), alpha=step)
        torch.clear_autocast_cache()  # it holds weights as they were

    try:
        yield move
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parts, before)
        torch.clear_autocast_cache()


class GradientSum:
    """sum_k w_k L_k and its gradient, of losses that are seen one after the other; no loss's graph is kept.

    Args:
        tensors: leaves, with respect to which.
        scale: multiply each loss by this before it is differentiated, and divide its gradient by it (float16).
        by_backward: differentiate by ``backward()``, not ``torch.autograd.grad``: reentrant checkpoints and sharded
            parameters need it.

    Attributes:
        value: the sum.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> total = GradientSum([w])
        >>> for weight in (0.5, -0.25):
        ...     _ = total.add((w**2).sum(), weight)
        >>> loss = total.loss()
        >>> loss.backward()
        >>> loss.item(), w.grad
        (1.25, tensor([0.5000, 1.0000]))
    """

    def __init__(self, tensors: Sequence[Tensor], scale: float = 1.0, by_backward: bool = False) -> None:
        self.tensors = [tensor for tensor in tensors if tensor.requires_grad]
        self.scale = scale
        self.by_backward = by_backward
        self.value: Tensor | None = None
        self._gradients: list[Tensor | None] = [None] * len(self.tensors)

    def add(self, loss: Tensor, weight: float) -> list[Tensor | None]:
        """Add ``weight * loss`` and return the loss's own gradient, tensor by tensor; its graph is freed."""
        scaled = loss if self.scale == 1 else loss * self.scale
        found = self._by_backward(scaled) if self.by_backward else self._by_grad(scaled)
        for i, gradient in enumerate(found):
            if gradient is None:
                continue
            if self.scale != 1:
                gradient.div_(self.scale)
            summed = self._gradients[i]
            self._gradients[i] = weight * gradient if summed is None else summed.add_(gradient, alpha=weight)
        self.value = weight * loss.detach() + (0 if self.value is None else self.value)
        return found

    def loss(self) -> Tensor:
        """A scalar of this value that has this gradient, once."""
        assert self.value is not None
        used = [(t, g) for t, g in zip(self.tensors, self._gradients, strict=True) if g is not None]
        return _Known.apply(self.value, tuple(g for _, g in used), *(t for t, _ in used))

    def _by_grad(self, loss: Tensor) -> list[Tensor | None]:
        return list(torch.autograd.grad(loss, self.tensors, allow_unused=True))

    def _by_backward(self, loss: Tensor) -> list[Tensor | None]:
        before = [tensor.grad for tensor in self.tensors]
        try:
            for tensor in self.tensors:
                tensor.grad = None
            loss.backward()
            return [tensor.grad for tensor in self.tensors]
        finally:
            for tensor, gradient in zip(self.tensors, before, strict=True):
                tensor.grad = gradient


class _Known(torch.autograd.Function):
    """A value whose gradient is known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> Any:
        return None, None, *(gradient * factor for gradient in ctx.gradients)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as the parameters are under FSDP2."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """The part of a sharded tensor that this process holds; any other tensor itself, without its graph."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part.detach()


def local_part(whole: Tensor, like: Any) -> Tensor:
    """What this process holds of a tensor that is sharded as ``like`` is."""
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * like.device_mesh.ndim
    part: Tensor = (
        DTensor.from_local(whole, like.device_mesh, everywhere, run_check=False)
        .redistribute(placements=like.placements)
        .to_local()
    )
    return part


def dot(v: Sequence[Tensor], gradients: Sequence[Tensor], like: Any) -> Tensor:
    """v'g over all parts, those of other processes included where the tensors are sharded (as ``like`` is)."""
    parts = [torch.dot(a.reshape(-1), local(g).reshape(-1).to(a.dtype)) for a, g in zip(v, gradients, strict=True)]
    total = torch.stack(parts).sum().float() if parts else torch.zeros((), device=like.device)
    return over_shards(total, like)


def over_shards(value: Tensor, like: Any) -> Tensor:
    """The sum of a value over the processes among which a tensor is sharded."""
    if is_sharded(like):
        for dimension, placement in enumerate(like.placements):
            if placement.is_shard():
                torch.distributed.all_reduce(value, group=like.device_mesh.get_group(dimension))
    return value
