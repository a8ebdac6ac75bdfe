"""Normalization layers: (x - mean) / sqrt(var + eps), and what is made of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hessian.curvature import norms
from lightning_hessian.curvature.taylor.coefficients import (
    Call,
    Coefficients,
    RuleFunction,
    bilinear,
    linear,
    nonzero,
    sum_of_products,
    total,
)
from lightning_hessian.curvature.taylor.products import thirds


def normalize(
    x: Coefficients,
    dims: Sequence[int],
    eps: float,
    weight: Coefficients | None = None,
    bias: Coefficients | None = None,
    centers: bool = True,
) -> tuple[Coefficients, Tensor, Tensor]:
    """y * weight + bias with y = c / sqrt(u) and u = mean(c^2) + eps over the dimensions.

    c is x - mean(x), or x itself for RMS norm.

    Returns:
        The coefficients, and the values of mean(x) and mean(c^2).
    """
    none = (None,) * len(x.first)
    w0, w1, w2 = (None, none, None) if weight is None else weight
    b0, b1, b2 = (None, none, None) if bias is None else bias
    only_bias = weight is None and bias is not None
    if w2 is not None or b2 is not None or only_bias or torch.compiler.is_compiling():
        normal = _Normal(list(dims), eps, centers, x.value, x.second, x.first)
        y0, y2, *y1 = normal.coefficients()
        y = affine(Coefficients(y0, tuple(y1), y2), weight, bias)
        return y, normal.m0.detach(), normal.v0.detach()
    z0, z2, mean, variance, *z1 = _Normalize.apply(
        list(dims), eps, centers, x.value, x.second, w0, b0, *x.first, *w1, *b1
    )
    return Coefficients(z0, tuple(z1), z2), mean, variance


class _Normal:
    """c and r = u^(-1/2) along the directions: r1 = -r0^3 u1 / 2 and r2 = 3 r0^5 sum u1^2 / 4 - r0^3 u2 / 2, with
    u1 = 2 mean(c0 c1) and u2 = 2 mean(c0 c2 + sum c1^2)."""

    def __init__(
        self,
        dims: list[int],
        eps: float,
        centers: bool,
        x0: Tensor,
        x2: Tensor | None,
        x1: Sequence[Tensor | None],
        moments: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.dims, self.centers = dims, centers
        self.m0 = self.mean(x0) if moments is None else moments[0]
        self.c0 = x0 - self.m0 if centers else x0
        self.v0 = self.mean(self.c0 * self.c0) if moments is None else moments[1]
        self.c1 = [None if x is None else self.centered(x) for x in x1]
        self.c2 = None if x2 is None else self.centered(x2)
        self.r0 = (self.v0 + eps).rsqrt()
        zero, cube = torch.zeros_like(self.r0), self.r0 * self.r0 * self.r0
        self.u1 = [zero if c is None else 2 * self.mean(self.c0 * c) for c in self.c1]
        self.u2 = zero if self.c2 is None else 2 * self.mean(self.c0 * self.c2)
        for c in self.c1:
            self.u2 = self.u2 if c is None else self.u2 + 2 * self.mean(c * c)
        self.r1 = [-0.5 * cube * u for u in self.u1]
        self.r2 = -0.5 * cube * self.u2
        for u in self.u1:
            self.r2 = self.r2 + 0.75 * cube * self.r0 * self.r0 * u * u

    def mean(self, t: Tensor) -> Tensor:
        return t.mean(self.dims, keepdim=True)

    def centered(self, t: Tensor) -> Tensor:
        return t - self.mean(t) if self.centers else t

    def centered_in_place(self, t: Tensor) -> Tensor:
        return t.sub_(self.mean(t)) if self.centers else t

    def coefficients(self) -> list[Any]:
        """y0 = c0 r0, y2 = c2 r0 + 2 sum c1 r1 + c0 r2, and y1 = c1 r0 + c0 r1."""
        is_moving = self.c2 is not None or any(c is not None for c in self.c1)
        y2 = self.c0 * self.r2 if is_moving else None
        if y2 is not None and self.c2 is not None:
            y2 = y2.addcmul_(self.c2, self.r0)
        for c, r in zip(self.c1, self.r1, strict=True):
            if c is not None and y2 is not None:
                y2 = y2.addcmul_(c, r, value=2)
        pairs = zip(self.c1, self.r1, strict=True)
        y1 = [None if c is None else (c * self.r0).addcmul_(self.c0, r) for c, r in pairs]
        return [self.c0 * self.r0, y2, *y1]

    def backward(self, g0: Tensor | None, g2: Tensor | None, g1: Sequence[Tensor | None]) -> list[Any]:
        """The gradients by x0, x2 and x1, from those by y0, y2 and y1."""
        zero, square = torch.zeros_like(self.r0), self.r0 * self.r0
        cube = square * self.r0

        def along(a: Tensor | None, b: Tensor | None) -> Tensor:
            return zero if a is None or b is None else (a * b).sum(self.dims, keepdim=True)

        # To r ...
        dr2 = along(g2, self.c0)
        dr0 = along(g0, self.c0) + along(g2, self.c2)
        dr1 = []
        for g, c in zip(g1, self.c1, strict=True):
            dr0 = dr0 + along(g, c)
            dr1.append(along(g, self.c0) + 2 * along(g2, c))
        # ... from there to u ...
        dr0 = dr0 - 1.5 * square * self.u2 * dr2
        for u, d in zip(self.u1, dr1, strict=True):
            dr0 = dr0 + 3.75 * square * square * u * u * dr2 - 1.5 * square * u * d
        size = math.prod(self.c0.shape[dim] for dim in self.dims)
        du0, du2 = -cube * dr0 / size, -cube * dr2 / size
        du1 = [(3 * cube * square * u * dr2 - cube * d) / size for u, d in zip(self.u1, dr1, strict=True)]
        # ... and to c.
        d0 = sum_of_products((self.c0, du0), (g0, self.r0), (g2, self.r2), (self.c2, du2))
        d1: list[Tensor | None] = []
        for g, c, r, du in zip(g1, self.c1, self.r1, du1, strict=True):
            d0 = sum_of_products((c, du), (g, r), start=d0)
            d1.append(None if c is None else sum_of_products((self.c0, du), (c, 2 * du2), (g, self.r0), (g2, 2 * r)))
        d2 = None if self.c2 is None else sum_of_products((self.c0, du2), (g2, self.r0))
        return [None if d is None else self.centered_in_place(d) for d in (d0, d2, *d1)]


class _Normalize(RuleFunction):
    """Saves x0, x1, x2 and the parameters only."""

    @staticmethod
    def forward(
        ctx: Any,
        dims: list[int],
        eps: float,
        centers: bool,
        x0: Tensor,
        x2: Tensor | None,
        w0: Tensor | None,
        b0: Tensor | None,
        *moving: Tensor | None,
    ) -> Any:
        ctx.settings = dims, eps, centers
        ctx.set_materialize_grads(False)
        x1, w1, b1 = thirds(moving)
        normal = _Normal(dims, eps, centers, x0, x2, x1)
        moments = normal.m0, normal.v0
        ctx.save_for_backward(x0, x2, w0, *moments, *moving)
        ctx.mark_non_differentiable(*moments)
        y0, y2, *y1 = normal.coefficients()
        if w0 is None:
            return y0, y2, *moments, *y1
        z2, z1 = None if y2 is None else y2.mul_(w0), []
        for y, w, b in zip(y1, w1, b1, strict=True):
            if y is not None and w is not None:
                z2 = sum_of_products((y, 2 * w), start=z2)
            z = sum_of_products((y0, w), start=None if y is None else y.mul_(w0))
            z1.append(z if b is None else b.expand(y0.shape) if z is None else z.add_(b))
        z0 = y0.mul_(w0) if b0 is None else y0.mul_(w0).add_(b0)
        return z0, z2, *moments, *z1

    @staticmethod
    def backward(ctx: Any, g0: Tensor | None, g2: Tensor | None, _: Any, __: Any, *g1: Tensor | None) -> Any:
        g0, g2, *g1 = map(nonzero, (g0, g2, *g1))  # type: ignore[assignment]
        x0, x2, w0, mean, variance, *moving = ctx.saved_tensors
        x1, w1, _ = thirds(moving)
        dims, eps, centers = ctx.settings
        normal = _Normal(dims, eps, centers, x0, x2, x1, (mean, variance))
        dw: list[Any] = [None] * (1 + len(x1))
        db: list[Any] = [None] * (1 + len(x1))
        if w0 is not None:
            y0, y2, *y1 = normal.coefficients()
            n, needed = len(x1), ctx.needs_input_grad
            if needed[5]:
                dw[0] = _total(zip((y0, y2, *y1), (g0, g2, *g1), strict=True), w0.shape)
            if needed[6] and g0 is not None:
                db[0] = g0.sum_to_size(w0.shape)
            for p, (y, g) in enumerate(zip(y1, g1, strict=True)):
                if needed[7 + n + p]:
                    twice = None if g2 is None else 2 * g2
                    dw[1 + p] = _total([(y0, g), (y, twice)], w0.shape)
                if needed[7 + 2 * n + p] and g is not None:
                    db[1 + p] = g.sum_to_size(w0.shape)
            h0 = sum_of_products((g0, w0), *zip(g1, w1, strict=True))
            g1 = tuple(
                sum_of_products((g, w0), (g2, None if w is None else 2 * w)) for g, w in zip(g1, w1, strict=True)
            )
            g0, g2 = h0, None if g2 is None else g2 * w0
        d0, d2, *d1 = normal.backward(g0, g2, g1)
        return None, None, None, d0, d2, dw[0], db[0], *d1, *dw[1:], *db[1:]


def _total(products: Iterable[tuple[Tensor | None, Tensor | None]], shape: torch.Size) -> Tensor | None:
    """The sum of the products, over all entries that share a parameter; None is zero."""
    found = sum_of_products(*products)
    return None if found is None else found.sum_to_size(shape)


def affine(y: Coefficients, weight: Coefficients | None, bias: Coefficients | None) -> Coefficients:
    """y * weight + bias."""
    scaled = y if weight is None else bilinear(torch.mul, y, weight)
    return scaled if bias is None else total(scaled, bias)


def layer_norm(call: Call, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    dims = range(-len(shape), 0)
    norms._last_dimensions(x.detach(), shape)  # refuses another shape
    y, _, _ = normalize(_wide(call.of(x)), dims, eps, _or_none(call, weight), _or_none(call, bias))
    dtype = norms._output_dtype(x)
    return linear(lambda t: t.to(dtype), y)


def rms_norm(call: Call, x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    wide = _wide(call.of(x))
    epsilon = torch.finfo(wide.value.dtype).eps if eps is None else eps
    y, _, _ = normalize(wide, range(-len(shape), 0), epsilon, _or_none(call, weight), centers=False)
    return linear(lambda t: t.to(x.dtype), y)


def group_norm(call: Call, x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    def grouped(t: Tensor) -> Tensor:
        return t.reshape(len(t), groups, math.prod(t.shape[1:]) // groups)

    normal, _, _ = normalize(linear(grouped, _wide(call.of(x))), [-1], eps)
    y = linear(lambda t: t.view(x.shape), normal)
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
    parameters = _per_channel(call, weight, x), _per_channel(call, bias, x)
    y, mean, variance = normalize(wide, dims, eps, *parameters)
    norms._update_running(running_mean, mean.flatten(), momentum)
    norms._update_running(running_var, variance.flatten() * (samples / (samples - 1)), momentum)
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
