"""A penalty in a fit, and on a step on which it acts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_hessian.curvature import ProbeSource
from lightning_hessian.penalties import Penalty

OnNonfinite = Literal["skip", "raise"]


@dataclass(kw_only=True, eq=False)
class FitPenalty:
    """A penalty in a fit: its settings, and what is true of it once in the fit.

    Args:
        penalty: the penalty.
        name: its unique name in logs and checkpoints.
        strength_at: its factor in the loss at an optimizer step; 0 where it does not act.
        seed: of its probes.
        on_nonfinite: what to do where its value or its gradient is not finite.
        allow_fp16: accept float16 precision.

    Attributes:
        skipped: on how many steps of the fit it was left out because it was not finite.
        has_unlogged: whether that number has grown and was not logged yet.
    """

    penalty: Penalty
    name: str
    strength_at: Callable[[int], float]
    seed: int = 0
    on_nonfinite: OnNonfinite = "skip"
    allow_fp16: bool = False
    skipped: int = 0
    has_unlogged: bool = False
    _done: set[str] = field(default_factory=set)

    def begin(self) -> None:
        """Forget an earlier fit."""
        self.skipped = 0
        self.has_unlogged = False
        self._done = set()

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


def unique_names(penalties: Sequence[Penalty]) -> list[str]:
    """The penalties' names; from the second of the same name on they are numbered.

    Example:
        >>> from lightning_hessian import HessianTrace, HessianNorm
        >>> unique_names([HessianTrace(), HessianNorm(), HessianTrace(probes=2)])
        ['hessian_trace', 'hessian_norm', 'hessian_trace_2']
    """
    names = [penalty.name for penalty in penalties]
    before = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name}_{count + 1}" if count else name for name, count in zip(names, before, strict=True)]
