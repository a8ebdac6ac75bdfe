"""Normalization layers written with primitives, so that autograd can differentiate them any number of times.

PyTorch's fused kernels treat the saved mean and inverse standard deviation as constants in the third derivative
(pytorch#175754, #186256). The fused weight norm already does so in the second. Here every statistic is a node of the
graph. Each function has the signature and the side effects of its namesake in ``torch.nn.functional``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


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
    """y = (x - mean) / sqrt(var + eps) * weight + bias, with batch statistics, or running statistics in evaluation."""
    x = _in_full_precision(input)
    if training:
        samples = x.numel() // x.size(1)
        if samples == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
        across = [0, *range(2, x.dim())]
        mean = x.mean(across, keepdim=True)
        centered = x - mean
        variance = centered.square().mean(across, keepdim=True)
        _update_running(running_mean, mean.flatten(), momentum)
        _update_running(running_var, variance.flatten() * (samples / (samples - 1)), momentum)
    elif running_mean is None or running_var is None:
        raise RuntimeError("Expected running_mean and running_var to be defined when training=False")
    else:
        centered = x - _per_channel(running_mean, x)
        variance = _per_channel(running_var, x)
    return _scale_and_shift(centered, variance, weight, bias, eps).to(input.dtype)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch norm with statistics per sample and channel. Their means over the batch update the running statistics."""
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    x = _in_full_precision(input)
    across = list(range(2, x.dim()))
    size = x[0, 0].numel()
    if size == 1:
        raise ValueError(f"Expected more than 1 spatial element when training, got input size {input.size()}")
    mean = x.mean(across, keepdim=True)
    centered = x - mean
    variance = centered.square().mean(across, keepdim=True)
    _update_running(running_mean, mean.mean(0).flatten(), momentum)
    _update_running(running_var, variance.mean(0).flatten() * (size / (size - 1)), momentum)
    return _scale_and_shift(centered, variance, weight, bias, eps).to(input.dtype)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last ``len(normalized_shape)`` dimensions."""
    x, across = _last_dimensions(input, normalized_shape)
    centered = x - x.mean(across, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(across, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    return (y if bias is None else y + bias).to(_output_dtype(input))


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last ``len(normalized_shape)`` dimensions."""
    x, across = _last_dimensions(input, normalized_shape)
    epsilon = torch.finfo(x.dtype).eps if eps is None else eps
    y = x * torch.rsqrt(x.square().mean(across, keepdim=True) + epsilon)
    return (y if weight is None else y * weight).to(input.dtype)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """w = g * v / ||v||, with the norm over every dimension except ``dim`` (over all dimensions for -1)."""
    across = [d for d in range(v.dim()) if d != dim]
    return v * (g * torch.rsqrt(v.square().sum(across, keepdim=True)))


def _scale_and_shift(
    centered: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    # Multiply the small tensors first. This leaves one product of full size.
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * _per_channel(weight, centered)
    y = centered * scale
    return y if bias is None else y + _per_channel(bias, centered)


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (like.dim() - 2))


_FROZEN = threading.local()


@contextmanager
def statistics_at_rest() -> Iterator[None]:
    """Context manager: freeze running statistics. A recomputed checkpoint must not count its batch a second time."""
    _FROZEN.active = True
    try:
        yield
    finally:
        _FROZEN.active = False


@torch.no_grad()
def _update_running(running: Tensor | None, batch: Tensor, momentum: float) -> None:
    if running is not None and not getattr(_FROZEN, "active", False):
        running.mul_(1 - momentum).add_(batch.detach().to(running.dtype), alpha=momentum)


def _last_dimensions(input: Tensor, normalized_shape: Sequence[int]) -> tuple[Tensor, list[int]]:
    if list(input.shape[-len(normalized_shape) :]) != list(normalized_shape):
        raise RuntimeError(
            f"Given normalized_shape={list(normalized_shape)}, expected input with shape "
            f"[*, {', '.join(map(str, normalized_shape))}], but got input of size {list(input.shape)}"
        )
    return _in_full_precision(input), list(range(-len(normalized_shape), 0))


def _in_full_precision(x: Tensor) -> Tensor:
    # The fused kernels also compute the statistics of half-precision inputs in float32.
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _output_dtype(input: Tensor) -> torch.dtype:
    # Autocast runs layer norm in float32 on a GPU. On a CPU it keeps the input type.
    return torch.float32 if input.is_cuda and torch.is_autocast_enabled("cuda") else input.dtype
