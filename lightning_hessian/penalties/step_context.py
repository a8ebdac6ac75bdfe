"""The input of a penalty for one training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_hessian.curvature import HessianOperator, ProbeSource, higher_order, watch_losses
from lightning_hessian.curvature.operators import input_gradients, vector_jacobian_product
from lightning_hessian.curvature.taylor import taylor_mode
from lightning_hessian.curvature.vectors import pack_rows
from lightning_hessian.step.isolation import RandomState


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class StepContext:
    """The input of a penalty for one training step.

    Args:
        loss: the loss L(theta), with its graph, computed inside ``higher_order()``.
        parameters: the model's parameters theta, by name.
        probes: source of random vectors. By default each context draws new ones, because a network could adapt to a
            fixed probe. ``ProbeSource(seed, step)`` is reproducible.
        inputs: the step's inputs x, each of shape (samples, ...), in the graph of the loss. Input penalties need them.
        losses: recorded calls of loss functions. They determine whether the loss is the mean or the sum of the samples'
            losses l_i (without a call: the mean).
        outputs: logits or predictions, in the graph of the inputs. By default the arguments of the loss functions.
        mean_over_ranks: mean of a tensor over the processes that share the batch, equal on all of them. Each process
            must call it. Default: one process.
        at_shifted_inputs: ``at_shifted_inputs(shifts)`` runs the same step at x + shifts, with the same random numbers,
            and returns its context. Finite differences need it.
        batch_size: number of samples in the batch, needed without ``inputs``.
        taylor: the mode that carried Taylor coefficients through the step, needed by penalties that use them.
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
    taylor: taylor_mode | None = None

    @classmethod
    def evaluate(
        cls,
        loss: Callable[..., Tensor],
        inputs: Tensor | Sequence[Tensor],
        parameters: Mapping[str, Tensor],
        probes: ProbeSource | None = None,
    ) -> StepContext:
        """The context of ``loss(*inputs)``, for input penalties outside of Lightning.

        Args:
            loss: computes the mean loss of a batch from its inputs, including the forward pass.
            inputs: one tensor or several, each of shape (samples, ...).
            parameters: the model's parameters, by name.
            probes: source of random vectors. By default each context draws new ones.

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
        """Number of samples in the batch.

        Raises:
            ValueError: the context has neither ``inputs`` nor ``batch_size``.
        """
        if self.inputs:
            return self.inputs[0].size(0)
        if self.batch_size is None:
            raise ValueError(
                "The context has no inputs and no batch size, so the number of samples is unknown. Create it with "
                "`inputs=` or `batch_size=`; in the mixin pass the inputs: self.regularized(loss, inputs=x)."
            )
        return self.batch_size

    def hessian(self, parameters: Mapping[str, Tensor]) -> HessianOperator:
        """The Hessian of the loss with respect to these parameters. Its products are differentiable."""
        return HessianOperator(self.loss, parameters.values(), differentiable=True)

    @property
    def summed_loss(self) -> Tensor:
        """sum_i l_i. Its derivatives with respect to x_i are those of l_i, for all samples at once."""
        return self.loss if self._reduction == "sum" else self.loss * self.samples

    @property
    def sample_losses(self) -> Tensor | None:
        """l_i, of shape (samples,), without terms that do not pass through a loss function. None without any call.

        If a loss function's factor depends on the inputs (focal loss), these are not the samples' losses.
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
        """Reshape a tensor of the step to (samples, n).

        Raises:
            ValueError: its rows are neither one per sample nor grouped by sample in order.
        """
        count = len(tensor) if tensor.dim() > 0 else 1
        if count != self.samples and (tensor.numel() % self.samples or self._mixes(tensor)):
            raise ValueError(
                f"A tensor of shape {tuple(tensor.shape)} entered the loss of {self.samples} samples, but its rows "
                "cannot be told apart by sample. Call the loss function on a tensor of shape (samples, ...), or "
                'return {"loss": ..., "logits": ...} with such logits.'
            )
        return tensor.reshape(self.samples, -1)

    def _mixes(self, tensor: Tensor) -> bool:
        # Do the first sample's rows depend on another sample's input, or other samples' rows on the first one's?
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
        """Whether a sample's outputs, or its share of the loss, depend on another sample's input.

        If the step called a loss function, its arguments and its factor in the loss determine this; otherwise the
        loss's mixed second derivatives do.
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
        # A factor of a mean or a sum belongs to all samples.
        return any(self._depends(factor.sum(), slice(None)) for factor in shared) or any(
            self._depends(part[0].sum(), slice(1, None)) for part in parts
        )

    def _couples_by_mixed_derivatives(self) -> bool:
        """Whether d^2 L / dx_i dx_j is nonzero for a sample i in a random half and a sample j in the other half."""
        if self.samples < 2:
            return False
        generator = self.probes.generator(_COUPLING)
        half = torch.rand(self.samples, generator=generator, device="cpu") < 0.5
        half[0], half[1] = True, False
        gradients = input_gradients(self.summed_loss, self.inputs, derivatives=2)
        v = [
            torch.randn(x.shape, generator=generator, device="cpu").to(x) * half.to(x).view(-1, *[1] * (x.dim() - 1))
            for x in gradients
        ]
        products = pack_rows(vector_jacobian_product(gradients, self.inputs, v)).float()
        half = half.to(products.device)
        return bool(products[~half].norm() > _COUPLED * products[half].norm())


_COUPLED = 1e-3
"""Mixed derivatives above this fraction of the samples' own are not rounding errors."""
_COUPLING = 1 << 20
"""A separate probe stream."""


@dataclass(frozen=True)
class ForwardContext:
    """What one training step offers a penalty before its forward pass.

    Args:
        parameters: the model's parameters, by name.
        probes: source of random vectors.
        module: the model, for the names of layers in errors.
    """

    parameters: Mapping[str, Tensor]
    probes: ProbeSource = field(default_factory=ProbeSource.fresh)
    module: nn.Module | None = None
