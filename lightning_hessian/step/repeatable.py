"""Run one training step of one module on one batch repeatedly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_hessian.curvature import higher_order, watch_losses
from lightning_hessian.curvature.containers import exchanged, tensors_in
from lightning_hessian.curvature.displacement import at_distances
from lightning_hessian.step.isolation import Snapshot, silenced
from lightning_hessian.step.output import logits_in, loss_of
from lightning_hessian.step.repeatability import parameters_unchanged

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StepRun:
    """The results of one run of a step.

    Args:
        output: the step's return value.
        loss: the scalar loss in the output, with its graph.
        losses_seen: the loss function calls of the run. It is empty unless the step watches losses.
        higher_order: the ``higher_order`` context of the run, if any.
    """

    output: Any
    loss: Tensor
    losses_seen: watch_losses
    higher_order: higher_order | None = None

    def outputs(self) -> Sequence[Tensor]:
        """Return the logits in the step's output, or else the outputs passed to its loss functions."""
        logits = logits_in(self.output)
        return self.losses_seen.outputs(self.loss) if logits is None else (logits,)


RunContext = Callable[[], AbstractContextManager[Any]]
"""Creates a context manager for one run."""


class BatchSkipped(Exception):
    """A training step has no loss for its batch: it returned None.

    Attributes:
        output: the step's return value.
    """

    def __init__(self, output: Any) -> None:
        super().__init__("The training step returned None for this batch.")
        self.output = output


