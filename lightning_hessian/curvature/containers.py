"""Find and replace tensors in nested containers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor


def tensors_in(container: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested tuples, lists, mappings and dataclasses, in order.

    Example:
        >>> import torch
        >>> [t.shape[0] for t in tensors_in({"x": torch.ones(2), "rest": (torch.ones(3), "a name")})]
        [2, 3]
    """
    if isinstance(container, Tensor):
        yield container
    elif isinstance(container, Mapping):
        for part in container.values():
            yield from tensors_in(part)
    elif isinstance(container, tuple | list):
        for part in container:
            yield from tensors_in(part)
    elif dataclasses.is_dataclass(container) and not isinstance(container, type):
        for field in dataclasses.fields(container):
            yield from tensors_in(getattr(container, field.name))


def exchanged(container: Any, old: Sequence[Tensor], new: Sequence[Tensor]) -> Any:
    """Copy nested containers, with the tensors ``old`` replaced by ``new``. Everything else is shared.

    Example:
        >>> import torch
        >>> x, y = torch.zeros(1), torch.ones(1)
        >>> exchanged({"a": (x, y)}, [x], [torch.full((1,), 5.0)])
        {'a': (tensor([5.]), tensor([1.]))}
    """
    return _walk(container, {id(tensor): other for tensor, other in zip(old, new, strict=True)})


def _walk(part: Any, replacement: Mapping[int, Tensor]) -> Any:
    if isinstance(part, Tensor):
        return replacement.get(id(part), part)
    if isinstance(part, Mapping):
        mapping: Any = copy.copy(part)
        for key, value in part.items():
            mapping[key] = _walk(value, replacement)
        return mapping
    if isinstance(part, tuple | list):
        parts = [_walk(value, replacement) for value in part]
        return type(part)(*parts) if hasattr(part, "_fields") else type(part)(parts)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        changed = copy.copy(part)
        for field in dataclasses.fields(part):
            # Works for frozen dataclasses too.
            object.__setattr__(changed, field.name, _walk(getattr(part, field.name), replacement))
        return changed
    return part
