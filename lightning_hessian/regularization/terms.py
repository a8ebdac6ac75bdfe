"""Penalties with a graph: strength * penalty is a term of the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lightning_hessian.penalties import InputPenalty
from lightning_hessian.regularization.active_penalty import ActivePenalty
from lightning_hessian.regularization.first_looks import (
    check_coefficients,
    check_runs_again,
    note_extra_forward,
    try_backward,
    warn_of_coupling,
)
from lightning_hessian.regularization.input_runs import PenaltyRuns
from lightning_hessian.regularization.logs import log_penalty
from lightning_hessian.regularization.nonfinite import skip_value
from lightning_hessian.step.loop import TrainingLoop


def terms_of(
    module: nn.Module, loop: TrainingLoop, runs: PenaltyRuns, active: Sequence[ActivePenalty], loss: Tensor
) -> list[tuple[ActivePenalty, Tensor]]:
    """strength * penalty with its graph, for each penalty that is finite.

    Args:
        module: the module.
        loop: the loop that trains it.
        runs: the runs of the step; the run that counts was made.
        active: the penalties that act.
        loss: the task loss of that run.
    """
    parameters = list(module.parameters())
    terms: list[tuple[ActivePenalty, Tensor]] = []
    in_autocast = loop.autocast_dtype(loss.device.type) is not None
    # The derivatives of a loss computed under autocast are taken outside of it, as for any backward pass.
    with torch.autocast(loss.device.type, enabled=False):
        for one in active:
            if runs.batch_norms and isinstance(one.penalty, InputPenalty):
                note_extra_forward(one.in_fit, list(runs.batch_norms))
            if runs.runs_again_for(one.penalty):
                check_runs_again(one.in_fit, module, partial(runs.check_repeatable, loss, repr(one.penalty)))
            with runs.explained(one.penalty):
                context = runs.context(one.penalty)
                if isinstance(one.penalty, InputPenalty):
                    warn_of_coupling(one.in_fit, context)
                check_coefficients(one.in_fit, context, partial(runs.context_of_another_run, one.penalty), in_autocast)
                value = one.penalty.value(context)
                log_penalty(loop, one.name, value.detach())
                one.see(value)
                if loop.all(math.isfinite(value.item())):
                    terms.append((one, one.strength * one.penalty.term(value)))
                    try_backward(one.in_fit, terms[-1][1], parameters)
                else:
                    skip_value(module, loop, one.in_fit, loss, value)
    return terms


def total_of(terms: Sequence[tuple[ActivePenalty, Tensor]]) -> Tensor | None:
    """The sum of the terms; None if there is none."""
    return torch.stack([term for _, term in terms]).sum() if terms else None
