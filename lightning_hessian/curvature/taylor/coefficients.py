"""Taylor coefficients of a tensor along theta + t v_p, for several directions v_p at once."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_hessian.curvature.taylor.compiler import note_coefficients, stale

_ATTRIBUTE = "_taylor_coefficients"


class Coefficients(NamedTuple):
    """x(t) = x0 + t x1 + t^2/2 x2 + O(t^3) along theta + t v_p. None stands for zero.

    Args:
        value: x0, the tensor that the user's code sees.
        first: x1 for each direction v_p.
        second: x2, summed over the directions. It enters the loss linearly, so the sum is all that is needed.
    """

    value: Tensor
    first: tuple[Tensor | None, ...]
    second: Tensor | None

    @property
    def is_constant(self) -> bool:
        """Whether all coefficients are zero."""
        return self.second is None and all(x is None for x in self.first)


def attach(x: Coefficients) -> Tensor:
    """The value, with its coefficients as an attribute."""
    if not x.is_constant:
        setattr(x.value, _ATTRIBUTE, (x.first, x.second, _version(x.value)))
        if torch.compiler.is_compiling():
            note_coefficients(x.value)
    return x.value


def _version(tensor: Tensor) -> int:
    """Counts the writes in place to a tensor and all its views; -1 where that is not known."""
    return -1 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def current(tensors: Iterable[Any]) -> list[Tensor]:
    """Those tensors, and those that they are views of, that have coefficients which no write has passed by.

    Under ``torch.no_grad()`` they keep them through a write, as autograd keeps its graph: :func:`renew`.
    """
    if torch.compiler.is_compiling():  # which does not count writes
        return [x for x in tensors if has_coefficients(x) and isinstance(x, Tensor)]
    wholes = [whole for x in tensors if isinstance(x, Tensor) for whole in (x, x._base) if whole is not None]
    return [x for x in wholes if has_coefficients(x) and is_current(x, _version(x))]


def is_current(tensor: Tensor, version: int) -> bool:
    """Whether the coefficients, if any, are those of this version of the tensor."""
    found = getattr(tensor, _ATTRIBUTE, None)
    return found is None or found[2] in (-1, version)


def renew(tensor: Tensor) -> None:
    """Take the coefficients for those of the tensor as it is."""
    found = getattr(tensor, _ATTRIBUTE, None)
    if found is not None:
        setattr(tensor, _ATTRIBUTE, (*found[:2], _version(tensor)))
        if torch.compiler.is_compiling():
            note_coefficients(tensor)


def detach(tensor: Tensor) -> None:
    """Take the coefficients off a tensor."""
    if torch.compiler.is_compiling():  # which can set an attribute, not delete it
        setattr(tensor, _ATTRIBUTE, None)
    elif hasattr(tensor, _ATTRIBUTE):
        delattr(tensor, _ATTRIBUTE)


def has_coefficients(value: Any) -> bool:
    """Whether a value is a tensor with coefficients, or a list or tuple with such a tensor in it."""
    if isinstance(value, Tensor):
        return getattr(value, _ATTRIBUTE, None) is not None
    return isinstance(value, list | tuple) and any(map(has_coefficients, value))


def counts_writes(tensor: Tensor) -> bool:
    """Whether a tensor has coefficients that know when they are stale. In a compiled graph they do not."""
    found = getattr(tensor, _ATTRIBUTE, None)
    return found is not None and found[2] != -1


def coefficients_of(value: Any, directions: int, layer: Callable[[], str] | None = None) -> Coefficients:
    """The coefficients of a tensor; zeros for a constant one.

    Raises:
        HigherOrderError: the tensor was written in place through another view of its memory.
    """
    found = getattr(value, _ATTRIBUTE, None)
    if found is None:
        return Coefficients(value, (None,) * directions, None)
    first, second, version = found
    # The compiler must not see the count, which it would expect to be the same in the next step.
    if (now := _version(value)) != -1 and version not in (-1, now):
        raise stale(value, layer)
    return Coefficients(value, first, second)


def is_real_or_complex(x: Tensor) -> bool:
    """Whether a tensor has a dtype with derivatives."""
    return x.is_floating_point() or x.is_complex()


def add(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms; None is zero."""
    present = [term for term in terms if term is not None]
    return functools.reduce(operator.add, present) if present else None


