"""Copy a batch of any structure, and choose tensors in it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_hessian.curvature.containers import tensors_in

InputChoice = str | int | Sequence[str | int] | Callable[[Any], Any] | None
"""A selection of a batch's tensors: a key or attribute name, an index, a list of these, a function of the batch that
returns one or several tensors, or None for the first floating-point tensor."""


def copied(batch: Any, convert: Callable[[Tensor], Tensor] = lambda tensor: tensor.detach().clone()) -> Any:
    """Deep-copy a batch, which may be a user-defined object. A step may change the batch that it gets.

    Args:
        batch: the batch.
        convert: copies one tensor.
    """
    return copy.deepcopy(batch, {id(tensor): convert(tensor) for tensor in tensors_in(batch)})


def samples_in(batch: Any) -> int | None:
    """Return the size of the first dimension of the first tensor that has one, or None if there is none.

    Example:
        >>> import torch
        >>> samples_in({"x": torch.ones(4, 2), "y": torch.ones(4)})
        4
    """
    return next((len(tensor) for tensor in tensors_in(batch) if tensor.dim() > 0), None)


def select_inputs(batch: Any, which: InputChoice = None) -> tuple[Tensor, ...]:
    """Return the input tensors of a batch.

    Args:
        batch: tensors in nested tuples, lists, mappings or dataclasses.
        which: a key (or an attribute's name), an index, a list of these, a function of the batch that returns one or
            several of the batch's own tensors, or None for the first floating-point tensor.

    Raises:
        ValueError: nothing is selected, or a selected part is not a floating-point tensor of the batch with at least
            one dimension.

    Example:
        >>> import torch
        >>> batch = {"ids": torch.tensor([1, 2]), "image": torch.zeros(2, 3)}
        >>> select_inputs(batch)[0].shape, select_inputs(batch, "image")[0].shape
        (torch.Size([2, 3]), torch.Size([2, 3]))
    """
    everything = list(tensors_in(batch))
    if which is None:
        chosen = [tensor for tensor in everything if tensor.is_floating_point() and tensor.dim() > 0][:1]
        if not chosen:
            found = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in everything) or "none"
            raise ValueError(
                f"The batch has no floating-point tensor to be the input (its tensors: {found}), and integers "
                "such as token ids have no derivatives. A penalty can take the embeddings instead: pass it "
                "layer='<name of the embedding layer>'. Attacks cannot. If the batch is a custom object, pass "
                "inputs=lambda batch: ..., or use the mixin's self.regularized(loss, inputs=...)."
            )
    elif callable(which):
        answer = which(batch)
        chosen = [answer] if isinstance(answer, Tensor) else list(answer)
    else:
        keys: Sequence[str | int] = [which] if isinstance(which, str | int) else list(which)
        chosen = [part_of(batch, key, "inputs") for key in keys]
    if not chosen:
        raise ValueError(f"inputs={which!r} chooses no tensor of the batch. Choose at least one.")
    for tensor in chosen:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dim() == 0:
            what = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"inputs={which!r} chooses {what}, which has no derivatives by sample: an input must be a "
                "floating-point tensor of shape (samples, ...). For token ids, penalize the embeddings: pass "
                "layer='<name of the embedding layer>' to the penalty."
            )
        if not any(tensor is other for other in everything):
            raise ValueError(
                f"inputs={which!r} returns a tensor that is not one of the batch's own, so the step would not "
                "use its replacement. Return a tensor of the batch, not a copy of it. Only in tuples, lists, mappings "
                "and dataclasses can tensors be replaced: otherwise use the mixin's self.regularized(loss, inputs=...)."
            )
    return tuple(chosen)


def part_of(batch: Any, key: str | int, name: str) -> Any:
    """Return the part of a batch with this key, attribute name or index. Errors call the key ``name``.

    Raises:
        ValueError: the batch has no such part. The error describes the batch.
    """
    try:
        if isinstance(key, str) and not isinstance(batch, Mapping):
            return getattr(batch, key)
        return batch[key]
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        if isinstance(batch, Mapping):
            has = f"a mapping with the keys {', '.join(map(repr, batch))}"
        elif isinstance(batch, Sequence):
            has = f"a {type(batch).__name__} of {len(batch)} parts"
        else:
            has = f"a {type(batch).__name__}"
        raise ValueError(f"{name}={key!r} is not in the batch, which is {has}.") from error
