"""Functions that choose entries by the values x0: max-pooling, maxima, sorting, and piecewise linear activations.

The choice is a constant to the derivatives, as it is to autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_hessian.curvature.taylor.coefficients import Call, Coefficients, add, linear


def pooling_rule(with_indices: Callable[..., Any], spatial: int, returns_indices: bool) -> Callable[[Call], Any]:
    """Max-pooling, which takes the coefficients of the largest entries."""

    def rule(call: Call) -> Any:
        x = call.of(call.argument(0, "input"))
        kwargs = {k: v for k, v in call.kwargs.items() if k not in ("input", "return_indices")}
        value, indices = with_indices(x.value, *call.args[1:], **kwargs)
        flat = indices.flatten(-spatial)

        def chosen(t: Tensor) -> Tensor:
            return t.flatten(-spatial).gather(-1, flat).view(value.shape)

        first = tuple(None if x1 is None else chosen(x1) for x1 in x.first)
        found = Coefficients(value, first, None if x.second is None else chosen(x.second))
        return (found, indices) if returns_indices else found

    return rule


def by_indices_rule(call: Call) -> Any:
    """(values, indices) = f(x, ..., dim): max, min, sort, topk, median, kthvalue, cummax, ..."""
    if isinstance(call.argument(1, "other"), Tensor):
        return _of_two(call)
    x = call.of(call.args[0])
    result = call.function(*call.args, **call.kwargs)
    if isinstance(result, Tensor):  # over all entries
        return _evenly(call, result, None, False)
    values, indices = result
    name = call.function.__name__
    dim = call.argument(2 if name in ("topk", "kthvalue") else 1, "dim", -1)
    if name == "sort" and isinstance(dim, bool):
        dim = call.kwargs.get("dim", -1)
    is_reduced = values.dim() < x.value.dim()
    index = indices.unsqueeze(dim) if is_reduced else indices

    def chosen(t: Tensor) -> Tensor:
        picked = t.gather(dim, index)
        return picked.squeeze(dim) if is_reduced else picked

    first = tuple(None if x1 is None else chosen(x1) for x1 in x.first)
    found = Coefficients(values, first, None if x.second is None else chosen(x.second))
    return type(result)((found, indices)) if not hasattr(result, "_fields") else (found, indices)


def extremum_rule(call: Call) -> Any:
    """amax and amin: entries that tie share evenly."""
    value = call.function(*call.args, **call.kwargs)
    dim = call.argument(1, "dim", None)
    return _evenly(call, value, dim if dim not in ((), []) else None, bool(call.argument(2, "keepdim", False)))


def _evenly(call: Call, value: Tensor, dim: Any, keepdim: bool) -> Coefficients:
    x = call.of(call.args[0])
    dims = list(range(x.value.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    whole = value
    if not keepdim:
        shape = [1 if i in [d % max(1, x.value.dim()) for d in dims] else n for i, n in enumerate(x.value.shape)]
        whole = value.reshape(shape)
    share = (x.value == whole).to(x.value.dtype)
    share = share / share.sum(dims, keepdim=True) if dims else share

    def mean(t: Tensor) -> Tensor:
        return (share * t).sum(dims, keepdim=keepdim) if dims else share * t

    first = tuple(None if x1 is None else mean(x1) for x1 in x.first)
    return Coefficients(value, first, None if x.second is None else mean(x.second))


def _of_two(call: Call) -> Coefficients:
    """The larger or the smaller of two, element by element; ties share evenly."""
    a, b = call.of(call.args[0]), call.of(call.argument(1, "other"))
    value = call.function(*call.args, **call.kwargs)
    is_max = call.function.__name__ in ("max", "maximum", "fmax")
    first_wins = a.value > b.value if is_max else a.value < b.value
    share = torch.where(first_wins, 1.0, torch.where(a.value == b.value, 0.5, 0.0)).to(value.dtype)

    def mixed(p: Tensor | None, q: Tensor | None) -> Tensor | None:
        mine = None if p is None else share * p
        others = None if q is None else (1 - share) * q
        return add(mine, others)

    first = tuple(mixed(p, q) for p, q in zip(a.first, b.first, strict=True))
    return Coefficients(value, first, mixed(a.second, b.second))


def piecewise_linear(slope: Callable[..., Tensor]) -> Callable[[Call], Coefficients]:
    """f(x) with f' = slope(x, ...) constant between kinks."""

    def rule(call: Call) -> Coefficients:
        x = call.of(call.argument(0, "input"))
        kwargs = {k: v for k, v in call.kwargs.items() if k not in ("input", "inplace")}
        f1 = slope(x.value.detach(), *call.args[1:], **kwargs)
        value = call.function(*call.args, **call.kwargs)
        return Coefficients(value, *linear(lambda t: t * f1, x)[1:])

    return rule


def relu_slope(x: Tensor, *_: Any) -> Tensor:
    return (x > 0).to(x.dtype)


def leaky_relu_slope(x: Tensor, negative_slope: float = 0.01, *_: Any) -> Tensor:
    return torch.where(x > 0, 1.0, negative_slope).to(x.dtype)


def hardtanh_slope(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, *_: Any) -> Tensor:
    return ((x > min_val) & (x < max_val)).to(x.dtype)


def relu6_slope(x: Tensor, *_: Any) -> Tensor:
    return hardtanh_slope(x, 0.0, 6.0)


def threshold_slope(x: Tensor, threshold: float, *_: Any, **__: Any) -> Tensor:
    return (x > threshold).to(x.dtype)


def shrink_slope(x: Tensor, lambd: float = 0.5, *_: Any) -> Tensor:
    return (x.abs() > lambd).to(x.dtype)


def abs_slope(x: Tensor) -> Tensor:
    return x.sign()


def clamp_rule(call: Call) -> Any:
    low, high = call.argument(1, "min"), call.argument(2, "max")
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return NotImplemented
    x = call.of(call.argument(0, "input"))
    inside = torch.ones_like(x.value, dtype=torch.bool)
    if low is not None:
        inside &= x.value >= low
    if high is not None:
        inside &= x.value <= high
    return Coefficients(call.function(*call.args, **call.kwargs), *linear(lambda t: t * inside, x)[1:])


POOLING = {
    (F.max_pool1d, F.max_pool1d_with_indices): 1,
    (F.max_pool2d, F.max_pool2d_with_indices): 2,
    (F.max_pool3d, F.max_pool3d_with_indices): 3,
    (F.adaptive_max_pool1d, F.adaptive_max_pool1d_with_indices): 1,
    (F.adaptive_max_pool2d, F.adaptive_max_pool2d_with_indices): 2,
    (F.adaptive_max_pool3d, F.adaptive_max_pool3d_with_indices): 3,
}
