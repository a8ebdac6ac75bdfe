"""How penalties become part of a step's loss; the callback and the mixin share it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_hessian.curvature import ProbeSource
from lightning_hessian.passes import Passes
from lightning_hessian.penalties import InputPenalty, Penalty

if TYPE_CHECKING:
    from lightning_hessian.callbacks.regularizer import HessianRegularizer


def penalised(
    module: LightningModule,
    regularizers: Sequence[HessianRegularizer],
    step: Callable[[Any], Any],
    batch: Any = None,
    all_inputs: bool = False,
) -> Any:
    """Run ``step(batch)`` and add to the loss it returns the penalties of every regularizer that acts now.

    The penalties share their forward passes (see :class:`Passes`), and each sees the task loss alone. Where none acts,
    and outside of training (a validation step may call the training step), ``step(batch)`` is all that runs.

    Args:
        module: the LightningModule, attached to a Trainer.
        regularizers: what to add.
        step: computes the task loss: a scalar tensor, a mapping with "loss", or None to skip the batch.
        batch: what penalties on the inputs find them in.
        all_inputs: whether every tensor of the batch is an input.
    """
    trainer = module.trainer
    # With manual optimization several optimizers may step in one batch, or ones that Lightning does not count.
    now = trainer.global_step if module.automatic_optimization else trainer.fit_loop.total_batch_idx
    listed = [
        (regularizer, penalty, strength)
        for regularizer in regularizers
        for penalty, strength in zip(regularizer.penalties, regularizer.strengths_at(now), strict=True)
    ]
    # A penalty keeps its name on every step, whichever others act.
    names = _different([penalty.name for _, penalty, _ in listed])
    acting = [(*entry, name) for entry, name in zip(listed, names, strict=True) if entry[2] > 0]
    if not acting or not trainer.training or not torch.is_grad_enabled():
        return step(batch)
    count = trainer.fit_loop.total_batch_idx  # monotonic over epochs, and kept by checkpoints
    passes = Passes(module, step, batch, [penalty for _, penalty, *_ in acting], loss_of, all_inputs)
    with passes.before.restored_on_error():
        task = passes.task()
        output, loss = task.output, task.loss
        if loss is None:
            return output
        parameters = list(module.parameters())
        terms: list[Tensor] = []
        logged: dict[str, Tensor] = {}
        # The derivatives of a loss computed under autocast are taken outside of it, as for any backward pass.
        with torch.autocast(loss.device.type, enabled=False):
            for regularizer, penalty, strength, name in acting:
                probes = ProbeSource(regularizer.seed, now, count, trainer.global_rank)
                if passes.coupling and isinstance(penalty, InputPenalty):
                    regularizer.say_own_pass(penalty, list(passes.coupling))
                with passes.explained(penalty):
                    value = penalty.value(passes.context(penalty, probes))
                    logged[f"curvature/{name}"] = value.detach()
                    if _is_finite(value, module):
                        terms.append(strength * penalty.term(value))
                        regularizer.try_backward(penalty, terms[-1], parameters)
                    else:
                        _report_nonfinite(module, regularizer, penalty, loss, value)
    added = torch.stack(terms).sum() if terms else torch.zeros_like(loss)
    for key, value in {**logged, "train/penalty": added.detach()}.items():
        _log(module, key, value)
    if not terms:
        return output
    return loss + added if isinstance(output, Tensor) else {**output, "loss": loss + added}


def _different(names: Sequence[str]) -> list[str]:
    """The names, numbered from the second that is the same."""
    alike = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name}_{before + 1}" if before else name for name, before in zip(names, alike, strict=True)]


def loss_of(output: Any) -> Tensor | None:
    if output is None:
        return None
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        what = f"a {type(output).__name__}"
        if isinstance(output, Mapping):
            what = f"a dict without a tensor under 'loss' (its keys: {', '.join(map(str, output)) or 'none'})"
        raise MisconfigurationException(
            f"The training step returned {what}, so there is no loss to add a penalty to. "
            'Return the loss tensor, a dict {"loss": ...}, or None to skip the batch.'
        )
    if loss.numel() != 1:
        raise MisconfigurationException(
            f"The training step returned a loss of shape {tuple(loss.shape)}; a penalty needs a scalar. "
            "Reduce it, for example by `.mean()`."
        )
    if not loss.requires_grad:
        raise MisconfigurationException(
            "The loss that the training step returned has no graph, so neither it nor a penalty on its curvature "
            "can be differentiated. Compute it from the model's parameters, without `.detach()`, `.item()` or "
            "`torch.no_grad()` on the way."
        )
    return loss.reshape(())


def _is_finite(value: Tensor, module: LightningModule) -> bool:
    finite = math.isfinite(value.item())
    trainer = module.trainer
    # All ranks drop the penalty or none: they average one gradient.
    return finite if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(finite, all=True)


def _report_nonfinite(
    module: LightningModule, regularizer: HessianRegularizer, penalty: Penalty, loss: Tensor, value: Tensor
) -> None:
    if math.isfinite(value.item()):
        what, cause = "not finite on another process", "It is finite on this one."
    elif not math.isfinite(loss.item()):
        what, cause = str(value.item()), "The task loss itself is not finite: is the batch empty?"
    else:
        what, cause = (
            str(value.item()),
            (
                "The task loss is finite: its derivatives overflow, or meet a point where they do not exist "
                "(the square root or a norm at 0, for example)."
            ),
        )
    message = f"The penalty {penalty.name} is {what} at step {module.trainer.global_step}. {cause}"
    if regularizer.on_nonfinite == "raise":
        raise FloatingPointError(f"{message} Lower the learning rate or the strength, or pass on_nonfinite='skip'.")
    if regularizer.nonfinite_steps == 0:
        rank_zero_warn(
            f"{message} This step trains on the task loss alone, and so does every later one like it; "
            f"`train/{penalty.name}_skipped` counts them. Pass on_nonfinite='raise' to stop instead."
        )
    regularizer.nonfinite_steps += 1
    _log(module, f"train/{penalty.name}_skipped", float(regularizer.nonfinite_steps), reduce=False)


def _log(module: LightningModule, name: str, value: Tensor | float, reduce: bool = True) -> None:
    several = reduce and module.trainer.world_size > 1
    # With the batch size given Lightning does not look for it, which a step that takes an iterator would not survive.
    module.log(name, value, on_step=True, on_epoch=False, sync_dist=several, batch_size=1)
