"""A penalty can be finite and its gradient not: the gradient is looked at after the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hessian.curvature.first_order import local


class AwaitedBackward:
    """What is kept from a penalized step until its backward pass is over, to take that back where it is not finite.

    An ordinary step pays for one pass over the gradients (and, while gradients are accumulated, one copy of them).

    Args:
        loss: what the step returned, with the penalties in it.
        parameters: those that are trained.
        task_gradient: the gradient of the task loss alone, computed anew; None for a parameter that it leaves out.

    Example:
        >>> w = torch.zeros(2, requires_grad=True)
        >>> loss = w.sum() + w.norm().sqrt()
        >>> awaited = AwaitedBackward(loss, [w], lambda: [torch.ones(2)])
        >>> loss.backward()
        >>> awaited.is_over, awaited.is_finite()
        (True, False)
        >>> awaited.use_task_loss(lambda gradient: gradient)
        True
        >>> w.grad
        tensor([1., 1.])
    """

    def __init__(
        self,
        loss: Tensor,
        parameters: Sequence[Tensor],
        task_gradient: Callable[[], Sequence[Tensor | None]],
    ) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.task_gradient = task_gradient
        self._value = loss.detach()
        self._factor: Tensor | None = None
        self._before: list[Tensor | None] = []
        loss.register_hook(self._begin)

    def _begin(self, factor: Tensor) -> None:
        # Lightning divides the loss by the number of accumulated batches, and scales it in float16.
        self._factor = factor
        self._before = [None if p.grad is None else p.grad.detach().clone() for p in self.parameters]

    def is_all_of(self, total: Tensor) -> bool:
        """Whether a loss that was differentiated is a multiple of the step's loss, with no other terms."""
        assert self._factor is not None
        return torch.allclose(self._value * self._factor, total.detach(), rtol=1e-5, equal_nan=True)

    @property
    def is_over(self) -> bool:
        """Whether there was a backward pass from the loss."""
        return self._factor is not None

    def is_finite(self) -> bool:
        """Whether all gradients are numbers."""
        gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
        if not gradients:
            return True
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients)])
        # The norm of large numbers may overflow.
        return bool(norms.isfinite().all()) or all(bool(gradient.isfinite().all()) for gradient in gradients)

    def use_task_loss(self, mean_over_ranks: Callable[[Tensor], Tensor]) -> bool:
        """Put what the task loss alone gives in place of the gradients.

        Args:
            mean_over_ranks: the mean over the processes whose gradients the backward pass has averaged.

        Returns:
            Whether that is finite. If not, the gradients are as the backward pass left them.
        """
        assert self._factor is not None
        found = []
        for before, gradient in zip(self._before, self.task_gradient(), strict=True):
            added = None if gradient is None else gradient * self._factor
            total = added if before is None else before if added is None else before + added
            found.append(None if total is None else mean_over_ranks(total))
        if not all(bool(total.isfinite().all()) for total in found if total is not None):
            return False
        for parameter, total in zip(self.parameters, found, strict=True):
            _set_gradient(parameter, total)
        return True

    def undo(self) -> None:
        """Give the parameters the gradients from before the backward pass."""
        for parameter, before in zip(self.parameters, self._before, strict=True):
            _set_gradient(parameter, before)


def _set_gradient(parameter: Tensor, gradient: Any) -> None:
    if parameter.grad is not None and gradient is not None:
        parameter.grad.detach().copy_(gradient)  # it may be a view of DDP's buckets
    else:
        parameter.grad = gradient
