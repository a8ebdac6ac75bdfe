"""Layers that are fast where they are differentiated twice.

PyTorch has fused kernels for these functions and their gradients, but autograd takes the derivative of a gradient in
many slow operations. Here it takes the same kernels again. Further derivatives are right, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_hessian.curvature import activations


def convolution(function: Callable[..., Tensor], spatial: int) -> Callable[..., Tensor]:
    """Build a convolution over this number of dimensions, with the signature of ``function`` (``F.conv2d``, ...)."""

    def convolve(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:  # fmt: skip
        if isinstance(padding, str) or input.dim() != spatial + 2 or input.dtype != weight.dtype:
            return function(input, weight, bias, stride, padding, dilation, groups)
        stride, padding, dilation = (_numbers(value, spatial) for value in (stride, padding, dilation))
        found: Tensor = _Convolution.apply(input, weight, bias, (stride, padding, dilation), groups)
        return found

    return convolve


def _numbers(value: Any, count: int) -> list[int]:
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * count if len(numbers) == 1 else numbers


class _Convolution(torch.autograd.Function):
    """x * w + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, geometry: Any, groups: int) -> Tensor:
        ctx.settings = geometry, groups
        ctx.save_for_backward(x, w)
        return _convolved(x, w, b, geometry, groups)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        needed = list(ctx.needs_input_grad[:3])
        return *_ConvolutionGradient.apply(g, *ctx.saved_tensors, needed, *ctx.settings), None, None


class _ConvolutionGradient(torch.autograd.Function):
    """The gradients by x, w and b: they are bilinear in (g, w), bilinear in (g, x), and linear in g."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, needed: list[bool], geometry: Any, groups: int) -> Any:
        ctx.settings = geometry, groups
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, w)
        return _gradients(g, x, w, needed, geometry, groups)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, vw: Tensor | None, vb: Tensor | None) -> Any:
        g, x, w = ctx.saved_tensors
        needs_g, needs_x, needs_w = ctx.needs_input_grad[:3]
        by_g = by_x = by_w = None
        if needs_g and vw is not None:
            by_g = _convolved(x, vw, vb, *ctx.settings)
        elif needs_g and vb is not None:
            by_g = vb.view(1, -1, *[1] * (g.dim() - 2)).expand_as(g)
        if needs_g and v is not None:
            along_x = _convolved(v, w, None, *ctx.settings)
            by_g = along_x if by_g is None else by_g + along_x
        if needs_x and vw is not None:
            by_x = _gradients(g, x, vw, [True, False, False], *ctx.settings)[0]
        if needs_w and v is not None:
            by_w = _gradients(g, v, w, [False, True, False], *ctx.settings)[1]
        return by_g, by_x, by_w, None, None, None


def _convolved(x: Tensor, w: Tensor, b: Tensor | None, geometry: Sequence[list[int]], groups: int) -> Tensor:
    stride, padding, dilation = geometry
    return torch.convolution(x, w, b, stride, padding, dilation, False, [0] * (x.dim() - 2), groups)


def _gradients(
    g: Tensor, x: Tensor, w: Tensor, needed: list[bool], geometry: Sequence[list[int]], groups: int
) -> tuple[Tensor | None, ...]:
    extra = [0] * (x.dim() - 2)
    found: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
        g, x, w, [w.size(0)], *geometry, False, extra, groups, needed
    )
    return found


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """x sigmoid(x)."""
    if inplace:  # must overwrite the input
        return F.silu(input, inplace=True)
    found: Tensor = _SiLU.apply(input)
    return found


class _SiLU(torch.autograd.Function):
    """x sigmoid(x). It saves x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _SiLUGradient.apply(g, *ctx.saved_tensors)


class _SiLUGradient(torch.autograd.Function):
    """g f'(x)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(g, x)
        return _silu_gradient(g, x)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        g, x = ctx.saved_tensors
        return _silu_gradient(v, x), activations.SILU[2](x, torch.sigmoid(x), 1.0) * g * v


def _silu_gradient(g: Tensor, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # the kernel has no derivative
        return g * activations.SILU[1](x, torch.sigmoid(x), 1.0)
    found: Tensor = torch.ops.aten.silu_backward(g, x)
    return found


FASTER: dict[Any, Callable[..., Tensor]] = {
    F.conv1d: convolution(F.conv1d, 1),
    F.conv2d: convolution(F.conv2d, 2),
    F.conv3d: convolution(F.conv3d, 3),
    F.silu: silu,
}
"""Function -> what to call instead, on ordinary tensors."""