def nonzero(x: Tensor | None) -> Tensor | None:
    """None for a tensor that PyTorch knows to be zero: it has no memory to write to."""
    return None if x is None or x._is_zerotensor() else x


def sum_of_products(*products: tuple[Tensor | None, Tensor | None], start: Tensor | None = None) -> Tensor | None:
    """The sum of a * b, on top of ``start``, which is overwritten; None is zero."""
    for a, b in products:
        if a is not None and b is not None:
            start = a * b if start is None else start.addcmul_(a, b)
    return start


def scaled(factor: float, x: Tensor | None) -> Tensor | None:
    """factor * x; None is zero."""
    return None if x is None else factor * x


def linear(f: Callable[[Tensor], Tensor], x: Coefficients) -> Coefficients:
    """The coefficients of f(x), f linear."""
    first = tuple(None if x1 is None else f(x1) for x1 in x.first)
    return Coefficients(f(x.value), first, None if x.second is None else f(x.second))


def bilinear(f: Callable[[Any, Any], Tensor], a: Coefficients, b: Coefficients) -> Coefficients:
    """The coefficients of f(a, b), linear in each: Leibniz' rule, (f(a, b))'' = f(a'', b) + 2 f(a', b') + f(a, b'')."""

    def product(p: Any, q: Any) -> Tensor | None:
        return None if p is None or q is None else f(p, q)

    first = tuple(add(product(a1, b.value), product(a.value, b1)) for a1, b1 in zip(a.first, b.first, strict=True))
    mixed = [scaled(2, product(a1, b1)) for a1, b1 in zip(a.first, b.first, strict=True)]
    second = add(product(a.second, b.value), *mixed, product(a.value, b.second))
    return Coefficients(f(a.value, b.value), first, second)


def total(*terms: Coefficients) -> Coefficients:
    """The coefficients of a sum of tensors that broadcast."""
    value = functools.reduce(operator.add, (term.value for term in terms))

    def expanded(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.shape == value.shape else x.expand(value.shape)

    first = tuple(expanded(add(*parts)) for parts in zip(*(term.first for term in terms), strict=True))
    return Coefficients(value, first, expanded(add(*(term.second for term in terms))))


def stacked(parts: Sequence[Tensor | None]) -> tuple[Tensor, Callable[[Tensor], list[Tensor | None]]]:
    """Tensors of one shape in rows, for one call of a function of rows; and how to take its result apart again."""
    present = [part for part in parts if part is not None]

    def apart(result: Tensor) -> list[Tensor | None]:
        # Not `tensor_split`, whose backward pass fills each piece up with zeros.
        size = len(result) // len(present)
        pieces = iter(result.split([size] * len(present)))
        return [None if part is None else next(pieces) for part in parts]

    return (present[0] if len(present) == 1 else torch.cat(present)), apart


class Call:
    """A call of a function with coefficients in its arguments.

    Args:
        function: the function.
        args: its arguments.
        kwargs: its keyword arguments.
        directions: how many directions there are.
        inside: makes a context manager in which operations carry coefficients along.
        layer: gives the name of the layer that calls.
    """

    def __init__(
        self,
        function: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        directions: int,
        inside: Callable[[], AbstractContextManager[Any]],
        layer: Callable[[], str],
    ) -> None:
        if not args and "input" in kwargs and "condition" not in kwargs:  # the first argument, but for torch.where
            args = (kwargs["input"],)
            kwargs = {name: value for name, value in kwargs.items() if name != "input"}
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.directions = directions
        self.inside = inside
        self.layer = layer

    def of(self, value: Any) -> Coefficients:
        """The coefficients of an argument."""
        return coefficients_of(value, self.directions, self.layer)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by its position or its name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def other(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
        """A call of another function."""
        return Call(function, args, kwargs, self.directions, self.inside, self.layer)


class RuleFunction(torch.autograd.Function):
    """A custom function that is part of a rule: its arguments are coefficients, and carry none themselves."""


Rule = Callable[[Call], Any]
"""A call -> what it returns, tensors as :class:`Coefficients`; or NotImplemented where the rule does not fit."""
