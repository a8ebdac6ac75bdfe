"""Looking at the gradients when a backward pass has ended, whoever started it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hessian.curvature.sharding import local


class BackwardWatch:
    """Calls a function when a backward pass from a loss has ended, and can exchange the gradients of the pass.

    An ordinary pass costs one look at each gradient. While gradients accumulate, it costs one copy of them, too.
    It does not matter who calls ``backward()``, or on which multiple of the loss.

    Args:
        loss: the loss, with its graph.
        parameters: the trained parameters.
        on_end: called when the pass has ended and DDP has averaged the gradients.

    Example:
        >>> w = torch.zeros(2, requires_grad=True)
        >>> loss = w.sum() + w.norm().sqrt()
        >>> watch = BackwardWatch(loss, [w], lambda watch: print(watch.is_finite()))
        >>> loss.backward()
        False
        >>> watch.replace([torch.ones(2)])
        True
        >>> w.grad
        tensor([1., 1.])
    """

    def __init__(self, loss: Tensor, parameters: Sequence[Tensor], on_end: Callable[[BackwardWatch], None]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._value = loss.detach()
        self._on_end = on_end
        self._factor = torch.ones_like(self._value)
        self._before: list[Tensor | None] = []
        loss.register_hook(self._begin)

    def _begin(self, factor: Tensor) -> None:
        # Lightning divides the loss by the number of accumulated batches.
        self._factor = factor
        self._before = [None if p.grad is None else p.grad.detach().clone() for p in self.parameters]
        at_backward_end(self._end)

    def _end(self) -> None:
        with torch.enable_grad():
            self._on_end(self)

    def is_all_of(self, total: Tensor) -> bool:
        """Whether ``total``, the loss that was differentiated, has no other terms (of a millionth of it or more)."""
        return torch.allclose(self._value * self._factor, total.detach(), rtol=1e-6, equal_nan=True)

    def is_finite(self) -> bool:
        """Whether all gradients are finite."""
        gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
        if not gradients:
            return True
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients)])
        # The norm of large numbers may overflow.
        return bool(norms.isfinite().all()) or all(bool(gradient.isfinite().all()) for gradient in gradients)

    def replace(
        self, gradients: Sequence[Tensor | None], mean_over_ranks: Callable[[Tensor], Tensor] | None = None
    ) -> bool:
        """Put other gradients in place of those that the backward pass has added.

        Args:
            gradients: one for each parameter; None for a parameter that the loss does not depend on.
            mean_over_ranks: the mean over the processes, if the pass has averaged over them.

        Returns:
            Whether the new gradients are finite. If not, nothing is exchanged.
        """
        totals = []
        for parameter, before, gradient in zip(self.parameters, self._before, gradients, strict=True):
            total = before if gradient is None else gradient * self._factor + (0 if before is None else before)
            if mean_over_ranks is not None and parameter.grad is not None:
                # Every rank calls this equally often, also for a parameter that its own loss does not depend on.
                total = mean_over_ranks(torch.zeros_like(parameter) if total is None else total)
            totals.append(total)
        if not all(bool(local(total).isfinite().all()) for total in totals if total is not None):
            return False
        for parameter, total in zip(self.parameters, totals, strict=True):
            _set_gradient(parameter, total)
        return True

    def undo(self) -> None:
        """Restore the gradients from before the backward pass."""
        for parameter, before in zip(self.parameters, self._before, strict=True):
            _set_gradient(parameter, before)


def at_backward_end(function: Callable[[], None]) -> None:
    """Call a function when the running backward pass has ended and DDP has averaged the gradients."""
    queue = torch.autograd.Variable._execution_engine.queue_callback
    # Twice: DDP queues its own in the pass, and averages the gradients there.
    queue(lambda: queue(function))


def _set_gradient(parameter: Tensor, gradient: Any) -> None:
    if parameter.grad is not None and gradient is not None:
        parameter.grad.detach().copy_(gradient)  # it may be a view of DDP's buckets
    else:
        parameter.grad = gradient
