"""Parameters that are sharded over processes (DTensor, as under FSDP2): parts, and sums over all parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, as the parameters are under FSDP2."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """The part of a sharded tensor that this process holds; any other tensor itself, without its graph."""
    part: Tensor = tensor.to_local() if is_dtensor(tensor) else tensor
    return part.detach()


def shard_like(whole: Tensor, like: Any) -> Tensor:
    """The part of ``whole`` that this process holds where ``whole`` is sharded as ``like`` is."""
    if not is_dtensor(like):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * like.device_mesh.ndim
    part: Tensor = (
        DTensor.from_local(whole, like.device_mesh, everywhere, run_check=False)
        .redistribute(placements=like.placements)
        .to_local()
    )
    return part


def dot(v: Sequence[Tensor], gradients: Sequence[Tensor], like: Any) -> Tensor:
    """v'g over all parts; those of other processes are included where the tensors are sharded (as ``like`` is)."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    flat = [(a.reshape(-1).to(dtype), local(g).reshape(-1).to(dtype)) for a, g in zip(v, gradients, strict=True)]
    total = torch.stack([torch.dot(a, g) for a, g in flat]).sum() if flat else like.new_zeros((), dtype=dtype)
    return sum_over_shards(total, like)


def sum_over_shards(value: Tensor, like: Any) -> Tensor:
    """The sum of a value over the processes among which ``like`` is sharded."""
    if is_dtensor(like):
        for dimension, placement in enumerate(like.placements):
            if placement.is_shard():
                torch.distributed.all_reduce(value, group=like.device_mesh.get_group(dimension))
    return value
