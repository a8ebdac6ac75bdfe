"""Base classes of penalties. A penalty is a function of a step's loss, parameters and inputs, without Lightning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_hessian.curvature import ParameterFilter, select_parameters
from lightning_hessian.curvature.graph import depends
from lightning_hessian.curvature.parameters import check_filter
from lightning_hessian.curvature.taylor import taylor_mode
from lightning_hessian.penalties.differences import AscentDifference, DifferenceContext, SecondDifference
from lightning_hessian.penalties.step_context import ForwardContext, StepContext
from lightning_hessian.step.batches import InputChoice


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a penalty requires of the model and the training step. Unmet requirements raise an error before training.

    Args:
        derivatives: number of times the loss is differentiated, including the training gradient. Above 1 the forward
            pass runs inside ``higher_order()``.
        differences: the penalty consists of losses at displaced parameters (:meth:`Penalty.differences`).
        smooth: the penalty is noise if activations have kinks.
        full_precision: 16-bit rounding errors exceed the penalty.
        whole_parameters: the penalty does not support parameters sharded across processes.
        float16: the penalty works under float16 autocast: its gradient comes from the scaled loss's backward pass.
        losses: the step's calls of loss functions must be recorded (:attr:`StepContext.losses`).
        taylor: the forward pass runs inside :meth:`Penalty.forward_mode` and carries Taylor coefficients.
    """

    derivatives: int = 3
    differences: bool = False
    smooth: bool = False
    full_precision: bool = False
    whole_parameters: bool = True
    float16: bool = False
    losses: bool = False
    taylor: bool = False


class Penalty(ABC):
    """A measure of curvature to add to a loss. Each subclass is one file that reads like its formula.

    Attributes:
        default_strength: the factor in the loss of a regularizer that is given none.
        scales_with_interval: whether a regularizer that acts on every n-th step only takes n times the strength.
    """

    default_strength: ClassVar[float] = 1e-3
    scales_with_interval: ClassVar[bool] = True

    @property
    @abstractmethod
    def name(self) -> str:
        """Log name: ``curvature/<name>``. May be a class attribute."""

    @property
    def needs(self) -> Needs:
        """Requirements on the model and the step. May be a class attribute."""
        return Needs()

    def needs_on(self, parameters: Mapping[str, Tensor]) -> Needs:
        """Requirements on a step with these parameters of the model. By default :attr:`needs`."""
        return self.needs

    @abstractmethod
    def value(self, context: StepContext) -> Tensor:
        """The measure at this step: a scalar, differentiable with respect to the parameters."""

    def differences(self, context: DifferenceContext) -> Sequence[SecondDifference | AscentDifference]:
        """Terms to add to the loss instead of ``strength * term(value)`` if ``needs.differences`` is set. The penalty's
        value is the mean of their values."""
        raise NotImplementedError

    def forward_mode(self, context: ForwardContext) -> taylor_mode:
        """The context manager for the forward pass if ``needs.taylor`` is set."""
        raise NotImplementedError

    def term(self, value: Tensor) -> Tensor:
        """The term that enters the loss, before multiplication by the strength. By default the value itself."""
        return value

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """Check the model before training.

        Raises:
            ValueError: the penalty cannot be computed on these parameters.
        """
        select_parameters(parameters)

    def with_fixed_direction(self, context: StepContext) -> Callable[[StepContext], Tensor]:
        """The penalty as a function with exactly the gradient used in training: what the penalty treats as constant,
        such as a direction found by a search, is fixed at its value for ``context``. By default nothing is constant."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """State kept between steps, for checkpoints. By default empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore a state. An empty one resets the penalty."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __call__(self, context: StepContext) -> Tensor:
        """The term that enters the loss, before multiplication by the strength."""
        return self.term(self.value(context))


class WeightPenalty(Penalty):
    """A penalty on derivatives with respect to all or some parameters.

    Args:
        parameters: restrict the penalty to these: a glob on names (``"*.weight"``), a list of globs, or a predicate
            ``(name, parameter) -> bool``. Default: all that require a gradient.

    Raises:
        ValueError: ``parameters`` has another type.
    """

    def __init__(self, parameters: ParameterFilter = None) -> None:
        check_filter(parameters)
        self.parameters = parameters

    def selected(self, context: StepContext | DifferenceContext | ForwardContext) -> dict[str, Tensor]:
        """The penalized parameters, by name."""
        return select_parameters(context.parameters, self.parameters)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'' if self.parameters is None else f'parameters={self.parameters!r}'})"

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        select_parameters(parameters, self.parameters)


class InputPenalty(Penalty):
    """A penalty on each sample's derivatives with respect to its input. It is a mean over samples, independent of the
    batch size.

    Args:
        inputs: tensors of the batch to use as input: a key (or attribute name), an index, several of these, or a
            function of the batch that returns one or several of its tensors. Default: the first floating-point tensor.
            Several inputs form one long vector per sample. The step receives a copy of the batch's containers with
            these tensors replaced, so later hooks do not see what the step writes into the containers.
        layer: use this layer's output as input instead (by name, at its first call in a step), for example of an
            embedding.

    Raises:
        ValueError: both are given.
    """

    def __init__(self, inputs: InputChoice = None, layer: str | None = None) -> None:
        if inputs is not None and layer is not None:
            raise ValueError(f"inputs={inputs!r} and layer={layer!r} both specify the input: keep one.")
        self.inputs = inputs
        self.layer = layer

    @property
    def needs(self) -> Needs:
        return Needs(losses=True)

    def check_inputs(self, context: StepContext) -> None:
        """Check that the context has inputs with one row per sample, and that the samples are independent.

        Raises:
            ValueError: no input, inputs with different numbers of samples, outputs that do not depend on the inputs,
                or batch norm in training mode.
        """
        if not context.inputs:
            raise ValueError(
                f"{type(self).__name__} differentiates with respect to the inputs, but the context has none. Compute "
                "the loss from them: StepContext.evaluate(loss, inputs, parameters)."
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
                f"The outputs do not depend on the inputs that {type(self).__name__} takes ({chosen}). Perhaps these "
                "are the targets, because the real inputs are integers, which have no derivatives; or the step "
                "detaches them. Choose others with `inputs=`; convert images to floating point before the step; for "
                "token ids penalize the embeddings with layer='<name of the embedding layer>'."
            )
        if context.losses.batch_statistics:
            raise ValueError(
                "Batch norm used the batch's statistics, which couples the samples, but "
                f"{type(self).__name__} needs each sample's own derivatives. Put the batch norm layers in evaluation "
                "mode (the callback and the mixin do this for nn.BatchNorm layers), or use GroupNorm."
            )
