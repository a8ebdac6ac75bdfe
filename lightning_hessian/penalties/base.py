"""What every penalty is: a function of one step's loss, parameters and inputs that knows nothing of Lightning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_hessian.curvature import (
    ProbeSource,
    higher_order,
    select_parameters,
    watch_losses,
)
from lightning_hessian.curvature.displacement import dot
from lightning_hessian.curvature.graph import depends
from lightning_hessian.curvature.operators import input_gradients, rows, vector_jacobian_product
from lightning_hessian.step.batches import InputChoice
from lightning_hessian.step.isolation import RandomState


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class StepContext:
    """What one training step offers a penalty.

    Args:
        loss: the loss L(theta), with its graph, computed inside ``higher_order()``.
        parameters: the model's parameters theta, by name.
        probes: where random vectors come from; by default each context draws new ones (one fixed probe could be gamed
            by the network). ``ProbeSource(seed, step)`` gives the same ones again.
        inputs: the step's inputs x, each of shape (samples, ...), in the graph of the loss. The penalties on the
            inputs need them.
        losses: the calls of loss functions that were seen in the step; they tell whether the loss is the mean or the
            sum of the samples' losses l_i (where none was seen, it is taken for the mean).
        outputs: logits or predictions, in the graph of the inputs; by default what the loss functions were called on.
        mean_over_ranks: the mean of a tensor over the processes that share the batch, the same on all of them; every
            one of them must call it. By default there is one process.
        moved: ``moved(shifts)`` runs the same step at x + shifts, with the same random numbers, and returns its
            context. Finite differences need it.
    """

    loss: Tensor
    parameters: Mapping[str, Tensor]
    probes: ProbeSource = field(default_factory=ProbeSource.fresh)
    inputs: Sequence[Tensor] = ()
    losses: watch_losses = field(default_factory=watch_losses)
    outputs: Sequence[Tensor] = ()
    mean_over_ranks: Callable[[Tensor], Tensor] = _itself
    moved: Callable[[Sequence[Tensor]], StepContext] | None = None

    @classmethod
    def of(
        cls,
        loss: Callable[..., Tensor],
        inputs: Tensor | Sequence[Tensor],
        parameters: Mapping[str, Tensor],
        probes: ProbeSource | None = None,
    ) -> StepContext:
        """The context of ``loss(*inputs)``, for penalties on the inputs outside of Lightning.

        Args:
            loss: computes the mean loss of a batch from its inputs, the forward pass included.
            inputs: one tensor or several, each of shape (samples, ...).
            parameters: the model's parameters, by name.
            probes: where random vectors come from; by default each context draws new ones.

        Example:
            >>> from torch import nn
            >>> from lightning_hessian import InputGradientNorm, StepContext
            >>> net, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
            >>> def loss(x):
            ...     return nn.functional.cross_entropy(net(x), y)
            >>> penalty = InputGradientNorm()(StepContext.of(loss, x, dict(net.named_parameters())))
            >>> penalty.requires_grad
            True
        """
        given = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        own_probes = probes or ProbeSource.fresh()
        random = RandomState.now(given[0].device)

        def at(shifts: Sequence[Tensor]) -> StepContext:
            moved = [(x.detach() + shift).requires_grad_() for x, shift in zip(given, shifts, strict=True)]
            after = RandomState.now(given[0].device)
            random.restore()  # the same dropout masks
            try:
                return run(moved)
            finally:
                after.restore()

        def run(moved: Sequence[Tensor]) -> StepContext:
            with higher_order(), watch_losses() as seen:
                value = loss(*moved)
            return cls(value, parameters, own_probes, moved, seen, seen.outputs(value), moved=at)

        return run([x.detach().clone().requires_grad_() for x in given])

    @property
    def samples(self) -> int:
        """How many samples the inputs have."""
        return self.inputs[0].size(0)

    @property
    def summed_loss(self) -> Tensor:
        """sum_i l_i: its derivatives by x_i are those of l_i, for all samples at once."""
        return self.loss if self._reduction == "sum" else self.loss * self.samples

    @property
    def sample_losses(self) -> Tensor | None:
        """l_i, of shape (samples,), up to terms that do not pass through a loss function; None where none was seen.

        Where a factor of a loss function depends on the inputs (focal loss), these are not the samples' losses.
        """
        calls = self.losses.calls_in(self.loss)
        if not calls:
            return None
        parts = [
            self.by_sample(call.weights(self.loss, create_graph=True) * call.elements()).sum(dim=1) for call in calls
        ]
        return (1 if self._reduction == "sum" else self.samples) * torch.stack(parts).sum(dim=0)

    @cached_property
    def _reduction(self) -> str | None:
        return self.losses.reduction_of(self.loss, self.samples)

    def by_sample(self, tensor: Tensor) -> Tensor:
        """A tensor of the step's as (samples, n).

        Raises:
            ValueError: it has another number of rows, and they are not those of the samples one after the other.
        """
        count = len(tensor) if tensor.dim() > 0 else 1
        if count != self.samples and (tensor.numel() % self.samples or self._mixes(tensor)):
            raise ValueError(
                f"A tensor of shape {tuple(tensor.shape)} went into the loss for {self.samples} samples, and its rows "
                "cannot be told apart by sample. Call the loss function on a tensor of shape (samples, ...), or return "
                '{"loss": ..., "logits": ...} with such logits.'
            )
        return tensor.reshape(self.samples, -1)

    def _mixes(self, tensor: Tensor) -> bool:
        # Does what would be the first sample's depend on another's input, or what would be another's on the first's?
        own = tensor.reshape(self.samples, -1)
        for part, others in ((own[0], slice(1, None)), (own[1:], slice(0, 1))):
            if self._depends(part.sum(), others):
                return True
        return False

    def _depends(self, value: Tensor, samples: slice) -> bool:
        if not value.requires_grad:
            return False
        gradients = torch.autograd.grad(value, self.inputs, retain_graph=True, allow_unused=True)
        return any(gradient is not None and bool(gradient[samples].any()) for gradient in gradients)

    def couples(self) -> bool:
        """Whether one sample's outputs, or its share of the loss, depend on another sample's input.

        Where a loss function was seen, its arguments and its factor in the loss tell. Otherwise the mixed second
        derivatives of the loss do.
        """
        seen = self.losses.calls_in(self.loss)
        if not seen:
            return self._couples_by_mixed_derivatives()
        factors = [factor for call in seen if (factor := call.factor(self.loss, create_graph=True)) is not None]
        shared = [factor for factor in factors if factor.numel() < self.samples]
        try:
            parts = [self.by_sample(part) for part in (*self.outputs, *factors) if part.numel() >= self.samples]
        except ValueError:
            return True
        # What stands before a mean or a sum belongs to all samples.
        return any(self._depends(factor.sum(), slice(None)) for factor in shared) or any(
            self._depends(part[0].sum(), slice(1, None)) for part in parts
        )

    def _couples_by_mixed_derivatives(self) -> bool:
        """Whether d^2 L / dx_i dx_j is not zero for a sample i of a random half and a sample j of the other."""
        if self.samples < 2:
            return False
        generator = self.probes.generator(_COUPLING)
        half = torch.rand(self.samples, generator=generator) < 0.5
        half[0], half[1] = True, False
        gradients = input_gradients(self.summed_loss, self.inputs, derivatives=2)
        v = [
            torch.randn(x.shape, generator=generator).to(x) * half.to(x).view(-1, *[1] * (x.dim() - 1))
            for x in gradients
        ]
        products = rows(vector_jacobian_product(gradients, self.inputs, v)).float()
        half = half.to(products.device)
        return bool(products[~half].norm() > _COUPLED * products[half].norm())


_COUPLED = 1e-3
"""How large mixed derivatives are, in units of the samples' own, that are no rounding."""
_COUPLING = 1 << 20
"""A stream of probes of its own."""


