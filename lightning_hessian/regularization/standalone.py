"""A module's training step outside of a Trainer, on a copy whose logs nobody sees."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from lightning_hessian.regularization.mixin import HessianRegularizationMixin

Step = Callable[[Any, Any, int], Any]
"""(module, batch, index of the batch) -> what the training step returns."""


def step_of(module: nn.Module, loss: Callable[[Any, Any], Any] | None) -> Step:
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


def training_step(module: Any, batch: Any, index: int) -> Any:
    """Call the module's own, with the batch's index if it takes one."""
    if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
        return module.training_step(batch, index)
    return module.training_step(batch)


def quiet_copy(module: nn.Module) -> nn.Module:
    """A copy that shares the Trainer, which user code may look at, but does not log to it."""
    trainer = getattr(module, "_trainer", None)
    twin = copy.deepcopy(module)
    if isinstance(twin, LightningModule):
        twin._trainer = trainer
        for method in ("log", "log_dict"):
            setattr(twin, method, lambda *args, **kwargs: None)
    return twin
