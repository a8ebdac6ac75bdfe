"""Estimators of the operator norm of the weight Hessian, by power iteration across steps."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_hessian.curvature import ProbeSource, power_iteration
from lightning_hessian.curvature.backward_watch import at_backward_end
from lightning_hessian.curvature.taylor import taylor_mode
from lightning_hessian.curvature.vectors import normalize_rows, pack, unpack
from lightning_hessian.penalties.base import Needs
from lightning_hessian.penalties.differences import DifferenceContext, SecondDifference
from lightning_hessian.penalties.estimator import DifferenceEstimator, Estimator
from lightning_hessian.penalties.step_context import ForwardContext, StepContext

FIRST_SEARCH = 5
"""Additional iterations if there is no v yet."""


@dataclass
class PowerVector:
    """State of the power iteration between steps.

    Args:
        parts: v by parameter name. Empty before the first step.
        sign: the sign of v'Hv.
        is_fixed: v stays as it is.

    Attributes:
        awaits_product: whether a step has left the next v to a backward pass, which did not give it (yet).
    """

    parts: dict[str, Tensor] = field(default_factory=dict)
    sign: float = 1.0
    is_fixed: bool = False
    awaits_product: bool = field(default=False, init=False)

    def fits(self, selected: Mapping[str, Tensor]) -> bool:
        """Whether v belongs to these parameters."""
        return bool(self.parts) and _shapes(self.parts) == _shapes(selected)

    def start(self, selected: Mapping[str, Tensor], probes: ProbeSource) -> tuple[Tensor, int]:
        """The initial v, flat, and the number of iterations to run before those of the step."""
        first = next(iter(selected.values()))
        if self.fits(selected):
            return pack([self.parts[name] for name in selected]).to(first.device, first.dtype), 0
        if self.parts:
            changed = sorted(set(_shapes(self.parts).items()) ^ set(_shapes(selected).items()))
            warnings.warn(
                "HessianNorm's vector belongs to other parameters than the selected ones (the first difference is "
                f"{changed[0][0]!r}). The search starts anew.",
                stacklevel=2,
            )
        size = sum(tensor.numel() for tensor in selected.values())
        # All ranks must start from the same vector.
        return probes.shared().draw(size, 0, first.device, first.dtype), FIRST_SEARCH

    def keep(self, u: Tensor, selected: Mapping[str, Tensor]) -> bool:
        """Store u for the next step, unless it is zero or NaN."""
        if self.is_fixed:
            return False
        self.awaits_product = False
        is_usable = u.square().sum().item() > 0
        if is_usable:
            self.parts = dict(zip(selected, unpack(u, list(selected.values())), strict=True))
        return is_usable

    def state_dict(self) -> dict[str, Any]:
        return {"v": self.parts, "sign": self.sign} if self.parts else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.parts = dict(state.get("v", {}))
        self.sign = state.get("sign", 1.0)
        self.awaits_product = False


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _sign(value: Tensor) -> float:
    return -1.0 if value.item() < 0 else 1.0


@dataclass(frozen=True, kw_only=True)
class NormEstimator(Estimator):
    """An estimator of ||H||_2.

    Args:
        selected: returns the penalized parameters of a context.
        iterations: power iterations per step; the last one carries the gradient.
        vector: state kept between steps.
    """

    iterations: int
    vector: PowerVector

    @abstractmethod
    def with_fixed_direction(self, context: StepContext) -> Callable[[StepContext], Tensor]:
        """The value, with the direction fixed to the search's result at ``context``."""


class AutogradNorm(NormEstimator):
    """||Hv|| = u'Hv, u = Hv / ||Hv||, by double differentiation. The gradient treats u and v as constants."""

    method = "autograd"

    @property
    def needs(self) -> Needs:
        return Needs(derivatives=3)

    def value(self, context: StepContext) -> Tensor:
        u, _, product = self._iterate(context)
        self.vector.keep(u, self.selected(context))
        return torch.dot(u, product)

    def with_fixed_direction(self, context: StepContext) -> Callable[[StepContext], Tensor]:
        u, v, _ = self._iterate(context)
        return lambda other: torch.dot(u, other.hessian(self.selected(other)).matvec(v, create_graph=True))

    def _iterate(self, context: StepContext) -> tuple[Tensor, Tensor, Tensor]:
        """u, v, and this rank's Hv with its graph."""
        selected = self.selected(context)
        hessian = context.hessian(selected)

        def matvec(v: Tensor) -> Tensor:
            return context.mean_over_ranks(hessian.matvec(v[0])).unsqueeze(0)

        start, first_search = self.vector.start(selected, context.probes)
        v = power_iteration(matvec, start.unsqueeze(0), self.iterations - 1 + first_search)[0]
        product = hessian.matvec(v, create_graph=True)
        # u is 0 if the product is 0, where the norm has no gradient.
        u = normalize_rows(context.mean_over_ranks(product.detach()).unsqueeze(0))[0]
        return u, v, product