@dataclass(frozen=True)
class Difference:
    """A penalty's share of the loss, weight * [L(theta + step v) + L(theta - step v) - 2 L(theta)].

    Args:
        tensors: the parts of theta that move.
        direction: v, part by part of the tensors' shapes (of a sharded one, the part that this process holds); drawn
            anew at each call, so that nothing of the model's size need be kept for long.
        step: how far.
        weight: strength / step^2, over the number of differences that are averaged.
        value: the penalty's value from Hv of all ranks' batches together (flat, over the tensors), which is
            [g(theta + step v) - g(theta - step v)] / (2 step). By default the value is v'Hv of this rank's batch.
    """

    tensors: Sequence[Tensor]
    direction: Callable[[], list[Tensor]]
    step: float
    weight: float
    value: Callable[[Tensor], Tensor] | None = None

    def slope(self, v: Sequence[Tensor], gradients: Mapping[Tensor, Tensor]) -> Tensor:
        """v'g, of a gradient by tensor; one that has none does not count."""
        pairs = [(part, gradients[t]) for part, t in zip(v, self.tensors, strict=True) if t in gradients]
        return dot([v for v, _ in pairs], [gradient for _, gradient in pairs], self.tensors[0])

    def gradient(self, gradients: Mapping[Tensor, Tensor]) -> Tensor:
        """g over the tensors, flat; zero where one has none."""
        found = [gradients.get(tensor) for tensor in self.tensors]
        return torch.cat(
            [
                tensor.new_zeros(tensor.numel()) if gradient is None else gradient.reshape(-1)
                for gradient, tensor in zip(found, self.tensors, strict=True)
            ]
        )


