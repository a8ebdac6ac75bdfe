"""The callback that adds a curvature penalty to the loss of any LightningModule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsFloat

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_hessian.arguments import choice, is_number, whole_number
from lightning_hessian.penalties import Penalty
from lightning_hessian.regularization import penalized_step
from lightning_hessian.regularization.active_penalty import FitPenalty, OnNonfinite, unique_names
from lightning_hessian.regularization.adaptive import Adaptive
from lightning_hessian.regularization.checks import refuse_module, total_steps, warn_of_long_warmup
from lightning_hessian.regularization.fit import RegularizedFit
from lightning_hessian.regularization.states import save_states, states_in
from lightning_hessian.step.lightning_loop import LightningLoop

Strength = float | SupportsFloat | Callable[[int], float]
"""The factor of a penalty in the loss, or a function from the optimizer step to it. (A float is a SupportsFloat as
well, but LightningCLI must be told so.)"""


class HessianRegularizer(Callback):
    r"""Train on loss + strength * penalty, without a change to the module.

    The callback wraps the module's ``training_step`` when fitting starts, and restores it when fitting ends, also by
    an exception. It adds the penalty to the loss that the step returns (a tensor, a dict with "loss", or None). There
    is one backward pass, so accumulation, clipping, DDP and schedulers work unchanged. The module's own logs keep the
    task loss (with ``HessianTrace(method="two_pass")`` the task loss at theta + s v). The callback logs the raw value
    as ``curvature/<penalty name>``, and what it added as ``train/penalty``. (Between the steps on which the penalty
    acts, Lightning repeats the last values in its logs.)

    The Trainer's checkpoints hold what a penalty keeps from step to step (the vector of :class:`HessianNorm`). A fit
    that resumes from no checkpoint starts anew.

    Several penalties share the forward pass, in one of these callbacks or in several on one Trainer. Each penalty sees
    the task loss alone.

    Args:
        penalty: what to add, for example ``HessianTrace()``, or a list of penalties.
        strength: the penalty's factor in the loss, at least 0; with 0 nothing is computed. A number, or a function of
            the optimizer step (0, 1, ...), a :class:`GradientShare`, or a :class:`CurvatureBudget`. For a list of
            penalties, a list of strengths or one for all. None: the penalty's own default, 1 for
            :class:`SharpnessAware` and 1e-3 for the others. A schedule may set this attribute. Start where
            strength * penalty is 1-10 % of the task loss, or with the answer of :func:`suggest_strength`.
        every_n_steps: act on every n-th optimizer step only, with n times the strength (but :class:`SharpnessAware`,
            whose step would not be SAM's). Manual optimization counts batches, because several optimizers may step.
        start: the share of training that passes without the penalty, from 0 to below 1. With ``start=0.75`` it acts in
            the last quarter of the optimizer steps.
        warmup_steps: raise the strength linearly from 0 over this many steps, from where it starts.
        on_nonfinite: what to do when the penalty's value or gradient is NaN or infinite. ``"skip"`` trains that step
            on the task loss alone, counts it (``nonfinite_steps``, logged as ``train/<penalty name>_skipped``), and
            warns once for each penalty. ``"raise"`` stops. (When the gradient is not finite, the step runs again for
            the gradient of the task loss. If that run gives another loss, or if the loss has other terms in manual
            optimization, the whole gradient of this backward pass is left out.)
        seed: seed of the probes, a whole number. Probes depend on the seed, the step, the micro-batch and the rank,
            never on global random state.
        allow_fp16: accept float16 precision. The penalty's inner gradients are not loss-scaled and may vanish or
            overflow.

    Raises:
        ValueError: an argument is out of its range.
        MisconfigurationException: when fitting starts: manual optimization (use
            :class:`HessianRegularizationMixin`), float16, sharded parameters, a frozen model, or ``parameters`` that
            match nothing. In the step: an output without a differentiable loss, or an empty batch.
        HigherOrderError: a layer or an operator, named, cannot be differentiated often enough.

    Example:
        >>> import lightning as L
        >>> from lightning_hessian import HessianRegularizer, HessianTrace
        >>> trainer = L.Trainer(
        ...     callbacks=[HessianRegularizer(HessianTrace(), strength=1e-3)],
        ...     logger=False, enable_checkpointing=False,
        ... )
    """

    def __init__(
        self,
        penalty: Penalty | Sequence[Penalty],
        strength: float | Sequence[float] | Strength | Adaptive | Sequence[Strength | Adaptive] | None = None,
        *,
        every_n_steps: int = 1,
        start: float = 0.0,
        warmup_steps: int = 0,
        on_nonfinite: OnNonfinite = "skip",
        seed: int = 0,
        allow_fp16: bool = False,
    ) -> None:
        penalties = [penalty] if isinstance(penalty, Penalty) else penalty
        if not isinstance(penalties, Sequence) or not penalties or not all(isinstance(p, Penalty) for p in penalties):
            raise ValueError(
                f"penalty={penalty!r} is not a Penalty. Pass an object such as HessianTrace(), or a list of them."
            )
        whole_number("every_n_steps", every_n_steps, least=1)
        if not is_number(start) or not 0 <= float(start) < 1:
            raise ValueError(
                f"start={start!r} must be a number from 0 to below 1: the share of training that passes without the "
                "penalty."
            )
        whole_number("warmup_steps", warmup_steps, least=0)
        choice("on_nonfinite", on_nonfinite, ("skip", "raise"))
        whole_number("seed", seed)
        self.penalty = penalty
        self.penalties = tuple(penalties)
        self.strength = strength
        self._strengths()
        self.every_n_steps = every_n_steps
        self.start = float(start)
        self.warmup_steps = warmup_steps
        self.on_nonfinite = on_nonfinite
        self.seed = seed
        self.allow_fp16 = allow_fp16
        self._first_step = 0
        self._in_fit: list[FitPenalty] = []
        self._fit: RegularizedFit | None = None

    @property
    def nonfinite_steps(self) -> int:
        """On how many steps of the latest fit a penalty was left out because it was not finite, over all penalties."""
        return sum(one.skipped for one in self._in_fit)

    def strengths_at(self, step: int) -> list[float]:
        """The factor of each penalty at an optimizer step; 0 where it does not act."""
        strengths = self._strengths()
        if step < self._first_step or step % self.every_n_steps:
            return [0.0] * len(strengths)
        ramp = min(1.0, (step - self._first_step) / self.warmup_steps) if self.warmup_steps else 1.0
        now = [self._strength_now(index, strength, step) for index, strength in enumerate(strengths)]
        factors = [self.every_n_steps if penalty.scales_with_interval else 1 for penalty in self.penalties]
        return [strength * factor * ramp for strength, factor in zip(now, factors, strict=True)]

    def rules(self) -> list[Adaptive | None]:
        """How the strength of each penalty adapts; None where it does not."""
        return [one if isinstance(one, Adaptive) else None for one in self._strengths()]

    def _strength_now(self, index: int, strength: Strength | Adaptive, step: int) -> float:
        if not isinstance(strength, Adaptive):
            return _at(strength, step)
        control = self._in_fit[index].control if self._in_fit else None
        if control is None or control.rule != strength:
            control = strength.new_control(self.penalties[index])
        return control.strength

    def _strengths(self) -> list[Strength | Adaptive]:
        if self.strength is None:
            strengths: list[Any] = [penalty.default_strength for penalty in self.penalties]
        elif not isinstance(self.strength, Sequence) or isinstance(self.strength, str):
            strengths = [self.strength] * len(self.penalties)
        elif len(self.strength) != len(self.penalties):
            raise ValueError(
                f"strength={self.strength!r} has {len(self.strength)} factors for {len(self.penalties)} penalties. "
                "Give one for each, or a single number for all."
            )
        else:
            strengths = list(self.strength)
        for strength in strengths:
            if isinstance(strength, type):
                raise ValueError(f"strength={strength.__name__} is a class. Pass an object: {strength.__name__}(...).")
            if not callable(strength) and not isinstance(strength, Adaptive):
                _check_strength(strength)
        return strengths

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_module(pl_module)
        regularizers = _regularizers_of(trainer)
        if regularizers.count(self) > 1:
            raise MisconfigurationException("The Trainer has the same HessianRegularizer twice. Keep one.")
        if self is regularizers[-1]:  # several of these callbacks share one fit
            _begin_fit(pl_module, regularizers)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        regularizers = _regularizers_of(trainer)
        if self._fit is not None and self is regularizers[0]:
            if self._fit.has_started:  # a tuner has trained with it
                _begin_fit(pl_module, regularizers, self._fit.states)
            start(self._fit, regularizers, lambda: total_steps(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        warn_of_long_warmup(lambda: trainer.estimated_stepping_batches, self._first_step, self.warmup_steps)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._fit is not None:
            self._fit.log_skipped()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Lightning refuses two callbacks of a class that override `state_dict`: the states of all are kept together.
        save_states([one for regularizer in _regularizers_of(trainer) for one in regularizer._in_fit], checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._fit is not None and trainer.state.fn == TrainerFn.FITTING:
            self._fit.resume(states_in(checkpoint))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        penalized_step.remove(pl_module)  # also where a tuner has ended the fit
        self._fit = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")


def _begin_fit(
    module: LightningModule, regularizers: Sequence[HessianRegularizer], states: Mapping[str, Any] | None = None
) -> None:
    """Make a fit of the module for all regularizers, and let its training step be penalized."""
    fit = RegularizedFit(module, LightningLoop(module.trainer, module))
    fit.resume(states or {})
    enlist(fit, regularizers)
    for one in regularizers:
        one._fit = fit
    penalized_step.install(module, fit)


def enlist(fit: RegularizedFit, regularizers: Sequence[HessianRegularizer]) -> None:
    """Let a fit use the penalties of these regularizers. What it knows of those that it has used before is kept."""
    names = iter(unique_names(penalties_of(regularizers)))
    enlisted = []
    for one in regularizers:
        if not any(known in fit.known for known in one._in_fit):
            one._in_fit = [
                FitPenalty(penalty=penalty, name=penalty.name, settings=one, index=index)
                for index, penalty in enumerate(one.penalties)
            ]
        for penalty in one._in_fit:
            penalty.name = next(names)
            enlisted.append(penalty)
    fit.use(enlisted)


def start(fit: RegularizedFit, regularizers: Sequence[HessianRegularizer], total_steps: Callable[[], float]) -> None:
    """Start the penalties of these regularizers that have not started, and say which of them do nothing.

    Args:
        fit: the fit.
        regularizers: the regularizers.
        total_steps: tells the number of optimizer steps of the fit, where one of them needs it.
    """
    for one in regularizers:
        one._first_step = math.ceil(one.start * total_steps()) if one.start else 0
        for penalty, strength in zip(one._in_fit, one._strengths(), strict=True):
            if strength == 0 and not penalty.has_started:
                rank_zero_info(f"The penalty {penalty.name} has strength 0: it is not computed.")
    fit.start()


def penalties_of(regularizers: Sequence[HessianRegularizer]) -> list[Penalty]:
    return [penalty for one in regularizers for penalty in one.penalties]


def _regularizers_of(trainer: Trainer) -> list[HessianRegularizer]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, HessianRegularizer)]


def _at(strength: Strength, step: int) -> float:
    value = strength(step) if callable(strength) else strength
    _check_strength(value)
    return float(value)


def _check_strength(strength: SupportsFloat) -> None:
    if not is_number(strength) or not 0 <= float(strength) < math.inf:
        raise ValueError(
            f"strength={strength!r} must be a finite number of at least 0: the factor of the penalty in the loss. "
            "A negative one would reward curvature. (The words of the command line are objects in Python: instead of "
            "'auto' pass what suggest_strength() returns, instead of 'share:0.1' GradientShare(0.1).)"
        )
