"""What every penalty is: a function of one step's loss and parameters that knows nothing of Lightning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from lightning_hessian.curvature import ProbeSource, select_parameters


@dataclass(frozen=True)
class StepContext:
    """What one training step offers a penalty.

    Args:
        loss: the batch-mean loss L(theta), with its graph, computed inside ``higher_order()``.
        parameters: the model's parameters theta, by name.
        probes: where random vectors come from.
    """

    loss: Tensor
    parameters: Mapping[str, Tensor]
    probes: ProbeSource = field(default_factory=ProbeSource)


class Penalty(ABC):
    """A measure of curvature that can be added to a loss. A subclass is one file that reads like its formula."""

    name: ClassVar[str]
    """What the measure is called in logs: ``curvature/<name>``."""

    @abstractmethod
    def value(self, context: StepContext) -> Tensor:
        """The measure at this step: a scalar that can be differentiated with respect to the parameters."""

    def term(self, value: Tensor) -> Tensor:
        """What enters the loss, times the strength. By default the value itself."""
        return value

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """Refuse a model before it is trained.

        Raises:
            ValueError: the penalty cannot be computed on these parameters.
        """
        select_parameters(parameters)

    def __call__(self, context: StepContext) -> Tensor:
        """The term that enters the loss, times the strength."""
        return self.term(self.value(context))