Product = Callable[[Difference], Tensor]
"""See :meth:`Penalty.differences`."""


class Penalty(ABC):
    """A measure of curvature that can be added to a loss. A subclass is one file that reads like its formula."""

    name: ClassVar[str]
    """What the measure is called in logs: ``curvature/<name>``."""

    @property
    def derivatives(self) -> int:
        """How often the loss is differentiated, the gradient for training included. Above 1 the forward pass must
        run inside ``higher_order()``."""
        return 3

    @property
    def needs_smoothness(self) -> bool:
        """Whether kinks of activations make the measure noise."""
        return False

    @property
    def needs_full_precision(self) -> bool:
        """Whether the rounding of 16-bit numbers drowns the measure."""
        return False

    @property
    def watches_losses(self) -> bool:
        """Whether the calls of loss functions in the step are looked at (:attr:`StepContext.losses`)."""
        return False

    @property
    def by_differences(self) -> bool:
        """Whether the penalty is made of the step's losses at other parameters (:meth:`differences`)."""
        return False

    @property
    def needs_whole_parameters(self) -> bool:
        """Whether parameters that are sharded over processes are beyond it. They are not in the loss's graph."""
        return not self.by_differences

    def differences(
        self, parameters: Mapping[str, Tensor], strength: float, probes: ProbeSource, product: Product
    ) -> list[Difference]:
        """What to add to the loss where the penalty is made :attr:`by_differences`. Its value is the mean of theirs.

        Args:
            parameters: the model's parameters, by name.
            strength: the penalty's factor in the loss.
            probes: where random vectors come from.
            product: Hv of all ranks' batches together along a difference (flat, over its tensors), for a search. It
                takes two runs of the step, and every rank must take as many.
        """
        raise NotImplementedError

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

    def held(self, context: StepContext) -> Callable[[StepContext], Tensor]:
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
    def watches_losses(self) -> bool:
        return True

    def check_inputs(self, context: StepContext) -> None:
        """Refuse a context without inputs, or with some that are not samples in rows or not independent.

        Raises:
            ValueError: no input, inputs with different numbers of samples, or batch norm in training mode.
        """
        if not context.inputs:
            raise ValueError(
                f"{type(self).__name__} differentiates by the inputs, and the context has none. Compute the loss from "
                "them: StepContext.of(loss, inputs, parameters)."
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


def needs_own_runs(method: str) -> ValueError:
    """The error of a penalty by differences that is given a loss."""
    return ValueError(
        f"method={method!r} runs the step at other parameters, which a loss that is computed already cannot do. Use "
        "HessianRegularizer or the mixin, or method='autograd'."
    )
