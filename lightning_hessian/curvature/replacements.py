"""Replacements for functions with wrong or missing higher derivatives in PyTorch, written with primitives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_hessian.curvature import fused_norms, norms


def _in_order_of_torch(batch_norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reordered(input: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool,
                  momentum: float, eps: float, cudnn_enabled: bool = True) -> Tensor:  # fmt: skip
        return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)

    return reordered


def _instance_norm(input: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, use_input_stats: bool,
                   momentum: float, eps: float, cudnn_enabled: bool = True) -> Tensor:  # fmt: skip
    return norms.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _layer_norm(input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5,
                cudnn_enable: bool = True) -> Tensor:  # fmt: skip
    return norms.layer_norm(input, normalized_shape, weight, bias, eps)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    y = (input + 3).clamp(0, 6) / 6
    return input.copy_(y) if inplace else y


def _hardsigmoid_(input: Tensor) -> Tensor:
    return _hardsigmoid(input, inplace=True)


def _complex_silu(input: Tensor, inplace: bool = False) -> Tensor:
    x = input.clone() if inplace else input
    y = x * torch.sigmoid(x)
    return input.copy_(y) if inplace else y


# The fused kernels of these functions have wrong higher derivatives. The values here are correct at any order. The
# functions of torch.nn.functional and the lower-level ones of torch take their arguments in different orders.
ALWAYS: Mapping[Any, Callable[..., Tensor]] = {
    F.batch_norm: norms.batch_norm,
    F.instance_norm: norms.instance_norm,
    F.layer_norm: norms.layer_norm,
    F.rms_norm: norms.rms_norm,
    torch.batch_norm: _in_order_of_torch(norms.batch_norm),
    torch.instance_norm: _instance_norm,
    torch.layer_norm: _layer_norm,
    torch.rms_norm: norms.rms_norm,
    torch._weight_norm: norms.weight_norm,
    F.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardsigmoid_: _hardsigmoid_,
}

# Correct up to the second derivative, and faster than primitives up to there.
SOUND_TWICE = {F.layer_norm, torch.layer_norm}


# Equally correct at any order, and faster up to the second derivative.
FASTER_TWICE: Mapping[Any, Callable[..., Tensor]] = {
    F.batch_norm: fused_norms.batch_norm,
    torch.batch_norm: _in_order_of_torch(fused_norms.batch_norm),
}


def replacement(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], derivatives: int) -> Any:
    """Return the function to call instead, with the same arguments, or None if the original is correct."""
    if derivatives < 3 and func in SOUND_TWICE:
        return None
    if derivatives < 3 and func in FASTER_TWICE and args and type(args[0]) is Tensor:
        return FASTER_TWICE[func]
    if func in ALWAYS:
        return ALWAYS[func]
    if func is F.silu and args and args[0].is_complex():
        return _complex_silu
    if func in _TRANSPOSED:
        return _TRANSPOSED[func] if any(_numbers(_argument(args, kwargs, 5, "output_padding", 0))) else None
    if func is _LINEAR_CROSS_ENTROPY and kwargs.get("options") is not None:
        return _linear_cross_entropy
    return None


_LINEAR_CROSS_ENTROPY = getattr(F, "linear_cross_entropy", None)  # since torch 2.13


def _linear_cross_entropy(*args: Any, options: Any, **kwargs: Any) -> Tensor:
    # The fused loss stores precomputed gradients without a graph. The plain loss computes the same function.
    loss: Tensor = _LINEAR_CROSS_ENTROPY(*args, **kwargs)  # type: ignore[misc]
    return loss


def _transposed(convolution: Callable[..., Tensor], dimensions: int) -> Callable[..., Tensor]:
    """Build a transposed convolution whose double backward also supports ``output_padding``.

    It computes the whole result without padding, then crops ``padding`` at the start and ``padding - output_padding``
    at the end.
    """

    def convolve(
        input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
        groups: int = 1, dilation: Any = 1,
    ) -> Tensor:  # fmt: skip
        paddings, extras = _numbers(padding, dimensions), _numbers(output_padding, dimensions)
        largest = [max(pair) for pair in zip(_numbers(stride, dimensions), _numbers(dilation, dimensions), strict=True)]
        if any(extra >= most for extra, most in zip(extras, largest, strict=True)):  # PyTorch raises
            return convolution(input, weight, bias, stride, padding, output_padding, groups, dilation)
        whole = convolution(input, weight, None, stride, 0, 0, groups, dilation)
        crop: list[int] = []
        for p, extra in zip(paddings, extras, strict=True):
            crop = [-p, extra - p, *crop]  # F.pad starts at the last dimension
        y = F.pad(whole, crop)
        return y if bias is None else y + bias.to(y.dtype).view(-1, *[1] * dimensions)

    return convolve


_TRANSPOSED = {
    F.conv_transpose1d: _transposed(F.conv_transpose1d, 1),
    F.conv_transpose2d: _transposed(F.conv_transpose2d, 2),
    F.conv_transpose3d: _transposed(F.conv_transpose3d, 3),
}


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def _numbers(value: Any, dimensions: int = 1) -> tuple[int, ...]:
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * dimensions if len(numbers) == 1 and dimensions > 1 else numbers
