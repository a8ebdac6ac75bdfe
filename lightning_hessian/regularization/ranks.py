"""What the processes of a Trainer decide and compute together."""

from __future__ import annotations

import functools
from collections.abc import Callable

from lightning.pytorch import Trainer
from torch import Tensor


def mean_over_ranks(trainer: Trainer, tensor: Tensor) -> Tensor:
    """The mean of a tensor over the processes; every one of them must call this."""
    # Lightning reduces in place.
    return tensor if trainer.world_size == 1 else trainer.strategy.reduce(tensor.clone(), reduce_op="mean")


def on_all_ranks(trainer: Trainer, condition: bool) -> bool:
    """Whether a condition holds on every process; every one of them must call this."""
    return condition if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(condition, all=True)


def mean_if_synchronized(trainer: Trainer) -> Callable[[Tensor], Tensor] | None:
    """The mean over the processes, where this backward pass averages the gradients over them; otherwise None."""
    synchronized = getattr(trainer.strategy.model, "require_backward_grad_sync", False)
    return functools.partial(mean_over_ranks, trainer) if synchronized else None
