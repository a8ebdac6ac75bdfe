"""Is the penalty's gradient right on this very model? Finite differences in float64 answer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_hessian.curvature import (
    HessianOperator,
    HigherOrderError,
    ProbeSource,
    higher_order,
    padding_rows,
    select_parameters,
)
from lightning_hessian.curvature.graph import is_kinked, kinked_layers, kinks
from lightning_hessian.penalties import Penalty, StepContext
from lightning_hessian.regularization.injection import loss_of
from lightning_hessian.regularization.standalone import quiet_copy, step_of
from lightning_hessian.step.batches import exchanged, tensors_in
from lightning_hessian.step.isolation import RandomState, seed_all
from lightning_hessian.step.passes import Passes, attributes_of, not_repeatable, same_loss

TOLERANCE = 1e-4
"""The relative error above which a derivative is called wrong. Sound ones are nearer to 1e-8."""

OUTSIDE = "the training step's or the penalty's own code, outside any layer"
"""Named as the fault where every layer is right by itself."""

_STEPS = (1e-4, 1e-5, 1e-6)
_DIRECTIONS = 3


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found. Errors are relative to central differences in float64.

    Args:
        penalty: the penalty, as printed.
        value: the penalty's value on the batch.
        loss_gradient_error: of the task loss's gradient. Where this one is wrong the loss is not the function that
            its gradient belongs to: a straight-through estimator, a detached statistic, spectral norm in training.
        hessian_error: of Hessian-vector products of the task loss.
        penalty_gradient_error: of the gradient that the penalty trains with.
        replaced: the layers that ``higher_order()`` had to replace, with their operator.
        faults: the layers at fault where an error is too large.
        kinks: activations and functions whose first derivative jumps. A difference across a kink is no derivative:
            where the differences do not converge, and no layer is at fault, nothing is decided.
    """

    penalty: str
    value: float
    loss_gradient_error: float
    hessian_error: float
    penalty_gradient_error: float
    replaced: dict[str, str] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
    kinks: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all three derivatives agree with finite differences."""
        return all(map(_is_right, (self.loss_gradient_error, self.hessian_error, self.penalty_gradient_error)))

    def __str__(self) -> str:
        wrong = "UNDECIDED" if self.kinks and not self.faults else "WRONG"

        def row(what: str, error: float) -> str:
            return f"  {what:<26}{error:9.1e}  {'right' if _is_right(error) else wrong}"

        lines = [
            f"{self.penalty}: the gradient is {'right' if self.ok else wrong} (value {self.value:.6g})",
            "  relative error against central differences in float64",
            row("gradient of the loss", self.loss_gradient_error),
            row("Hessian-vector product", self.hessian_error),
            row("gradient of the penalty", self.penalty_gradient_error),
        ]
        if self.replaced:
            layers = ", ".join(f"{layer} ({operator})" for layer, operator in self.replaced.items())
            lines.append(f"  replaced by higher_order(): {layers}")
        if self.faults:
            lines.append(f"  at fault: {', '.join(self.faults)}")
        if self.kinks and not self.ok:
            lines.append(
                f"  kinks: {', '.join(self.kinks)}. A difference across a kink is no derivative: the penalty sees the "
                "loss between\n  the kinks only. To decide, verify a copy of the model with smooth activations (SiLU, "
                "softplus) in their places."
            )
        return "\n".join(lines)


def verify(
    module: nn.Module,
    batch: Any,
    penalty: Penalty,
    loss: Callable[[Any, Any], Tensor] | None = None,
) -> Verification:
    """Compare the penalty's gradient on a model and a batch of yours with central differences in float64.

    Everything happens on a float64 copy; the module, its buffers, the batch and the random state stay as they are. The
    penalty's probes and all randomness in the step (dropout, ``numpy.random``, ``random``) are the same in every
    evaluation. Where a derivative is wrong, the layer at fault is the innermost whose own derivatives are wrong while
    those of all layers inside it are right.

    Args:
        module: a LightningModule, or any module if ``loss`` is given; in the mode you train in.
        batch: a batch as the training step gets it; a few samples do.
        penalty: for example ``HessianTrace()``.
        loss: ``loss(module, batch)`` returns the task loss; by default the module's ``training_step(batch, 0)``.

    Returns:
        A report that prints readably; its ``ok`` says whether all is right.

    Raises:
        HigherOrderError: an operator has no double backward, or no third one.
        MisconfigurationException: the step returns no differentiable loss or another one when it is run again, or
            optimization is manual and there is no ``loss``.
        ValueError: the penalty cannot be computed on these parameters, or has no higher derivative to verify.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1))
        >>> from lightning_hessian import HessianTrace
        >>> report = verify(net, torch.ones(5, 3), HessianTrace(), loss=lambda net, x: net(x).square().mean())
        >>> report.ok, report.replaced
        (True, {'1': 'layer_norm'})
    """
    if not isinstance(penalty, Penalty):
        raise ValueError(f"penalty={penalty!r} is not a Penalty. Pass an object such as HessianTrace().")
    if penalty.by_differences:
        raise ValueError(
            f"{penalty!r} is made of ordinary first-order gradients, so there is no higher derivative to verify. "
            f"Verify {type(penalty).__name__}(), to which its gradient tends for small steps."
        )
    step = step_of(module, loss)
    twin = quiet_copy(module).double()
    penalty.check(dict(twin.named_parameters()))
    tensors = list(select_parameters(dict(twin.named_parameters())).values())
    batch = _float64(batch, tensors[0].device)
    context = higher_order(twin, derivatives=max(2, penalty.derivatives))
    latest: list[Passes] = []

    def task_loss() -> Tensor:
        with _FullPrecision():
            fresh = _copied(batch)  # a step may change what it is handed
            latest[:] = [Passes(twin, lambda batch: step(twin, batch, 0), fresh, [penalty], loss_of, context=context)]
            task = latest[0].task().loss
        if task is None:
            raise MisconfigurationException("The step returned None for this batch. Pass one that has a loss.")
        return task

    def step_context() -> StepContext:
        return latest[0].context(penalty, ProbeSource(seed=1))

    with _float64_by_default(), context.explained():
        check = _Check(twin, task_loss, tensors)
        first, before = check.evaluate(), attributes_of(twin)
        if not same_loss(first, check.evaluate()):
            raise not_repeatable("verify", before, attributes_of(twin))
        kinked = sorted({*kinks(first), *kinked_layers(twin)})
        try:
            # A direction that the penalty has searched for is a constant of its gradient.
            held = penalty.held(step_context())

            def penalty_value(task: Tensor) -> Tensor:
                with _FullPrecision():
                    return held(step_context())

            errors = check.loss_gradient(), check.hessian(), check.gradient_of(penalty_value)
        except HigherOrderError as error:
            if named := _layers_at_fault(twin, check):
                raise HigherOrderError(f"{error} At fault: {', '.join(named)}.") from error
            raise
        value = penalty_value(check.evaluate()).item()
        faults: tuple[str, ...] = ()
        if not all(map(_is_right, errors)):
            decided = check.converged or not kinked
            # A kinked layer of PyTorch's is right where it has derivatives: it is the differences that fail there.
            found = [name for name in _layers_at_fault(twin, check) if not is_kinked(twin.get_submodule(name))]
            faults = tuple(found) or ((OUTSIDE,) if decided else ())
    return Verification(repr(penalty), value, *errors, context.replaced, faults, tuple(kinked))


def _relative(a: Tensor, b: Tensor) -> float:
    size = max(a.norm().item(), b.norm().item())
    return (a - b).norm().item() / size if size > 0 else 0.0


def _is_right(error: float) -> bool:
    return error < TOLERANCE  # what is not a number is not right


class _Check:
    """Derivatives of a scalar function of some tensors against central differences."""

    def __init__(self, module: nn.Module, function: Callable[[], Tensor], tensors: Sequence[Tensor]) -> None:
        self.module = module
        self.function = function
        self.tensors = list(tensors)
        self.converged = True
        self.buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
        generator = torch.Generator().manual_seed(0)
        # A direction moves each tensor in proportion to its own size, so that no step is too long for a small one.
        self.directions = [
            [torch.randn(t.shape, generator=generator).to(t) * _scale(t) for t in self.tensors]
            for _ in range(_DIRECTIONS)
        ]
        # An embedding's padding row is a constant to autograd.
        for tensor, row in padding_rows(module).items():
            for i, own in enumerate(self.tensors):
                if own is tensor:
                    for direction in self.directions:
                        direction[i][row] = 0

    def evaluate(self) -> Tensor:
        """The function at the present tensors, with the same buffers and random numbers each time."""
        with torch.no_grad():
            for buffer, before in self.buffers:
                buffer.copy_(before)
        device = self.tensors[0].device
        random = RandomState.now(device)
        try:
            seed_all(0, device)
            with torch.enable_grad():
                return self.function()
        finally:
            random.restore()

    def loss_gradient(self) -> float:
        return self.gradient_of(lambda value: value)

    def hessian(self) -> float:
        """Of v'Hv, which needs one derivative more than the gradient that is differenced."""
        v = self.directions[0]
        exact = [_quadratic_form(self.evaluate(), self.tensors, v).item()]
        return self._error(exact, [v], lambda: _dot(self._gradient(self.evaluate()), v))

    def gradient_of(self, measure: Callable[[Tensor], Tensor]) -> float:
        gradient = self._gradient(measure(self.evaluate()))
        exact = [_dot(gradient, direction).item() for direction in self.directions]
        return self._error(exact, self.directions, lambda: measure(self.evaluate()))

    def _gradient(self, value: Tensor) -> Sequence[Tensor]:
        if not value.requires_grad:
            return [torch.zeros_like(tensor) for tensor in self.tensors]
        return torch.autograd.grad(value, self.tensors, allow_unused=True, materialize_grads=True)

    def _error(self, exact: list[float], directions: list[list[Tensor]], value: Callable[[], Tensor]) -> float:
        if not all(map(math.isfinite, exact)):
            return math.nan
        # Truncation wants a short step and rounding a long one: the best of a few is the differences' own error.
        found = [self._differences(step, directions, value) for step in _STEPS]
        errors = [_relative(torch.tensor(exact), differences) for differences in found]
        best = min((error for error in errors if math.isfinite(error)), default=math.nan)
        if not _is_right(best):
            # Where the differences agree among themselves, it is the derivative that is wrong.
            self.converged &= any(_is_right(_relative(a, b)) for a, b in pairwise(found))
        return best

    def _differences(self, step: float, directions: list[list[Tensor]], value: Callable[[], Tensor]) -> Tensor:
        differences = []
        for direction in directions:
            with self._moved(step, direction):
                ahead = value().item()
            with self._moved(-step, direction):
                behind = value().item()
            differences.append((ahead - behind) / (2 * step))
        return torch.tensor(differences)

    @contextmanager
    def _moved(self, step: float, direction: list[Tensor]) -> Iterator[None]:
        before = [tensor.detach().clone() for tensor in self.tensors]
        with torch.no_grad():
            for tensor, towards in zip(self.tensors, direction, strict=True):
                tensor.add_(towards, alpha=step)
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, old in zip(self.tensors, before, strict=True):
                    tensor.copy_(old)


