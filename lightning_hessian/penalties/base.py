"""What every penalty is: a function of one step's loss, parameters and inputs that knows nothing of Lightning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_hessian.curvature import ParameterFilter, select_parameters
from lightning_hessian.curvature.graph import depends
from lightning_hessian.curvature.parameters import check_filter
from lightning_hessian.penalties.differences import DifferenceContext, SecondDifference
from lightning_hessian.penalties.step_context import StepContext
from lightning_hessian.step.batches import InputChoice


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a penalty needs of the model and the training step. What a step does not give is refused before training.

    Args:
        derivatives: how often the loss is differentiated, the gradient for training included. Above 1 the forward pass
            runs inside ``higher_order()``.
        differences: the penalty is made of the step's losses at displaced parameters (:meth:`Penalty.differences`).
        smooth: kinks of activations make the measure noise.
        full_precision: the rounding of 16-bit numbers drowns the measure.
        whole_parameters: parameters that are sharded over processes are beyond it.
        losses: the calls of loss functions in the step are recorded (:attr:`StepContext.losses`).
    """

    derivatives: int = 3
    differences: bool = False
    smooth: bool = False
    full_precision: bool = False
    whole_parameters: bool = True
    losses: bool = False


class Penalty(ABC):
    """A measure of curvature that can be added to a loss. A subclass is one file that reads like its formula."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What the measure is called in logs: ``curvature/<name>``. A class attribute does."""

    @property
    def needs(self) -> Needs:
        """What the penalty needs of the model and the step. A class attribute does."""
        return Needs()

    @abstractmethod
    def value(self, context: StepContext) -> Tensor:
        """The measure at this step: a scalar that can be differentiated with respect to the parameters."""

    def differences(self, context: DifferenceContext) -> list[SecondDifference]:
        """What to add to the loss instead of ``strength * term(value)``, where the penalty needs ``differences``. The
        penalty's value is the mean of theirs."""
        raise NotImplementedError

    def term(self, value: Tensor) -> Tensor:
        """What enters the loss, times the strength. By default the value itself."""
        return value

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """Refuse a model before it is trained.

        Raises:
            ValueError: the penalty cannot be computed on these parameters.
        """
        select_parameters(parameters)

    def with_fixed_direction(self, context: StepContext) -> Callable[[StepContext], Tensor]:
        """The penalty as a function whose gradient is the one it trains with: what it treats as constant (a direction
        that a search has found) stays as it is at ``context``. By default nothing is."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """What the penalty keeps from step to step, for checkpoints. By default nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on from a state; from an empty one, start anew."""

    def __call__(self, context: StepContext) -> Tensor:
        """The term that enters the loss, times the strength."""
        return self.term(self.value(context))


class WeightPenalty(Penalty):
    """A penalty on derivatives with respect to the parameters, or some of them.

    Args:
        parameters: restrict it to these: a glob on names (``"*.weight"``), a list of globs, or a predicate
            ``(name, parameter) -> bool``. By default all that require a gradient.

    Raises:
        ValueError: ``parameters`` is something else.
    """

    def __init__(self, parameters: ParameterFilter = None) -> None:
        check_filter(parameters)
        self.parameters = parameters

    def selected(self, context: StepContext | DifferenceContext) -> dict[str, Tensor]:
        """The parameters that the penalty is about, by name."""
        return select_parameters(context.parameters, self.parameters)

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        select_parameters(parameters, self.parameters)


class InputPenalty(Penalty):
    """A penalty on derivatives by the inputs, sample by sample: the mean over samples, whatever the batch size.

    Args:
        inputs: which tensors of the batch: a key (or an attribute's name), an index, several of these, or a function
            of the batch that returns one tensor or several of its own; by default the first floating-point tensor.
            Several inputs are taken together, as one long vector for each sample. (The step gets a copy of the
            batch's containers with these in place; what it writes into the containers, later hooks do not see.)
        layer: take the output of this layer (by name, at its first call in a step) for the input instead, for
            example that of an embedding.

    Raises:
        ValueError: both are given.
    """

    def __init__(self, inputs: InputChoice = None, layer: str | None = None) -> None:
        if inputs is not None and layer is not None:
            raise ValueError(f"inputs={inputs!r} and layer={layer!r} name two places to take the input from: keep one.")
        self.inputs = inputs
        self.layer = layer

    @property
    def needs(self) -> Needs:
        return Needs(losses=True)

    def check_inputs(self, context: StepContext) -> None:
        """Refuse a context without inputs, or with some that are not samples in rows or not independent.

        Raises:
            ValueError: no input, inputs with different numbers of samples, or batch norm in training mode.
        """
        if not context.inputs:
            raise ValueError(
                f"{type(self).__name__} differentiates by the inputs, and the context has none. Compute the loss from "
                "them: StepContext.evaluate(loss, inputs, parameters)."
            )
        sizes = [tuple(x.shape) for x in context.inputs]
        if len({size[0] for size in sizes}) > 1:
            raise ValueError(
                f"The inputs of {type(self).__name__} have the shapes {', '.join(map(str, sizes))}: their first "
                "dimension must be the number of samples in all of them. Choose others with `inputs=`."
            )
        if context.outputs and not any(depends(z, on=x) for z in context.outputs for x in context.inputs):
            chosen = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in context.inputs)
            raise ValueError(
                f"The outputs do not depend on the inputs that {type(self).__name__} takes ({chosen}). They may be "
                "the targets, where the real inputs are whole numbers, which have no derivatives; or the step "
                "detaches them. Choose with `inputs=`; convert images to floating point before the step; for token ids "
                "penalize the embeddings, by layer='<name of the embedding layer>'."
            )
        if context.losses.batch_statistics:
            raise ValueError(
                "Batch norm normalized by the batch's own statistics, which couples the samples, and "
                f"{type(self).__name__} is made of each sample's own derivatives. Put the batch norm layers in "
                "evaluation mode (the callback and the mixin do this for nn.BatchNorm layers), or use GroupNorm."
            )
