"""Batch norm with fused kernels, fast where it is differentiated twice.

PyTorch has fused kernels for the norm and its gradient, but autograd takes the derivative of the gradient in dozens of
passes over memory. Here it is one closed formula. Further derivatives are right, too: they take primitives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hessian.curvature import norms


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch norm, with the signature and the side effects of its namesake in ``torch.nn.functional``."""
    samples = input.numel() // input.size(1)
    if not training or samples <= 1:
        return norms.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    x = norms._in_full_precision(input)
    weight, bias = (None if part is None else part.to(x.dtype) for part in (weight, bias))
    y, mean, r = _BatchNorm.apply(x, weight, bias, eps)
    variance = (r**-2 - eps).clamp_min(0)
    norms._update_running(running_mean, mean, momentum)
    norms._update_running(running_var, variance * (samples / (samples - 1)), momentum)
    return y.to(input.dtype)


class _BatchNorm(torch.autograd.Function):
    """y = w z + b with z = (x - m) r, r = 1 / sqrt(var(x) + eps). Returns m and r, too, without a graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
        y, m, r = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, m, r)
        ctx.mark_non_differentiable(m, r)
        return y, m, r

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> Any:
        dx, dw, db = _BatchNormGradient.apply(g, *ctx.saved_tensors, ctx.eps)
        has_weight, has_bias = ctx.needs_input_grad[1:3]
        return dx, dw if has_weight else None, db if has_bias else None, None


class _BatchNormGradient(torch.autograd.Function):
    """dx = r w (g - mean(g) - z mean(g z)), dw = sum(g z) and db = sum(g)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor | None, m: Tensor, r: Tensor, eps: float) -> Any:
        dx, dw, db = _batch_norm_gradient(g, x, weight, m, r, eps)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, weight, m, r, dw, db)
        return dx, dw, db

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, vw: Tensor | None, vb: Tensor | None) -> Any:
        g, x, weight, m, r, dw, db = ctx.saved_tensors
        zero = torch.zeros_like(m)
        v = torch.zeros_like(x) if v is None else v
        vw, vb = zero if vw is None else vw, zero if vb is None else vb
        if torch.is_grad_enabled():
            found = _by_primitives(g, x, weight, ctx.eps, (v, vw, vb))
        else:
            found = _second_derivative(g, x, weight, m, r, dw, db, ctx.eps, (v, vw, vb))
        return *found, None, None, None


def _batch_norm_gradient(g: Tensor, x: Tensor, weight: Tensor | None, m: Tensor, r: Tensor, eps: float) -> Any:
    w = torch.ones_like(m) if weight is None else weight  # without one CUDA's kernel has no dw
    return torch.ops.aten.native_batch_norm_backward(g, x, w, None, None, m, r, True, eps, [True, True, True])


def _second_derivative(
    g: Tensor, x: Tensor, weight: Tensor | None, m: Tensor, r: Tensor, dw: Tensor, db: Tensor, eps: float,
    seeds: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return the gradients of <v, dx> + <vw, dw> + <vb, db> by g, x and w.

    With means over a channel's n entries, and c = mean(v g) - mean(v) mean(g) - mean(v z) mean(g z), the sum is
    n r w c + <vw, dw> + <vb, db>. By g: the gradient formula at v, plus vw z + vb. By w: n r c. By x: through z,
    s = (vw - r w mean(v z)) g - r w mean(g z) v, and through r, which stands before c and in z.
    """
    v, vw, vb = seeds
    n = x.numel() // x.size(1)
    across = [0, *range(2, x.dim())]

    def wide(t: Tensor) -> Tensor:
        return norms._per_channel(t, x)

    by_g, vz, v_sum = _batch_norm_gradient(v, x, weight, m, r, eps)
    v_mean, vz_mean, g_mean, gz_mean = v_sum / n, vz / n, db / n, dw / n
    c = (v * g).sum(across) / n - v_mean * g_mean - vz_mean * gz_mean
    rw = r if weight is None else r * weight
    by_g.addcmul_(x, wide(vw * r)).add_(wide(vb - vw * r * m))
    # s = of_g * g + of_v * v, and by x: r (s - mean(s) - z mean(s z)) - r^2 w c z.
    of_g, of_v = vw - rw * vz_mean, -rw * gz_mean
    s_mean, sz_mean = of_g * g_mean + of_v * v_mean, of_g * gz_mean + of_v * vz_mean
    of_z = -r * (sz_mean + rw * c)
    by_x = torch.addcmul(wide(-r * s_mean - of_z * r * m), x, wide(of_z * r))
    by_x.addcmul_(g, wide(r * of_g)).addcmul_(v, wide(r * of_v))
    return by_g, by_x, None if weight is None else n * r * c


def _by_primitives(
    g: Tensor, x: Tensor, weight: Tensor | None, eps: float, seeds: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same with a graph."""
    ones = x.new_ones(x.size(1))
    parts = (g, x, ones if weight is None else weight, torch.zeros_like(ones))
    # Other tensors of the same values: g may depend on x, and that dependence is not this function's.
    own_g, own_x, w, b = (_own(part) for part in parts)
    y = norms.batch_norm(own_x, None, None, w, b, training=True, eps=eps)
    gradients = torch.autograd.grad(y, [own_x, w, b], own_g, create_graph=True)
    by_g, by_x, by_w = torch.autograd.grad(gradients, [own_g, own_x, w], seeds, create_graph=True)
    return by_g, by_x, None if weight is None else by_w


def _own(t: Tensor) -> Tensor:
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
