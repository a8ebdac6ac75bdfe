"""Smooth activations with closed-form derivatives in terms of one precomputed sigmoid.

Three derivatives of PyTorch's softplus or SiLU expand into dozens of elementwise operations, each a pass over
memory. Here each derivative is one short formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Formula = Callable[[Tensor, Tensor, float], Tensor]
"""(x, s, beta) -> one derivative, with s = sigmoid(beta x)."""


class _Derivative(torch.autograd.Function):
    """f^(k)(x), the k-th formula of a list. Its derivative is the next formula."""

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
            s = torch.sigmoid(ctx.beta * x)  # with a graph, so that autograd can differentiate the last formula
        return gradient * ctx.formulas[k](x, s, ctx.beta), None, None, None, None


def _sigmoid_derivative(s: Tensor) -> Tensor:
    """s (1 - s), the derivative of the sigmoid, in one pass over memory."""
    return torch.addcmul(s, s, s, value=-1)


_SOFTPLUS: tuple[Formula, ...] = (
    lambda x, s, beta: F.softplus(x, beta),
    lambda x, s, beta: s.view_as(s),
    lambda x, s, beta: _sigmoid_derivative(s).mul_(beta),
    lambda x, s, beta: _sigmoid_derivative(s) * (beta**2 - 2 * beta**2 * s),
)

SILU: tuple[Formula, ...] = (
    lambda x, s, beta: x * s,
    lambda x, s, beta: torch.addcmul(s, x, _sigmoid_derivative(s)),
    lambda x, s, beta: _sigmoid_derivative(s).mul_(torch.addcmul(2 + x, x, s, value=-2)),
    lambda x, s, beta: _sigmoid_derivative(s) * (3 * (1 - 2 * s) + x * (1 - 6 * _sigmoid_derivative(s))),
)


def softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """log(1 + exp(beta x)) / beta.

    PyTorch's version is linear beyond the threshold. From 20 on the two agree to 2e-9.
    """
    if threshold < 20:
        return F.softplus(input, beta, threshold)
    return _Derivative.apply(input, torch.sigmoid(beta * input.detach()), beta, _SOFTPLUS, 0)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """x sigmoid(x)."""
    if inplace:  # must overwrite the input
        return F.silu(input, inplace=True)
    return _Derivative.apply(input, torch.sigmoid(input.detach()), 1.0, SILU, 0)
