"""Custom ``torch.autograd.Function``s: J x1 and d/dt J(x + t x1) x1 from their own backward passes.

Not by their ``jvp``: nested ``torch.func.jvp`` takes its result for a constant, so f'' would be zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hessian.curvature import refusals
from lightning_hessian.curvature.errors import OTHER_METHODS, HigherOrderError
from lightning_hessian.curvature.taylor.coefficients import Call, Coefficients, add


def custom_function(call: Call, cls: Any) -> Any:
    """The coefficients of what a custom ``torch.autograd.Function`` returns.

    Raises:
        HigherOrderError: its backward cannot be differentiated.
    """
    refusals.refuse_function(cls)
    moving = [(i, call.of(x)) for i, x in enumerate(call.args) if isinstance(x, Tensor)]
    moving = [(i, x) for i, x in moving if not x.is_constant]
    with torch._C.DisableTorchFunction():
        # Arguments of their own: derivatives by one must not pass through another.
        args = list(call.args)
        for i, x in moving:
            args[i] = x.value.view_as(x.value)
        before = [x.value._version for _, x in moving]
        result = call.function(*args, **call.kwargs)
        if before != [x.value._version for _, x in moving]:
            raise HigherOrderError(
                f"The custom function {cls.__name__} (called in {call.layer()}) writes into its arguments, so Taylor "
                f"coefficients cannot pass it. {OTHER_METHODS}"
            )
        inputs, coefficients = [args[i] for i, _ in moving], [x for _, x in moving]
        if isinstance(result, Tensor):
            return _carried(call, cls, result, inputs, coefficients)
        return type(result)(_carried(call, cls, y, inputs, coefficients) for y in result)


def _carried(call: Call, cls: Any, y: Any, inputs: Sequence[Tensor], x: Sequence[Coefficients]) -> Any:
    if not isinstance(y, Tensor) or not y.requires_grad:
        return y

    def along(output: Tensor | None, parts: Sequence[Tensor | None], is_first: bool = False) -> Tensor | None:
        """The derivative of the output along the parts: that of <J'u, parts> by u."""
        if output is None or not output.requires_grad:
            return None
        u = torch.zeros_like(output, requires_grad=True)
        rows = torch.autograd.grad(output, inputs, u, create_graph=True, allow_unused=True)
        pairs = zip(rows, parts, strict=True)
        product = add(*((a.conj() * b).real.sum() for a, b in pairs if a is not None and b is not None))
        if product is None:
            return None
        found = None
        if product.requires_grad:
            found = torch.autograd.grad(product, u, create_graph=True, allow_unused=True)[0]
        if found is None and is_first:
            raise HigherOrderError(
                f"The custom function {cls.__name__} (called in {call.layer()}) has a backward that cannot be "
                "differentiated by the gradient that it gets, so Taylor coefficients cannot pass it. Write it with "
                f"differentiable operations of PyTorch. {OTHER_METHODS}"
            )
        return found

    directions = [[one.first[p] for one in x] for p in range(call.directions)]
    first = tuple(along(y, parts, is_first=True) for parts in directions)
    curved = [along(y1, parts) for y1, parts in zip(first, directions, strict=True)]
    return Coefficients(y, first, add(along(y, [one.second for one in x], is_first=True), *curved))
