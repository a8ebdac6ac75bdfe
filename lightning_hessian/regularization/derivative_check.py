"""Derivatives of a function against central differences in float64, and the layers whose derivatives are wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_hessian.curvature import HessianOperator, higher_order, padding_rows
from lightning_hessian.curvature.displacement import at_distances
from lightning_hessian.curvature.graph import kinked_layers, kinks
from lightning_hessian.curvature.taylor import taylor_mode
from lightning_hessian.curvature.vectors import pack
from lightning_hessian.step.isolation import Snapshot, seed_all

TOLERANCE = 1e-4
"""The relative error above which a derivative is called wrong. Sound ones are nearer to 1e-8."""

_STEPS = (1e-4, 1e-5, 1e-6)
_DIRECTIONS = 3


def _relative(a: Tensor, b: Tensor) -> float:
    size = max(a.norm().item(), b.norm().item())
    return (a - b).norm().item() / size if size > 0 else 0.0


def is_right(error: float) -> bool:
    """Whether a relative error is small enough."""
    return error < TOLERANCE  # what is not a number is not right


class DerivativeCheck:
    """Derivatives of a scalar function of some tensors against central differences.

    Args:
        module: the module that the function runs.
        function: gives a scalar with its graph.
        tensors: with respect to which.
        by_taylor: compute v'Hv by Taylor coefficients, not by autograd.
        plain: gives the same scalar outside of any mode; by default the function does.

    Attributes:
        converged: whether the differences agreed among themselves wherever a derivative was wrong.
    """

    def __init__(
        self,
        module: nn.Module,
        function: Callable[[], Tensor],
        tensors: Sequence[Tensor],
        by_taylor: bool = False,
        plain: Callable[[], Tensor] | None = None,
    ) -> None:
        self.module = module
        self.function = function
        self.plain = plain or function
        self.tensors = list(tensors)
        self.by_taylor = by_taylor
        self.converged = True
        self.before = Snapshot(module, self.tensors[0].device)
        generator = torch.Generator().manual_seed(0)
        # A direction moves each tensor in proportion to its own size, so that no step is too long for a small one.
        self.directions = [
            [torch.randn(t.shape, generator=generator, device="cpu").to(t) * _scale(t) for t in self.tensors]
            for _ in range(_DIRECTIONS)
        ]
        # An embedding's padding row is a constant to autograd.
        for tensor, row in padding_rows(module).items():
            for i, own in enumerate(self.tensors):
                if own is tensor:
                    for direction in self.directions:
                        direction[i][row] = 0

    def evaluate(self, function: Callable[[], Tensor] | None = None) -> Tensor:
        """The function at the present tensors, with the same buffers and random numbers each time."""
        with self.before.rewound(), torch.enable_grad():
            seed_all(0, self.tensors[0].device)
            return (function or self.function)()

    def quadratic_form(self, v: Sequence[Tensor], tensors: Sequence[Tensor] | None = None) -> Tensor:
        """v'Hv with its graph, H with respect to some of the tensors; by default to all."""
        tensors = self.tensors if tensors is None else tensors
        if not self.by_taylor:
            return HessianOperator(self.evaluate(), tensors).quadratic_form(pack(v))
        with taylor_mode(tensors, [v], self.module) as mode:
            value = self.evaluate(self.plain)
        return mode.second(value)

    def loss_gradient(self) -> float:
        """The relative error of the gradient."""
        return self.gradient_of(lambda value: value)

    def hessian(self, tensors: Sequence[Tensor] | None = None) -> float:
        """The relative error of v'Hv, which needs one derivative more than the gradient that is differenced.

        Args:
            tensors: H is with respect to these; by default to all.
        """
        chosen = [tensors is None or any(one is own for one in tensors) for own in self.tensors]
        v = [x if is_chosen else torch.zeros_like(x) for x, is_chosen in zip(self.directions[0], chosen, strict=True)]
        pairs = [(own, x) for own, x, is_chosen in zip(self.tensors, v, chosen, strict=True) if is_chosen]
        exact = [self.quadratic_form([x for _, x in pairs], [own for own, _ in pairs]).item()]
        return self._error(exact, [v], lambda: _dot(self._gradient(self.evaluate()), v))

    def gradient_of(self, measure: Callable[[Tensor], Tensor]) -> float:
        """The relative error of the gradient of a measure of the function's value."""
        return self.gradient_error(lambda: measure(self.evaluate()))

    def gradient_error(self, value: Callable[[], Tensor]) -> float:
        """The relative error of the gradient of any value."""
        gradient = self._gradient(value())
        exact = [_dot(gradient, direction).item() for direction in self.directions]
        return self._error(exact, self.directions, value)

    def _gradient(self, value: Tensor) -> Sequence[Tensor]:
        if not value.requires_grad:
            return [torch.zeros_like(tensor) for tensor in self.tensors]
        return torch.autograd.grad(value, self.tensors, allow_unused=True, materialize_grads=True)

    def _error(self, exact: list[float], directions: list[list[Tensor]], value: Callable[[], Tensor]) -> float:
        if not all(map(math.isfinite, exact)):
            return math.nan
        # The truncation error grows with the step and the rounding error shrinks: take the best of a few steps.
        found = [self._differences(step, directions, value) for step in _STEPS]
        errors = [_relative(torch.tensor(exact), differences) for differences in found]
        best = min((error for error in errors if math.isfinite(error)), default=math.nan)
        if not is_right(best):
            # Where the differences agree among themselves, it is the derivative that is wrong.
            self.converged &= any(is_right(_relative(a, b)) for a, b in pairwise(found))
        return best

    def _differences(self, step: float, directions: list[list[Tensor]], value: Callable[[], Tensor]) -> Tensor:
        differences = []
        for direction in directions:
            ahead, behind = at_distances(self.tensors, direction, [step, -step], lambda: value().item())
            differences.append((ahead - behind) / (2 * step))
        return torch.tensor(differences)


