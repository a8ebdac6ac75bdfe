"""What penalties and measurements need of the loop that trains, whichever library runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sharding:
    """How a loop shards the parameters.

    Args:
        by: the name of what does it, for errors.
        in_graph: whether the parameters are DTensors, which are in the loss's graph.
    """

    by: str
    in_graph: bool


class TrainingLoop(Protocol):
    """A loop that trains one module.

    The members that speak of all processes (:meth:`mean`, :meth:`total`, :meth:`all`, :meth:`log`) must be called by
    every one of them.
    """

    @property
    def is_training(self) -> bool:
        """Whether the loop trains now. (A validation may call the training step.)"""

    @property
    def global_step(self) -> int:
        """How many optimizer steps were taken."""

    @property
    def batches_before(self) -> int:
        """How many batches were trained on before this one. It grows over epochs, and checkpoints keep it."""

    @property
    def is_automatic(self) -> bool:
        """Whether the loop differentiates what the step returns and steps the optimizer itself."""

    @property
    def ends_optimizer_step(self) -> bool:
        """Whether an optimizer steps after this batch. (Manual optimization does not tell: as if after each.)"""

    @property
    def precision(self) -> str:
        """The precision, by Lightning's name: ``"32-true"``, ``"bf16-mixed"``, ..."""

    @property
    def gradient_scale(self) -> float | None:
        """The factor of the loss in the backward pass, by which float16 gradients do not underflow; None without."""

    @property
    def sharding(self) -> Sharding | None:
        """How the parameters are sharded; None if they are not."""

    @property
    def rank(self) -> int:
        """The number of this process."""

    @property
    def world_size(self) -> int:
        """The number of processes."""

    @property
    def synchronizes_gradients(self) -> bool:
        """Whether the backward pass of this batch averages the gradients over the processes."""

    @property
    def has_static_graph(self) -> bool:
        """Whether DDP takes every backward pass to be the same."""

    @property
    def learning_rates(self) -> list[float]:
        """The present learning rate of each parameter group that has one, over all optimizers."""

    @property
    def callbacks(self) -> Sequence[object]:
        """What else is called while the loop trains."""

    @property
    def loggers(self) -> Sequence[Any]:
        """The loggers that may take images."""

    def autocast_dtype(self, kind: str) -> torch.dtype | None:
        """The type to which the step casts on a kind of device; None if it does not."""

    def full_precision(self) -> AbstractContextManager[Any]:
        """Context manager: the step runs without autocast."""

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""

    def all(self, condition: bool) -> bool:
        """Whether a condition holds on every process."""

    def log(self, name: str, value: Tensor | float, reduce: bool) -> None:
        """Log a value of this step, or with ``reduce`` its mean over the processes."""

    def report(self, scalars: Mapping[str, float], step: int) -> None:
        """Log what was measured between two steps."""
