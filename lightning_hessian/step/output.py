"""The loss in what a training step returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor


def loss_of(output: Any) -> Tensor | None:
    """The scalar loss in what a step returned: a tensor, or a mapping with "loss"; None where it skips the batch.

    Raises:
        MisconfigurationException: the step returned something else, a loss that is no scalar, or one without a graph.
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
            "Reduce it, for example by `.mean()`."
        )
    if not loss.requires_grad:
        raise MisconfigurationException(
            "The loss that the training step returned has no graph, so neither it nor a penalty on its curvature "
            "can be differentiated. Compute it from the model's parameters, without `.detach()`, `.item()` or "
            "`torch.no_grad()` on the way."
        )
    return loss.reshape(())


def with_loss(output: Any, loss: Tensor) -> Any:
    """What a step returned, with another loss in it."""
    return loss if isinstance(output, Tensor) else {**output, "loss": loss}


def logits_in(output: Any) -> Tensor | None:
    """The tensor with a graph that a step returned under "logits", if it did."""
    logits = output.get("logits") if isinstance(output, Mapping) else None
    return logits if isinstance(logits, Tensor) and logits.requires_grad else None
