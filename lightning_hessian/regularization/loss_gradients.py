"""How the gradients of a step's losses are taken in a fit, besides the Trainer's own backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_hessian.curvature.displacement import loss_gradient
from lightning_hessian.curvature.graph import nodes
from lightning_hessian.curvature.sharding import is_dtensor
from lightning_hessian.step.loop import TrainingLoop


class LossGradients:
    """Differentiates losses of one module's step, by ``torch.autograd.grad``, or by ``backward()`` where it must be.

    Sharded parameters and reentrant checkpoints need ``backward()``. Whether the module has such checkpoints is looked
    for once in a fit.

    Args:
        loop: the loop that trains the module.
    """

    def __init__(self, loop: TrainingLoop) -> None:
        self._loop = loop
        self._has_reentrant_checkpoints: bool | None = None

    def gradient(
        self,
        loss: Tensor,
        tensors: Sequence[Tensor],
        scale: float = 1.0,
        keep_graph: bool = False,
        watched: Sequence[Tensor] = (),
    ) -> list[Tensor | None]:
        """The gradient of a loss; see :func:`~lightning_hessian.curvature.displacement.loss_gradient`.

        Raises:
            MisconfigurationException: the loss cannot be differentiated apart from the Trainer's backward pass.
        """
        by_backward = self.needs_backward(tensors)
        if self._found_reentrant_checkpoints(loss):
            by_backward = True
            if self._loop.has_static_graph:
                raise MisconfigurationException(
                    "DDP with static_graph=True counts the backward passes that reentrant checkpoints need, and would "
                    "not reduce the gradients of a step that takes several. Pass use_reentrant=False to "
                    "torch.utils.checkpoint.checkpoint, or leave static_graph off."
                )
        try:
            # As any backward pass, outside of autocast.
            with torch.autocast(loss.device.type, enabled=False):
                return loss_gradient(loss, tensors, scale, by_backward, keep_graph, watched)
        except RuntimeError as error:
            if "backward through the graph a second time" not in str(error):
                raise
            raise MisconfigurationException(
                "The loss passes through something that was computed before the step (or before `self.regularized`), "
                "and a penalty that runs the step several times differentiates that several times. Compute the whole "
                "forward pass inside, detach what comes from outside, or use method='autograd'."
            ) from error

    def needs_backward(self, tensors: Sequence[Tensor]) -> bool:
        """Whether losses are differentiated by ``backward()``, as far as is known."""
        return bool(self._has_reentrant_checkpoints) or any(map(is_dtensor, tensors))

    def _found_reentrant_checkpoints(self, loss: Tensor) -> bool:
        if self._has_reentrant_checkpoints is None:
            self._has_reentrant_checkpoints = any("CheckpointFunction" in node.name() for node in nodes(loss))
        return self._has_reentrant_checkpoints
