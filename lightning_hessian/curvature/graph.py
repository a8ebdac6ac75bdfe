"""Inspect the autograd graph of a result, and the hooks on its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def nodes(result: Tensor | Sequence[Tensor], until: Any = None) -> Iterator[Any]:
    """Yield each node of the graph of one or several tensors once. Stop at the node ``until``, and exclude it.

    Example:
        >>> import torch
        >>> [node.name() for node in nodes(torch.ones(2, requires_grad=True).exp().sum())]
        ['SumBackward0', 'ExpBackward0', 'torch::autograd::AccumulateGrad']
    """
    todo = [result.grad_fn] if isinstance(result, Tensor) else [one.grad_fn for one in result]
    seen = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen or node is until:
            continue
        seen.add(node)
        yield node
        todo.extend(following for following, _ in node.next_functions)


def has_parameters(result: Tensor) -> bool:
    """Return whether a tensor depends on parameters."""
    return any(isinstance(leaf, nn.Parameter) for leaf in leaves(result))


def leaves(result: Tensor) -> Iterator[Tensor]:
    """Yield the leaf tensors of a result's graph."""
    if result.grad_fn is None and result.requires_grad:
        yield result
    for node in nodes(result):
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf


def depends(result: Tensor, on: Tensor) -> bool:
    """Return whether the graph of ``result`` contains the tensor ``on``.

    Example:
        >>> import torch
        >>> x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> depends(x.exp(), on=x), depends(x.exp(), on=y)
        (True, False)
    """
    if on.grad_fn is not None:
        return any(node is on.grad_fn for node in nodes(result))
    return result is on or any(getattr(node, "variable", None) is on for node in nodes(result))


_KINKED = re.compile(
    r"^(Abs|Clamp|ClampMax|ClampMin|Hard\w*|LeakyRelu\w*|MaxPool\w*|AdaptiveMaxPool\w*|Max|Maximum|Min|Minimum|"
    r"Prelu\w*|PreluKernel|Relu|Rrelu\w*|Softshrink|Threshold)Backward"
)


_KINKED_LAYERS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Threshold, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish,
    nn.Hardshrink, nn.Softshrink, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
)  # fmt: skip


def kinked_layers(module: nn.Module) -> list[str]:
    """Return the class names of a module's layers whose first derivative jumps."""
    return sorted({type(layer).__name__ for layer in module.modules() if is_kinked(layer)})


def is_kinked(layer: nn.Module) -> bool:
    """Return whether the layer is a PyTorch layer whose first derivative jumps."""
    return isinstance(layer, _KINKED_LAYERS)


def kinks(result: Tensor) -> list[str]:
    """Return the names of the graph's backward nodes whose functions have a jump in the first derivative.

    Example:
        >>> import torch
        >>> kinks(torch.ones(2, requires_grad=True).relu().sum())
        ['ReluBackward0']
    """
    return sorted({node.name() for node in nodes(result) if _KINKED.search(node.name())})


def is_compiled(result: Tensor) -> bool:
    """Return whether the graph has a compiled part, through which only one backward pass can go."""
    return any(node.name().startswith("CompiledFunction") for node in nodes(result))


def computes_in_half_precision(result: Tensor) -> bool:
    """Return whether a result in the graph is in a 16-bit type. Autocast may be on for a part of the step only.

    Example:
        >>> import torch
        >>> x = torch.ones(2, 2, requires_grad=True)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     product = x @ x
        >>> computes_in_half_precision(product.float().sum()), computes_in_half_precision((x @ x).sum())
        (True, False)
    """
    of_nodes = (made for node in nodes(result) for made in node._input_metadata)
    return any(made.dtype in (torch.float16, torch.bfloat16) for made in of_nodes)


@contextmanager
def without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Context manager: disable all gradient hooks registered on the tensors."""
    tables = [
        table
        for tensor in tensors
        for table in (tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None))
        if table
    ]
    kept = [dict(table) for table in tables]
    try:
        for table in tables:
            table.clear()
        yield
    finally:
        for table, hooks in zip(tables, kept, strict=True):
            table.update(hooks)
