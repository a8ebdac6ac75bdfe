"""Functions without a rule: d^k/dt^k f(x(t)) at t = 0 by two nested ``torch.func.jvp``."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from lightning_hessian.curvature.errors import OTHER_METHODS, HigherOrderError
from lightning_hessian.curvature.taylor.coefficients import (
    Call,
    Coefficients,
    add,
    has_coefficients,
    is_real_or_complex,
    nonzero,
)


def _without_dispatch(function: FunctionType) -> FunctionType | None:
    """A function of PyTorch without its own call of torch function modes. None if it makes none."""
    if not any(name.startswith("has_torch_function") for name in function.__code__.co_names):
        return None
    names = function.__globals__
    known = _GLOBALS.setdefault(
        names["__name__"], names | {name: _no for name in names if name.startswith("has_torch_function")}
    )
    body = FunctionType(function.__code__, known, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def _no(*_: Any) -> bool:
    return False


_GLOBALS: dict[str, dict[str, Any]] = {}

_BODIES = {
    function: body
    for place in (torch, torch.functional, torch.linalg, torch.nn.functional, torch.Tensor)
    for function in vars(place).values()
    if isinstance(function, FunctionType) and (body := _without_dispatch(function)) is not None
}

# The compiler looks functions up by number.
BODY_LIST: list[FunctionType] = list(_BODIES.values())
"""The functions that PyTorch writes in Python with other functions: a mode sees the calls in their bodies."""
_NUMBERS = {id(function): number for number, function in enumerate(_BODIES)}


@torch.compiler.assume_constant_result
def body_number(function: Any) -> int:
    """The place of a function's body in ``BODY_LIST``, or -1."""
    return _NUMBERS.get(id(function), -1)


WRONG = {
    "_batch_norm_with_update", "_native_batch_norm_legit", "native_batch_norm", "native_layer_norm",
    "native_group_norm", "linalg_householder_product", "scatter_reduce", "scatter_reduce_", "linalg_eigh",
    "linalg_eigvalsh", "linalg_eig", "linalg_eigvals",
    "_safe_softmax.default", "renorm", "dist", "linalg_matrix_norm", "linalg_vector_norm", "norm",
    "linalg_norm", "triplet_margin_loss", "cosine_embedding_loss", "linalg_svd", "svd",
    "as_strided", "as_strided_copy", "as_strided_", "linalg_polar", "linalg_matrix_sqrth",
    "linalg_lstsq",
}  # fmt: skip
"""Functions whose forward-mode derivatives are wrong at second order, not finite, or cannot be differentiated again
(pytorch#196700, #196699, and the walk through PyTorch's operators in the tests)."""

WRONG_FOR_COMPLEX = {"linalg_slogdet", "slogdet", "logdet", "std", "std_mean", "pairwise_distance", "sgn"}


def by_forward_mode(call: Call, name: str | None = None) -> Any:
    """The coefficients of what a function returns, by forward-mode differentiation.

    Args:
        call: the call.
        name: what errors call the function.

    Raises:
        HigherOrderError: the function has no forward-mode derivatives.
    """
    called = str(name or getattr(call.function, "__name__", repr(call.function)))
    moving = [x for x in _tensors(call.args) + _tensors(tuple(call.kwargs.values())) if has_coefficients(x)]
    if called in WRONG or (called in WRONG_FOR_COMPLEX and any(x.is_complex() for x in moving)):
        raise HigherOrderError(
            f"The operation {called} (called in {call.layer()}) has no Taylor rule, and its forward-mode derivatives "
            f"in PyTorch are not right at second order. {OTHER_METHODS}"
        )
    device = moving[0].device
    random = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    results = []
    for p in range(call.directions):
        if p:  # the same random numbers for every direction
            torch.set_rng_state(random[0])
            if random[1] is not None:
                torch.cuda.set_rng_state(random[1], device)
        results.append(_along(call, moving, p, called))
    return _collected(results)


def _along(call: Call, moving: list[Tensor], p: int, name: str) -> Any:
    """(y0, y1, y2) along direction p, in the structure of what the function returns; x2 goes with the first one."""
    series = {id(x): call.of(x) for x in moving}

    def at(t: Tensor) -> Any:
        def moved(value: Any) -> Any:
            if isinstance(value, Tensor) and id(value) in series:
                x = series[id(value)]
                x1, x2 = x.first[p], None if p else x.second
                return add(x.value, None if x1 is None else t * x1, None if x2 is None else t * t / 2 * x2)
            if isinstance(value, list | tuple):
                parts = [moved(part) for part in value]
                return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
            return value

        result = call.function(*moved(tuple(call.args)), **{key: moved(value) for key, value in call.kwargs.items()})
        flat = [y for y in _leaves(result) if isinstance(y, Tensor) and is_real_or_complex(y)]  # others are constant
        return tuple(flat), result

    zero = torch.zeros((), dtype=_real(moving[0]), device=moving[0].device)
    one = torch.ones_like(zero)

    twice: Any = jvp  # its annotation does not know has_aux

    def first_order(t: Tensor) -> Any:
        y0, y1, result = twice(at, (t,), (one,), has_aux=True)
        return (y0, y1), result

    try:
        (y0, y1), (_, y2), result = twice(first_order, (zero,), (one,), has_aux=True)
    except (NotImplementedError, RuntimeError) as error:
        raise HigherOrderError(
            f"The operation {name} (called in {call.layer()}) has no Taylor rule, and PyTorch cannot differentiate it "
            f"in forward mode ({str(error).splitlines()[0][:200]}). {OTHER_METHODS}"
        ) from error
    return y0, y1, y2, result


def _collected(results: list[Any]) -> Any:
    values, _, _, template = results[0]
    found = iter(
        Coefficients(
            value,
            tuple(nonzero(first[i]) for _, first, _, _ in results),
            add(*(nonzero(second[i]) for _, _, second, _ in results)),
        )
        for i, value in enumerate(values)
    )

    def filled(part: Any) -> Any:
        if isinstance(part, Tensor) and is_real_or_complex(part):
            return next(found)
        if isinstance(part, list | tuple):
            parts = [filled(one) for one in part]
            return tuple(parts) if hasattr(part, "_fields") else type(part)(parts)
        return part

    return filled(template)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(value) if isinstance(leaf, Tensor)]


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]


def _real(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else x.real.dtype
