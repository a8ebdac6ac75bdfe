"""The operator norm of each sample's input Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from lightning_hessian.arguments import choice, is_number, whole_number
from lightning_hessian.curvature import SampleHessians, lanczos, power_iteration
from lightning_hessian.curvature.eigenvectors import SEARCHES, Search
from lightning_hessian.curvature.operators import input_gradients
from lightning_hessian.curvature.vectors import pack_rows, unpack_rows
from lightning_hessian.penalties.base import InputPenalty, Needs
from lightning_hessian.penalties.step_context import StepContext
from lightning_hessian.step.batches import InputChoice

Method = Literal["autograd", "finite_difference"]


class InputHessianNorm(InputPenalty):
    r"""The mean over samples of ||H_i||_2, where H_i is the Hessian of sample i's loss with respect to its input.

    .. math:: \frac{1}{B} \sum_i \|H_i v_i\|, \qquad H_i = \frac{\partial^2 l_i}{\partial x_i^2}, \quad \|v_i\| = 1

    A search without a graph, starting at the input gradient, finds the direction v_i, which is then constant. The
    gradient flows through the single product H_i v_i and is exact once the search has converged. ||H_i v_i|| is at most
    ||H_i||_2, the largest absolute eigenvalue. One Hessian-vector product of the summed loss serves all samples. l_i is
    the loss that the step averages or sums over the samples. Units: loss / input^2.

    Batch norm in training mode couples the samples, so H_i does not exist. The penalty then uses a separate forward
    pass with the running statistics from before the step. With piecewise-linear activations H_i contains only the
    loss's curvature in the logits, so a network can evade the penalty. Use softplus, GELU, SiLU or tanh.

    Args:
        iterations: Hessian-vector products for the search, at least 0. On trained networks one leaves an error of about
            3 % of the norm; ``iterations=2, search="lanczos"`` leaves 1 to 2 % (``benchmarks/input_hessian.py
            quality``).
        search: ``"power"`` iteration, or ``"lanczos"``, which is better from two iterations on and stores
            ``iterations`` basis vectors.
        method: ``"autograd"``, or ``"finite_difference"``: |v'Hv| from the losses at x - hv, x and x + hv, with the
            search from gradients there. It needs ordinary backward passes only, so fused and compiled operators work.
            Each evaluation repeats the step with the same dropout masks.
        squared: penalize the mean of the squared norms, which is smooth at 0.
        step: of the finite differences: h = ``step`` times the L2 norm of the sample's input.
        inputs: tensors of the batch to use as input, see :class:`InputPenalty`.
        layer: layer whose output to use as input, see :class:`InputPenalty`.

    Raises:
        ValueError: an argument is out of range.

    Source:
        Mustafa, Vandermeulen, Kloft 2020, "Input Hessian Regularization of Neural Networks" (arXiv 2009.06571).

    Example:
        >>> from lightning_hessian import InputHessianNorm, StepContext
        >>> w, x = torch.tensor([2.0], requires_grad=True), torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> penalty = InputHessianNorm()(StepContext.evaluate(lambda x: (w * x[:, 0] ** 3).mean(), x, {"w": w}))
        >>> penalty.item()  # the mean of 6 w x_0, 12 and 0
        6.0
    """

    name = "input_hessian_norm"

    def __init__(
        self,
        iterations: int = 1,
        search: Search = "power",
        method: Method = "autograd",
        *,
        squared: bool = False,
        step: float = 1e-2,
        inputs: InputChoice = None,
        layer: str | None = None,
    ) -> None:
        super().__init__(inputs, layer)
        whole_number("iterations", iterations, 0, "the Hessian-vector products of the search")
        choice("search", search, SEARCHES)
        choice("method", method, get_args(Method))
        if not is_number(step) or not 0 < float(step) < math.inf:
            raise ValueError(f"step={step!r} must be a positive number, relative to the L2 norm of the input.")
        self.iterations = iterations
        self.search = search
        self.method = method
        self.squared = squared
        self.step = step

    @property
    def needs(self) -> Needs:
        return _ByAutograd.needs if self.method == "autograd" else _ByFiniteDifferences.needs

    def value(self, context: StepContext) -> Tensor:
        hessians = self._hessians(context)
        return self._mean_norm(hessians, self._direction(hessians, context))

    def with_fixed_direction(self, context: StepContext) -> Callable[[StepContext], Tensor]:
        v = self._direction(self._hessians(context), context)
        return lambda other: self._mean_norm(self._hessians(other), v)

    def _hessians(self, context: StepContext) -> _Hessians:
        self.check_inputs(context)
        if self.method == "autograd":
            return _ByAutograd(context)
        return _ByFiniteDifferences(context, self.step)

    def _direction(self, hessians: _Hessians, context: StepContext) -> Tensor:
        start = hessians.gradient
        is_zero = ~start.any(dim=1, keepdim=True)
        if is_zero.any():
            random = context.probes.draw(start.numel(), 0, start.device, start.dtype)
            start = torch.where(is_zero, random.view_as(start), start)
        find = power_iteration if self.search == "power" else lanczos
        return find(hessians.matvec, start, self.iterations)

    def _mean_norm(self, hessians: _Hessians, v: Tensor) -> Tensor:
        squares = hessians.squared_length(v)
        if self.squared:
            return squares.mean()
        # The root has no derivative at 0. NaN must stay NaN.
        zero = squares == 0
        return torch.where(zero, 0, torch.where(zero, 1, squares).sqrt()).mean()

    def __repr__(self) -> str:
        return f"InputHessianNorm(iterations={self.iterations}, search={self.search!r}, method={self.method!r})"


class _Hessians(Protocol):
    """Interface to the Hessians of all samples. Vectors are rows, of shape (samples, n)."""

    gradient: Tensor
    """Each sample's input gradient, without a graph."""

    def matvec(self, v: Tensor) -> Tensor:
        """H_i v_i, without a graph."""

    def squared_length(self, v: Tensor) -> Tensor:
        """||H_i v_i||^2, of shape (samples,), differentiable with respect to the parameters."""


