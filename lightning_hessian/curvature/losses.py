"""What a training step handed to its loss function, seen where it calls it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Reduction = Literal["mean", "sum"]

_SEEN = {F.cross_entropy, F.binary_cross_entropy_with_logits, F.mse_loss, F.nll_loss}


@dataclass(frozen=True)
class LossCall:
    """One call of a loss function: its arguments by name, and what it returned."""

    function: Callable[..., Tensor]
    arguments: dict[str, Any]
    result: Tensor

    @property
    def outputs(self) -> Tensor:
        """The first argument: logits, predictions, or log-probabilities for ``nll_loss``."""
        return self.arguments["input"]

    def elements(self) -> Tensor:
        """The same call without its reduction."""
        return self.function(**{**self.arguments, "reduction": "none"})

    def weights(self, loss: Tensor) -> Tensor:
        """The constant factors with which the elements enter the loss, of the elements' shape."""
        (factor,) = torch.autograd.grad(loss, self.result, retain_graph=True, allow_unused=True, materialize_grads=True)
        if self.arguments.get("reduction", "mean") == "none":
            return factor
        with torch.no_grad():
            elements = self.elements()
            # What the reduction divides by depends on class weights and ignored targets: ask it.
            total = elements.sum()
            share = self.result / total if total != 0 else total.new_tensor(1 / elements.numel())
        return (factor * share).expand_as(elements)


class watch_losses(TorchFunctionMode):
    """Context manager that records the calls of cross entropy, binary cross entropy with logits, MSE and NLL inside.

    Example:
        >>> logits = torch.zeros(2, 3, requires_grad=True)
        >>> with watch_losses() as seen:
        ...     loss = F.cross_entropy(logits, torch.tensor([0, 2]))
        >>> seen.outputs[0] is logits, seen.reduction_of(loss)
        (True, 'mean')
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[LossCall] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _SEEN and result.requires_grad:
            arguments = inspect.signature(func).bind(*args, **(kwargs or {})).arguments
            self.calls.append(LossCall(func, arguments, result))
        return result

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """The different tensors that loss functions were called on."""
        return tuple({id(call.outputs): call.outputs for call in self.calls}.values())

    def reduction_of(self, loss: Tensor) -> Reduction | None:
        """Whether the loss is the mean or the sum over samples; None where no call was seen.

        Raises:
            ValueError: some calls average and others sum.
        """
        found = {_reduction(call, loss) for call in self.calls}
        if len(found) > 1:
            raise ValueError(
                "The step calls loss functions with reduction='mean' and with reduction='sum', so there is no one way "
                "to tell each sample's loss from their sum. Use the same reduction in all."
            )
        return found.pop() if found else None

    def sample_losses(self, loss: Tensor, samples: int) -> Tensor | None:
        """l_i, of shape (samples,), with their graph: what each sample contributes to the loss, up to terms that do
        not pass through a loss function; their mean (or sum, by the reduction) is the loss. None where no call was
        seen."""
        if not self.calls:
            return None
        scale = samples if self.reduction_of(loss) == "mean" else 1
        parts = [(call.weights(loss) * call.elements()).reshape(samples, -1).sum(dim=1) for call in self.calls]
        return scale * torch.stack(parts).sum(dim=0)


def _reduction(call: LossCall, loss: Tensor) -> Reduction:
    declared = call.arguments.get("reduction", "mean")
    if declared in ("mean", "sum"):
        return declared
    # The step reduces by itself: its factors add up to about 1 for a mean, to their number for a sum.
    total = call.weights(loss).sum().abs().item()
    return "sum" if total > math.sqrt(max(call.result.numel(), 2)) else "mean"
