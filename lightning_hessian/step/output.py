"""Extract or replace the loss in a training step's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor


def loss_of(output: Any) -> Tensor | None:
    """Return the scalar loss in a step's output: a tensor, or a mapping with "loss". None means to skip the batch.

    Raises:
        MisconfigurationException: the output has another type, or the loss is not a scalar or has no graph.
    """
    if output is None:
        return None
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        what = f"a {type(output).__name__}"
        if isinstance(output, Mapping):
            what = f"a dict without a tensor under 'loss' (its keys: {', '.join(map(str, output)) or 'none'})"
        raise MisconfigurationException(
            f"The training step returned {what}, so there is no loss to add a penalty to. "
            'Return the loss tensor, a dict {"loss": ...}, or None to skip the batch.'
        )
    if loss.numel() != 1:
        raise MisconfigurationException(
            f"The training step returned a loss of shape {tuple(loss.shape)}; a penalty needs a scalar. "
            "Reduce it, for example with `.mean()`."
        )
    if not loss.requires_grad:
        raise MisconfigurationException(
            "The loss that the training step returned has no graph, so neither the loss nor a penalty on its curvature "
            "can be differentiated. Compute it from the model's parameters, without `.detach()`, `.item()` or "
            "`torch.no_grad()` on the way."
        )
    return loss.reshape(())


def with_loss(output: Any, loss: Tensor) -> Any:
    """Return a step's output with its loss replaced."""
    return loss if isinstance(output, Tensor) else {**output, "loss": loss}


def logits_in(output: Any) -> Tensor | None:
    """Return the tensor under "logits" in a step's output, or None if it is missing or has no graph."""
    logits = output.get("logits") if isinstance(output, Mapping) else None
    return logits if isinstance(logits, Tensor) and logits.requires_grad else None
