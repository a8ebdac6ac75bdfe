"""One training step of one module on one batch, as a thing that can be run, and run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_hessian.curvature import higher_order, watch_losses
from lightning_hessian.curvature.displacement import at_both_ends
from lightning_hessian.step.batches import exchanged, tensors_in
from lightning_hessian.step.isolation import Snapshot, silenced
from lightning_hessian.step.output import logits_in, loss_of
from lightning_hessian.step.repeatability import parameters_unchanged

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StepRun:
    """What one run of a step gave.

    Args:
        output: what the step returned.
        loss: the scalar in it, with its graph.
        losses_seen: the calls of loss functions in the run; none are recorded where nobody looks at them.
        higher_order: the context that the run was in, if any.
    """

    output: Any
    loss: Tensor
    losses_seen: watch_losses
    higher_order: higher_order | None = None

    def outputs(self) -> Sequence[Tensor]:
        """The logits that the step returned, or what its loss functions were called on."""
        logits = logits_in(self.output)
        return self.losses_seen.outputs(self.loss) if logits is None else (logits,)


RunContext = Callable[[], AbstractContextManager[Any]]
"""Makes a context manager for one run."""


class BatchSkipped(Exception):
    """A training step has no loss for its batch: it returned None.

    Attributes:
        output: what the step returned.
    """

    def __init__(self, output: Any) -> None:
        super().__init__("The training step returned None for this batch.")
        self.output = output


class RepeatableStep:
    """One training step of one module on one batch.

    :meth:`run` is the run that counts: its logs, metrics, buffers and random numbers stay. :meth:`rerun` leaves no
    trace: it begins with the buffers and the random numbers (dropout masks) that the first run began with, ``self.log``
    and torchmetrics are silent in it, and afterwards everything is as it was.

    Args:
        module: the module; its buffers, random state and autocast setting of this moment are what every run begins
            with.
        step: computes what a training step returns, from a batch.
        batch: the batch. A step may change the batch that it gets: every further run sees the batch as it was.
        copies_batch: hand copies of the batch's tensors to every run, the first one included.
        watches_losses: record the calls of loss functions. (It costs a little for every operation.)
        context: run everything in this ``higher_order``; by default a run that needs one has its own.

    Attributes:
        has_run: whether the run that counts was made.

    Raises:
        MisconfigurationException: in a run: the step returns no differentiable loss, changes a parameter, or cannot be
            run again (it takes an iterator, changes its batch, or returns None where it returned a loss before).

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
        self._context = context
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        kind = device.type
        # The penalty's derivatives are taken without autocast; the step computes as it ever does.
        self._autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self._before = Snapshot(module, device)
        self._containers = batch if isinstance(batch, Iterator) else exchanged(batch, (), ())
        self._versions = [(x, x._version) for x in tensors_in(batch) if not x.is_inference()]
        self._gave_batch = False
        self._had_loss = False

    def run(
        self, derivatives: int = 1, leaves: Mapping[int, Tensor] | None = None, within: RunContext | None = None
    ) -> StepRun:
        """The run that counts.

        Args:
            derivatives: how often the loss will be differentiated. Above 1 the run is inside ``higher_order``.
            leaves: tensors to put in the places of the batch's own, by the id of these.
            within: makes a context manager for a run, which is inside it.

        Raises:
            BatchSkipped: the step has no loss for this batch.
        """
        self.has_run = True
        run, is_complete = self._run(derivatives, leaves, within)
        return run if is_complete else replace(self.rerun(3, leaves, within), output=run.output)

    def rerun(
        self, derivatives: int = 1, leaves: Mapping[int, Tensor] | None = None, within: RunContext | None = None
    ) -> StepRun:
        """A run that leaves no trace, with the parameters as they are now. Arguments as for :meth:`run`."""
        with self._before.rewound(), silenced(self.module), torch.enable_grad(), parameters_unchanged(self.module):
            run, is_complete = self._run(derivatives, leaves, within)
        return run if is_complete else self.rerun(3, leaves, within)

    def gradients_at(
        self,
        tensors: Sequence[Tensor],
        v: Sequence[Tensor],
        distance: float,
        differentiate: Callable[[StepRun], T],
        counts: bool = False,
    ) -> tuple[T, T]:
        """Run and differentiate the step at theta + distance v, and then at theta - distance v.

        Args:
            tensors: the parameters that move.
            v: the direction, part by part.
            distance: how far along v.
            differentiate: called with each run, while the parameters are there. It must free the run's graph, so that
                the activations of one run are kept at a time.
            counts: whether the first of the two is the run that counts.

        Returns:
            What ``differentiate`` returned at either end.

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

        return at_both_ends(tensors, v, distance, evaluate)

    def restored_on_error(self) -> AbstractContextManager[None]:
        """Put buffers and random states back to what the first run began with, if what happens inside fails."""
        return self._before.restored_on_error()

    def _run(
        self, derivatives: int, leaves: Mapping[int, Tensor] | None, within: RunContext | None
    ) -> tuple[StepRun, bool]:
        """A run, and whether all fused norms were replaced in it: before the first gradient that a forward pass takes
        nobody knew that there would be a further derivative. The next run replaces them all."""
        with ExitStack() as stack:
            if within is not None:
                stack.enter_context(within())
            batch = self._fresh_batch(leaves)
            context = self._context
            if context is None and derivatives > 1:
                context = higher_order(self.module, derivatives)
            took_gradients = context is not None and context.takes_gradients
            if context is not None:
                stack.enter_context(context)
            losses = watch_losses()
            if self._watches_losses:
                stack.enter_context(losses)
            stack.enter_context(self._autocast)
            output = self._step(batch)
        loss = loss_of(output)
        if loss is None and self._had_loss:
            raise MisconfigurationException(
                "The training step returned a loss for this batch, and None when it was run again for a penalty. It "
                "must be a function of the batch and the random numbers alone."
            )
        if loss is None:
            raise BatchSkipped(output)
        self._had_loss = True
        takes_more = context is not None and context.takes_gradients and not took_gradients
        is_complete = context is None or context.derivatives == 3 or not takes_more
        return StepRun(output=output, loss=loss, losses_seen=losses, higher_order=context), is_complete

    def _fresh_batch(self, leaves: Mapping[int, Tensor] | None) -> Any:
        """The batch as it was, with the leaves in their places."""
        if self._copies_batch:
            if isinstance(self.batch, Iterator):
                raise MisconfigurationException(
                    "The training step takes the dataloader's iterator, so running it a second time would take "
                    "another batch. Let it take a batch, or use method='autograd', which runs the step once."
                )
            tensors = list(tensors_in(self.batch))
            return exchanged(self.batch, tensors, [(leaves or {}).get(id(x), x).clone() for x in tensors])
        if not self._gave_batch:
            self._gave_batch = True
            return self.batch
        if isinstance(self.batch, Iterator) or any(x._version != version for x, version in self._versions):
            raise MisconfigurationException(
                "The training step takes the dataloader's iterator or changes its batch in place, and has to be "
                "run a second time, which would see another batch. Change a copy of the batch."
            )
        return exchanged(self._containers, (), ())
