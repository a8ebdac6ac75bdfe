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
from torch.nn._reduction import legacy_get_string
from torch.overrides import TorchFunctionMode

Reduction = Literal["mean", "sum"]

_SEEN = {
    F.cross_entropy,
    F.nll_loss,
    F.binary_cross_entropy_with_logits,
    F.binary_cross_entropy,
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.kl_div,
}


@dataclass(frozen=True)
class LossCall:
    """One call of a loss function: its arguments by name, what it returned, and the value of that at the time."""

    function: Callable[..., Tensor]
    arguments: dict[str, Any]
    result: Tensor
    value: Tensor

    @property
    def reduction(self) -> str:
        return self.arguments["reduction"]

    @property
    def outputs(self) -> Tensor:
        """Logits, predictions or log-probabilities: the argument with a graph, in whichever order they came."""
        first, second = self.arguments["input"], self.arguments["target"]
        return first if first.requires_grad else second

    def elements(self) -> Tensor:
        """The same call without its reduction."""
        return self.function(**{**self.arguments, "reduction": "none"})

    def factor(self, loss: Tensor) -> Tensor | None:
        """The derivative of the loss by what the call returned; None where it is no part of the loss."""
        return torch.autograd.grad(loss, self.result, retain_graph=True, allow_unused=True)[0]

    def weights(self, loss: Tensor) -> Tensor:
        """The constant factors with which the elements enter the loss, of the elements' shape."""
        factor = self.factor(loss)
        if factor is None or self.reduction == "none":
            return torch.zeros_like(self.result) if factor is None else factor
        with torch.no_grad():
            elements = self.elements()
            # What the reduction divides by depends on class weights and ignored targets: ask it.
            total = elements.sum()
            share = self.value / total if total != 0 else total.new_tensor(1 / elements.numel())
        return (factor * share).expand_as(elements)


class watch_losses(TorchFunctionMode):
    """Context manager that records the calls of the usual loss functions of ``torch.nn.functional`` inside.

    Seen are cross entropy, NLL, binary cross entropy (with logits or without), MSE, L1, smooth L1, Huber and KL
    divergence, also when their modules are called.

    Attributes:
        calls: the calls whose result has a graph.
        batch_statistics: whether batch norm normalised by the statistics of the batch.

    Example:
        >>> logits = torch.zeros(2, 3, requires_grad=True)
        >>> with watch_losses() as seen:
        ...     loss = F.cross_entropy(logits, torch.tensor([0, 2]))
        >>> seen.outputs(loss)[0] is logits, seen.reduction_of(loss, samples=2)
        (True, 'mean')
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[LossCall] = []
        self.batch_statistics = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.batch_norm and _arguments(func, args, kwargs)["training"]:
            self.batch_statistics = True
        if func in _SEEN and result.requires_grad:
            self.calls.append(LossCall(func, _arguments(func, args, kwargs), result, result.detach().clone()))
            # The step may go on with it in place.
            return result.clone()
        return result

    def calls_in(self, loss: Tensor) -> list[LossCall]:
        """Those that the loss is made of; others were for the logs."""
        return [call for call in self.calls if call.factor(loss) is not None]

    def outputs(self, loss: Tensor) -> tuple[Tensor, ...]:
        """The different tensors that the loss functions were called on."""
        return tuple({id(call.outputs): call.outputs for call in self.calls_in(loss)}.values())

    def reduction_of(self, loss: Tensor, samples: int) -> Reduction | None:
        """Whether the loss is the mean or the sum over samples; None where no call was seen.

        A call that averages gives a mean; one that sums gives a sum, unless the step divides by the number of samples
        (or elements); one without reduction gives a sum where its elements enter with factor 1, else a mean.

        Raises:
            ValueError: some calls average and others sum.
        """
        found = {_reduction(call, loss, samples) for call in self.calls_in(loss)}
        if len(found) > 1:
            raise ValueError(
                "The step calls loss functions with reduction='mean' and with reduction='sum', so there is no one way "
                "to tell each sample's loss from their sum. Use the same reduction in all."
            )
        return found.pop() if found else None


def _arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    bound = inspect.signature(func).bind(*args, **(kwargs or {}))
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    size_average, reduce = arguments.pop("size_average", None), arguments.pop("reduce", None)
    if size_average is not None or reduce is not None:
        arguments["reduction"] = legacy_get_string(size_average, reduce, emit_warning=False)
    return arguments


def _reduction(call: LossCall, loss: Tensor, samples: int) -> Reduction:
    if call.reduction in ("mean", "batchmean"):
        return "mean"
    with torch.no_grad():
        weight = call.weights(loss).abs().mean().item()
        count = call.elements().numel()
    if call.reduction == "sum":
        divided = any(math.isclose(weight * by, 1, rel_tol=1e-3) for by in (samples, count))
        return "mean" if divided and samples > 1 else "sum"
    return "sum" if math.isclose(weight, 1, rel_tol=1e-3) else "mean"