class _ByAutograd:
    needs = Needs(derivatives=3, losses=True)

    def __init__(self, context: StepContext) -> None:
        self.hessians = SampleHessians(context.summed_loss, context.inputs, differentiable=True)
        self.gradient = self.hessians.gradient.detach()
        self.matvec = self.hessians.matvec

    def squared_length(self, v: Tensor) -> Tensor:
        return self.hessians.matvec(v, create_graph=True).square().sum(dim=1)


class _ByFiniteDifferences:
    """From runs of the step at shifted inputs, with first-order gradients only."""

    # A second difference is about (h / ||x||)^2 of the losses, which bfloat16's 8 significant bits cannot resolve.
    needs = Needs(derivatives=1, full_precision=True, losses=True)

    def __init__(self, context: StepContext, step: float) -> None:
        if context.at_shifted_inputs is None:
            raise ValueError(
                "method='finite_difference' evaluates the loss at other inputs, but this context cannot. Create it "
                "with StepContext.evaluate(loss, inputs, parameters), or use method='autograd'."
            )
        self.context = context
        self.at_shifted_inputs = context.at_shifted_inputs
        length = torch.linalg.vector_norm(pack_rows(context.inputs).detach(), dim=1, keepdim=True)
        self.h = step * torch.where(length > 0, length, 1)
        self.gradient = self._gradient(context)

    def matvec(self, v: Tensor) -> Tensor:
        return (self._gradient(self._at(v, self.h)) - self.gradient) / self.h

    def squared_length(self, v: Tensor) -> Tensor:
        # |v'Hv| equals ||Hv|| at an eigenvector.
        contexts = self._at(v, self.h), self.context, self._at(v, -self.h)
        ahead, here, behind = (self._losses(context) for context in contexts)
        differences = ahead + behind - 2 * here
        self._check_sum(differences, *(context.summed_loss for context in contexts))
        return (differences / self.h.squeeze(1).square()).square()

    def _check_sum(self, found: Tensor, ahead: Tensor, here: Tensor, behind: Tensor) -> None:
        """Check that the samples' differences sum to the loss's difference, up to rounding."""
        with torch.no_grad():
            missing = (ahead + behind - 2 * here - found.sum()).abs()
            rounding = 100 * torch.finfo(here.dtype).eps * here.abs()
            if missing > 0.05 * found.abs().sum() + rounding:
                raise ValueError(
                    "method='finite_difference' needs the loss as a sum over samples, but the loss functions of "
                    "torch.nn.functional called in the step do not account for all of it: other terms depend on the "
                    "inputs, or a factor does (as in the focal loss). Use method='autograd'."
                )

    def _at(self, v: Tensor, h: Tensor) -> StepContext:
        return self.at_shifted_inputs(unpack_rows(h * v, self.context.inputs))

    def _gradient(self, context: StepContext) -> Tensor:
        return pack_rows(input_gradients(context.summed_loss, context.inputs))

    def _losses(self, context: StepContext) -> Tensor:
        losses = context.sample_losses
        if losses is None:
            raise ValueError(
                "method='finite_difference' needs each sample's loss, but the step's loss comes from none of the usual "
                "loss functions of torch.nn.functional (cross_entropy, nll_loss, mse_loss, "
                "binary_cross_entropy_with_logits, ...) or their modules. Call one, or use method='autograd'."
            )
        return losses