class TaylorNorm(AutogradNorm):
    """|v'Hv|, the loss's second Taylor coefficient along v, a constant.

    v is a leaf of the graph: the step's backward pass leaves d(v'Hv)/dv = 2 Hv there, the direction of the next v.
    The search and the value of a step go by autograd where there is no v to start from, and where the pass before left
    none: ``torch.autograd.grad`` visits only the leaves it is asked for.
    """

    method = "taylor"

    @property
    def needs(self) -> Needs:
        is_ready = self.vector.parts and not self.vector.awaits_product
        return Needs(derivatives=1, taylor=True) if is_ready else super().needs

    def forward_mode(self, context: ForwardContext) -> taylor_mode:
        """The mode that carries the coefficients along v."""
        selected = self.selected(context)
        start, _ = self.vector.start(selected, context.probes)
        v = [part.detach().requires_grad_() for part in unpack(start, list(selected.values()))]
        return taylor_mode(list(selected.values()), [v], context.module)

    def value(self, context: StepContext) -> Tensor:
        mode = context.taylor
        if mode is None:
            return super().value(context)
        self.vector.awaits_product = not self.vector.is_fixed
        selected = self.selected(context)
        # The hooks must not hold the graph, in which v is: that circle would never be freed.
        mean_over_ranks = context.mean_over_ranks
        form = mode.second(context.loss)
        sign = _sign(mean_over_ranks(form.detach()))
        products: dict[str, Tensor] = {}

        def receive(name: str, product: Tensor | None) -> None:
            if product is None:  # the penalty was left out of the loss
                self.vector.awaits_product = False
                return
            if not products:
                at_backward_end(finish)
            products[name] = product

        def finish() -> None:
            parts = [products.get(name, torch.zeros_like(tensor)) for name, tensor in selected.items()]
            products.clear()
            product = mean_over_ranks(pack(parts).mul_(sign))
            self.vector.keep(normalize_rows(product.unsqueeze(0))[0], selected)

        for name, (v,) in zip(selected, mode.parts, strict=True):
            if v is not None:
                v.register_hook(partial(receive, name))
        return sign * form

    def vector_at(self, context: StepContext) -> PowerVector:
        """The v of this step, not to be changed by another: the kept one, or the result of a search."""
        if self.vector.parts:
            return PowerVector(dict(self.vector.parts), is_fixed=True)
        selected = self.selected(context)
        _, v, _ = self._iterate(context)
        return PowerVector(dict(zip(selected, unpack(v, list(selected.values())), strict=True)), is_fixed=True)


@dataclass(frozen=True, kw_only=True)
class CentralDifferenceNorm(NormEstimator, DifferenceEstimator):
    """|v'Hv|, Hv = [g(theta + e v) - g(theta - e v)] / 2e, from ordinary passes.

    Args:
        step: e; None for a default that depends on the dtype.
    """

    method = "central_difference"
    # bfloat16's 8 significant bits cannot resolve the second difference. v is not sharded, so parameters must not be.
    needs = Needs(derivatives=1, differences=True, smooth=True, full_precision=True, whole_parameters=True)
    step: float | None

    def differences(self, context: DifferenceContext) -> list[SecondDifference]:
        selected = self.selected(context)
        tensors = list(selected.values())
        distance = self._default_distance(tensors) if self.step is None else float(self.step)
        start, first_search = self.vector.start(selected, context.probes)
        sign = self.vector.sign

        def difference(v: Tensor, weight: float) -> SecondDifference:
            def value(product: Tensor) -> Tensor:
                form = torch.dot(v, product)
                if self.vector.keep(normalize_rows(product.unsqueeze(0))[0], selected):
                    self.vector.sign = _sign(form)
                return form.abs()

            return SecondDifference(
                tensors=tensors, direction=lambda: unpack(v, tensors), distance=distance, weight=weight, value=value
            )

        def matvec(v: Tensor) -> Tensor:
            nonlocal sign
            product = context.hessian_vector_product(difference(v[0], 1.0))
            sign = _sign(torch.dot(v[0], product))
            return product.unsqueeze(0)

        v = power_iteration(matvec, start.unsqueeze(0), self.iterations - 1 + first_search)[0]
        return [difference(v, sign * context.strength / distance**2)]

    def with_fixed_direction(self, context: StepContext) -> Callable[[StepContext], Tensor]:
        return self.value

    def _default_distance(self, tensors: Sequence[Tensor]) -> float:
        # The error of a second difference of gradients is O(e^2) + O(eps / e^2). The O(e^2) part is larger along v, the
        # direction of highest curvature, than along the trace's probes, whose step is eight times as long.
        share = torch.finfo(tensors[0].dtype).eps ** 0.25 / 16
        return share * torch.stack([tensor.detach().square().sum() for tensor in tensors]).sum().sqrt().item()
