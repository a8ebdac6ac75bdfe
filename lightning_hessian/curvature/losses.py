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

from lightning_hessian.curvature.graph import has_parameters, nodes

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


@dataclass(frozen=True, kw_only=True)
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
        """Logits, predictions or log-probabilities: the argument with a graph, in whichever order they came; of two
        such the one that depends on parameters (the other may be the input)."""
        first, second = self.arguments["input"], self.arguments["target"]
        if not (first.requires_grad and second.requires_grad):
            return first if first.requires_grad else second
        return second if has_parameters(second) and not has_parameters(first) else first

    def elements(self) -> Tensor:
        """The same call without its reduction, in float32 at the least."""
        return self.again(reduction="none")

    def again(self, **changed: Any) -> Tensor:
        """The same call with other arguments, in float32 at the least."""
        return self.function(**{name: _widened(value) for name, value in {**self.arguments, **changed}.items()})

    def factor(self, loss: Tensor, create_graph: bool = False) -> Tensor | None:
        """The derivative of the loss by what the call returned; None where it is no part of the loss."""
        (found,) = torch.autograd.grad(
            loss, self.result, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        return found

    def weights(self, loss: Tensor, create_graph: bool = False) -> Tensor:
        """The factors with which the elements enter the loss, of the elements' shape or one for all."""
        factor = self.factor(loss, create_graph)
        if factor is None:
            return torch.zeros_like(self.result)
        if self.reduction in ("none", "sum"):
            return factor
        with torch.no_grad():
            # What the reduction divides by depends on class weights and ignored targets: ask it.
            elements = self.elements()
            total = elements.sum()
            share = self.value / total if total != 0 else total.new_tensor(1 / elements.numel())
        return factor * share

    def counted(self) -> float:
        """How many elements count: what a mean over them divides by, with class weights and ignored targets."""
        with torch.no_grad():
            total, mean = self.again(reduction="sum"), self.again(reduction="mean")
        return (total / mean).item() if mean != 0 and mean.isfinite() else float(self.elements().numel())


class watch_losses(TorchFunctionMode):
    """Context manager that records the calls of the usual loss functions of ``torch.nn.functional`` inside.

    Seen are cross entropy, NLL, binary cross entropy (with logits or without), MSE, L1, smooth L1, Huber and KL
    divergence, also when their modules are called.

    Attributes:
        calls: the calls whose result has a graph.
        was_entered: whether a loss was computed inside at all.
        batch_statistics: whether batch norm normalized by the statistics of the batch.

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
        if func in _SEEN and result.requires_grad:
            self.calls.append(
                LossCall(
                    function=func,
                    arguments=_arguments(func, args, kwargs),
                    result=result,
                    value=result.detach().clone(),
                )
            )
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

        A call that averages gives a mean, whatever the factor. One that sums, or does not reduce, gives a sum where
        its elements enter with factor 1, and a mean where they are divided by their number or that of the samples (in
        sum, or each), or averaged.

        Raises:
            ValueError: some calls average and others sum, or no call tells.
        """
        calls = self.calls_in(loss)
        found = {_reduction(call, loss, samples) for call in calls}
        known = found - {None}
        if len(known) > 1:
            raise ValueError(
                "The step calls loss functions with reduction='mean' and with reduction='sum', so there is no one way "
                "to tell each sample's loss from their sum. Use the same reduction in all."
            )
        if calls and not known:
            raise ValueError(
                f"The step sums its loss ({calls[0].function.__name__}, reduction={calls[0].reduction!r}) and "
                "multiplies it by a factor that is neither 1 nor 1 over a number of samples or elements, so a mean "
                "cannot be told from a sum, and each sample's loss not from their sum. Let the loss function average "
                "(reduction='mean') and put the factor there."
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
    if not len(used) or (_alike(used.min(), 1) and _alike(used.max(), 1)):
        return "sum"
    elements = call.elements().numel()
    in_sum = weights.sum().item() * (elements if call.reduction == "sum" else 1)
    if any(_alike(in_sum, value) for value in (1, elements / samples)):
        return "mean"
    if _alike(used.min(), used.max()) and any(_alike(1 / used[0], n) for n in (samples, elements, call.counted())):
        return "mean"
    averaged = call.reduction == "none" and any(
        node.name().startswith("MeanBackward") for node in nodes(loss, until=call.result.grad_fn)
    )
    return "mean" if averaged else None


def _alike(a: Tensor | float, b: Tensor | float) -> bool:
    return math.isclose(float(a), float(b), rel_tol=1e-3)


def _widened(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < 4
    return value.float() if half else value
