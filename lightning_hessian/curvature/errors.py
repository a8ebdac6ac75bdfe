"""Errors about derivatives that do not exist, in the words of the model's author instead of autograd's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

OTHERWISE = "As a penalty, HessianTrace(method='two_pass') takes it as it is: it needs ordinary backward passes only."


class HigherOrderError(RuntimeError):
    """An operator or a layer cannot be differentiated as often as a curvature penalty needs.

    Attributes:
        operator: the operator without a derivative, where the error is about one that has not been located yet.
    """

    operator: str | None = None


def missing_derivative(operator: str, layer: str | None = None, times: str = "as often") -> HigherOrderError:
    """The error of an operator that PyTorch cannot differentiate often enough."""
    where = f" (called in {layer})" if layer is not None else ""
    error = HigherOrderError(
        f"The operator {operator}{where} cannot be differentiated {times} as curvature needs. Replace it by one that "
        "can, or keep it out of the way: choose with `parameters=` only parameters whose gradient does not pass "
        f"through it. {OTHERWISE}"
    )
    error.operator = operator if layer is None else None
    return error


def once_differentiable_error(functions: str, how: str = "is marked @once_differentiable") -> HigherOrderError:
    """The error of custom functions whose backward has no derivative."""
    return HigherOrderError(
        f"The loss passes through {functions}, whose backward {how}. PyTorch would leave its part of the Hessian out "
        "without an error. Write its backward with differentiable operations, and remove the mark. "
        "`lightning_hessian.verify` names the layer."
    )


def nested_tensor_error(where: str) -> HigherOrderError:
    """The error of nested tensors, most of whose operators have no second derivative."""
    return HigherOrderError(
        f"The loss passes through nested tensors, which PyTorch cannot differentiate twice here ({where}). Pad them, "
        f"for example by torch.nested.to_padded_tensor, before the layers with parameters. {OTHERWISE}"
    )


@contextmanager
def derivatives_explained(
    layer_of: Callable[[str], str | None] = lambda operator: None, times: str = "as often"
) -> Iterator[None]:
    """Translate autograd's errors about missing derivatives: name the operator, the layer and the way out.

    Args:
        layer_of: the name of the layer that called an operator; None where it is not known.
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
# Of dispatch errors the back end tells: they list all others.
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
    told = found.group(1) if (found := _BACKEND.search(message)) else message
    if _NESTED.search(told):
        return nested_tensor_error(message.splitlines()[0])
    if _SPARSE.search(told):
        return HigherOrderError(
            "The loss passes through sparse tensors, which PyTorch cannot differentiate twice here "
            f"({message.splitlines()[0]}). Make "
            f"them dense by `.to_dense()`, or compute with indices and values of your own. {OTHERWISE}"
        )
    return None
