"""Record the arguments and results of the loss function calls in a training step."""

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

from lightning_hessian.curvature.graph import has_parameters, nodes

Reduction = Literal["mean", "sum"]

_RECORDED = {
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


@dataclass(frozen=True, kw_only=True)
class LossCall:
    """One call of a loss function: its arguments by name, its result, and a copy of the result's value at the time."""

    function: Callable[..., Tensor]
    arguments: dict[str, Any]
    result: Tensor
    value: Tensor

    @property
    def reduction(self) -> str:
        return self.arguments["reduction"]

    @property
    def outputs(self) -> Tensor:
        """Logits, predictions or log-probabilities: the argument with a graph, in either position.

        If both arguments have a graph, it is the one that depends on parameters: the other may be the input.
        """
        first, second = self.arguments["input"], self.arguments["target"]
        if not (first.requires_grad and second.requires_grad):
            return first if first.requires_grad else second
        return second if has_parameters(second) and not has_parameters(first) else first

    def elements(self) -> Tensor:
        """Repeat the call without its reduction, in float32 or wider."""
        return self.again(reduction="none")

    def again(self, **changed: Any) -> Tensor:
        """Repeat the call with changed arguments, in float32 or wider."""
        return self.function(**{name: _upcast(value) for name, value in {**self.arguments, **changed}.items()})

    def factor(self, loss: Tensor, create_graph: bool = False) -> Tensor | None:
        """Return d loss / d result, or None if the loss does not use the result."""
        (found,) = torch.autograd.grad(
            loss, self.result, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        return found

    def weights(self, loss: Tensor, create_graph: bool = False) -> Tensor:
        """Return the factors of the elements in the loss: of the elements' shape, or one factor for all."""
        factor = self.factor(loss, create_graph)
        if factor is None:
            return torch.zeros_like(self.result)
        if self.reduction in ("none", "sum"):
            return factor
        with torch.no_grad():
            # The reduction's divisor depends on class weights and ignored targets, so compute it from the call itself.
            elements = self.elements()
            total = elements.sum()
            share = self.value / total if total != 0 else total.new_tensor(1 / elements.numel())
        return factor * share

    def counted(self) -> float:
        """Return the divisor of a mean over the elements, which depends on class weights and ignored targets."""
        with torch.no_grad():
            total, mean = self.again(reduction="sum"), self.again(reduction="mean")
        return (total / mean).item() if mean != 0 and mean.isfinite() else float(self.elements().numel())


class watch_losses(TorchFunctionMode):
    """Context manager: record the calls of common ``torch.nn.functional`` loss functions inside.

    It records cross entropy, NLL, binary cross entropy (with or without logits), MSE, L1, smooth L1, Huber and KL
    divergence, and also calls through their modules.

    Attributes:
        calls: the recorded calls whose result has a graph.
        was_entered: whether the context was entered at all.
        batch_statistics: whether batch norm used the statistics of the batch.

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
        self.was_entered = False

    def __enter__(self) -> watch_losses:
        self.was_entered = True
        super().__enter__()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.batch_norm and _arguments(func, args, kwargs)["training"]:
            self.batch_statistics = True
        if func in _RECORDED and result.requires_grad:
            self.calls.append(
                LossCall(
                    function=func,
                    arguments=_arguments(func, args, kwargs),
                    result=result,
                    value=result.detach().clone(),
                )
            )
            # The step may modify the result in place, so it gets a copy.
            return result.clone()
        return result

    def calls_in(self, loss: Tensor) -> list[LossCall]:
        """Return the calls that the loss depends on. Others may be for logs only."""
        return [call for call in self.calls if call.factor(loss) is not None]

    def outputs(self, loss: Tensor) -> tuple[Tensor, ...]:
        """Return the distinct output tensors in the calls that the loss depends on."""
        return tuple({id(call.outputs): call.outputs for call in self.calls_in(loss)}.values())

    def reduction_of(self, loss: Tensor, samples: int) -> Reduction | None:
        """Return whether the loss is the mean or the sum over samples, or None if no call was recorded.

        A call that averages gives a mean, whatever its factor. A call that sums, or does not reduce, gives

        - a sum if its elements enter the loss with factor 1;
        - a mean if its elements are averaged, or divided (each, or in sum) by the number of elements or samples.

        Raises:
            ValueError: some calls average and others sum, or no call is conclusive.
        """
        calls = self.calls_in(loss)
        found = {_reduction(call, loss, samples) for call in calls}
        known = found - {None}
        if len(known) > 1:
            raise ValueError(
                "The step calls loss functions with reduction='mean' and with reduction='sum', so the "
                "losses of single samples cannot be recovered. Use the same reduction in all calls."
            )
        if calls and not known:
            raise ValueError(
                f"The step sums its loss ({calls[0].function.__name__}, reduction={calls[0].reduction!r}) and "
                "multiplies it by a factor that is neither 1 nor 1 / (number of samples or elements), so a mean "
                "cannot be told from a sum, and the losses of single samples are unknown. Let the loss function "
                "average (reduction='mean') and multiply its result by the factor."
            )
        return known.pop() if known else None


def _arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    bound = inspect.signature(func).bind(*args, **(kwargs or {}))
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    size_average, reduce = arguments.pop("size_average", None), arguments.pop("reduce", None)
    if size_average is not None or reduce is not None:
        arguments["reduction"] = legacy_get_string(size_average, reduce, emit_warning=False)
    return arguments


def _reduction(call: LossCall, loss: Tensor, samples: int) -> Reduction | None:
    if call.reduction in ("mean", "batchmean"):
        return "mean"
    weights = call.weights(loss)
    used = weights[weights != 0]
    if not len(used) or (_close(used.min(), 1) and _close(used.max(), 1)):
        return "sum"
    elements = call.elements().numel()
    in_sum = weights.sum().item() * (elements if call.reduction == "sum" else 1)
    if any(_close(in_sum, value) for value in (1, elements / samples)):
        return "mean"
    if _close(used.min(), used.max()) and any(_close(1 / used[0], n) for n in (samples, elements, call.counted())):
        return "mean"
    averaged = call.reduction == "none" and any(
        node.name().startswith("MeanBackward") for node in nodes(loss, until=call.result.grad_fn)
    )
    return "mean" if averaged else None


def _close(a: Tensor | float, b: Tensor | float) -> bool:
    return math.isclose(float(a), float(b), rel_tol=1e-3)


def _upcast(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < 4
    return value.float() if half else value