class RepeatableStep:
    """One training step of one module on one batch.

    :meth:`run` is the run that counts: its effects on logs, metrics, buffers and random states stay. :meth:`rerun` has
    no side effects. It starts from the buffers and random states (dropout masks) of the first run, disables
    ``self.log`` and torchmetrics, and restores everything afterwards.

    Args:
        module: the module. Every run starts from the buffers, random state and autocast setting at construction.
        step: computes a training step's return value from a batch.
        batch: the batch. Every further run sees the original batch, even if the step changes the one that it gets.
        copies_batch: pass copies of the batch's tensors to every run, including the first.
        watches_losses: record the loss function calls. This adds a small cost to every operation.
        context: run everything in this ``higher_order`` context. By default, each run that needs one creates its own.

    Attributes:
        has_run: whether :meth:`run` was called.

    Raises:
        MisconfigurationException: in a run, if the step returns no differentiable loss, changes a parameter, or cannot
            run again (it takes an iterator, changes its batch, or returns None after it returned a loss).

    Example:
        >>> net = nn.Linear(2, 1)
        >>> step = RepeatableStep(net, lambda x: net(x).square().mean(), torch.ones(3, 2))
        >>> bool(step.run().loss == step.rerun().loss)
        True
    """

    def __init__(
        self,
        module: nn.Module,
        step: Callable[[Any], Any],
        batch: Any,
        *,
        copies_batch: bool = False,
        watches_losses: bool = False,
        context: higher_order | None = None,
    ) -> None:
        self.module = module
        self.batch = batch
        self.has_run = False
        self._step = step
        self._copies_batch = copies_batch
        self._watches_losses = watches_losses
        self.context = context
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        kind = device.type
        # Autocast is off for the penalty's derivatives. The step keeps its usual setting.
        self._autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self._before = Snapshot(module, device)
        self._containers = batch if isinstance(batch, Iterator) else exchanged(batch, (), ())
        self._versions = [(x, x._version) for x in tensors_in(batch) if not x.is_inference()]
        self._batch_used = False
        self._had_loss = False
        self._takes_gradients = False

    def run(
        self, derivatives: int = 1, leaves: Mapping[int, Tensor] | None = None, within: RunContext | None = None
    ) -> StepRun:
        """Run the step with its usual side effects.

        Args:
            derivatives: how often the loss will be differentiated by autograd. Above 1 the run is inside
                ``higher_order``; with 0 it is outside of any.
            leaves: replacements for the batch's tensors, by the id of the original.
            within: creates a context manager that encloses the run.

        Raises:
            BatchSkipped: the step has no loss for this batch.
        """
        self.has_run = True
        run, is_complete = self._run(derivatives, leaves, within)
        return run if is_complete else replace(self.rerun(3, leaves, within), output=run.output)

    def rerun(
        self, derivatives: int = 1, leaves: Mapping[int, Tensor] | None = None, within: RunContext | None = None
    ) -> StepRun:
        """Run the step without side effects, at the current parameters. The arguments are those of :meth:`run`."""
        with self._before.rewound(), silenced(self.module), torch.enable_grad(), parameters_unchanged(self.module):
            run, is_complete = self._run(derivatives, leaves, within)
        return run if is_complete else self.rerun(3, leaves, within)

    def gradients_at(
        self,
        tensors: Sequence[Tensor],
        v: Sequence[Tensor],
        distances: Sequence[float],
        differentiate: Callable[[StepRun], T],
        counts: bool = False,
    ) -> list[T]:
        """Run and differentiate the step at theta + distance v, for each distance.

        Args:
            tensors: the parameters that move.
            v: the direction, one part per parameter.
            distances: the distances along v.
            differentiate: called with each run while the parameters are displaced. It must free the run's graph, so
                that the activations of only one run are in memory.
            counts: whether the first of the runs is the run that counts.

        Returns:
            The results of ``differentiate``, one for each distance.

        Raises:
            BatchSkipped: the step has no loss for this batch.
        """

        def evaluate() -> T:
            nonlocal counts
            if not counts:
                return differentiate(self.rerun())
            counts = False
            with parameters_unchanged(self.module):
                run = self.run()
            return differentiate(run)

        return at_distances(tensors, v, distances, evaluate)

    def restored_on_error(self) -> AbstractContextManager[None]:
        """Context manager: restore the buffers and random states of the first run's start if the code inside raises."""
        return self._before.restored_on_error()

    def _run(
        self, derivatives: int, leaves: Mapping[int, Tensor] | None, within: RunContext | None
    ) -> tuple[StepRun, bool]:
        """Run the step. Return the run, and whether it replaced all fused norms that it had to.

        The context learns of a gradient in the forward pass, which adds one derivative, only when it is computed. By
        then fused norms may have run. The next run replaces them all.
        """
        with ExitStack() as stack:
            stack.enter_context(self._autocast)
            if within is not None:
                stack.enter_context(within())
            batch = self._fresh_batch(leaves)
            context = self.context if derivatives else None
            if context is None and derivatives > 1:
                context = higher_order(self.module, 3 if self._takes_gradients else derivatives)
            took_gradients = context is not None and context.takes_gradients
            if context is not None:
                stack.enter_context(context)
            losses = watch_losses()
            if self._watches_losses:
                stack.enter_context(losses)
            output = self._step(batch)
            loss = loss_of(output)
        if loss is None and self._had_loss:
            raise MisconfigurationException(
                "The training step returned a loss for this batch, and None when it was run again for a penalty. Its "
                "result must depend only on the batch and the random numbers."
            )
        if loss is None:
            raise BatchSkipped(output)
        self._had_loss = True
        takes_more = context is not None and context.takes_gradients and not took_gradients
        self._takes_gradients |= takes_more
        is_complete = context is None or context.derivatives == 3 or not takes_more
        return StepRun(output=output, loss=loss, losses_seen=losses, higher_order=context), is_complete

    def _fresh_batch(self, leaves: Mapping[int, Tensor] | None) -> Any:
        """Return the original batch, with the tensors in ``leaves`` replaced."""
        if isinstance(self.batch, Iterator):
            if self._batch_used:
                raise MisconfigurationException(
                    "The training step takes the dataloader's iterator, so running it a second time would take "
                    "another batch. Let it take a batch, or use a penalty that runs the step once, such as "
                    "method='autograd'."
                )
            self._batch_used = True
            return self.batch
        if self._copies_batch:
            tensors = list(tensors_in(self.batch))
            return exchanged(self.batch, tensors, [(leaves or {}).get(id(x), x).clone() for x in tensors])
        if not self._batch_used:
            self._batch_used = True
            return self.batch
        if any(x._version != version for x, version in self._versions):
            raise MisconfigurationException(
                "The training step takes the dataloader's iterator or changes its batch in place. It must run a second "
                "time, and would then see another batch. Let it take a batch, and change only a copy of the batch."
            )
        return exchanged(self._containers, (), ())
