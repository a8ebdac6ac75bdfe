"""Flatten several tensors into one vector, and split it again; copy and group many small tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


def pack(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Concatenate the entries of all tensors into a flat vector of shape (n,).

    Example:
        >>> pack([torch.tensor([[1.0, 2.0]]), torch.tensor(3.0)])
        tensor([1., 2., 3.])
    """
    return torch.cat([tensor.reshape(-1) if dtype is None else tensor.reshape(-1).to(dtype) for tensor in tensors])


def unpack(v: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Undo :func:`pack`. The parts have the shapes and dtypes of the tensors ``like``.

    Example:
        >>> unpack(torch.arange(3.0), like=[torch.zeros(1, 2), torch.zeros(1)])
        [tensor([[0., 1.]]), tensor([2.])]
    """
    parts = v.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, like, strict=True)]


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies without a graph. A GPU starts one kernel for all of them.

    Example:
        >>> copies([torch.tensor([1.0, 2.0]), torch.tensor(3)])
        [tensor([1., 2.]), tensor(3)]
    """
    if any(not _is_plain(tensor) for tensor in tensors):
        return [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        copied = [torch.empty_like(tensor) for tensor in tensors]
        if copied:
            torch._foreach_copy_(copied, list(tensors))
    return copied


def _is_plain(tensor: Tensor) -> bool:
    """Not sparse, nested, sharded or of another class of its own."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_nested


def groups(tensors: Sequence[Tensor], entries: int = 2**16) -> Iterator[slice]:
    """Yield slices of consecutive tensors that have at most ``entries`` entries together. A larger tensor is alone.

    A GPU starts one kernel for a group instead of one for each tensor, and temporary results stay small.

    Example:
        >>> list(groups([torch.zeros(3), torch.zeros(2), torch.zeros(9), torch.zeros(1)], entries=5))
        [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None)]
    """
    start, size = 0, 0
    for i, tensor in enumerate(tensors):
        if i > start and size + tensor.numel() > entries:
            yield slice(start, i)
            start, size = i, 0
        size += tensor.numel()
    if tensors:
        yield slice(start, len(tensors))


def pack_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors of shape (samples, ...) into one of shape (samples, n).

    Example:
        >>> pack_rows([torch.zeros(2, 3, 4), torch.zeros(2, 5)]).shape
        torch.Size([2, 17])
    """
    return torch.cat([tensor.reshape(len(tensor), -1) for tensor in tensors], dim=1)


def unpack_rows(v: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Undo :func:`pack_rows`. The parts have the shapes and dtypes of the tensors ``like``."""
    parts = v.split([tensor[0].numel() for tensor in like], dim=1)
    return [part.reshape(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, like, strict=True)]


def normalize_rows(v: Tensor) -> Tensor:
    """Divide each row by its length. A row of zeros stays zero.

    Example:
        >>> normalize_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    length = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    return v / torch.where(length > 0, length, 1)
