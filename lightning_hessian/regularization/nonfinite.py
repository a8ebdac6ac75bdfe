"""What happens where a penalty is not finite: its value, or its gradient when the backward pass is over."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_hessian.curvature.sharding import local
from lightning_hessian.regularization.active_penalty import ActivePenalty, FitPenalty
from lightning_hessian.regularization.logs import log_skipped
from lightning_hessian.regularization.loss_gradients import LossGradients
from lightning_hessian.regularization.ranks import mean_if_synchronized, on_all_ranks
from lightning_hessian.step.repeatability import same_loss
from lightning_hessian.step.repeatable import BatchSkipped, RepeatableStep


def skip_value(module: LightningModule, one: FitPenalty, loss: Tensor, value: Tensor) -> None:
    """Leave out a penalty whose value is not finite: count, log and warn, or raise.

    Args:
        module: the module, attached to a Trainer.
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
    message = f"The penalty {one.name} is {what} at step {module.trainer.global_step}. {cause}"
    if one.on_nonfinite == "raise":
        raise FloatingPointError(f"{message} Lower the learning rate or the strength, or pass on_nonfinite='skip'.")
    if one.skipped == 0:
        rank_zero_warn(
            f"{message} This step trains on the task loss alone, and so does every later one like it; "
            f"`train/{one.name}_skipped` counts them. Pass on_nonfinite='raise' to stop instead."
        )
    one.skipped += 1
    log_skipped(module, {one.name: one.skipped})


