"""A strength that holds the penalty's gradient at a share of the task loss's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_hessian.arguments import is_number, whole_number
from lightning_hessian.penalties import Penalty
from lightning_hessian.step.loop import TrainingLoop

_NEW = 0.3
"""The weight of a new measurement in the mean, from the third on."""
_RISE = 2.0
"""The factor by which one measurement may raise the strength, after the first."""
_FAR = math.log(1.5)
"""How far from the mean a measurement is looked at again on the next step."""
_EACH = 10
"""This many steps are measured at the start, one after the other: the ratio may grow a thousandfold in one."""
_FREE, _AFTER = 20, 20
"""This many measurements are taken as often as needed, and then at most one in so many acting steps."""
_UNMEASURED = 1e-4
"""The strength of the first step, before a warm-up: ``two_pass`` moves each weight by 0.014 there."""
_MOST_UNMEASURED = 1.0
"""How far the strength is raised where the first measurements are rounding."""


@dataclass(frozen=True)
class GradientShare:
    r"""A strength that keeps the penalty's gradient at a share of the task loss's gradient, throughout training.

    .. math:: \text{strength} = \text{share} \cdot \lVert \nabla L \rVert_2 \, / \, \lVert \nabla P \rVert_2

    with the task loss L and the penalty P, over all parameters that are trained and all ranks' batches together. The
    share has no unit, so it carries over from one model and data set to another, where a strength does not.

    The ratio is measured on every ``every_n_steps``-th step on which the penalty acts, on each of the first ten, and
    more often where it changes. The strength follows the geometric mean of the ratios, in which a new one counts 30 %.
    Where one is off the mean by more than 1.5, the next step is measured, too; if that is off to the same side, it
    takes the place of the mean. After the first, one measurement raises the strength by a factor of at most 2. A fall
    is not bounded, because derivatives by the inputs may grow a thousandfold in a step, and one step with a strength
    that is too large destroys the weights. A measurement that is not finite, zero, or a rounding error (of ``two_pass``
    in 16 bits) changes nothing. With gradient accumulation the gradients are those of all micro-batches of a step
    together.

    A measurement costs a plain step, or its backward pass: at the default about 2 % of a plain step on average, and at
    most 5 % where the ratio keeps changing, after about twenty measurements at the start. The strength is logged as
    ``train/strength`` (with several such penalties as ``train/<penalty name>_strength``), and kept in checkpoints.

    A penalty may keep a network where its derivatives are zero at first, at any share: a penalty on the inputs does so
    where the last layer is zero. Let it start later, with ``start=0.1``.

    ``warmup_steps`` and ``every_n_steps`` of the regularizer multiply the strength, and with it the share.

    Args:
        share: the length of the penalty's gradient in units of the task loss's, in (0, 1].
        every_n_steps: how many acting steps lie between two measurements, at least 1.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from lightning_hessian import HessianRegularizer, HessianTrace
        >>> regularizer = HessianRegularizer(HessianTrace(), strength=GradientShare(0.1), warmup_steps=200)
    """

    share: float
    every_n_steps: int = 50

    def __post_init__(self) -> None:
        if not is_number(self.share) or not 0 < float(self.share) <= 1:
            raise ValueError(
                f"share={self.share!r} must lie in (0, 1]: how large the penalty's gradient is to be, as a share of "
                "the task loss's. 0.1 is a start."
            )
        whole_number("every_n_steps", self.every_n_steps, 1, "the acting steps between two measurements")

    def check(self, penalty: Penalty, loop: TrainingLoop) -> None:
        """Any penalty will do."""

    def new_control(self, penalty: Penalty) -> ShareControl:
        """What adapts the strength of the penalty by this rule."""
        return ShareControl(self)


@dataclass
class ShareControl:
    """The strength of one penalty in a fit, by :class:`GradientShare`.

    Args:
        rule: the setting.

    Attributes:
        strength: the present strength.
        steps: on how many steps the penalty has acted.
        log_ratio: the mean of log(||grad P|| / ||grad L||); None before the first measurement.
        measured: how many measurements are in it.
        side: on which side of the mean the last measurement was far off, 1 above and -1 below; 0 if it was near.
        interval: how many acting steps lie between two measurements now.
        next_at: on which acting step the next one is taken.
    """

    rule: GradientShare
    strength: float = field(default=_UNMEASURED, init=False)
    steps: int = field(default=0, init=False)
    log_ratio: float | None = field(default=None, init=False)
    measured: int = field(default=0, init=False)
    side: int = field(default=0, init=False)
    interval: int = field(default=1, init=False)
    next_at: int = field(default=0, init=False)

    @property
    def is_due(self) -> bool:
        """Whether the next acting step is to be measured."""
        return self.steps >= self.next_at

    def measure(self, task: float, penalty: float) -> None:
        """Adapt the strength to the lengths of the gradients of the task loss and of the penalty at strength 1."""
        if not (0 < task < math.inf and 0 < penalty < math.inf):
            self._wait(is_far=False)
            return
        now = math.log(penalty / task)
        change = 0.0 if self.log_ratio is None else now - self.log_ratio
        side = 0 if abs(change) < _FAR else 1 if change > 0 else -1
        if self.log_ratio is None or (side and side == self.side):  # a second one as far off is no noise
            self.log_ratio = now
        else:
            self.log_ratio += max(_NEW, 1 / (self.measured + 1)) * change
        # On the measured step itself the share is at most 1.5 times the one asked for.
        wanted = self.rule.share / math.exp(max(self.log_ratio, now - _FAR))
        if self.measured:
            wanted = min(wanted, self.strength * _RISE)
        self.strength = wanted
        self.measured += 1
        self.side = side
        self._wait(is_far=side != 0)

    def not_resolved(self) -> None:
        """The measured gradient was rounding: raise the strength until one is not, or keep what was measured before."""
        self._wait(is_far=False)
        if not self.measured:
            self.strength = min(2 * self.strength, _MOST_UNMEASURED)

    def _wait(self, is_far: bool) -> None:
        is_short = is_far or self.measured < _EACH
        self.interval = 1 if is_short else min(math.ceil(1.5 * self.interval), self.rule.every_n_steps)
        not_before = min(_AFTER * (self.measured - _FREE), self.steps + self.rule.every_n_steps)
        self.next_at = max(self.steps + self.interval, not_before)

    def acted(self) -> None:
        """Count an optimizer step on which the penalty acted."""
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            name: getattr(self, name)
            for name in ("strength", "steps", "log_ratio", "measured", "side", "interval", "next_at")
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; an empty one starts anew."""
        fresh = ShareControl(self.rule).state_dict()
        for name, value in (fresh | dict(state)).items():
            setattr(self, name, value)
