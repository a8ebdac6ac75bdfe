"""The task loss of a module, for functions that are handed a module outside of a fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_hessian.regularization.mixin import HessianRegularizationMixin
from lightning_hessian.step.training_step import training_step

TaskStep = Callable[[Any, Any, int], Any]
"""(module, batch, index of the batch) -> what the training step returns."""


def task_step(module: nn.Module, loss: Callable[[Any, Any], Any] | None) -> TaskStep:
    """The module's ``training_step``, or ``loss(module, batch)`` where it is given.

    Raises:
        MisconfigurationException: the training step returns no task loss, and there is no ``loss``.
    """
    if loss is not None:
        return lambda module, batch, index: loss(module, batch)
    if (
        not isinstance(module, LightningModule)
        or not module.automatic_optimization
        or isinstance(module, HessianRegularizationMixin)
    ):
        raise MisconfigurationException(
            f"The training step of {type(module).__name__} returns no task loss to look at: it is not a "
            "LightningModule, optimizes manually, or adds its penalty itself. Pass `loss=lambda module, batch: ...`."
        )
    return training_step
