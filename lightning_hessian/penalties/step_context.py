"""What one training step offers a penalty."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lightning_hessian.curvature import HessianOperator, ProbeSource, higher_order, watch_losses
from lightning_hessian.curvature.operators import input_gradients, vector_jacobian_product
from lightning_hessian.curvature.vectors import pack_rows
from lightning_hessian.step.isolation import RandomState


def _unchanged(tensor: Tensor) -> Tensor:
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
        at_shifted_inputs: ``at_shifted_inputs(shifts)`` runs the same step at x + shifts, with the same random numbers,
            and returns its context. Finite differences need it.
        batch_size: how many samples the batch has, where there are no inputs to tell.
    """

    loss: Tensor
    parameters: Mapping[str, Tensor]
    probes: ProbeSource = field(default_factory=ProbeSource.fresh)
    _: KW_ONLY
    inputs: Sequence[Tensor] = ()
    losses: watch_losses = field(default_factory=watch_losses)
    outputs: Sequence[Tensor] = ()
    mean_over_ranks: Callable[[Tensor], Tensor] = _unchanged
    at_shifted_inputs: Callable[[Sequence[Tensor]], StepContext] | None = None
    batch_size: int | None = None

    @classmethod
    def evaluate(
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
            >>> penalty = InputGradientNorm()(StepContext.evaluate(loss, x, dict(net.named_parameters())))
            >>> penalty.requires_grad
            True
        """
        given = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        own_probes = probes or ProbeSource.fresh()
        random = RandomState.now(given[0].device)

        def run(x: Sequence[Tensor]) -> StepContext:
            with higher_order(), watch_losses() as seen:
                value = loss(*x)
            return cls(
                value,
                parameters,
                probes=own_probes,
                inputs=x,
                losses=seen,
                outputs=seen.outputs(value),
                at_shifted_inputs=shifted,
            )

        def shifted(shifts: Sequence[Tensor]) -> StepContext:
            with random.rewound():  # the same dropout masks
                return run([(x.detach() + shift).requires_grad_() for x, shift in zip(given, shifts, strict=True)])

        return run([x.detach().clone().requires_grad_() for x in given])

    @property
    def samples(self) -> int:
        """How many samples the batch has.

        Raises:
            ValueError: neither inputs nor a batch tell.
        """
        if self.inputs:
            return self.inputs[0].size(0)
        if self.batch_size is None:
            raise ValueError(
                "The context has neither inputs nor a batch that tell the number of samples. Make it with "
                "`inputs=` or `batch_size=`; in the mixin hand the inputs over: self.regularized(loss, inputs=x)."
            )
        return self.batch_size

    def hessian(self, parameters: Mapping[str, Tensor]) -> HessianOperator:
        """The Hessian of the loss with respect to some of the parameters; its products can be differentiated."""
        return HessianOperator(self.loss, parameters.values(), differentiable=True)

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
        products = pack_rows(vector_jacobian_product(gradients, self.inputs, v)).float()
        half = half.to(products.device)
        return bool(products[~half].norm() > _COUPLED * products[half].norm())


_COUPLED = 1e-3
"""How large mixed derivatives are, in units of the samples' own, that are no rounding."""
_COUPLING = 1 << 20
"""A stream of probes of its own."""
