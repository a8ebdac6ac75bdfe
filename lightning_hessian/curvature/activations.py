"""Smooth activations whose derivatives are closed forms of one sigmoid, computed once.

Differentiated three times, PyTorch's softplus and SiLU grow into dozens of elementwise operations, each a pass over
memory. Here each derivative is one short formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Formula = Callable[[Tensor, Tensor, float], Tensor]
"""(x, s, beta) -> a derivative, with s = sigmoid(beta x)."""


class _Derivative(torch.autograd.Function):
    """f^(k)(x), the k-th of a list of formulas; its derivative is the next one."""

    @staticmethod
    def forward(x: Tensor, s: Tensor, beta: float, formulas: tuple[Formula, ...], k: int) -> Tensor:
        return formulas[k](x, s, beta)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, s, ctx.beta, ctx.formulas, ctx.k = inputs
        ctx.save_for_backward(x, s)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, s = ctx.saved_tensors
        k = ctx.k + 1
        if k < len(ctx.formulas) - 1:
            return gradient * _Derivative.apply(x, s, ctx.beta, ctx.formulas, k), None, None, None, None
        if torch.is_grad_enabled():
            s = torch.sigmoid(ctx.beta * x)  # the last formula is differentiated by autograd, should anyone ask
        return gradient * ctx.formulas[k](x, s, ctx.beta), None, None, None, None


def _slope(s: Tensor) -> Tensor:
    """s (1 - s), in one pass over memory."""
    return torch.addcmul(s, s, s, value=-1)


_SOFTPLUS: tuple[Formula, ...] = (
    lambda x, s, beta: F.softplus(x, beta),
    lambda x, s, beta: s.view_as(s),
    lambda x, s, beta: _slope(s).mul_(beta),
    lambda x, s, beta: _slope(s) * (beta**2 - 2 * beta**2 * s),
)

_SILU: tuple[Formula, ...] = (
    lambda x, s, beta: x * s,
    lambda x, s, beta: torch.addcmul(s, x, _slope(s)),
    lambda x, s, beta: _slope(s).mul_(torch.addcmul(2 + x, x, s, value=-2)),
    lambda x, s, beta: _slope(s) * (3 * (1 - 2 * s) + x * (1 - 6 * _slope(s))),
)


def softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """log(1 + exp(beta x)) / beta. (Beyond the threshold PyTorch's is linear; from 20 on the two agree to 2e-9.)"""
    if threshold < 20:
        return F.softplus(input, beta, threshold)
    return _Derivative.apply(input, torch.sigmoid(beta * input.detach()), beta, _SOFTPLUS, 0)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """x sigmoid(x)."""
    if inplace:  # the input must change too
        return F.silu(input, inplace=True)
    return _Derivative.apply(input, torch.sigmoid(input.detach()), 1.0, _SILU, 0)
