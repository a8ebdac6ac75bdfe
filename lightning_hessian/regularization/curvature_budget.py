"""A strength that holds a measured curvature at a target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_hessian.arguments import is_number
from lightning_hessian.penalties import HessianNorm, HessianTrace, Penalty
from lightning_hessian.regularization.gradient_share import GradientShare, ShareControl
from lightning_hessian.step.loop import TrainingLoop

_LEAST, _MOST = 0.01, 2.0
"""The smallest share of the gradient, which is that of the beginning, and the largest one."""
_RATE, _GAIN = 0.2, 12.0
"""The largest change of the share's logarithm in one acting step. It is reached where the curvature is off the target
by exp(1/12), or 9 %."""
_NEW = 0.2
"""The weight of a new value of the penalty in the mean of the curvature."""
_RATE_OF_MONITOR, _GAIN_OF_MONITOR = math.log(2.0), 4.0
"""The same for one measurement of a monitor, off the target by 28 %. Between two of them training has gone on."""


class _Measured(Protocol):
    """A measurement of a monitor at an optimizer step."""

    step: int
    trace: Any
    stability: float | None


@runtime_checkable
class _Monitor(Protocol):
    """What measures curvature in training: :class:`CurvatureMonitor`, or a callback with the same two members."""

    batches: str

    @property
    def latest_curvature(self) -> _Measured | None:
        """The latest measurement that an uninterrupted run has, too."""


@dataclass(frozen=True)
class CurvatureBudget:
    r"""A strength that holds the trace of the Hessian, or the stability of training, at a target.

    The strength rises while the measured curvature is above the target, and falls while it is below. What is adapted is
    the share s of the penalty's gradient in units of the task loss's gradient (see :class:`GradientShare`). It starts
    at 0.01 and stays between 0.01 and 2.

    :class:`HessianTrace` measures the trace itself, and :class:`HessianNorm` the stability, both without ``scale`` and
    ``parameters``. After each step on which they act,

    .. math:: \log s \leftarrow \log s + 0.2 \, \min(1, \max(-1, 12 \log(c / \text{target}))),

    with c the mean of the penalty's own values, in which a new one counts 20 %. So the share changes by at most 20 % in
    a step. The values of :class:`HessianNorm` are lower bounds of the norm, which is then held somewhat above the
    target. ``HessianNorm(iterations=3)`` comes nearer. (The same holds for ``two_pass`` at a large strength: it
    measures the trace of a smoothed loss.)

    For any other penalty, a :class:`CurvatureMonitor` of training data must be among the Trainer's callbacks. After
    each of its measurements,

    .. math:: \log s \leftarrow \log s + \log 2 \, \min(1, \max(-1, 4 \log(c / \text{target}))),

    with c the measured value. So the share changes by a factor of at most 2 in a measurement. Let the monitor measure
    often enough, for example with ``every_n_steps=20``.

    **If the target cannot be met**, the share stays at its bound. At 2 the curvature stays above the target, and the
    penalty's gradient outweighs the task loss's: choose a higher target. At 0.01 it is below it without help.

    Args:
        trace: the target for tr(H), positive; for ``HessianTrace(method="gauss_newton")`` tr(G).
        stability: the target for eta lambda / 2, positive, with the largest learning rate eta and the norm lambda of
            the Hessian (a monitor's largest eigenvalue). Gradient descent is linearly unstable above 1.

    Raises:
        ValueError: not exactly one target is given, or it is not positive.
        MisconfigurationException: when fitting starts: neither the penalty nor a monitor measures the target.

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
                f"CurvatureBudget has {len(given)} targets. Give one: trace= or stability=. Each penalty has "
                "a strength of its own."
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

    def is_measured_by(self, penalty: Penalty) -> bool:
        """Whether the penalty's own values are those to be held."""
        if not isinstance(penalty, HessianTrace | HessianNorm) or penalty.parameters is not None:
            return False  # a part of the Hessian is not the Hessian
        return isinstance(penalty, HessianNorm) if self.trace is None else getattr(penalty, "scale", None) == "none"

    def check(self, penalty: Penalty, loop: TrainingLoop) -> None:
        """See that the target is measured.

        Raises:
            MisconfigurationException: it is not.
        """
        if self.stability is not None and not loop.learning_rates:
            raise MisconfigurationException(
                f"{self!r} holds the learning rate times an eigenvalue, and no optimizer has a learning rate. Hold the "
                "trace, or take strength=GradientShare(0.1)."
            )
        if self.is_measured_by(penalty) or _monitor_of(loop) is not None:
            return
        what, own = ("trace", "HessianTrace()") if self.trace is not None else ("largest eigenvalue", "HessianNorm()")
        raise MisconfigurationException(
            f"{self!r} holds the {what} of the whole Hessian, which {penalty!r} does not measure. Add a "
            "CurvatureMonitor of training data to the Trainer's callbacks, such as CurvatureMonitor(every_n_steps=20) "
            "(on the command line monitor=curvature monitor.every_n_steps=20). Or use "
            f"{own} without scale= and parameters=, or strength=GradientShare(0.1)."
        )

    def new_control(self, penalty: Penalty) -> BudgetControl:
        """What adapts the strength of the penalty by this rule."""
        return BudgetControl(self, self.is_measured_by(penalty))


@dataclass
class BudgetControl:
    """The strength of one penalty in a fit, by :class:`CurvatureBudget`.

    Args:
        rule: the setting.
        by_penalty: whether the penalty measures the target, or else a monitor.

    Attributes:
        whole: the strength at which the penalty's gradient is as long as the task loss's.
        share: the present share of it.
        curvature: the mean of the penalty's values; None before the first one.
        seen: the optimizer step of the monitor's measurement that was used last; -1 before the first one.
    """

    rule: CurvatureBudget
    by_penalty: bool
    whole: ShareControl = field(default_factory=lambda: ShareControl(GradientShare(1.0)), init=False)
    share: float = field(default=_LEAST, init=False)
    curvature: float | None = field(default=None, init=False)
    seen: int = field(default=-1, init=False)

    @property
    def strength(self) -> float:
        return self.share * self.whole.strength

    @property
    def is_due(self) -> bool:
        return self.whole.is_due

    def measure(self, task: float, penalty: float) -> None:
        """Adapt the strength to the lengths of the gradients of the task loss and of the penalty at strength 1."""
        self.whole.measure(task, penalty)

    def not_resolved(self) -> None:
        """See :meth:`ShareControl.not_resolved`."""
        self.whole.not_resolved()

    def see(self, value: float, loop: TrainingLoop) -> None:
        """Adapt the share on a step on which the penalty acted, with its value."""
        if self.by_penalty:
            self._follow_values(value, loop)
        elif (monitor := _monitor_of(loop)) is not None:
            self._follow_monitor(monitor.latest_curvature)

    def _follow_values(self, value: float, loop: TrainingLoop) -> None:
        if not math.isfinite(value):
            return
        if self.rule.stability is not None:
            value *= max(loop.learning_rates) / 2
        self.curvature = value if self.curvature is None else self.curvature + _NEW * (value - self.curvature)
        self._change(self.curvature, _RATE, _GAIN)

    def _follow_monitor(self, latest: _Measured | None) -> None:
        if latest is None or latest.step <= self.seen:
            return
        self.seen = latest.step
        value = latest.stability if self.rule.trace is None else latest.trace.estimate
        if value is not None and math.isfinite(value):
            self._change(value, _RATE_OF_MONITOR, _GAIN_OF_MONITOR)

    def _change(self, curvature: float, rate: float, gain: float) -> None:
        excess = math.log(curvature / self.rule.target) if curvature > 0 else -1.0
        self.share = min(max(self.share * math.exp(rate * min(max(gain * excess, -1.0), 1.0)), _LEAST), _MOST)

    def acted(self) -> None:
        """Count a step on which the penalty acted."""
        self.whole.acted()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        own = {name: getattr(self, name) for name in ("share", "curvature", "seen")}
        return {"whole": self.whole.state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; an empty one starts anew."""
        self.whole.load_state_dict(state.get("whole", {}))
        self.share = state.get("share", _LEAST)
        self.curvature = state.get("curvature")
        self.seen = state.get("seen", -1)


def _monitor_of(loop: TrainingLoop) -> _Monitor | None:
    """The monitor of the curvature on training data, if there is one."""
    return next((one for one in loop.callbacks if isinstance(one, _Monitor) and one.batches == "train"), None)
