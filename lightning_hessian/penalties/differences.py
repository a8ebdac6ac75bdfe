"""Penalties made of differences of the step's loss at displaced parameters: their terms and their context."""

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
    """A term of the loss, weight * [L(theta + distance v) + L(theta - distance v) - 2 L(theta)].

    Args:
        tensors: the displaced tensors of theta.
        direction: returns v as one tensor per displaced tensor, of the same shape (for a sharded tensor, this
            process's shard). Each call recomputes v, so that no vector of the model's size stays in memory.
        distance: displacement of theta along v.
        weight: the factor, such as strength / distance^2 over the number of averaged differences.
        value: computes the penalty's value from Hv, the product over all ranks' batches (flat, over ``tensors``):
            Hv = [g(theta + distance v) - g(theta - distance v)] / (2 distance). By default the value is v'Hv of this
            rank's batch.
    """

    tensors: Sequence[Tensor]
    direction: Callable[[], list[Tensor]]
    distance: float
    weight: float
    value: Callable[[Tensor], Tensor] | None = None

    @property
    def distances(self) -> tuple[float, float]:
        """The displacements along v."""
        return self.distance, -self.distance

    @property
    def needs_product(self) -> bool:
        """Whether the value needs the vector Hv, not only v'Hv."""
        return self.value is not None

    def slope(self, v: Sequence[Tensor], gradients: Mapping[Tensor, Tensor | None]) -> Tensor:
        """v'g for gradients by tensor. Tensors without a gradient contribute 0."""
        pairs = [(part, g) for part, t in zip(v, self.tensors, strict=True) if (g := gradients.get(t)) is not None]
        return dot([part for part, _ in pairs], [gradient for _, gradient in pairs], self.tensors[0])

    def flat_gradient(self, gradients: Mapping[Tensor, Tensor | None]) -> Tensor:
        """g over the tensors as one vector, zero for tensors without a gradient."""
        found = [(tensor, gradients.get(tensor)) for tensor in self.tensors]
        return pack([torch.zeros_like(tensor) if g is None else g for tensor, g in found])


@dataclass(frozen=True, kw_only=True)
class AscentDifference:
    """A term of the loss, weight * [L(theta + e) - L(theta)], with e computed from the gradient g of L(theta).

    e is a constant: the term's gradient is weight * [g(theta + e) - g(theta)].

    Args:
        tensors: the displaced tensors of theta.
        displacement: returns e from g, both as one tensor per displaced tensor (for a sharded tensor, this process's
            shard).
        weight: the factor, such as the strength.
        over_ranks: g is the mean gradient of all ranks' batches, not of this rank's. (With sharded parameters it always
            is.)
    """

    tensors: Sequence[Tensor]
    displacement: Callable[[Sequence[Tensor]], list[Tensor]]
    weight: float
    over_ranks: bool = False

    @property
    def distances(self) -> tuple[float]:
        """The displacements along e."""
        return (1.0,)


@dataclass(frozen=True, kw_only=True)
class DifferenceContext:
    """The input of a penalty made of differences, for one training step.

    Args:
        parameters: the model's parameters theta, by name.
        strength: the penalty's factor in the loss.
        probes: source of random vectors.
        hessian_vector_product: ``hessian_vector_product(difference)`` is Hv along a difference, over all ranks' batches
            (flat, over its tensors), for a search. It runs the step twice without side effects. All ranks must call it
            equally often.
    """

    parameters: Mapping[str, Tensor]
    strength: float
    probes: ProbeSource
    hessian_vector_product: Callable[[SecondDifference], Tensor]
