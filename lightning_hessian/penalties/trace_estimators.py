"""Estimators of the trace of the weight Hessian."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_hessian.curvature import Distribution, HessianOperator, ProbeSource, refuse_unsound_graph
from lightning_hessian.curvature.gauss_newton import random_factors
from lightning_hessian.curvature.operators import vector_jacobian_product
from lightning_hessian.curvature.sharding import local, shard_like, sum_over_shards
from lightning_hessian.curvature.taylor import taylor_mode
from lightning_hessian.curvature.vectors import pack
from lightning_hessian.penalties.base import Needs
from lightning_hessian.penalties.differences import DifferenceContext, SecondDifference
from lightning_hessian.penalties.estimator import DifferenceEstimator, Estimator
from lightning_hessian.penalties.step_context import ForwardContext, StepContext

Drop = Literal["tensor", "element"]

Sizes = Sequence[Tensor] | None
"""The diagonal of D in tr(D H D), one part per tensor; None for D = I."""


def no_sizes(tensors: Sequence[Tensor]) -> Sizes:
    """D = I: the unscaled trace."""
    return None


def filter_sizes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The size of each filter: root mean square over all dimensions but the first. For vectors, the absolute value of
    each entry. The results are constants, without a graph."""
    return [_filter_size(local(tensor)) for tensor in tensors]


def _filter_size(tensor: Tensor) -> Tensor:
    if tensor.dim() < 2:
        return tensor.abs()
    return tensor.square().mean(dim=tuple(range(1, tensor.dim())), keepdim=True).sqrt()


@dataclass(frozen=True, kw_only=True)
class TraceProbes:
    """How to draw the probes v of a trace, with E[v v'] = D^2.

    Args:
        count: number of probes to average over.
        distribution: of their entries.
        keep: probability of keeping a part of v.
        drop: the parts to keep or drop: whole tensors, or single elements.
    """

    count: int
    distribution: Distribution
    keep: float
    drop: Drop

    def draw(
        self, source: ProbeSource, tensors: Sequence[Tensor], sizes: Sizes, index: int
    ) -> tuple[list[int], Callable[[], list[Tensor]]]:
        """Indices of the kept tensors, and a function that returns v over them. It redraws v at each call to save
        memory."""
        kept, factor = list(range(len(tensors))), 1.0
        if self.keep < 1 and self.drop == "tensor":
            kept, factor = source.kept_tensors(len(tensors), self.keep, index)
        counts = [tensors[i].numel() for i in kept]
        first = tensors[kept[0]]
        keep_elements = self.keep if self.drop == "element" else 1.0

        def v() -> list[Tensor]:
            flat = source.draw(sum(counts), index, first.device, first.dtype, self.distribution, keep_elements)
            parts = []
            for i, part in zip(kept, flat.split(counts), strict=True):
                part = shard_like(part.view(tensors[i].shape).to(tensors[i].dtype), like=tensors[i])
                part = part if sizes is None else part * sizes[i]
                parts.append(part if factor == 1 else part * math.sqrt(factor))
            return parts

        return kept, v


@dataclass(frozen=True, kw_only=True)
class TraceEstimator(Estimator):
    """An estimator of tr(D H D).

    Args:
        selected: returns the penalized parameters of a context.
        probes: how to draw v.
        sizes: computes the diagonal of D from the parameters.
    """

    name: ClassVar[str] = "hessian_trace"
    probes: TraceProbes
    sizes: Callable[[Sequence[Tensor]], Sizes]


class AutogradTrace(TraceEstimator):
    """v'Hv by double differentiation."""

    method = "autograd"
    needs = Needs(derivatives=3)

    def value(self, context: StepContext) -> Tensor:
        tensors = list(self.selected(context).values())
        sizes = self.sizes(tensors)
        draws = [self.probes.draw(context.probes, tensors, sizes, index) for index in range(self.probes.count)]
        # All probes share one first gradient. It omits tensors that no probe keeps.
        needed = sorted({i for kept, _ in draws for i in kept})
        hessian = HessianOperator(context.loss, [tensors[i] for i in needed], differentiable=True)
        forms = [hessian.quadratic_form(pack(v()), [needed.index(i) for i in kept]) for kept, v in draws]
        return torch.stack(forms).mean()


class TaylorTrace(AutogradTrace):
    """v'Hv as the second Taylor coefficient of the loss along theta + t v."""

    method = "taylor"
    needs = Needs(derivatives=1, taylor=True, whole_parameters=False, float16=True)

    def forward_mode(self, context: ForwardContext) -> taylor_mode:
        """The mode that carries the coefficients along all probes."""
        tensors = list(self.selected(context).values())
        sizes = self.sizes(tensors)
        scale = self._scale(tensors)
        directions: list[list[Tensor | None]] = []
        for index in range(self.probes.count):
            kept, v = self.probes.draw(context.probes, tensors, sizes, index)
            direction: list[Tensor | None] = [None] * len(tensors)
            for i, part in zip(kept, v(), strict=True):
                direction[i] = part if scale == 1 else part * scale
            directions.append(direction)
        return taylor_mode(tensors, directions, context.module, scale)

    def _scale(self, tensors: Sequence[Tensor]) -> float:
        """The probes' factor, for float16: the coefficients along v would overflow, those along a vector of an eighth
        of the parameters' size do not. It is a power of two, which rounds nothing."""
        kind = tensors[0].device.type
        if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) != torch.float16:
            return 1.0
        size = 1.0 if self.sizes is filter_sizes else _root_mean_square(tensors)
        return 2.0 ** (round(math.log2(size)) - 3) if size else 1.0

    def value(self, context: StepContext) -> Tensor:
        if context.taylor is None:
            return super().value(context)  # the same number, from the graph of a loss that is computed already
        return context.taylor.second(context.loss) / self.probes.count


