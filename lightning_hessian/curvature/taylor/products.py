"""Matrix products and linear layers. Their sums of products accumulate in place, and they save their inputs only."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_hessian.curvature.taylor.coefficients import Coefficients, RuleFunction, bilinear, linear, nonzero, total


def matmul(a: Coefficients, b: Coefficients) -> Coefficients:
    """a @ b."""
    a, b = _in_autocast_dtype(a), _in_autocast_dtype(b)
    shape, other = a.value.shape, b.value.shape
    is_stack = len(shape) >= 3 and shape[:-2] == other[:-2]
    if a.value.layout != torch.strided or b.value.layout != torch.strided:
        return bilinear(torch.matmul, a, b)
    if torch.compiler.is_compiling() or a.value.is_complex() or b.value.is_complex() or a.value.dtype != b.value.dtype:
        return bilinear(torch.matmul, a, b)
    if is_stack:
        count = math.prod(shape[:-2])
        a, b = (linear(lambda t: t.reshape(count, *t.shape[-2:]), x) for x in (a, b))
        return linear(lambda t: t.view(*shape[:-1], other[-1]), _product(a, b, None))
    if len(shape) >= 2 and len(other) == 2:
        rows = linear(_rows, a)
        return linear(lambda t: t.view(*shape[:-1], other[-1]), _product(rows, b, None))
    return bilinear(torch.matmul, a, b)


def linear_layer(x: Coefficients, weight: Coefficients, bias: Coefficients | None) -> Coefficients:
    """x W' + b."""
    transposed = linear(lambda t: t.t(), weight)
    fits = (
        x.value.layout == torch.strided
        and x.value.dim() >= 2
        and weight.value.dim() == 2
        and x.value.dtype == weight.value.dtype
    )
    if bias is None or bias.second is not None or not fits or x.value.is_complex() or torch.compiler.is_compiling():
        product = matmul(x, transposed)
        dtype = product.value.dtype  # as autocast has it
        return product if bias is None else total(product, linear(lambda t: t.to(dtype), bias))
    shape = x.value.shape
    rows = linear(_rows, x)
    rows, transposed, bias = map(_in_autocast_dtype, (rows, transposed, bias))
    y = _product(rows, transposed, bias)
    return linear(lambda t: t.view(*shape[:-1], t.shape[-1]), y)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 is ambiguous where a dimension is 0


def _in_autocast_dtype(x: Coefficients) -> Coefficients:
    """In the dtype in which autocast computes products."""
    kind = x.value.device.type
    if not torch.is_autocast_enabled(kind) or x.value.dtype == torch.float64:
        return x
    dtype = torch.get_autocast_dtype(kind)
    return linear(lambda t: t.to(dtype), x)


def _product(a: Coefficients, b: Coefficients, c: Coefficients | None) -> Coefficients:
    """a @ b + c, of matrices or of equally many; c is a row that is added to all rows."""
    none = (None,) * len(a.first)
    c0, c1 = (None, none) if c is None else c[:2]
    y0, y2, *y1 = _Product.apply(a.value, a.second, b.value, b.second, c0, *a.first, *b.first, *c1)
    return Coefficients(y0, tuple(y1), y2)


class _Product(RuleFunction):
    """Leibniz' rule, y1 = a1 b0 + a0 b1 and y2 = a2 b0 + 2 sum a1 b1 + a0 b2."""

    @staticmethod
    def forward(
        ctx: Any,
        a0: Tensor,
        a2: Tensor | None,
        b0: Tensor,
        b2: Tensor | None,
        c0: Tensor | None,
        *moving: Tensor | None,
    ) -> Any:
        a1, b1, c1 = thirds(moving)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a0, a2, b0, b2, *a1, *b1)
        y0 = _sum_of_products((1, a0, b0), start=c0)
        y1 = [
            _expanded(_sum_of_products((1, a, b0), (1, a0, b), start=c), y0) for a, b, c in zip(a1, b1, c1, strict=True)
        ]
        y2 = _sum_of_products((1, a2, b0), (1, a0, b2), *((2, a, b) for a, b in zip(a1, b1, strict=True)))
        return y0, y2, *y1

    @staticmethod
    def backward(ctx: Any, g0: Tensor | None, g2: Tensor | None, *g1: Tensor | None) -> Any:
        g0, g2, *g1 = map(nonzero, (g0, g2, *g1))  # type: ignore[assignment]
        a0, a2, b0, b2, *moving = ctx.saved_tensors
        n = len(g1)
        a1, b1 = moving[:n], moving[n:]
        needed = ctx.needs_input_grad

        def by_a(*terms: Any) -> Tensor | None:
            return _sum_of_products(*((factor, g, None if b is None else b.mT) for factor, g, b in terms))

        def by_b(*terms: Any) -> Tensor | None:
            return _sum_of_products(*((factor, None if a is None else a.mT, g) for factor, a, g in terms))

        da0 = by_a((1, g0, b0), (1, g2, b2), *((1, g, b) for g, b in zip(g1, b1, strict=True))) if needed[0] else None
        da2 = by_a((1, g2, b0)) if needed[1] else None
        db0 = by_b((1, a0, g0), (1, a2, g2), *((1, a, g) for a, g in zip(a1, g1, strict=True))) if needed[2] else None
        db2 = by_b((1, a0, g2)) if needed[3] else None
        dc0 = g0.sum(0) if needed[4] and g0 is not None else None
        da1 = [by_a((1, g1[p], b0), (2, g2, b1[p])) if needed[5 + p] else None for p in range(n)]
        db1 = [by_b((1, a0, g1[p]), (2, a1[p], g2)) if needed[5 + n + p] else None for p in range(n)]
        dc1 = [g.sum(0) if needed[5 + 2 * n + p] and g is not None else None for p, g in enumerate(g1)]
        return da0, da2, db0, db2, dc0, *da1, *db1, *dc1


def _sum_of_products(*terms: tuple[int, Tensor | None, Tensor | None], start: Tensor | None = None) -> Any:
    """start + sum of factor * a @ b; None is zero."""
    found = None
    for factor, a, b in terms:
        if a is None or b is None:
            continue
        if found is None:
            found = a @ b if start is None else torch.addmm(start, a, b)
            found = found if factor == 1 else found.mul_(factor)
        elif found.dim() == 2:
            found.addmm_(a, b, alpha=factor)
        else:
            found.baddbmm_(a, b, alpha=factor)
    return start if found is None else found


def _expanded(x: Tensor | None, like: Tensor) -> Tensor | None:
    return x if x is None or x.shape == like.shape else x.expand(like.shape)


def thirds(parts: Any) -> tuple[Any, Any, Any]:
    """Three sequences of equal length, in one."""
    n = len(parts) // 3
    return parts[:n], parts[n : 2 * n], parts[2 * n :]