def _why_not_finite(module: LightningModule) -> str:
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
        module: the module, attached to a Trainer.
        step: the step; it is run again for the task loss's own gradient.
        active: the penalties that the step's loss has.
        gradients: how losses are differentiated.
        task_loss: the task loss of the run that counts, to see that another run has the same; None where the run was at
            other parameters.
        total: the loss that is differentiated, where it is known: it may have other terms.
    """

    def __init__(
        self,
        module: LightningModule,
        step: RepeatableStep,
        active: Sequence[ActivePenalty],
        gradients: LossGradients,
        task_loss: Tensor | None,
        total: Callable[[], Tensor | None],
    ) -> None:
        self._module = module
        self._step = step
        self._active = active
        self._gradients = gradients
        self._task_loss = task_loss
        self._total = total

    def watch(self, loss: Tensor) -> None:
        """Look when the backward pass from this loss, or from a multiple of it, is over."""
        # A scaler looks itself, and lowers its scale.
        if getattr(self._module.trainer.precision_plugin, "scaler", None) is None and loss.grad_fn is not None:
            trained = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
            BackwardWatch(loss, trained, self._look)

    def _look(self, watch: BackwardWatch) -> None:
        trainer = self._module.trainer
        if on_all_ranks(trainer, watch.is_finite()):
            return
        names = " or ".join(dict.fromkeys(one.name for one in self._active))
        message = (
            f"The gradient of the penalty {names} is not finite at step {trainer.global_step}, though its value is."
        )
        # In manual optimization the loss may have other terms, of which nothing is known here.
        total = self._total()
        is_whole = self._module.automatic_optimization or (total is not None and watch.is_all_of(total))
        gradients = self._task_gradient(watch.parameters) if is_whole else None
        if on_all_ranks(trainer, gradients is not None):
            assert gradients is not None
            if not on_all_ranks(trainer, watch.replace(gradients, mean_if_synchronized(trainer))):
                return  # the task loss's own gradient is not finite: training without a penalty would meet it, too
            did = "This step trains on the task loss alone"
        else:
            watch.undo()
            did = "The whole gradient of this backward pass is left out"
        if any(one.in_fit.on_nonfinite == "raise" for one in self._active):
            watch.undo()
            raise FloatingPointError(f"{message} {_NO_DERIVATIVE} Change the loss there, or pass on_nonfinite='skip'.")
        if all(one.in_fit.skipped == 0 for one in self._active):
            rank_zero_warn(
                f"{message} {did}, and so does every later one like it; `train/{self._active[0].name}_skipped` "
                f"counts them. {_NO_DERIVATIVE} Pass on_nonfinite='raise' to stop instead."
            )
        for one in self._active:
            one.in_fit.skipped += 1
            one.in_fit.has_unlogged = True  # logging is not allowed here

    def _task_gradient(self, parameters: Sequence[Tensor]) -> list[Tensor | None] | None:
        """The gradient of the task loss alone; None where the step does not give the same loss again."""
        try:
            loss = self._step.rerun().loss
            if self._task_loss is not None and not same_loss(loss, self._task_loss):
                return None
            return self._gradients.gradient(loss, parameters)
        except (MisconfigurationException, BatchSkipped):
            return None


_NO_DERIVATIVE = (
    "A higher derivative may not exist there (equal points in a distance, the root or the logarithm of 0), or overflow "
    "because training diverges (a high learning rate or strength)."
)


class BackwardWatch:
    """Looks at the gradients when a backward pass from a loss has ended, and can take them back.

    An ordinary pass pays for one look at each gradient (and, while gradients are accumulated, for one copy of them).
    It does not matter who calls ``backward()``, and on what multiple of the loss.

    Args:
        loss: what a penalized step returned, with its graph.
        parameters: those that are trained.
        when_over: called when the pass has ended and DDP has averaged the gradients.

    Example:
        >>> w = torch.zeros(2, requires_grad=True)
        >>> loss = w.sum() + w.norm().sqrt()
        >>> watch = BackwardWatch(loss, [w], lambda watch: print(watch.is_finite()))
        >>> loss.backward()
        False
        >>> watch.replace([torch.ones(2)])
        True
        >>> w.grad
        tensor([1., 1.])
    """

    def __init__(self, loss: Tensor, parameters: Sequence[Tensor], when_over: Callable[[BackwardWatch], None]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._value = loss.detach()
        self._when_over = when_over
        self._factor = torch.ones_like(self._value)
        self._before: list[Tensor | None] = []
        loss.register_hook(self._begin)

    def _begin(self, factor: Tensor) -> None:
        # Lightning divides the loss by the number of accumulated batches.
        self._factor = factor
        self._before = [None if p.grad is None else p.grad.detach().clone() for p in self.parameters]
        queue = torch.autograd.Variable._execution_engine.queue_callback
        # Twice: DDP queues its own in the pass, and averages the gradients there.
        queue(lambda: queue(self._end))

    def _end(self) -> None:
        with torch.enable_grad():
            self._when_over(self)

    def is_all_of(self, total: Tensor) -> bool:
        """Whether a loss is a multiple of the one that is watched. Terms below a millionth of it are not seen."""
        return torch.allclose(self._value * self._factor, total.detach(), rtol=1e-6, equal_nan=True)

    def is_finite(self) -> bool:
        """Whether all gradients are numbers."""
        gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
        if not gradients:
            return True
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients)])
        # The norm of large numbers may overflow.
        return bool(norms.isfinite().all()) or all(bool(gradient.isfinite().all()) for gradient in gradients)

    def replace(
        self, gradients: Sequence[Tensor | None], mean_over_ranks: Callable[[Tensor], Tensor] | None = None
    ) -> bool:
        """Put other gradients of the loss in place of what the backward pass has added.

        Args:
            gradients: by the parameters; None for one that has no part in it.
            mean_over_ranks: the mean over the processes, where the pass has averaged over them.

        Returns:
            Whether they are finite. If not, the gradients are as the backward pass left them.
        """
        totals = []
        for parameter, before, gradient in zip(self.parameters, self._before, gradients, strict=True):
            total = before if gradient is None else gradient * self._factor + (0 if before is None else before)
            if mean_over_ranks is not None and parameter.grad is not None:
                # On every rank, as often, also where it has no part in this one's loss.
                total = mean_over_ranks(torch.zeros_like(parameter) if total is None else total)
            totals.append(total)
        if not all(bool(local(total).isfinite().all()) for total in totals if total is not None):
            return False
        for parameter, total in zip(self.parameters, totals, strict=True):
            _set_gradient(parameter, total)
        return True

    def undo(self) -> None:
        """Give the parameters the gradients from before the backward pass."""
        for parameter, before in zip(self.parameters, self._before, strict=True):
            _set_gradient(parameter, before)


def _set_gradient(parameter: Tensor, gradient: Any) -> None:
    if parameter.grad is not None and gradient is not None:
        parameter.grad.detach().copy_(gradient)  # it may be a view of DDP's buckets
    else:
        parameter.grad = gradient
