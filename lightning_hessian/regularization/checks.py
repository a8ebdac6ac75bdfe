"""What is refused before training: what a penalty needs, and a module, a precision or a strategy does not give."""

from __future__ import annotations

import math
from collections.abc import Callable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_hessian.penalties import Penalty
from lightning_hessian.regularization.active_penalty import FitPenalty
from lightning_hessian.regularization.input_runs import check_layer
from lightning_hessian.step.loop import TrainingLoop


def refuse_module(module: LightningModule) -> None:
    """Refuse a module whose loss the callback cannot reach.

    Raises:
        MisconfigurationException: it optimizes manually, or has a penalty by the mixin.
    """
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(module).__name__} uses manual optimization, where the loss never passes through the "
            "Trainer, so a callback cannot add to it. Inherit from HessianRegularizationMixin, set "
            "`self.regularizer = HessianRegularizer(...)` in the module instead of passing it to the Trainer, and "
            "compute the loss by `self.regularized(lambda: ...)` in `training_step`."
        )
    if getattr(module, "regularizer", None) and hasattr(module, "regularized"):
        raise MisconfigurationException(
            f"{type(module).__name__} adds a penalty by the mixin's `regularizer`, and the Trainer has a "
            "HessianRegularizer as well: one would see the other's penalty as part of the loss. Keep one."
        )


def check_penalty(one: FitPenalty, module: nn.Module, loop: TrainingLoop) -> None:
    """Refuse a penalty that cannot be computed on this module in this loop.

    Raises:
        MisconfigurationException: the error names the setting, and says what to do.
    """
    penalty = one.penalty
    precision = loop.precision
    if not one.settings.allow_fp16:
        _refuse_float16(penalty, precision)
    _refuse_sparse_gradients(penalty, module)
    _refuse_sharded_parameters(penalty, loop)
    check_layer(penalty, module)
    _refuse_rounding(penalty, precision)
    try:
        penalty.check(dict(module.named_parameters()))
    except ValueError as error:
        raise MisconfigurationException(f"The penalty {penalty.name} cannot be computed. {error}") from error


def total_steps(trainer: Trainer) -> float:
    """The number of optimizer steps of a fit (of batches, with manual optimization).

    Raises:
        MisconfigurationException: it is not known.
    """
    total = trainer.estimated_stepping_batches
    counts_batches = not trainer.lightning_module.automatic_optimization
    if counts_batches and trainer.max_steps > 0 and len(trainer.optimizers) > 1:
        raise MisconfigurationException(
            "A HessianRegularizer with start > 0 counts batches in manual optimization. With several optimizers "
            "max_steps does not tell how many there are: pass max_epochs to the Trainer, or leave start at 0."
        )
    if any(isinstance(one, GradientAccumulationScheduler) for one in trainer.callbacks):  # type: ignore[attr-defined]
        raise MisconfigurationException(
            "A HessianRegularizer with start > 0 starts after a share of the optimizer steps, and with a "
            "GradientAccumulationScheduler their number is not known beforehand. Set accumulate_grad_batches, or leave "
            "start at 0."
        )
    if not 0 <= total < math.inf:
        raise MisconfigurationException(
            "A HessianRegularizer with start > 0 starts after a share of the training steps, and their number is not "
            "known here. Pass max_steps to the Trainer (max_time does not tell), or leave start at 0."
        )
    return total


def warn_of_long_warmup(total_steps: Callable[[], float], first_step: int, warmup_steps: int) -> None:
    """Warn where training ends before the strength has risen; ``total_steps`` tells when it ends."""
    total = total_steps() if warmup_steps else math.inf
    if 0 < total < first_step + warmup_steps:
        reached = max(0.0, (total - first_step) / warmup_steps)
        rank_zero_warn(
            f"warmup_steps={warmup_steps} exceeds the {total - first_step:.0f} steps that a HessianRegularizer has "
            f"from step {first_step} on: the penalty reaches {reached:.0%} of its strength. Lower it, or train longer."
        )


def _refuse_float16(penalty: Penalty, precision: str) -> None:
    works = penalty.needs.differences or (penalty.needs.float16 and precision == "16-mixed")
    if precision in ("16-mixed", "16-true") and not works:
        raise MisconfigurationException(
            f"precision={precision!r}: {penalty!r} differentiates the loss before it is scaled, so its "
            "inner gradients may vanish or overflow in float16 and train on a wrong penalty in silence. "
            "Use precision='bf16-mixed' or '32-true', take HessianTrace(method='two_pass') or SharpnessAware() (with "
            "'16-mixed' HessianTrace(), too), or pass allow_fp16=True to try it all the same."
        )


def _refuse_rounding(penalty: Penalty, precision: str) -> None:
    if penalty.needs.full_precision and "16" in precision:
        raise MisconfigurationException(
            f"{penalty!r} takes differences of losses that 16-bit numbers (precision={precision!r}) "
            "round away: it would train on noise. Use precision='32-true', or method='autograd'."
        )


def _refuse_sparse_gradients(penalty: Penalty, module: nn.Module) -> None:
    for name, layer in module.named_modules() if penalty.needs.differences else ():
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse:
            raise MisconfigurationException(
                f"The layer {name!r} has sparse gradients, and {penalty!r} sums gradients of several "
                "passes. Pass sparse=False to it."
            )


def _refuse_sharded_parameters(penalty: Penalty, loop: TrainingLoop) -> None:
    sharding, whole = loop.sharding, penalty.needs.whole_parameters
    if sharding is not None and (whole or not sharding.in_graph):
        why = "are then not in the loss's graph, and Hessian-vector products would be zero or fail"
        if whole and penalty.needs.differences:
            why = f"{penalty!r} moves along a vector of all of them, which it keeps whole"
        raise MisconfigurationException(
            f"{sharding.by} shards the parameters, which {why}. Use "
            "HessianTrace(), HessianTrace(method='two_pass') or SharpnessAware() with ModelParallelStrategy (FSDP2), "
            "or any penalty with strategy='ddp' or one device."
        )