def layers_at_fault(module: nn.Module, check: DerivativeCheck) -> tuple[str, ...]:
    """The innermost layers whose derivatives are wrong by themselves, on the inputs they get in the model."""
    calls: dict[str, tuple[nn.Module, Any, Any]] = {}

    def record(name: str) -> Callable[..., None]:
        def keep(layer: nn.Module, args: Any, kwargs: Any) -> None:
            # As they are now: a layer further on may change its inputs in place.
            if name not in calls:
                calls[name] = (layer, *apply_to_collection((args, kwargs), Tensor, lambda t: t.detach().clone()))

        return keep

    handles = [
        layer.register_forward_pre_hook(record(name), with_kwargs=True)
        for name, layer in module.named_modules()
        if name
    ]
    try:
        check.evaluate(check.plain)
    finally:
        for handle in handles:
            handle.remove()

    faults: list[str] = []
    for name in sorted(calls, key=lambda name: -name.count(".")):
        if any(fault.startswith(name + ".") for fault in faults):
            continue
        if not is_right(_layer_error(*calls[name], check.by_taylor)):
            faults.append(name)
    return tuple(faults)


def _layer_error(layer: nn.Module, args: Any, kwargs: Any, by_taylor: bool) -> float:
    """The worst relative error of the layer's first, second and third derivative by its inputs and parameters."""
    tensors: list[Tensor] = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        tensors.append(tensor.detach().clone().requires_grad_())
        return tensors[-1]

    def inputs() -> Any:
        # Clones, because a layer may work in place.
        return apply_to_collection((args, kwargs), Tensor, lambda t: t.clone() if t.requires_grad else t)

    args, kwargs = apply_to_collection((args, kwargs), Tensor, leaf)
    if not tensors:
        return 0.0

    def function() -> Tensor:
        outputs: list[Tensor] = []
        own_args, own_kwargs = inputs()
        context = higher_order(layer)
        inside = nullcontext() if by_taylor else context
        with FullPrecision(), inside, context.explained():
            # A linear head alone would not look at products of the outputs' derivatives.
            apply_to_collection(layer(*own_args, **own_kwargs), Tensor, lambda y: outputs.append(y))
        value = torch.zeros(())
        for index, y in enumerate(y for y in outputs if y.is_floating_point()):
            weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(index), device="cpu").to(y)
            value = value + (weights * y).sum() + (weights * y.square()).mean()
        return value

    check = DerivativeCheck(layer, function, tensors, by_taylor)
    try:
        if not check.evaluate().requires_grad:
            return 0.0
        v = check.directions[0]
        errors = [
            check.loss_gradient(),
            check.hessian(),
            check.gradient_error(lambda: check.quadratic_form(v)),
        ]
        worst = max(errors) if all(map(math.isfinite, errors)) else math.nan
        undecided = not check.converged and (kinked_layers(layer) or kinks(check.evaluate()))
        return 0.0 if undecided and not math.isnan(worst) else worst
    except RuntimeError:  # no derivative at all
        return math.inf


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _scale(tensor: Tensor) -> float:
    size = tensor.detach().square().mean().sqrt().item()
    return size if size > 0 else 0.1


class FullPrecision(TorchFunctionMode):
    """Layers that compute a part in float32 on purpose do it in float64: their rounding is not to be judged here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextmanager
def float64_by_default() -> Iterator[None]:
    """Inside, new tensors are float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
