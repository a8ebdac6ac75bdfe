"""What the processes of a Trainer decide and compute together."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_hessian.curvature.sharding import is_dtensor, local, sum_over_shards
from lightning_hessian.curvature.vectors import pack


def mean_over_ranks(trainer: Trainer, tensor: Tensor) -> Tensor:
    """The mean of a tensor over the processes; every one of them must call this."""
    # Lightning reduces in place.
    return tensor if trainer.world_size == 1 else trainer.strategy.reduce(tensor.clone(), reduce_op="mean")


def mean_length(trainer: Trainer, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> float:
    """The length of the mean gradient of all processes; every one of them must call this. None is zero."""
    sharded = [is_dtensor(tensor) for tensor in tensors]
    if any(sharded) or trainer.world_size == 1:  # sharded gradients are those of all processes
        parts = [(local(g), tensor) for g, tensor in zip(gradients, tensors, strict=True) if g is not None]
        squares = [
            sum_over_shards(torch.linalg.vector_norm(g, dtype=_wide(g)).square(), like=tensor) for g, tensor in parts
        ]
    else:
        found = zip(gradients, tensors, strict=True)
        flat = pack([torch.zeros_like(tensor) if g is None else g for g, tensor in found], torch.float32)
        squares = [mean_over_ranks(trainer, flat).square().sum()]
    return math.sqrt(sum(square.item() for square in squares))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def ends_optimizer_step(module: LightningModule) -> bool:
    """Whether an optimizer steps after this batch. (Manual optimization does not tell: as if after each.)"""
    return not (module.automatic_optimization and module.trainer.fit_loop.epoch_loop._should_accumulate())


def on_all_ranks(trainer: Trainer, condition: bool) -> bool:
    """Whether a condition holds on every process; every one of them must call this."""
    return condition if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(condition, all=True)


def mean_if_synchronized(trainer: Trainer) -> Callable[[Tensor], Tensor] | None:
    """The mean over the processes, where this backward pass averages the gradients over them; otherwise None."""
    synchronized = getattr(trainer.strategy.model, "require_backward_grad_sync", False)
    return functools.partial(mean_over_ranks, trainer) if synchronized else None
