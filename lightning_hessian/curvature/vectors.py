"""Flatten several tensors into one vector, and split it again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
