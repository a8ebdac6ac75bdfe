"""Checks the penalty's gradient on a model by finite differences in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_hessian.curvature import HigherOrderError, ProbeSource, higher_order, select_parameters
from lightning_hessian.curvature.graph import is_kinked, kinked_layers, kinks
from lightning_hessian.penalties import Penalty, StepContext, WeightPenalty
from lightning_hessian.regularization.derivative_check import (
    DerivativeCheck,
    FullPrecision,
    float64_by_default,
    is_right,
    layers_at_fault,
)
from lightning_hessian.regularization.input_runs import PenaltyRuns, step_for
from lightning_hessian.regularization.task_loss import task_step
from lightning_hessian.step.batches import copied
from lightning_hessian.step.isolation import independent_copy
from lightning_hessian.step.repeatability import check_repeatable
from lightning_hessian.step.repeatable import BatchSkipped

OUTSIDE = "the training step's or the penalty's own code, outside any layer"
"""Named as the fault where every layer is right by itself."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What :func:`verify` found. Errors are relative to central differences in float64.

    Args:
        penalty: the penalty, as printed.
        value: the penalty's value on the batch.
        loss_gradient_error: error of the task loss's gradient. If it is large, autograd's gradient does not belong to
            the loss: a straight-through estimator, a detached statistic, spectral norm in training mode.
        hessian_error: error of Hessian-vector products of the task loss.
        penalty_gradient_error: error of the gradient that the penalty trains with.
        replaced: the layers that ``higher_order()`` replaced, with their operator.
        faults: the layers at fault, if an error is too large.
        kinks: activations and functions whose first derivative jumps. A difference across a kink is no derivative. If
            the differences do not converge and no layer is at fault, nothing is decided.
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
        return all(map(is_right, (self.loss_gradient_error, self.hessian_error, self.penalty_gradient_error)))

    def __str__(self) -> str:
        wrong = "UNDECIDED" if self.kinks and not self.faults else "WRONG"

        def row(what: str, error: float) -> str:
            return f"  {what:<26}{error:9.1e}  {'right' if is_right(error) else wrong}"

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
    """Compare the penalty's gradient on your model and batch with central differences in float64.

    Everything runs on a float64 copy. The module, its buffers, the batch and the random state stay unchanged. The
    penalty's probes and all randomness in the step (dropout, ``numpy.random``, ``random``) are the same in every
    evaluation. A layer is named as the fault if its own derivatives are wrong and those of all layers inside it are
    right.

    Args:
        module: a LightningModule, or any module if ``loss`` is given, in the mode that you train in.
        batch: a batch as the training step gets it; a few samples are enough.
        penalty: for example ``HessianTrace()``.
        loss: ``loss(module, batch)`` returns the task loss; by default the module's ``training_step(batch, 0)``.

    Returns:
        A report that prints readably; ``ok`` says whether all derivatives are right.

    Raises:
        HigherOrderError: an operator has no double backward, or no third one.
        MisconfigurationException: the step returns no differentiable loss, or another loss when it runs again, or
            optimization is manual and there is no ``loss``.
        ValueError: the penalty cannot be computed on these parameters, has no higher derivative to verify, or the
            batch is a DataLoader.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1))
        >>> from lightning_hessian import HessianTrace
        >>> report = verify(net, torch.ones(5, 3), HessianTrace(), loss=lambda net, x: net(x).square().mean())
        >>> report.ok
        True
    """
    if not isinstance(penalty, Penalty):
        raise ValueError(f"penalty={penalty!r} is not a Penalty. Pass an object such as HessianTrace().")
    if isinstance(batch, DataLoader):
        raise ValueError("verify takes one batch, not a DataLoader: verify(module, next(iter(loader)), penalty).")
    if penalty.needs.differences:
        raise ValueError(
            f"{penalty!r} is made of ordinary first-order gradients, so there is no higher derivative to verify. "
            f"Verify {type(penalty).__name__}(), to which its gradient tends for small steps."
        )
    task = task_step(module, loss)
    twin = independent_copy(module).double()
    parameters = dict(twin.named_parameters())
    penalty.check(parameters)
    tensors = list(select_parameters(parameters).values())
    chosen = select_parameters(parameters, penalty.parameters if isinstance(penalty, WeightPenalty) else None)
    device = tensors[0].device
    batch = copied(batch, lambda tensor: _in_float64(tensor.detach().to(device)))
    context = higher_order(twin, derivatives=max(2, penalty.needs.derivatives))
    acting = [penalty]
    latest: list[PenaltyRuns] = []

    def loss_for(penalties: Sequence[Penalty]) -> Tensor:
        with FullPrecision():
            inside = None if acting[0].needs.taylor else context
            step = step_for(penalties, twin, lambda batch: task(twin, batch, 0), copied(batch), inside)
            latest[:] = [PenaltyRuns(step, penalties, [ProbeSource(seed=1)] * len(penalties))]
            try:
                return latest[0].run().loss
            except BatchSkipped as skipped:
                raise MisconfigurationException(f"{skipped} Pass a batch that has a loss.") from skipped

    def step_context() -> StepContext:
        return latest[0].context(acting[0])

    with float64_by_default(), context.explained():
        check = DerivativeCheck(twin, lambda: loss_for(acting), tensors, plain=lambda: loss_for([]))
        try:
            first = check.evaluate()
            check_repeatable(twin, check.evaluate, first, "verify")
            kinked = sorted({*kinks(first), *kinked_layers(twin)})
            # A direction that the penalty has searched for is a constant of its gradient.
            fixed = penalty.with_fixed_direction(step_context())
            if isinstance(fixed, Penalty):
                acting[:] = [fixed]
                check.by_taylor = fixed.needs.taylor
                check.evaluate()

            def penalty_value(task: Tensor) -> Tensor:
                with FullPrecision():
                    return fixed(step_context())

            errors = check.loss_gradient(), check.hessian([*chosen.values()]), check.gradient_of(penalty_value)
        except HigherOrderError as error:
            if named := layers_at_fault(twin, check):
                raise HigherOrderError(f"{error} At fault: {', '.join(named)}.") from error
            raise
        value = penalty_value(check.evaluate()).item()
        faults: tuple[str, ...] = ()
        if not all(map(is_right, errors)):
            decided = check.converged or not kinked
            # A kinked layer of PyTorch's is right where it has derivatives: it is the differences that fail there.
            found = [name for name in layers_at_fault(twin, check) if not is_kinked(twin.get_submodule(name))]
            faults = tuple(found) or ((OUTSIDE,) if decided else ())
    loss_gradient_error, hessian_error, penalty_gradient_error = errors
    return Verification(
        penalty=repr(penalty),
        value=value,
        loss_gradient_error=loss_gradient_error,
        hessian_error=hessian_error,
        penalty_gradient_error=penalty_gradient_error,
        replaced=context.replaced,
        faults=faults,
        kinks=tuple(kinked),
    )


def _in_float64(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor.clone()
