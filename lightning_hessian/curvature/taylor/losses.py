"""Loss functions. Cross entropy is linear in the logarithms of the probabilities."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_hessian.curvature.taylor.coefficients import Call, Coefficients, attach, bilinear, linear, total
from lightning_hessian.curvature.taylor.elementwise import bounded_log, bounded_log_of_rest, elementwise
from lightning_hessian.curvature.taylor.softmax import log_softmax

CROSS_ENTROPY = (
    "input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing",
)  # fmt: skip


def cross_entropy_rule(call: Call) -> Any:
    given = dict(zip(CROSS_ENTROPY, call.args, strict=False)) | call.kwargs
    x, target, weight = call.of(given["input"]), given["target"], given.get("weight")
    smoothing, ignored = given.get("label_smoothing", 0.0), given.get("ignore_index", -100)
    reduction = given.get("reduction", "mean")
    if given.get("size_average") is not None or given.get("reduce") is not None:
        return NotImplemented
    classes = 1 if x.value.dim() > 1 else 0
    wide = x.value.dtype in (torch.float16, torch.bfloat16)
    log_p = log_softmax(linear(lambda t: t.float(), x) if wide else x, classes)
    if target.is_floating_point():
        return _soft(call, log_p, target, weight, classes, reduction, smoothing)

    def negative_log_likelihood(t: Tensor) -> Tensor:
        return F.nll_loss(t, target, weight, ignore_index=ignored, reduction=reduction)

    hard = linear(negative_log_likelihood, log_p)
    if not smoothing:
        return hard
    shape = [1] * x.value.dim()
    shape[classes] = -1
    kept = target != ignored

    def smooth(t: Tensor) -> Tensor:
        weighted = t if weight is None else t * weight.view(shape)
        each = -(weighted.sum(classes) * kept)
        if reduction == "none":
            return each
        if reduction == "sum":
            return each.sum()
        return each.sum() / (kept.sum() if weight is None else (weight[target.where(kept, 0)] * kept).sum())

    share = smoothing / x.value.size(classes)
    return total(linear(lambda t: (1 - smoothing) * t, hard), linear(lambda t: share * smooth(t), log_p))


def _soft(
    call: Call, log_p: Coefficients, target: Tensor, weight: Any, classes: int, reduction: str, smoothing: float
) -> Coefficients:
    """- sum_c weight_c target_c log p_c; targets and weights may have coefficients of their own."""
    shape = [1] * log_p.value.dim()
    shape[classes] = -1
    q = call.of(target)
    if smoothing:
        q = linear(lambda t: t * (1 - smoothing), q)
        q = q._replace(value=q.value + smoothing / log_p.value.size(classes))
    if weight is not None:
        q = bilinear(torch.mul, q, linear(lambda t: t.view(shape), call.of(weight)))

    def loss(t: Tensor) -> Tensor:
        each = -t.sum(classes)
        if reduction == "none":
            return each
        return each.sum() / (each.numel() if reduction == "mean" else 1)

    return linear(loss, bilinear(torch.mul, q, log_p))


def mse_loss(call: Call) -> Any:
    """mean((x - y)^2), or its weighted sum."""
    names = ("input", "target", "size_average", "reduce", "reduction", "weight")
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    if given.get("size_average") is not None or given.get("reduce") is not None:
        return NotImplemented
    reduction, weight = given.get("reduction", "mean"), given.get("weight")
    with call.inside():
        squares = (given["input"] - given["target"]).square()
        squares = squares if weight is None else squares * weight
        if reduction == "none":
            return call.of(squares)
        reduced = squares.sum()
        if reduction == "mean":
            reduced = reduced / (squares.numel() if weight is None else weight.expand_as(squares).sum())
        return call.of(reduced)


def binary_cross_entropy(call: Call) -> Any:
    """- t log p - (1 - t) log(1 - p), whose derivatives are bounded as in PyTorch's backward pass."""
    names = ("input", "target", "weight", "size_average", "reduce", "reduction")
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    reduction = reduction_of(given.get("size_average"), given.get("reduce"), given.get("reduction", "mean"))
    target, weight = given["target"], given.get("weight")
    p = call.of(given["input"])
    log_p, log_rest = (attach(elementwise(log, p)) for log in (bounded_log, bounded_log_of_rest))
    with call.inside():
        each = -(target * log_p + (1 - target) * log_rest)
        return reduced(each if weight is None else each * weight, reduction)


def reduction_of(size_average: Any, reduce: Any, reduction: str) -> str:
    """The reduction, which old arguments overrule."""
    if size_average is None and reduce is None:
        return reduction
    return torch.nn._reduction.legacy_get_string(size_average, reduce, emit_warning=False)


def reduced(each: Tensor, reduction: str) -> Tensor:
    """A loss of each sample, reduced."""
    return each if reduction == "none" else each.sum() if reduction == "sum" else each.mean()
