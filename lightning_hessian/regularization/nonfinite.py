"""What happens where a penalty is not finite: its value, or its gradient when the backward pass is over."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_hessian.curvature.backward_watch import BackwardWatch
from lightning_hessian.curvature.sharding import local
from lightning_hessian.regularization.active_penalty import ActivePenalty, FitPenalty
from lightning_hessian.regularization.logs import log_skipped
from lightning_hessian.regularization.loss_gradients import LossGradients
from lightning_hessian.regularization.ranks import mean_if_synchronized
from lightning_hessian.step.loop import TrainingLoop
from lightning_hessian.step.repeatable import BatchSkipped, RepeatableStep


def skip_value(module: nn.Module, loop: TrainingLoop, one: FitPenalty, loss: Tensor, value: Tensor) -> None:
    """Leave out a penalty whose value is not finite: count, log and warn, or raise.

    Args:
        module: the module.
        loop: the loop that trains it.
        one: the penalty.
        loss: the task loss.
        value: the penalty's value on this rank.

    Raises:
        FloatingPointError: ``on_nonfinite="raise"``.
    """
    if math.isfinite(value.item()):
        what, cause = "not finite on another process", "It is finite on this one."
    elif not math.isfinite(loss.item()):
        what, cause = str(value.item()), f"The task loss itself is not finite. {_why_not_finite(module)}"
    else:
        what = str(value.item())
        cause = (
            "The task loss is finite: its derivatives overflow, or meet a point where they do not exist "
            "(the square root or a norm at 0, for example)."
        )
    message = f"The penalty {one.name} is {what} at step {loop.global_step}. {cause}"
    if one.settings.on_nonfinite == "raise":
        raise FloatingPointError(f"{message} Lower the learning rate or the strength, or pass on_nonfinite='skip'.")
    if one.skipped == 0:
        rank_zero_warn(
            f"{message} This step trains on the task loss alone, and so does every later one like it; "
            f"`train/{one.name}_skipped` counts them. Pass on_nonfinite='raise' to stop instead."
        )
    one.skipped += 1
    log_skipped(loop, {one.name: one.skipped})


def _why_not_finite(module: nn.Module) -> str:
    for name, parameter in module.named_parameters():
        if not bool(local(parameter).isfinite().all()):
            return (
                f"The parameter {name!r} holds NaN or infinity already, so training has diverged in an earlier step: "
                "lower the learning rate or the strength."
            )
    return "The parameters are finite: look at the batch (is it empty, or are its numbers not finite?)."


class GradientGuard:
    """Sees that a backward pass leaves a finite gradient; otherwise the step trains on the task loss alone.

    Args:
        module: the module.
        loop: the loop that trains it.
        step: the step; it is run again for the task loss's own gradient.
        active: the penalties that the step's loss has.
        gradients: how losses are differentiated.
        task_loss: the task loss of the run that counts, to see that another run has the same; None where the run was at
            other parameters.
        total: the loss that is differentiated, where it is known: it may have other terms.
    """

    def __init__(
        self,
        module: nn.Module,
        loop: TrainingLoop,
        step: RepeatableStep,
        active: Sequence[ActivePenalty],
        gradients: LossGradients,
        *,
        task_loss: Tensor | None,
        total: Callable[[], Tensor | None],
    ) -> None:
        self._module = module
        self._loop = loop
        self._step = step
        self._active = active
        self._gradients = gradients
        self._task_loss = task_loss
        self._total = total

    def watch(self, loss: Tensor) -> None:
        """Look when the backward pass from this loss, or from a multiple of it, is over."""
        # A scaler looks itself, and lowers its scale.
        if self._loop.gradient_scale is None and loss.grad_fn is not None:
            trained = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
            BackwardWatch(loss, trained, self._look)

    def _look(self, watch: BackwardWatch) -> None:
        loop = self._loop
        if loop.all(watch.is_finite()):
            return
        names = " or ".join(dict.fromkeys(one.name for one in self._active))
        message = f"The gradient of the penalty {names} is not finite at step {loop.global_step}, though its value is."
        # In manual optimization the loss may have other terms, of which nothing is known here.
        total = self._total()
        is_whole = loop.is_automatic or (total is not None and watch.is_all_of(total))
        loss = self._task_loss_again() if is_whole else None
        # All processes take part in this backward pass or none: it gathers sharded parameters.
        gradients = self._gradient(loss, watch.parameters) if loop.all(loss is not None) else None
        if loop.all(gradients is not None):
            assert gradients is not None
            if not loop.all(watch.replace(gradients, mean_if_synchronized(loop))):
                return  # the task loss's own gradient is not finite: training without a penalty would meet it, too
            did = "This step trains on the task loss alone"
        else:
            watch.undo()
            did = "The whole gradient of this backward pass is left out"
        if any(one.in_fit.settings.on_nonfinite == "raise" for one in self._active):
            watch.undo()
            raise FloatingPointError(f"{message} {_NO_DERIVATIVE} Change the loss there, or pass on_nonfinite='skip'.")
        first = [f"`train/{one.name}_skipped`" for one in self._active if one.in_fit.skipped == 0]
        if first:
            rank_zero_warn(
                f"{message} {did}, and so does every later one like it, counted by {' and '.join(first)}. "
                f"{_NO_DERIVATIVE} Pass on_nonfinite='raise' to stop instead."
            )
        for one in self._active:
            one.in_fit.skipped += 1
            one.in_fit.has_unlogged = True  # logging is not allowed here

    def _task_loss_again(self) -> Tensor | None:
        """The task loss of a further run; None where the step does not give the same loss again."""
        try:
            loss = self._step.rerun().loss
        except (MisconfigurationException, BatchSkipped):
            return None
        # The run that counts may have computed it by other functions, which round in another way.
        is_same = self._task_loss is None or torch.allclose(loss, self._task_loss, rtol=1e-2, equal_nan=True)
        return loss if is_same else None

    def _gradient(self, loss: Tensor | None, parameters: Sequence[Tensor]) -> list[Tensor | None] | None:
        """The gradient of the task loss alone; None where it cannot be taken here."""
        assert loss is not None
        try:
            return self._gradients.gradient(loss, parameters)
        except MisconfigurationException:
            return None


_NO_DERIVATIVE = (
    "A higher derivative may not exist there (equal points in a distance, the root or the logarithm of 0), or overflow "
    "because training diverges (a high learning rate or strength)."
)
