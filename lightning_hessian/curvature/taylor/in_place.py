"""Writes in place: the coefficients move with the tensor that is written, and stale ones are refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_hessian.curvature.errors import HigherOrderError
from lightning_hessian.curvature.taylor.coefficients import (
    Call,
    Coefficients,
    attach,
    counts_writes,
    detach,
    has_coefficients,
    is_current,
    renew,
)
from lightning_hessian.curvature.taylor.compiler import check_writes, note_constant, note_write, stale

_OPERATORS = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__", "__imatmul__"}
_NO_WRITE = {"requires_grad_", "retain_grad_", "dropout_"}
_RESHAPES = {
    "t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "as_strided_", "resize_", "resize_as_",
    "set_",
}  # fmt: skip
_RANDOM_FILLS = {
    "normal_", "uniform_", "bernoulli_", "random_", "exponential_", "geometric_", "cauchy_", "log_normal_",
}  # fmt: skip
_CONSTANT_MARK = "_taylor_constant"


class Writes:
    """Which storages were written in place with something that has coefficients.

    Tensors that share such a storage (views from before the write) have stale coefficients, or none. Their use is
    refused. PyTorch's version counter, which all views share, tells the stale ones that have coefficients.
    """

    def __init__(self) -> None:
        self._written: dict[int, Any] = {}
        self._view: tuple[Tensor, int, bool] | None = None
        """The view that was written last, the version of its memory before, and whether that was written already."""

    def check(self, values: Any, layer: Callable[[], str]) -> None:
        """Refuse tensors among the arguments that a write in place has passed by.

        Raises:
            HigherOrderError: there is one.
        """
        if torch.compiler.is_compiling():
            check_writes(values)
            return
        if not self._written or self._is_stored_back(*values[0]):
            return
        for x in _tensors(values):
            if counts_writes(x) or getattr(x, _CONSTANT_MARK, None) == _version(x):
                continue
            if x.layout == torch.strided and x.untyped_storage()._cdata in self._written:
                raise stale(x, layer)

    def _is_stored_back(self, *args: Any) -> bool:
        """Whether x[index] = view stores back the view that was written last: ``x[index] += y`` does so.

        The coefficients of x are then known, as they were before that write: it was to entries that are stored now.
        """
        if self._view is None or len(args) != 3 or args[2] is not self._view[0]:
            return False
        x, index, view = args
        _, before, was_written = self._view
        if not isinstance(x, Tensor) or view._base is not (x if x._base is None else x._base):
            return False
        if _version(view) != before + 1 or not is_current(x, before):
            return False
        if was_written and not has_coefficients(x):
            return False
        with torch._C.DisableTorchFunction(), torch.no_grad():
            place = x[index]
        return (place.data_ptr(), place.shape, place.stride()) == (view.data_ptr(), view.shape, view.stride())

    def mark_constant(self, result: Any) -> None:
        """Results without a gradient (detached, or under ``torch.no_grad()``) are constants, whatever their memory."""
        for x in _tensors(result):
            if not isinstance(x, torch.nn.Parameter):
                if torch.compiler.is_compiling():
                    note_constant(x)
                else:
                    setattr(x, _CONSTANT_MARK, _version(x))

    def write(self, call: Call, compute: Callable[[Call], Any]) -> Any:
        """Run a call that writes in place: compute it out of place, and copy values and coefficients.

        Args:
            call: the call.
            compute: gives the coefficients of a call out of place.

        Raises:
            HigherOrderError: it writes into ``out``, or there is no such function out of place.
        """
        target = call.args[0]
        if call.kwargs.get("out") is not None or not isinstance(target, Tensor):
            raise _unknown(call)
        name, none = getattr(call.function, "__name__", ""), (None,) * call.directions
        if name in _RESHAPES:
            raise _unknown(call)
        if name == "detach_":
            target.detach_()
            detach(target)
            self.mark_constant(target)
            return target
        version = -1 if torch.compiler.is_compiling() else _version(target)
        if name == "__setitem__" and version != -1 and self._is_stored_back(*call.args):
            renew(target)
        if name in _RANDOM_FILLS:
            result = Coefficients(call.function(target.detach().clone(), *call.args[1:], **call.kwargs), none, None)
        elif name in ("zero_", "fill_") and not has_coefficients((*call.args[1:], *call.kwargs.values())):
            filled = call.function(target.clone(), *call.args[1:], **call.kwargs)
            result = Coefficients(filled, none, None)
        elif name == "__setitem__":
            result = _with_item(call)
        else:
            # A copy, because the rule may save its argument, which is about to change.
            source = call.of(target)
            copied = target.clone()
            attach(Coefficients(copied, source.first, source.second))
            result = compute(_out_of_place(call, copied))
        if not isinstance(result, Coefficients):
            result = call.of(result)
        if result.value.shape != target.shape:
            raise _unknown(call)
        target.copy_(result.value)
        if result.is_constant:
            detach(target)
            self.mark_constant(target)
        attach(Coefficients(target, *(_like(x, target) for x in (result.first, result.second))))
        if torch.compiler.is_compiling():
            note_write(target)
        else:
            storage = target.untyped_storage()
            self._view = None if target._base is None else (target, version, storage._cdata in self._written)
            self._written[storage._cdata] = storage
        return None if name == "__setitem__" else target


def is_in_place(call: Call) -> bool:
    """Whether a call writes into its first argument, or into ``out``."""
    name = getattr(call.function, "__name__", "")
    if call.kwargs.get("out") is not None or name == "__setitem__" or name in _OPERATORS:
        return True
    if name.endswith("_") and not name.endswith("__") and name not in _NO_WRITE:
        return True
    position = _inplace_position(call.function)
    return position is not None and bool(call.argument(position, "inplace", False))


@torch.compiler.assume_constant_result
def _inplace_position(function: Any) -> int | None:
    """Where a function of torch.nn.functional takes ``inplace``."""
    return _position_in_signature(function)  # the compiler would look into a cached function itself


@cache
def _position_in_signature(function: Any) -> int | None:
    if getattr(function, "__module__", "") != F.__name__:
        return None
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def _out_of_place(call: Call, target: Tensor) -> Call:
    name = getattr(call.function, "__name__", "")
    args, kwargs = [target, *call.args[1:]], dict(call.kwargs)
    position = _inplace_position(call.function)
    if position is not None:
        kwargs.pop("inplace", None)
        return call.other(call.function, args[:position], kwargs)
    plain = f"__{name[3:]}" if name in _OPERATORS else name.rstrip("_")
    for place in (Tensor, torch, F):
        if hasattr(place, plain):
            return call.other(getattr(place, plain), args, kwargs)
    if name == "copy_":
        return call.other(Tensor.expand_as, [args[1], target], {})
    raise _unknown(call)


def _with_item(call: Call) -> Coefficients:
    """x with x[index] = value."""
    target, index, value = call.args
    x, source = call.of(target), call.of(value)

    def written(into: Tensor | None, part: Any) -> Tensor | None:
        if into is None and (part is None or isinstance(part, int)):
            return None
        y = torch.zeros_like(x.value) if into is None else into.clone()
        y[index] = part
        return y

    constant = not isinstance(value, Tensor) or source.is_constant
    firsts = zip(x.first, (0,) * call.directions if constant else source.first, strict=True)
    first = tuple(written(into, 0 if part is None else part) for into, part in firsts)
    second = written(x.second, 0 if constant or source.second is None else source.second)
    value0 = x.value.clone()
    value0[index] = value
    return Coefficients(value0, first, second)


def _like(x: Any, target: Tensor) -> Any:
    if isinstance(x, tuple):
        return tuple(_like(one, target) for one in x)
    return None if x is None else x.expand(target.shape).to(target.dtype)


def _unknown(call: Call) -> HigherOrderError:
    name = getattr(call.function, "__name__", repr(call.function))
    where = "into `out`" if call.kwargs.get("out") is not None else "in place"
    return HigherOrderError(
        f"The operation {name} (called in {call.layer()}) writes {where}, and Taylor coefficients cannot follow it. "
        "Write out of place, or use method='autograd'."
    )


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
