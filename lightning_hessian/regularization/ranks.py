"""What the processes of a Trainer decide and compute together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_hessian.curvature.sharding import is_dtensor, local, sum_over_shards
from lightning_hessian.curvature.vectors import pack
from lightning_hessian.step.loop import TrainingLoop


def mean_length(loop: TrainingLoop, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> float:
    """The length of the mean gradient of all processes; every one of them must call this. None is zero."""
    sharded = [is_dtensor(tensor) for tensor in tensors]
    if any(sharded) or loop.world_size == 1:  # sharded gradients are those of all processes
        parts = [(local(g), tensor) for g, tensor in zip(gradients, tensors, strict=True) if g is not None]
        squares = [
            sum_over_shards(torch.linalg.vector_norm(g, dtype=_wide(g)).square(), like=tensor) for g, tensor in parts
        ]
    else:
        found = zip(gradients, tensors, strict=True)
        flat = pack([torch.zeros_like(tensor) if g is None else g for g, tensor in found], torch.float32)
        squares = [loop.mean(flat).square().sum()]
    return math.sqrt(sum(square.item() for square in squares))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def mean_if_synchronized(loop: TrainingLoop) -> Callable[[Tensor], Tensor] | None:
    """The mean over the processes, where this backward pass averages the gradients over them; otherwise None."""
    return loop.mean if loop.synchronizes_gradients else None
