"""A penalty in a fit, and on a step on which it acts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_hessian.curvature import ProbeSource
from lightning_hessian.penalties import Penalty
from lightning_hessian.regularization.adaptive import Adaptive, BudgetControl, Control
from lightning_hessian.regularization.ranks import mean_over_ranks

OnNonfinite = Literal["skip", "raise"]


class Settings(Protocol):
    """The settings of penalties. They may change during a fit."""

    seed: int
    on_nonfinite: OnNonfinite
    allow_fp16: bool

    def strengths_at(self, step: int) -> list[float]:
        """The factor of each penalty in the loss at an optimizer step; 0 where it does not act."""


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
    _done: set[str] = field(default_factory=set)

    def strength_at(self, step: int) -> float:
        """Its factor in the loss at an optimizer step."""
        return self.settings.strengths_at(step)[self.index]

    def control_by(self, rule: Adaptive) -> Control:
        """What adapts its strength by this rule."""
        if self.control is None or self.control.rule != rule:
            self.control = rule.new_control(self.penalty)
            self.control.load_state_dict(self.strength_state)
            self.strength_state = {}
        return self.control

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

    def measure(self, task: float, penalty: float) -> float:
        """Adapt its strength to the lengths of the gradients of the task loss and of strength * penalty.

        Returns:
            The factor by which the strength has changed.
        """
        control = self.in_fit.control
        assert control is not None
        if penalty == 0 and task > 0 and self.in_fit.is_first("share"):
            rank_zero_warn(
                f"{self.penalty!r} has no gradient on this batch (the loss is linear or quadratic in the parameters, "
                "or piecewise linear, or clamp= holds the value), so no strength gives it a share of the "
                f"gradient. Its strength stays at {control.strength:.2g} until it has one."
            )
        before = control.strength
        control.measure(task, penalty / self.strength)
        return control.strength / before

    def see(self, value: Tensor, trainer: Trainer) -> None:
        """Adapt its strength to its value on this rank's batch; all ranks call this."""
        if isinstance(self.in_fit.control, BudgetControl):
            self.in_fit.control.see(mean_over_ranks(trainer, value.detach()).item(), trainer)


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
