"""Parameters sharded over processes (DTensor, as in FSDP2): local shards, and sums over all shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hessian.curvature.vectors import groups, pack


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether the tensor is a DTensor, such as a parameter in FSDP2."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """Return this process's shard of a sharded tensor, or any other tensor itself, without its graph."""
    part: Tensor = tensor.to_local() if is_dtensor(tensor) else tensor
    return part.detach()


def shard_like(whole: Tensor, like: Any) -> Tensor:
    """Return this process's shard of ``whole``, sharded in the same way as ``like``."""
    if not is_dtensor(like):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    replicated = [Replicate()] * like.device_mesh.ndim
    part: Tensor = (
        DTensor.from_local(whole, like.device_mesh, replicated, run_check=False)
        .redistribute(placements=like.placements)
        .to_local()
    )
    return part


def whole(part: Tensor, like: Any) -> Tensor:
    """Return the whole of a tensor from all processes' shards, sharded in the same way as ``like``."""
    if not is_dtensor(like):
        return part
    from torch.distributed.tensor import DTensor

    shape = {"shape": like.shape, "stride": like.stride()}
    gathered: Tensor = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, **shape
    ).full_tensor()
    return gathered


def gatherers(module: nn.Module) -> list[Any]:
    """The layers for which FSDP2 gathers parameters (those of ``fully_shard``), outer ones first."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [layer for layer in module.modules() if isinstance(layer, FSDPModule)]


def reshard(module: nn.Module) -> None:
    """Let ``module.parameters()`` be the shards. FSDP2 keeps some parameters whole until a backward pass."""
    for gatherer in gatherers(module):
        gatherer.reshard()


def dot(v: Sequence[Tensor], gradients: Sequence[Tensor], like: Any) -> Tensor:
    """Return v'g. If the tensors are sharded, in the same way as ``like``, this sums over all processes."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    own = [local(gradient) for gradient in gradients]

    def flat(parts: Sequence[Tensor]) -> Tensor:
        return parts[0].reshape(-1).to(dtype) if len(parts) == 1 else pack(parts, dtype)

    products = [torch.dot(flat(v[group]), flat(own[group])) for group in groups(v)]
    total = torch.stack(products).sum() if products else like.new_zeros((), dtype=dtype)
    return sum_over_shards(total, like)


def sum_over_shards(value: Tensor, like: Any) -> Tensor:
    """Return the sum of a value over the processes that share ``like``'s shards."""
    if is_dtensor(like):
        for dimension, placement in enumerate(like.placements):
            if placement.is_shard():
                torch.distributed.all_reduce(value, group=like.device_mesh.get_group(dimension))
    return value
