"""Base classes of the estimators, the methods by which penalties on the weights are computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_hessian.penalties.base import Needs
from lightning_hessian.penalties.differences import DifferenceContext, SecondDifference
from lightning_hessian.penalties.step_context import ForwardContext, StepContext

Selection = Callable[[StepContext | DifferenceContext | ForwardContext], dict[str, Tensor]]
"""Returns the penalized parameters by name; see :meth:`WeightPenalty.selected`."""


@dataclass(frozen=True, kw_only=True)
class Estimator(ABC):
    """One method for a penalty on the weights: from a loss's graph, or from losses at displaced parameters.

    Args:
        selected: returns the penalized parameters of a context.

    Attributes:
        method: its name in the setting ``method``.
    """

    method: ClassVar[str]
    selected: Selection

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """Requirements on the model and the step."""

    @abstractmethod
    def value(self, context: StepContext) -> Tensor:
        """The measure at this step: a scalar, differentiable with respect to the parameters."""

    def differences(self, context: DifferenceContext) -> list[SecondDifference]:
        """Terms to add to the loss if ``needs.differences`` is set. The measure is the mean of their values."""
        raise NotImplementedError


class DifferenceEstimator(Estimator):
    """An estimator from losses at displaced parameters. It needs ordinary passes only."""

    @abstractmethod
    def differences(self, context: DifferenceContext) -> list[SecondDifference]: ...

    def value(self, context: StepContext) -> Tensor:
        """Raise an error, because the loss is already computed."""
        raise ValueError(
            f"method={self.method!r} runs the step at other parameters, but this loss is already computed. Use "
            "HessianRegularizer or the mixin, or method='autograd'."
        )
