"""A strength that holds a measured curvature at a target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_hessian.arguments import is_number
from lightning_hessian.penalties import HessianNorm, HessianTrace, Penalty
from lightning_hessian.regularization.gradient_share import GradientShare, ShareControl

_LEAST, _MOST = 0.01, 10.0
"""The smallest share of the gradient, which is that of the beginning, and the largest one."""
_RATE = 0.1
"""The largest change of the share's logarithm in one acting step."""
_GAIN = 4.0
"""The share changes at its full rate where the curvature is off the target by exp(1/4), or 28 %."""
_NEW = 0.1
"""The weight of a new value in the mean of the curvature."""


@dataclass(frozen=True)
class CurvatureBudget:
    r"""A strength that holds the trace of the Hessian, or the stability of training, at a target.

    The strength rises while the measured curvature is above the target, and falls while it is below. What is adapted is
    the share s of the penalty's gradient in units of the task loss's gradient (see :class:`GradientShare`). After each
    step on which the penalty acts,

    .. math:: \log s \leftarrow \log s + 0.1 \, \min(1, \max(-1, 4 \log(c / \text{target}))),

    with c the mean of the penalty's own values, in which a new one counts 10 %. So the share changes by at most 10 % in
    a step. It starts at 0.01 and stays between 0.01 and 10.

    The values of :class:`HessianNorm` are lower bounds of the norm, which is then held somewhat above the target.
    ``HessianNorm(iterations=3)`` comes nearer. (The same holds for ``two_pass`` at a large strength: it measures the
    trace of a smoothed loss.)

    **If the target cannot be met**, the share stays at its bound. At 10 the curvature stays above the target, and the
    penalty's gradient outweighs the task loss's: choose a higher target. At 0.01 it is below it without help.

    Args:
        trace: the target for tr(H), positive; for :class:`HessianTrace` (with ``method="gauss_newton"`` tr(G)).
        stability: the target for eta lambda / 2, positive, with the largest learning rate eta and the norm lambda of
            the Hessian; for :class:`HessianNorm`. Gradient descent is linearly unstable above 1.

    Raises:
        ValueError: not exactly one target is given, or it is not positive.
        MisconfigurationException: when fitting starts: the penalty does not measure the target.

    Example:
        >>> from lightning_hessian import HessianNorm, HessianRegularizer
        >>> regularizer = HessianRegularizer(HessianNorm(), strength=CurvatureBudget(stability=0.5))
    """

    trace: float | None = None
    stability: float | None = None

    def __post_init__(self) -> None:
        given = {name: x for name, x in (("trace", self.trace), ("stability", self.stability)) if x is not None}
        if len(given) != 1:
            raise ValueError(
                f"CurvatureBudget has {len(given)} targets. Give one: trace= for a HessianTrace, stability= for a "
                "HessianNorm. Each penalty has a strength of its own."
            )
        ((name, target),) = given.items()
        if not is_number(target) or not 0 < float(target) < math.inf:
            raise ValueError(f"{name}={target!r} must be a positive number: the value to be held.")

    @property
    def target(self) -> float:
        """The value to be held."""
        found = self.stability if self.trace is None else self.trace
        assert found is not None
        return float(found)

    def check(self, penalty: Penalty) -> None:
        """See that the penalty measures the target.

        Raises:
            MisconfigurationException: it does not.
        """
        if self.trace is not None and not (isinstance(penalty, HessianTrace) and penalty.scale == "none"):
            raise MisconfigurationException(
                f"{self!r} holds the trace of the Hessian, which {penalty!r} does not measure. Use HessianTrace() with "
                "scale='none', or strength=GradientShare(0.1)."
            )
        if self.stability is not None and not isinstance(penalty, HessianNorm):
            raise MisconfigurationException(
                f"{self!r} holds the largest eigenvalue of the Hessian, which {penalty!r} does not measure. Use "
                "HessianNorm(), or strength=GradientShare(0.1)."
            )

    def new_control(self) -> BudgetControl:
        """What adapts a strength by this rule."""
        return BudgetControl(self)


@dataclass
class BudgetControl:
    """The strength of one penalty in a fit, by :class:`CurvatureBudget`.

    Args:
        rule: the setting.

    Attributes:
        whole: the strength at which the penalty's gradient is as long as the task loss's.
        share: the present share of it.
        curvature: the mean of the measured values; None before the first one.
    """

    rule: CurvatureBudget
    whole: ShareControl = field(default_factory=lambda: ShareControl(GradientShare(1.0)), init=False)
    share: float = field(default=_LEAST, init=False)
    curvature: float | None = field(default=None, init=False)

    @property
    def strength(self) -> float:
        return self.share * self.whole.strength

    @property
    def is_due(self) -> bool:
        return self.whole.is_due

    def measure(self, task: float, penalty: float) -> None:
        """Adapt the strength to the lengths of the gradients of the task loss and of the penalty at strength 1."""
        self.whole.measure(task, penalty)

    def see(self, value: float, trainer: Trainer) -> None:
        """Adapt the share to the penalty's value on a step on which it acted."""
        if not math.isfinite(value):
            return
        if self.rule.stability is not None:
            value *= max(float(group["lr"]) for one in trainer.optimizers for group in one.param_groups) / 2
        self.curvature = value if self.curvature is None else self.curvature + _NEW * (value - self.curvature)
        excess = math.log(self.curvature / self.rule.target) if self.curvature > 0 else -1.0
        self.share = min(max(self.share * math.exp(_RATE * min(max(_GAIN * excess, -1.0), 1.0)), _LEAST), _MOST)

    def acted(self) -> None:
        """Count a step on which the penalty acted."""
        self.whole.acted()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"whole": self.whole.state_dict(), "share": self.share, "curvature": self.curvature}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; an empty one starts anew."""
        self.whole.load_state_dict(state.get("whole", {}))
        self.share = state.get("share", _LEAST)
        self.curvature = state.get("curvature")
