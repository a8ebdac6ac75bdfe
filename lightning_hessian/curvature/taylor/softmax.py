"""Softmax, its logarithm, and attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_hessian.curvature.taylor.coefficients import Call, Coefficients, add, bilinear, linear


def softmax(x: Coefficients, dim: int) -> Coefficients:
    """p1 = p c and p2 = p (s - E[s]), with c = x1 - E[x1], s = x2 + sum c^2, and E the mean under p."""
    p = torch.softmax(x.value, dim)
    centered = [None if x1 is None else x1 - (p * x1).sum(dim, keepdim=True) for x1 in x.first]
    first = tuple(None if c is None else p * c for c in centered)
    s = add(x.second, *(None if c is None else c * c for c in centered))
    return Coefficients(p, first, None if s is None else p * (s - (p * s).sum(dim, keepdim=True)))


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
    scores = bilinear(lambda a, b: a @ b.transpose(-2, -1), linear(lambda t: t * factor, q), k)
    if is_causal:
        rows, columns = scores.value.shape[-2:]
        mask = torch.ones(rows, columns, dtype=torch.bool, device=scores.value.device).tril()
    if mask is not None:
        m = call.of(mask)
        if mask.dtype == torch.bool:
            hidden = ~mask
            value = scores.value.masked_fill(hidden, -math.inf)
            scores = Coefficients(value, *linear(lambda t: t.masked_fill(hidden, 0), scores)[1:])
        else:
            first = tuple(add(a, b) for a, b in zip(scores.first, m.first, strict=True))
            scores = Coefficients(scores.value + mask, first, add(scores.second, m.second))
    weights = softmax(scores, -1)
    if mask is not None and mask.dtype == torch.bool and not bool(mask.any(-1).all()):
        empty = ~mask.any(-1, keepdim=True)  # a row that sees nothing gives zeros, not NaN
        weights = linear(lambda t: t.masked_fill(empty, 0), weights)
    if dropout:
        kept = F.dropout(torch.ones_like(weights.value), dropout)
        weights = linear(lambda t: t * kept, weights)
    return bilinear(torch.matmul, weights, v)


def dropout_rule(call: Call) -> Coefficients:
    """The same mask on every coefficient."""
    x = call.of(call.argument(0, "input"))
    rest, kwargs = call.args[1:], {k: v for k, v in call.kwargs.items() if k != "input"}
    mask: Tensor = call.function(torch.ones_like(x.value), *rest, **kwargs)
    return linear(lambda t: t * mask, x)
