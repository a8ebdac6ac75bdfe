"""Penalties in one fit of one module: how they become part of each step's loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hessian.curvature import ProbeSource
from lightning_hessian.curvature.sharding import is_dtensor, reshard
from lightning_hessian.regularization.active_penalty import ActivePenalty, FitPenalty, StepWindow
from lightning_hessian.regularization.checks import check_penalty
from lightning_hessian.regularization.differences import DisplacedLosses
from lightning_hessian.regularization.input_runs import PenaltyRuns, step_for
from lightning_hessian.regularization.logs import log_added, log_skipped, log_strength
from lightning_hessian.regularization.loss_gradients import LossGradients
from lightning_hessian.regularization.nonfinite import GradientGuard
from lightning_hessian.regularization.states import States, load_states
from lightning_hessian.regularization.terms import terms_of, total_of
from lightning_hessian.step.isolation import penalties_are_off
from lightning_hessian.step.loop import TrainingLoop
from lightning_hessian.step.output import with_loss
from lightning_hessian.step.repeatable import BatchSkipped


class RegularizedFit:
    """Adds penalties to the loss of each training step, for one fit of one module.

    It is made when fitting starts and is gone when it ends. A copy of the module or the callback has no fit.

    Args:
        module: the module.
        loop: the loop that trains it.

    Attributes:
        penalties: what is added now.
        known: all penalties that were added in this fit.
        states: what a checkpoint brought.
        total: in manual optimization, the loss of the latest backward pass, which may have other terms.
    """

    def __init__(self, module: nn.Module, loop: TrainingLoop) -> None:
        self.module = module
        self.loop = loop
        self.penalties: list[FitPenalty] = []
        self.known: list[FitPenalty] = []
        self.states: States = {}
        self.total: Tensor | None = None
        self._gradients = LossGradients(loop)

    def __reduce__(self) -> Any:
        return NoneType, ()

    @property
    def has_started(self) -> bool:
        """Whether all penalties that are added now have started."""
        return all(one.has_started for one in self.penalties)

    def use(self, penalties: Sequence[FitPenalty]) -> None:
        """Add these penalties from now on."""
        self.penalties = list(penalties)
        self.known += [one for one in penalties if one not in self.known]

    def start(self) -> None:
        """Start the penalties that have not started; refuse, before training, what cannot work here.

        Raises:
            MisconfigurationException: a penalty cannot be computed on this module in this loop.
        """
        for one in self.penalties:
            if not one.has_started:
                check_penalty(one, self.module, self.loop)
                load_states(one, self.states)
                one.follow_settings(self.loop)
                one.has_started = True

    def resume(self, states: States) -> None:
        """Let the penalties go on from the states that a checkpoint brought; those without a state start anew."""
        self.states = states
        for one in self.penalties:
            if one.has_started:
                load_states(one, states)

    def __call__(self, step: Callable[[Any], Any], batch: Any = None, all_inputs: bool = False) -> Any:
        """Run ``step(batch)`` and add to the loss it returns the penalties that act now.

        The penalties share their forward passes (see :class:`PenaltyRuns`), and each sees the task loss alone. Where
        none acts, and outside of training (a validation step may call the training step), ``step(batch)`` is all that
        runs.

        Args:
            step: computes the task loss: a scalar tensor, a mapping with "loss", or None to skip the batch.
            batch: what penalties on the inputs find them in.
            all_inputs: whether every tensor of the batch is an input.
        """
        if penalties_are_off() or not self.loop.is_training or not torch.is_grad_enabled():
            return step(batch)
        active = self._active_now()
        if not active:
            return step(batch)
        self.log_skipped()
        repeatable = step_for([one.penalty for one in active], self.module, step, batch)
        with repeatable.restored_on_error(), _states_restored_on_error([one.in_fit for one in active]):
            with_graph = [one for one in active if not one.penalty.needs.differences]
            by_differences = [one for one in active if one.penalty.needs.differences]
            sources = [one.probes for one in with_graph]
            runs = PenaltyRuns(repeatable, [one.penalty for one in with_graph], sources, all_inputs, self.loop.mean)
            task_loss = None
            try:
                if by_differences or any(one.is_measured for one in active):
                    displaced = DisplacedLosses(self.module, self.loop, runs, self._gradients)
                    output, entered = displaced.add(with_graph, by_differences)
                else:
                    output, entered, task_loss = self._add_terms(runs, with_graph)
            except BatchSkipped as skipped:
                return skipped.output if repeatable.has_run else step(batch)
            runs.forget_graphs()
            self._log_strengths(active)
            if self.loop.ends_optimizer_step:
                for one in active:
                    one.acted(self.loop)
            if entered:
                self.total = None
                guard = GradientGuard(
                    self.module,
                    self.loop,
                    repeatable,
                    entered,
                    self._gradients,
                    task_loss=task_loss,
                    total=lambda: self.total,
                )
                guard.watch(output if isinstance(output, Tensor) else output["loss"])
            return output

    def acts_now(self) -> bool:
        """Whether a penalty acts on this step."""
        return bool(self._active_now())

    def log_skipped(self) -> None:
        """Log what was counted when logging was not allowed."""
        unlogged = {one.name: one.skipped for one in self.penalties if one.has_unlogged}
        log_skipped(self.loop, unlogged)
        for one in self.penalties:
            one.has_unlogged = False

    def _active_now(self) -> list[ActivePenalty]:
        """The penalties that act on this step."""
        loop = self.loop
        count = loop.batches_before
        # With manual optimization several optimizers may step in one batch, or ones that Lightning does not count.
        now = loop.global_step if loop.is_automatic else count
        for one in self.penalties:
            one.follow_settings(loop)
        by_settings = {id(one.settings): one.settings.strengths_at(now) for one in self.penalties}
        strengths = [by_settings[id(one.settings)][one.index] for one in self.penalties]
        if not any(strengths):
            return []
        reshard(self.module)  # a validation step may have left parameters whole
        # Ranks draw probes of their own, but where they hold parts of one set of parameters.
        rank = 0 if any(map(is_dtensor, self.module.parameters())) else loop.rank
        return [
            ActivePenalty(in_fit=one, strength=strength, probes=ProbeSource(one.settings.seed, now, count, rank))
            for one, strength in zip(self.penalties, strengths, strict=True)
            if strength > 0
        ]

    def _add_terms(self, runs: PenaltyRuns, active: Sequence[ActivePenalty]) -> tuple[Any, list[ActivePenalty], Tensor]:
        """What the step returns with the penalties in its loss, the penalties that entered it, and the task loss."""
        task = runs.run()
        terms = terms_of(self.module, self.loop, runs, active, task.loss)
        total = total_of(terms)
        log_added(self.loop, None if total is None else total.detach(), like=task.loss)
        output = task.output if total is None else with_loss(task.output, task.loss + total)
        return output, [one for one, _ in terms], task.loss.detach()

    def _log_strengths(self, active: Sequence[ActivePenalty]) -> None:
        """Log the strengths that adapt."""
        adaptive = [one for one in self.penalties if one.control is not None]
        for one in active:
            if one.in_fit.control is not None:
                log_strength(self.loop, one.name if len(adaptive) > 1 else None, one.in_fit.control.strength)


@contextmanager
def _states_restored_on_error(penalties: Sequence[FitPenalty]) -> Iterator[None]:
    """Let every penalty and its strength go on from where they were if what happens inside fails."""
    before = [(one, one.penalty.state_dict(), one.control and one.control.state_dict()) for one in penalties]
    try:
        yield
    except BaseException:
        for one, state, strength in before:
            one.penalty.load_state_dict(state)
            if one.control is not None:
                one.control.load_state_dict(strength or {})
            one.window = StepWindow()
        raise
