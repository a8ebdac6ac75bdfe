"""A penalty in a fit, and on a step on which it acts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_hessian.curvature import ProbeSource
from lightning_hessian.penalties import Penalty
from lightning_hessian.regularization.adaptive import Adaptive, BudgetControl, Control
from lightning_hessian.regularization.ranks import mean_length
from lightning_hessian.step.loop import TrainingLoop

OnNonfinite = Literal["skip", "raise"]

Gradients = Sequence[Tensor | None]
"""A gradient by parameter; None is zero."""


class Settings(Protocol):
    """The settings of penalties. They may change during a fit."""

    seed: int
    on_nonfinite: OnNonfinite
    allow_fp16: bool

    def strengths_at(self, step: int) -> list[float]:
        """The factor of each penalty in the loss at an optimizer step; 0 where it does not act."""

    def rules(self) -> list[Adaptive | None]:
        """How the strength of each penalty adapts; None where it does not."""


@dataclass
class StepWindow:
    """What a penalty keeps of the micro-batches of one optimizer step.

    Attributes:
        task: the sum of the task loss's gradients, on steps that are measured.
        penalty: the sum of the penalty's gradients, at strength 1.
        batches: how many there are.
        values: the penalty's values.
    """

    task: Gradients = ()
    penalty: Gradients = ()
    batches: int = 0
    values: list[Tensor] = field(default_factory=list)

    def add(self, task: Gradients, penalty: Gradients) -> None:
        """Add the gradients of a micro-batch."""
        self.task = _sum(self.task, task) if self.batches else task
        self.penalty = _sum(self.penalty, penalty) if self.batches else penalty
        self.batches += 1


def _sum(a: Gradients, b: Gradients) -> Gradients:
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]


@dataclass(kw_only=True, eq=False)
class FitPenalty:
    """A penalty in a fit: its settings, and what is true of it once in the fit.

    Args:
        penalty: the penalty.
        name: its unique name in logs and checkpoints.
        settings: its settings, with those of other penalties.
        index: the place of its strength among them.

    Attributes:
        skipped: on how many steps of the fit it was left out because it was not finite.
        has_unlogged: whether that number has grown and was not logged yet.
        has_started: whether it was checked and has the state to start from.
        control: what adapts its strength, if something does.
        strength_state: the state that ``control`` starts from.
        window: the gradients and values of the optimizer step's micro-batches until now.
    """

    penalty: Penalty
    name: str
    settings: Settings
    index: int
    skipped: int = 0
    has_unlogged: bool = False
    has_started: bool = False
    control: Control | None = None
    strength_state: Mapping[str, Any] = field(default_factory=dict)
    window: StepWindow = field(default_factory=StepWindow)
    _done: set[str] = field(default_factory=set)

    def follow_settings(self, loop: TrainingLoop) -> None:
        """Let its strength adapt as the settings now say.

        Raises:
            MisconfigurationException: the strength follows a target that nothing measures.
        """
        rule = self.settings.rules()[self.index]
        if rule is None:
            self.control = None
        elif self.control is None or self.control.rule != rule:
            rule.check(self.penalty, loop)
            self.control = rule.new_control(self.penalty)
            self.control.load_state_dict(self.strength_state)
            self.strength_state = {}

    @property
    def strength_to_keep(self) -> Mapping[str, Any]:
        """What a checkpoint keeps of its strength."""
        return self.strength_state if self.control is None else self.control.state_dict()

    def is_first(self, look: str) -> bool:
        """Whether this is the first call for this look in the fit."""
        is_first = look not in self._done
        self._done.add(look)
        return is_first


@dataclass(frozen=True, kw_only=True)
class ActivePenalty:
    """A penalty on a step on which it acts.

    Args:
        in_fit: the penalty in the fit.
        strength: its factor in the loss on this step, above 0.
        probes: where its random vectors come from on this step.
    """

    in_fit: FitPenalty
    strength: float
    probes: ProbeSource

    @property
    def penalty(self) -> Penalty:
        return self.in_fit.penalty

    @property
    def name(self) -> str:
        return self.in_fit.name

    @property
    def is_measured(self) -> bool:
        """Whether the length of its gradient is measured on this step."""
        return self.in_fit.control is not None and self.in_fit.control.is_due

    def measure(
        self,
        loop: TrainingLoop,
        tensors: Sequence[Tensor],
        task: Gradients,
        penalty: Gradients,
        *,
        resolution: float,
    ) -> float:
        """Adapt its strength to the lengths of the gradients of the task loss and of strength * penalty.

        With gradient accumulation these are the sums over the micro-batches of an optimizer step.

        Args:
            loop: the loop that trains; all ranks call this.
            tensors: the parameters.
            task: the gradient of this batch's task loss.
            penalty: the gradient of strength * penalty on this batch.
            resolution: below this share of the task loss's gradient the penalty's gradient is rounding.

        Returns:
            The factor by which the strength has changed for this batch.
        """
        control, window = self.in_fit.control, self.in_fit.window
        assert control is not None
        window.add(task, [None if g is None else g / self.strength for g in penalty])
        if not loop.ends_optimizer_step:
            return 1.0
        lengths = [mean_length(loop, tensors, g) for g in (window.task, window.penalty)]
        if lengths[1] == 0 and lengths[0] > 0 and self.in_fit.is_first("share"):
            rank_zero_warn(
                f"{self.penalty!r} has no gradient on this batch (the loss is linear or quadratic in the parameters, "
                "or piecewise linear, weights are still zero, or clamp= holds the value), so no strength gives it a "
                f"share of the gradient. Its strength stays at {control.strength:.2g} until it has one."
            )
        before = control.strength
        if 0 < self.strength * lengths[1] < resolution * lengths[0]:
            control.not_resolved()
        else:
            control.measure(*lengths)
        return control.strength / before if window.batches == 1 else 1.0

    def see(self, value: Tensor) -> None:
        """Note its value on this rank's batch."""
        self.in_fit.window.values.append(value.detach())

    def acted(self, loop: TrainingLoop) -> None:
        """Count an optimizer step that has ended, and adapt its strength to its values; all ranks call this."""
        control, values = self.in_fit.control, self.in_fit.window.values
        self.in_fit.window = StepWindow()
        if control is None:
            return
        if isinstance(control, BudgetControl) and values:
            control.see(loop.mean(torch.stack(values).mean()).item(), loop)
        control.acted()


def unique_names(penalties: Sequence[Penalty]) -> list[str]:
    """The penalties' names; a name that is taken gets a number.

    Example:
        >>> from lightning_hessian import HessianTrace, HessianNorm
        >>> unique_names([HessianTrace(), HessianNorm(), HessianTrace(probes=2)])
        ['hessian_trace', 'hessian_norm', 'hessian_trace_2']
    """
    names: list[str] = []
    for penalty in penalties:
        candidates = [penalty.name, *(f"{penalty.name}_{number}" for number in range(2, len(penalties) + 2))]
        names.append(next(name for name in candidates if name not in names))
    return names
