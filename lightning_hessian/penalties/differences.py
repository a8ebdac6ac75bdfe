"""Penalties that are second differences of the step's loss: what they add, and what they are made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hessian.curvature import ProbeSource
from lightning_hessian.curvature.sharding import dot
from lightning_hessian.curvature.vectors import pack


@dataclass(frozen=True, kw_only=True)
class SecondDifference:
    """A penalty's share of the loss, weight * [L(theta + distance v) + L(theta - distance v) - 2 L(theta)].

    Args:
        tensors: the parts of theta that move.
        direction: v, part by part of the tensors' shapes (of a sharded one, the part that this process holds); drawn
            anew at each call, so that nothing of the model's size need be kept for long.
        distance: how far theta moves along v.
        weight: strength / distance^2, over the number of differences that are averaged.
        value: the penalty's value from Hv of all ranks' batches together (flat, over the tensors), which is
            [g(theta + distance v) - g(theta - distance v)] / (2 distance). By default the value is v'Hv of this rank's
            batch.
    """

    tensors: Sequence[Tensor]
    direction: Callable[[], list[Tensor]]
    distance: float
    weight: float
    value: Callable[[Tensor], Tensor] | None = None

    @property
    def needs_product(self) -> bool:
        """Whether the whole vector Hv is needed, not only v'Hv."""
        return self.value is not None

    def slope(self, v: Sequence[Tensor], gradients: Mapping[Tensor, Tensor | None]) -> Tensor:
        """v'g, of a gradient by tensor; a tensor without a gradient does not count."""
        pairs = [(part, g) for part, t in zip(v, self.tensors, strict=True) if (g := gradients.get(t)) is not None]
        return dot([part for part, _ in pairs], [gradient for _, gradient in pairs], self.tensors[0])

    def flat_gradient(self, gradients: Mapping[Tensor, Tensor | None]) -> Tensor:
        """g over the tensors, as one vector; zero where a tensor has none."""
        found = [(tensor, gradients.get(tensor)) for tensor in self.tensors]
        return pack([torch.zeros_like(tensor) if g is None else g for tensor, g in found])


@dataclass(frozen=True, kw_only=True)
class DifferenceContext:
    """What one training step offers a penalty that is made of second differences.

    Args:
        parameters: the model's parameters theta, by name.
        strength: the penalty's factor in the loss.
        probes: where random vectors come from.
        hessian_vector_product: ``hessian_vector_product(difference)`` is Hv of all ranks' batches together along a
            difference (flat, over its tensors), for a search. It takes two runs of the step that leave no trace. Every
            rank must call it as often.
    """

    parameters: Mapping[str, Tensor]
    strength: float
    probes: ProbeSource
    hessian_vector_product: Callable[[SecondDifference], Tensor]
