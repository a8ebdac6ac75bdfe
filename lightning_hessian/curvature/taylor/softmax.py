"""Softmax, its logarithm, and attention."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_hessian.curvature.taylor.coefficients import (
    Call,
    Coefficients,
    RuleFunction,
    add,
    linear,
    nonzero,
    sum_of_products,
    total,
)
from lightning_hessian.curvature.taylor.products import matmul


def softmax(x: Coefficients, dim: int) -> Coefficients:
    """p1 = p c and p2 = p (s - E[s]), with c = x1 - E[x1], s = x2 + sum c^2, and E the mean under p."""
    if not torch.compiler.is_compiling() and not x.is_constant:
        p, p2, *p1 = _Softmax.apply(dim, x.value, x.second, *x.first)
        return Coefficients(p, tuple(p1), p2)
    p = torch.softmax(x.value, dim)
    centered = [None if x1 is None else x1 - (p * x1).sum(dim, keepdim=True) for x1 in x.first]
    first = tuple(None if c is None else p * c for c in centered)
    s = add(x.second, *(None if c is None else c * c for c in centered))
    return Coefficients(p, first, None if s is None else p * (s - (p * s).sum(dim, keepdim=True)))


class _Softmax(RuleFunction):
    """Saves p, c and d = s - E[s]."""

    @staticmethod
    def forward(ctx: Any, dim: int, x0: Tensor, x2: Tensor | None, *x1: Tensor | None) -> Any:
        p = torch.softmax(x0, dim)
        c1 = [None if x is None else x - (p * x).sum(dim, keepdim=True) for x in x1]
        s = sum_of_products(*((c, c) for c in c1), start=None if x2 is None else x2.clone())
        assert s is not None
        d = s.sub_((p * s).sum(dim, keepdim=True))
        ctx.dim, ctx.has_second = dim, x2 is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(p, d, *c1)
        return p, p * d, *(None if c is None else p * c for c in c1)

    @staticmethod
    def backward(ctx: Any, g0: Tensor | None, g2: Tensor | None, *g1: Tensor | None) -> Any:
        g0, g2, *g1 = map(nonzero, (g0, g2, *g1))  # type: ignore[assignment]
        p, d, *c1 = ctx.saved_tensors

        def centered(g: Tensor) -> tuple[Tensor, Tensor]:
            """A gradient by what has its mean under p taken off -> that before, and its sum."""
            total = g.sum(ctx.dim, keepdim=True)
            return g.addcmul_(p, total, value=-1), total

        # By p, up to a constant in each row, which p's own gradient does not see.
        dp = sum_of_products((g2, d), *zip(g1, c1, strict=True), start=None if g0 is None else g0.clone())
        dx2 = None
        if g2 is not None:
            dx2, total = centered(g2 * p)
            dp = sum_of_products((d, -total), start=dp)
        dx1: list[Tensor | None] = []
        for g, c in zip(g1, c1, strict=True):
            twice = None if dx2 is None or c is None else 2 * dx2
            dc = None if c is None else sum_of_products((g, p), (twice, c))
            if dc is not None:
                dc, total = centered(dc)
                dp = sum_of_products((c, -total), start=dp)
            dx1.append(dc)
        dx0 = None
        if dp is not None:
            dx0 = dp.mul_(p)
            dx0.addcmul_(p, dx0.sum(ctx.dim, keepdim=True), value=-1)
        return None, dx0, dx2 if ctx.has_second else None, *dx1


def log_softmax(x: Coefficients, dim: int) -> Coefficients:
    """y1 = c and y2 = x2 - E[x2 + sum c^2], with c = x1 - E[x1], and E the mean under softmax(x)."""
    y = torch.log_softmax(x.value, dim)
    p = y.exp()
    first = tuple(None if x1 is None else x1 - (p * x1).sum(dim, keepdim=True) for x1 in x.first)
    s = add(x.second, *(None if c is None else c * c for c in first))
    if s is None:
        return Coefficients(y, first, None)
    mean = (p * s).sum(dim, keepdim=True)
    second = -mean.expand_as(y) if x.second is None else x.second - mean
    return Coefficients(y, first, second)


def softmax_rule(call: Call) -> Coefficients:
    return softmax(_cast(call), _dimension(call))


def log_softmax_rule(call: Call) -> Coefficients:
    return log_softmax(_cast(call), _dimension(call))


def _dimension(call: Call) -> int:
    dim = call.argument(1, "dim")
    if dim is None:
        dim = 0 if call.args[0].dim() in (0, 1, 3) else 1  # as torch.nn.functional chooses
    return int(dim)


def _cast(call: Call) -> Coefficients:
    x = call.of(call.argument(0, "input"))
    dtype = call.kwargs.get("dtype") or next((a for a in call.args[2:] if isinstance(a, torch.dtype)), None)
    return x if dtype is None else linear(lambda t: t.to(dtype), x)


def attention_rule(call: Call) -> Coefficients:
    """softmax(scale q k' + mask) v, with dropout on the weights; keys and values are repeated for grouped queries."""
    q, k, v = (call.of(call.argument(i, name)) for i, name in enumerate(("query", "key", "value")))
    mask, dropout = call.argument(3, "attn_mask"), call.argument(4, "dropout_p", 0.0)
    is_causal = call.argument(5, "is_causal", False)
    scale, grouped = call.kwargs.get("scale"), call.kwargs.get("enable_gqa", False)
    if grouped:
        k, v = (linear(lambda t: t.repeat_interleave(q.value.size(-3) // t.size(-3), -3), x) for x in (k, v))
    factor = 1 / math.sqrt(q.value.size(-1)) if scale is None else scale
    scores = matmul(linear(lambda t: t * factor, q), linear(lambda t: t.transpose(-2, -1), k))
    if is_causal:
        rows, columns = scores.value.shape[-2:]
        visible = torch.ones(rows, columns, dtype=torch.bool, device=scores.value.device).tril()
        scores = _masked(scores, visible)
    empty = None
    if mask is not None:
        scores = _masked(scores, mask) if mask.dtype == torch.bool else total(scores, call.of(mask))
        # A row that sees nothing gives zeros, not NaN.
        empty = scores.value.isneginf().all(-1, keepdim=True)
        scores = Coefficients(scores.value.masked_fill(empty, 0), *scores[1:])
    weights = softmax(scores, -1)
    if empty is not None:
        weights = linear(lambda t: t.masked_fill(empty, 0), weights)
    if dropout:
        kept = F.dropout(torch.ones_like(weights.value), dropout)
        weights = linear(lambda t: t * kept, weights)
    return matmul(weights, v)


def _masked(scores: Coefficients, visible: Tensor) -> Coefficients:
    hidden = ~visible
    value = scores.value.masked_fill(hidden, -math.inf)
    return Coefficients(value, *linear(lambda t: t.masked_fill(hidden, 0), scores)[1:])


def dropout_rule(call: Call) -> Coefficients:
    """The same mask on every coefficient."""
    x = call.of(call.argument(0, "input"))
    rest, kwargs = call.args[1:], {k: v for k, v in call.kwargs.items() if k != "input"}
    mask: Tensor = call.function(torch.ones_like(x.value), *rest, **kwargs)
    return linear(lambda t: t * mask, x)
