"""A loss whose gradient has been taken already, without the part that leads to the inputs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor


class _Known(torch.autograd.Function):
    """A scalar, and its gradients by some leaves."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> Any:
        return None, None, *(factor * gradient for gradient in ctx.gradients)


def without(total: Tensor, inputs: Collection[Tensor]) -> Tensor:
    """The same scalar with the same gradients by every leaf of its graph but ``inputs``.

    ``backward()`` would differentiate by the inputs as well, whose gradients nobody needs once the penalty has been
    computed: a third of the step. Here they are pruned, the other gradients are taken now, and ``backward()`` hands
    them on (scaled, accumulated and reduced as ever).

    Example:
        >>> w, x = torch.tensor(3.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
        >>> without(w * x, [x]).backward()
        >>> w.grad, x.grad
        (tensor(2.), None)
    """
    made = {id(x) for x in inputs}
    leaves = [leaf for leaf in _leaves(total) if id(leaf) not in made]
    # A hook on a parameter would act on both ways.
    if any(leaf._backward_hooks for leaf in leaves):
        return total
    found = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
    known = [(gradient, leaf) for gradient, leaf in zip(found, leaves, strict=True) if gradient is not None]
    return _Known.apply(total.detach(), tuple(gradient for gradient, _ in known), *(leaf for _, leaf in known))


def _leaves(value: Tensor) -> list[Tensor]:
    todo, seen, found = [value.grad_fn], set(), []
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            found.append(variable)
        todo.extend(following for following, _ in node.next_functions)
    return found
