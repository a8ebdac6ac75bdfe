"""Looking through the graph of a result, and what hangs on its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def nodes(result: Tensor | Sequence[Tensor], until: Any = None) -> Iterator[Any]:
    """All nodes of the graph of a tensor, or of several, each once; not further than the node ``until``.

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
    """Whether a tensor was computed from parameters."""
    return any(isinstance(leaf, nn.Parameter) for leaf in leaves(result))


def leaves(result: Tensor) -> Iterator[Tensor]:
    """The tensors that a result's graph begins with."""
    if result.grad_fn is None and result.requires_grad:
        yield result
    for node in nodes(result):
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf


def depends(result: Tensor, on: Tensor) -> bool:
    """Whether there is a way in the graph from one tensor back to another.

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
    """The classes of a module's layers whose first derivative jumps."""
    return sorted({type(layer).__name__ for layer in module.modules() if is_kinked(layer)})


def is_kinked(layer: nn.Module) -> bool:
    """Whether the layer is one of PyTorch's whose first derivative jumps."""
    return isinstance(layer, _KINKED_LAYERS)


def kinks(result: Tensor) -> list[str]:
    """The functions in a graph whose first derivative jumps, by the names of their derivatives.

    Example:
        >>> import torch
        >>> kinks(torch.ones(2, requires_grad=True).relu().sum())
        ['ReluBackward0']
    """
    return sorted({node.name() for node in nodes(result) if _KINKED.search(node.name())})


@contextmanager
def without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside, no hook that was registered on a tensor's gradient is called."""
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