def _layers_at_fault(module: nn.Module, check: _Check) -> tuple[str, ...]:
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
        check.evaluate()
    finally:
        for handle in handles:
            handle.remove()

    faults: list[str] = []
    for name in sorted(calls, key=lambda name: -name.count(".")):
        if any(fault.startswith(name + ".") for fault in faults):
            continue
        if not _is_right(_layer_error(*calls[name])):
            faults.append(name)
    return tuple(faults)


def _layer_error(layer: nn.Module, args: Any, kwargs: Any) -> float:
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
        with _FullPrecision(), higher_order(layer) as context, context.explained():
            # A linear head alone would not look at products of the outputs' derivatives.
            apply_to_collection(layer(*own_args, **own_kwargs), Tensor, lambda y: outputs.append(y))
        value = torch.zeros(())
        for index, y in enumerate(y for y in outputs if y.is_floating_point()):
            weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(index)).to(y)
            value = value + (weights * y).sum() + (weights * y.square()).mean()
        return value

    check = _Check(layer, function, tensors)
    try:
        if not check.evaluate().requires_grad:
            return 0.0
        v = check.directions[0]
        errors = [
            check.loss_gradient(),
            check.hessian(),
            check.gradient_of(lambda value: _quadratic_form(value, tensors, v)),
        ]
        worst = max(errors) if all(map(math.isfinite, errors)) else math.nan
        undecided = not check.converged and (kinked_layers(layer) or kinks(check.evaluate()))
        return 0.0 if undecided and not math.isnan(worst) else worst
    except RuntimeError:  # no derivative at all
        return math.inf


def _quadratic_form(loss: Tensor, tensors: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
    return HessianOperator(loss, tensors).quadratic_form(torch.cat([part.reshape(-1) for part in v]))


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _scale(tensor: Tensor) -> float:
    size = tensor.detach().square().mean().sqrt().item()
    return size if size > 0 else 0.1


def _float64(batch: Any, device: torch.device) -> Any:
    def convert(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to(device)
        return tensor.double() if tensor.is_floating_point() else tensor

    batch = _copied(batch)
    tensors = list(tensors_in(batch))
    return exchanged(batch, tensors, [convert(tensor) for tensor in tensors])


def _copied(batch: Any) -> Any:
    """A batch of its own, also where it is an object of the user's."""
    tensors = list(tensors_in(batch))
    known = {id(tensor): tensor.detach().clone() for tensor in tensors}  # what has a graph cannot be copied deeply
    return copy.deepcopy(batch, known)


class _FullPrecision(TorchFunctionMode):
    """Layers that compute a part in float32 on purpose do it in float64: their rounding is not to be judged here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextmanager
def _float64_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
