"""Curvature from ordinary gradients: parameters moved for a while, gradients summed, a loss that has their sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_hessian.curvature.graph import without_hooks

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
        with _writable(parts):
            for part, old, towards in zip(parts, before, v, strict=True):
                torch.add(old, towards, alpha=step, out=part)
        torch.clear_autocast_cache()  # it holds weights as they were

    try:
        yield move
    finally:
        with _writable(parts):
            torch._foreach_copy_(parts, before)
        torch.clear_autocast_cache()


@contextmanager
def _writable(parts: Sequence[Tensor]) -> Iterator[None]:
    """Write without a trace: what comes back bit for bit may be saved in graphs that were made before."""
    with torch.no_grad(), ExitStack() as stack:
        for part in parts:
            stack.enter_context(torch.autograd._unsafe_preserve_version_counter(part))
        yield


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
        ...     total.add((w**2).sum(), weight)
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
        self._unit = 1.0  # the gradients are summed in units of this, so that the first need not be multiplied

    def add(self, loss: Tensor, weight: float, look: Callable[[Mapping[Tensor, Tensor]], Any] | None = None) -> Any:
        """Add ``weight * loss``, whose graph is freed.

        Args:
            loss: a scalar with its graph.
            weight: its weight.
            look: called with the loss's own gradient, by tensor; what it returns is returned.
        """
        found = self.differentiate(loss)
        named = {tensor: gradient for tensor, gradient in zip(self.tensors, found, strict=True) if gradient is not None}
        seen = look(named) if look is not None else None
        del named
        if self.value is None:
            self._unit, self.value = weight, torch.zeros_like(loss)
        share = weight / self._unit
        for i in range(len(found)):
            gradient, found[i] = found[i], None  # freed one after the other
            summed = self._gradients[i]
            if gradient is not None:
                # Not in place: autograd may hand out one tensor as several gradients.
                if summed is not None:
                    self._gradients[i] = torch.add(summed, gradient, alpha=share)
                else:
                    self._gradients[i] = gradient if share == 1 else gradient * share
        self.value = self.value + weight * loss.detach()
        return seen

    def differentiate(self, loss: Tensor) -> list[Tensor | None]:
        """The gradient of a loss, whose graph is freed, without adding it."""
        scaled = loss if self.scale == 1 else loss * self.scale
        with without_hooks(self.tensors):  # they see the sum, once
            found = self._by_backward(scaled) if self.by_backward else self._by_grad(scaled)
        if self.scale != 1:
            found = [None if gradient is None else gradient / self.scale for gradient in found]
        return found

    def loss(self) -> Tensor:
        """A scalar of this value that has this gradient; it can be differentiated once."""
        assert self.value is not None
        used = [(t, g) for t, g in zip(self.tensors, self._gradients, strict=True) if g is not None]
        self._gradients = []
        return _Known.apply(self.value, [g for _, g in used], self._unit, *(t for t, _ in used))

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
    exact = torch.promote_types(like.dtype, torch.float32)
    flat = [(a.reshape(-1).to(exact), local(g).reshape(-1).to(exact)) for a, g in zip(v, gradients, strict=True)]
    total = torch.stack([torch.dot(a, g) for a, g in flat]).sum() if flat else like.new_zeros((), dtype=exact)
    return over_shards(total, like)


def over_shards(value: Tensor, like: Any) -> Tensor:
    """The sum of a value over the processes among which a tensor is sharded."""
    if is_sharded(like):
        for dimension, placement in enumerate(like.placements):
            if placement.is_shard():
                torch.distributed.all_reduce(value, group=like.device_mesh.get_group(dimension))
    return value
