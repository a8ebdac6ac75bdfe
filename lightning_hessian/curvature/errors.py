"""Errors about missing derivatives, phrased in terms of the model instead of autograd internals."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

OTHER_METHODS = "Use method='autograd', or method='two_pass', which needs ordinary backward passes only."

OTHERWISE = (
    "As a penalty, HessianTrace(method='two_pass') supports it: that method needs ordinary backward passes only."
)


class HigherOrderError(RuntimeError):
    """An operator or a layer cannot be differentiated as often as a curvature penalty needs.

    Attributes:
        operator: the operator without a derivative, if the layer that calls it is not located yet; otherwise None.
    """

    operator: str | None = None


def missing_derivative(operator: str, layer: str | None = None, times: str = "as often") -> HigherOrderError:
    """Build the error for an operator that PyTorch cannot differentiate often enough."""
    where = f" (called in {layer})" if layer is not None else ""
    error = HigherOrderError(
        f"The operator {operator}{where} cannot be differentiated {times} as curvature needs. Replace it by one that "
        "can, or bypass it: with `parameters=`, select only parameters whose gradient does not pass "
        f"through it. {OTHERWISE}"
    )
    error.operator = operator if layer is None else None
    return error


def once_differentiable_error(functions: str, how: str = "is marked @once_differentiable") -> HigherOrderError:
    """Build the error for custom functions whose backward has no derivative."""
    return HigherOrderError(
        f"The loss passes through {functions}, whose backward {how}. PyTorch would silently omit its part "
        "of the Hessian. Write its backward with differentiable operations, and remove the mark. "
        "`lightning_hessian.verify` names the layer."
    )


def nested_tensor_error(where: str) -> HigherOrderError:
    """Build the error for nested tensors. Most of their operators have no second derivative."""
    return HigherOrderError(
        f"The loss passes through nested tensors, which PyTorch cannot differentiate twice here ({where}). Pad them, "
        f"for example with torch.nested.to_padded_tensor, before the layers with parameters. {OTHERWISE}"
    )


@contextmanager
def derivatives_explained(
    layer_of: Callable[[str], str | None] = lambda operator: None, times: str = "as often"
) -> Iterator[None]:
    """Translate autograd's errors about missing derivatives. The new error names the operator, the layer and a remedy.

    Args:
        layer_of: returns the name of the layer that called an operator, or None if unknown.
        times: how often the loss is differentiated, in words.
    """
    try:
        yield
    except HigherOrderError as error:
        if error.operator is None:
            raise
        raise missing_derivative(error.operator, layer_of(error.operator), times) from error
    except RuntimeError as error:
        if (operator := _without_derivative(str(error))) is not None:
            raise missing_derivative(operator, layer_of(operator), times) from error
        if (translated := _translated(str(error))) is not None:
            raise translated from error
        raise


_MISSING = (
    r"derivative for '?(?:aten::)?(\w+)'? is not implemented",
    r"(\w+):? does not support 3rd\+ order",
    r"(\w+) is not differentiable twice",
    r"double backwards? on (\w+) (?:is )?not supported",
    r"Trying to backward through (\S+) but no autograd formula was registered",
)
# In a dispatch error only the first backend counts: the message then lists all other backends.
_BACKEND = re.compile(r"^Could not run '[^']*' with arguments from the '(\w+)' backend")
_NESTED = re.compile(r"NestedTensor|_nested_\w+|both to be nested")
_SPARSE = re.compile(
    r"not implemented for sparse tensors|expected sparse coordinate|_sparse_\w+|Sparse(Csr|Csc)?(CPU|CUDA)"
)


def _without_derivative(message: str) -> str | None:
    for pattern in _MISSING:
        if found := re.search(pattern, message, re.IGNORECASE):
            return found.group(1).strip("_")
    return None


def _translated(message: str) -> HigherOrderError | None:
    if "marked with @once_differentiable" in message:
        return once_differentiable_error("a custom torch.autograd.Function")
    if "does not currently support double backward" in message:
        return HigherOrderError(
            "The loss passes through a compiled function, which PyTorch cannot differentiate twice (pytorch#91469). "
            f"Compute the loss inside `with higher_order():`, where it runs eagerly. {OTHERWISE}"
        )
    cause = found.group(1) if (found := _BACKEND.search(message)) else message
    if _NESTED.search(cause):
        return nested_tensor_error(message.splitlines()[0])
    if _SPARSE.search(cause):
        return HigherOrderError(
            "The loss passes through sparse tensors, which PyTorch cannot differentiate twice here "
            f"({message.splitlines()[0]}). Make "
            f"them dense with `.to_dense()`, or compute with your own indices and values. {OTHERWISE}"
        )
    return None
