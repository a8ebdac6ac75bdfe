"""Normalization layers: (x - mean) / sqrt(var + eps), and what is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hessian.curvature import norms
from lightning_hessian.curvature.taylor.coefficients import Call, Coefficients, add, bilinear, linear, total


def normalize(x: Coefficients, dims: Sequence[int], eps: float, centers: bool = True) -> Coefficients:
    """c / sqrt(mean(c^2) + eps) over the dimensions, with c = x - mean(x), or c = x for RMS norm."""

    def mean(t: Tensor) -> Tensor:
        return t.mean(list(dims), keepdim=True)

    c = linear(lambda t: t - mean(t), x) if centers else x
    r0 = (mean(c.value * c.value) + eps).rsqrt()
    # r = u^(-1/2), u = mean(c^2) + eps: u1 = 2 mean(c0 c1), u2 = 2 mean(c0 c2 + sum c1^2).
    cube = r0 * r0 * r0
    u1 = [None if c1 is None else 2 * mean(c.value * c1) for c1 in c.first]
    r1 = tuple(None if u is None else -0.5 * cube * u for u in u1)
    inner = add(None if c.second is None else c.value * c.second, *(None if c1 is None else c1 * c1 for c1 in c.first))
    curved = add(*(None if u is None else 0.75 * r0 * r0 * u * u for u in u1))
    r2 = add(None if inner is None else -cube * mean(inner), None if curved is None else cube * curved)
    return bilinear(torch.mul, c, Coefficients(r0, r1, r2))


def affine(y: Coefficients, weight: Coefficients | None, bias: Coefficients | None) -> Coefficients:
    """y * weight + bias."""
    scaled = y if weight is None else bilinear(torch.mul, y, weight)
    return scaled if bias is None else total(scaled, bias)


def layer_norm(call: Call, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    dims = range(-len(shape), 0)
    y = affine(normalize(_wide(call.of(x)), dims, eps), _or_none(call, weight), _or_none(call, bias))
    dtype = norms._output_dtype(x)
    return linear(lambda t: t.to(dtype), y)


def rms_norm(call: Call, x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    wide = _wide(call.of(x))
    y = normalize(wide, range(-len(shape), 0), torch.finfo(wide.value.dtype).eps if eps is None else eps, centers=False)
    return linear(lambda t: t.to(x.dtype), affine(y, _or_none(call, weight), None))


def group_norm(call: Call, x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    def grouped(t: Tensor) -> Tensor:
        return t.reshape(len(t), groups, -1)

    y = linear(lambda t: t.view(x.shape), normalize(linear(grouped, _wide(call.of(x))), [-1], eps))
    y = affine(y, _per_channel(call, weight, x), _per_channel(call, bias, x))
    return linear(lambda t: t.to(x.dtype), y)


def batch_norm(
    call: Call,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    wide = _wide(call.of(x))
    if not training:
        assert running_mean is not None
        assert running_var is not None
        mean, scale = norms._per_channel(running_mean, x), norms._per_channel((running_var + eps).rsqrt(), x)
        shifted = Coefficients((wide.value - mean) * scale, *linear(lambda t: t * scale, wide)[1:])
        y = affine(shifted, _per_channel(call, weight, x), _per_channel(call, bias, x))
        return linear(lambda t: t.to(x.dtype), y)
    samples = x.numel() // x.size(1)
    if samples == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
    dims = [0, *range(2, x.dim())]
    with torch.no_grad():
        variance, mean = torch.var_mean(wide.value, dims, correction=0)
        norms._update_running(running_mean, mean, momentum)
        norms._update_running(running_var, variance * (samples / (samples - 1)), momentum)
    y = affine(normalize(wide, dims, eps), _per_channel(call, weight, x), _per_channel(call, bias, x))
    return linear(lambda t: t.to(x.dtype), y)


def norm_rule(norm: Any, names: Sequence[str]) -> Any:
    """A rule for a norm, whose arguments have these names and this order."""

    def rule(call: Call) -> Any:
        given = dict(zip(names, call.args, strict=False)) | call.kwargs
        known = {name: value for name, value in given.items() if name not in ("cudnn_enabled", "cudnn_enable")}
        x = known.pop("input")
        shape = known.pop("normalized_shape", None)
        groups = known.pop("num_groups", None)
        first = [x, *([shape] if shape is not None else []), *([groups] if groups is not None else [])]
        return norm(call, *first, **known)

    return rule


def _wide(x: Coefficients) -> Coefficients:
    """In float32 or better, as the fused kernels compute statistics."""
    is_half = x.value.dtype in (torch.float16, torch.bfloat16)
    return linear(lambda t: t.float(), x) if is_half else x


def _or_none(call: Call, parameter: Any) -> Coefficients | None:
    return None if parameter is None else call.of(parameter)


def _per_channel(call: Call, parameter: Any, x: Tensor) -> Coefficients | None:
    return None if parameter is None else linear(lambda t: norms._per_channel(t, x), call.of(parameter))