class ExactTrace(TraceEstimator):
    """sum_i d_i^2 e_i'He_i over all unit vectors, one row at a time."""

    method = "autograd"
    needs = Needs(derivatives=3)

    def value(self, context: StepContext) -> Tensor:
        tensors = list(self.selected(context).values())
        sizes = self.sizes(tensors)
        hessian = HessianOperator(context.loss, tensors, differentiable=True)
        diagonal = []
        for k, (gradient, tensor) in enumerate(zip(hessian.gradient, hessian.tensors, strict=True)):
            if not gradient.requires_grad:
                continue
            squares = torch.ones_like(tensor) if sizes is None else sizes[k].expand_as(tensor).square()
            for i, (entry, square) in enumerate(zip(gradient.reshape(-1), squares.reshape(-1), strict=True)):
                (row,) = vector_jacobian_product([entry], [tensor], [torch.ones_like(entry)], create_graph=True)
                diagonal.append(square * row.reshape(-1)[i])
        return torch.stack(diagonal).sum() if diagonal else hessian.gradient[0].new_zeros(())


class GaussNewtonTrace(TraceEstimator):
    """||D sum_i J_i' S_i u_i||^2, with expectation tr(D G D)."""

    method = "gauss_newton"
    name = "gauss_newton_trace"
    needs = Needs(derivatives=2, losses=True)

    def value(self, context: StepContext) -> Tensor:
        tensors = list(self.selected(context).values())
        sizes = self.sizes(tensors)
        custom = refuse_unsound_graph(context.loss, derivatives=2)
        seen = context.losses, context.loss, context.inputs
        squares = []
        for index in range(self.probes.count):
            factors = random_factors(*seen, context.probes, index, self.probes.distribution)
            z, su = zip(*factors, strict=True)
            rows = vector_jacobian_product(z, tensors, su, True, custom)
            if sizes is not None:
                rows = [row * size for row, size in zip(rows, sizes, strict=True)]
            squares += [row.square().sum() for row in rows]
        return torch.stack(squares).sum() / self.probes.count


@dataclass(frozen=True, kw_only=True)
class DifferenceTrace(TraceEstimator, DifferenceEstimator):
    """v'Hv = [L(theta + e v) + L(theta - e v) - 2 L(theta)] / e^2 + O(e^2)."""

    @abstractmethod
    def distance(self, context: DifferenceContext, tensors: Sequence[Tensor]) -> float:
        """Displacement of theta along v."""

    def differences(self, context: DifferenceContext) -> list[SecondDifference]:
        tensors = list(self.selected(context).values())
        sizes = self.sizes(tensors)
        distance = self.distance(context, tensors)
        weight = context.strength / (self.probes.count * distance**2)
        found = []
        for index in range(self.probes.count):
            kept, v = self.probes.draw(context.probes, tensors, sizes, index)
            moved = [tensors[i] for i in kept]
            found.append(SecondDifference(tensors=moved, direction=v, distance=distance, weight=weight))
        return found


class TwoPassTrace(DifferenceTrace):
    """strength v'Hv = [L(theta + s v) + L(theta - s v)] / 2 - L(theta) with s = sqrt(2 strength): L(theta) cancels."""

    method = "two_pass"
    needs = Needs(derivatives=1, differences=True, whole_parameters=False)

    def distance(self, context: DifferenceContext, tensors: Sequence[Tensor]) -> float:
        return math.sqrt(2 * context.strength)


@dataclass(frozen=True, kw_only=True)
class CentralDifferenceTrace(DifferenceTrace):
    """The difference with a distance independent of the strength.

    Args:
        step: the distance. None: eps^(1/4) / 2 times the root mean square of the parameters, with the dtype's machine
            epsilon eps.
    """

    method = "central_difference"
    # bfloat16's 8 significant bits cannot resolve a second difference with a small step.
    needs = Needs(derivatives=1, differences=True, smooth=True, full_precision=True, whole_parameters=False)
    step: float | None

    def distance(self, context: DifferenceContext, tensors: Sequence[Tensor]) -> float:
        if self.step is not None:
            return float(self.step)
        # The error of a second difference of gradients is O(e^2) + O(eps / e^2).
        share = torch.finfo(tensors[0].dtype).eps ** 0.25 / 2
        if self.sizes is filter_sizes:
            return share
        return share * _root_mean_square(tensors)


def _root_mean_square(tensors: Sequence[Tensor]) -> float:
    """Of all entries."""
    squares = torch.stack([local(tensor).square().sum() for tensor in tensors]).sum()
    return math.sqrt(sum_over_shards(squares, tensors[0]).item() / sum(tensor.numel() for tensor in tensors))
