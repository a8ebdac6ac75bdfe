"""What every way to compute a penalty is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_hessian.penalties.base import Needs
from lightning_hessian.penalties.differences import DifferenceContext, SecondDifference
from lightning_hessian.penalties.step_context import StepContext

Selection = Callable[[StepContext | DifferenceContext], dict[str, Tensor]]
"""The parameters that a penalty is about, by name; see :meth:`WeightPenalty.selected`."""


@dataclass(frozen=True, kw_only=True)
class Estimator(ABC):
    """One way to compute a penalty on the weights: from the graph of a loss, or from losses at displaced parameters.

    Args:
        selected: finds the parameters in a context.

    Attributes:
        method: what the setting ``method`` calls it.
    """

    method: ClassVar[str]
    selected: Selection

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What this way needs of the model and the step."""

    @abstractmethod
    def value(self, context: StepContext) -> Tensor:
        """The measure at this step: a scalar that can be differentiated with respect to the parameters."""

    def differences(self, context: DifferenceContext) -> list[SecondDifference]:
        """What to add to the loss, for a way that needs ``differences``. The measure is the mean of their values."""
        raise NotImplementedError


class DifferenceEstimator(Estimator):
    """A way that is made of losses at displaced parameters: ordinary passes only."""

    @abstractmethod
    def differences(self, context: DifferenceContext) -> list[SecondDifference]: ...

    def value(self, context: StepContext) -> Tensor:
        """Refuse a loss that is computed already."""
        raise ValueError(
            f"method={self.method!r} runs the step at other parameters, which a loss that is computed already cannot "
            "do. Use HessianRegularizer or the mixin, or method='autograd'."
        )
