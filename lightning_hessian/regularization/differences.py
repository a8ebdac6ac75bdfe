"""Penalties that are differences of the step's loss: the loss becomes a weighted sum of displaced losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hessian.curvature import padding_rows
from lightning_hessian.curvature.displacement import GradientSum
from lightning_hessian.curvature.graph import is_compiled
from lightning_hessian.curvature.sharding import is_dtensor, local, shard_like
from lightning_hessian.curvature.vectors import pack, unpack
from lightning_hessian.penalties import AscentDifference, DifferenceContext, SecondDifference
from lightning_hessian.regularization.active_penalty import ActivePenalty
from lightning_hessian.regularization.first_looks import (
    check_runs_again,
    forward_dtype,
    warn_of_kinks,
    warn_of_rounding,
)
from lightning_hessian.regularization.input_runs import PenaltyRuns
from lightning_hessian.regularization.logs import log_added, log_penalty
from lightning_hessian.regularization.loss_gradients import LossGradients
from lightning_hessian.regularization.nonfinite import skip_value
from lightning_hessian.regularization.terms import terms_of, total_of
from lightning_hessian.step.loop import TrainingLoop
from lightning_hessian.step.output import with_loss
from lightning_hessian.step.repeatability import check_repeatable
from lightning_hessian.step.repeatable import StepRun


class DisplacedLosses:
    """One step whose loss is a weighted sum of losses at displaced parameters.

    loss + sum_k w_k [L(theta + s_k v_k) + L(theta - s_k v_k) - 2 L(theta)] is a weighted sum of losses, and so is
    loss + w [L(theta + e) - L(theta)]. Each is run and differentiated at once, so that one run's activations are there
    at a time, and what is returned has the sum of the gradients. Where the weights of L(theta) cancel, as in
    ``method="two_pass"`` by itself, it is not run at all, unless e needs its gradient.

    Args:
        module: the module.
        loop: the loop that trains it.
        runs: the runs of the step, for the penalties with a graph.
        gradients: how losses are differentiated.
    """

    def __init__(self, module: nn.Module, loop: TrainingLoop, runs: PenaltyRuns, gradients: LossGradients) -> None:
        self.module = module
        self.loop = loop
        self.runs = runs
        self.step = runs.step
        self._gradients = gradients
        self._task: _Task | None = None
        self._tensors: list[Tensor] = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # A gradient of a float16 loss may underflow: the Trainer's scale protects it here as it does in its own
        # backward pass.
        scale = loop.gradient_scale
        self._scale = 1.0 if scale is None else scale

    def add(
        self, with_graph: Sequence[ActivePenalty], active: Sequence[ActivePenalty]
    ) -> tuple[Any, list[ActivePenalty]]:
        """What the step returns with the penalties in its loss, and the penalties that entered it.

        Args:
            with_graph: the penalties that are terms of the loss.
            active: the penalties that are differences.

        Raises:
            BatchSkipped: the step has no loss for this batch.
        """
        shares = [(one, one.penalty.differences(self._context(one))) for one in active]
        all_differences = [difference for _, differences in shares for difference in differences]
        center_weight = 1 - sum(len(difference.distances) * difference.weight for difference in all_differences)
        if math.isclose(center_weight, 0, abs_tol=1e-9):
            center_weight = 0.0
        ascends = any(isinstance(difference, AscentDifference) for difference in all_differences)
        measures = any(one.is_measured for one in (*with_graph, *active))
        total = GradientSum(self._tensors)
        added: Tensor | float = 0.0
        output: Any = None
        entered = list(active)
        if with_graph or center_weight or ascends or measures:
            # A compiled graph can be differentiated once.
            is_eager = measures and len(with_graph) > 1
            with torch.compiler.set_stance("force_eager") if is_eager else nullcontext():
                output, added, others = self._add_center(total, center_weight, with_graph, active, ascends or measures)
            entered = others + entered
        for one, differences in shares:
            own = GradientSum(self._tensors) if one.is_measured else total
            values = []
            for difference in differences:
                if isinstance(difference, AscentDifference):
                    values.append(self._add_ascent(own, one, difference))
                    continue
                value, returned = self._add_ends(own, one, difference)
                output = returned if output is None else output
                values.append(value)
            if one.is_measured:
                weight = sum(len(difference.distances) * difference.weight for difference in differences)
                gradients = own.gradients()
                self._measure(one, gradients, weight, max(map(self._resolution, differences)))
                total.add(1.0, own.value, gradients)
            value = torch.stack(values).mean()
            one.see(value)
            is_finite = self.loop.all(math.isfinite(value.item()))
            if is_finite or self._scale == 1:
                log_penalty(self.loop, one.name, value)
            if not is_finite and self._scale == 1:
                return self._task_loss_alone(one, value, output), []
            added = added + one.strength * value
        loss = total.loss()
        log_added(self.loop, torch.as_tensor(added), like=loss)
        return with_loss(output, loss), entered

    def _context(self, one: ActivePenalty) -> DifferenceContext:
        return DifferenceContext(
            parameters=dict(self.module.named_parameters()),
            strength=one.strength,
            probes=one.probes,
            hessian_vector_product=lambda difference: self._product(one, difference),
        )

    def _product(self, one: ActivePenalty, difference: SecondDifference) -> Tensor:
        """Hv of all ranks' batches together, from two runs that leave no trace."""
        ends = self._at_ends(one, difference, lambda run, v, gradients: difference.flat_gradient(gradients))
        return self._rate_of_change(difference, *ends)

    def _add_center(
        self,
        total: GradientSum,
        weight: float,
        with_graph: Sequence[ActivePenalty],
        active: Sequence[ActivePenalty],
        takes_gradient: bool,
    ) -> tuple[Any, Tensor | float, list[ActivePenalty]]:
        """Add weight * L(theta) and the penalties with a graph; what the step returned, and the penalties' sum.

        Args:
            total: where to add them.
            weight: the weight of L(theta).
            with_graph: the penalties with a graph.
            active: the penalties that are differences.
            takes_gradient: whether the gradient of L(theta) is needed by itself.
        """
        task = self.runs.run()
        for one in active:
            warn_of_kinks(one.in_fit, self.module, task.loss)
        terms = terms_of(self.module, self.loop, self.runs, with_graph, task.loss)
        entered = [one for one, _ in terms]
        directions = self.runs.directions()
        self.runs.forget_graphs()
        added: Tensor | float = 0.0
        rest: Tensor | None = None
        if takes_gradient:
            gradients = self._task_gradient(task.loss, entered)
            self._task = _Task(task.loss.detach(), dict(zip(self._tensors, gradients, strict=True)))
            if weight:
                total.add(weight, task.loss.detach(), gradients)
            measured = [pair for pair in terms if pair[0].is_measured]
            rest = total_of([pair for pair in terms if not pair[0].is_measured])
            for left, (one, term) in zip(reversed(range(len(measured))), measured, strict=True):
                own = self._differentiate(term, left > 0 or rest is not None, directions)
                factor = self._measure(one, own)
                added = added + factor * term.detach()
                total.add(factor, term.detach(), own)
        elif (sum_of_terms := total_of(terms)) is not None:
            added, rest = sum_of_terms.detach(), weight * task.loss + sum_of_terms
        else:
            rest = weight * task.loss
        if rest is not None:
            total.add(1.0, rest.detach(), self._differentiate(rest, watched=directions))
            added = added + rest.detach() if takes_gradient else added
        return task.output, added, entered

    def _task_gradient(self, loss: Tensor, others: Sequence[ActivePenalty]) -> list[Tensor | None]:
        """The gradient of L(theta), whose graph other penalties still need."""
        # A compiled graph can be differentiated once. One with Taylor coefficients costs more than a plain step.
        if others and (is_compiled(loss) or any(one.penalty.needs.taylor for one in others)):
            return self._differentiate(self.step.rerun().loss)
        return self._differentiate(loss, keep_graph=bool(others))

    def _measure(
        self, one: ActivePenalty, own: Sequence[Tensor | None], weight: float = 0.0, resolution: float = 0.0
    ) -> float:
        """Adapt the strength to the penalty's gradient, its own less that of weight * L(theta); the change's factor."""
        assert self._task is not None
        task = [self._task.gradients[tensor] for tensor in self._tensors]
        added = [
            g if weight == 0 or t is None else -weight * t if g is None else g - weight * t
            for g, t in zip(own, task, strict=True)
        ]
        return one.measure(self.loop, self._tensors, task, added, resolution=resolution)

    def _resolution(self, difference: SecondDifference | AscentDifference) -> float:
        """What share of the task loss's gradient a difference of two gradients must have to be more than rounding."""
        if isinstance(difference, AscentDifference):
            return 0.0
        return 4 * torch.finfo(forward_dtype(self.loop, difference.tensors[0])).eps

    def _add_ascent(self, total: GradientSum, one: ActivePenalty, difference: AscentDifference) -> Tensor:
        """Add weight * L(theta + e); L(theta + e) - L(theta)."""
        assert self._task is not None
        found = [(tensor, self._task.gradients[tensor]) for tensor in difference.tensors]
        parts = [torch.zeros_like(local(tensor)) if g is None else local(g) for tensor, g in found]
        if difference.over_ranks and not any(map(is_dtensor, difference.tensors)):
            parts = unpack(self.loop.mean(pack(parts)), parts)

        def differentiate(run: StepRun) -> Tensor:
            total.add(difference.weight, run.loss.detach(), self._differentiate(run.loss))
            self._check_runs_again(one, run, difference)
            return run.loss.detach()

        e = difference.displacement(parts)
        (there,) = self.step.gradients_at(difference.tensors, e, difference.distances, differentiate)
        return there - self._task.loss

    def _add_ends(self, total: GradientSum, one: ActivePenalty, difference: SecondDifference) -> tuple[Tensor, Any]:
        """Add weight * [L(theta + s v) + L(theta - s v)]; the penalty's value, and what the step returned."""
        output: Any = None

        def add(run: StepRun, v: Sequence[Tensor], gradients: dict[Tensor, Tensor | None]) -> Tensor:
            nonlocal output
            output = run.output if output is None else output
            seen = difference.flat_gradient(gradients) if difference.needs_product else difference.slope(v, gradients)
            total.add(difference.weight, run.loss.detach(), [gradients.pop(tensor) for tensor in self._tensors])
            return seen

        ends = self._at_ends(one, difference, add, counts=not self.step.has_run)
        value = self._rate_of_change(difference, *ends)
        return value if difference.value is None else difference.value(value), output

    def _at_ends(
        self,
        one: ActivePenalty,
        difference: SecondDifference,
        look: Callable[[StepRun, Sequence[Tensor], dict[Tensor, Tensor | None]], Tensor],
        counts: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """What ``look`` makes of the run, v and the gradients at either end."""
        warn_of_rounding(one.in_fit, self.loop, difference)
        v = without_padding(difference, self.module)

        def differentiate(run: StepRun) -> Tensor:
            gradients = dict(zip(self._tensors, self._differentiate(run.loss), strict=True))
            seen = look(run, v, gradients)
            self._check_runs_again(one, run, difference)
            return seen

        ahead, behind = self.step.gradients_at(difference.tensors, v, difference.distances, differentiate, counts)
        return ahead, behind

    def _check_runs_again(
        self, one: ActivePenalty, run: StepRun, difference: SecondDifference | AscentDifference
    ) -> None:
        check = partial(check_repeatable, self.module, self._rerun, run.loss.detach(), repr(one.penalty))
        check_runs_again(one.in_fit, self.module, check, difference.tensors)

    def _rate_of_change(self, difference: SecondDifference, ahead: Tensor, behind: Tensor) -> Tensor:
        """Hv over all ranks from gradients at either end; v'Hv on this rank from slopes."""
        rate = (ahead - behind) / (2 * difference.distance)
        return self.loop.mean(rate) if rate.dim() else rate

    def _differentiate(
        self, loss: Tensor, keep_graph: bool = False, watched: Sequence[Tensor] = ()
    ) -> list[Tensor | None]:
        if not loss.requires_grad:  # a penalty on a linear model
            return [None] * len(self._tensors)
        return self._gradients.gradient(loss, self._tensors, self._scale, keep_graph, watched)

    def _rerun(self) -> Tensor:
        """The loss of a further run."""
        loss = self.step.rerun().loss
        if self._gradients.needs_backward(self._tensors):  # sharded parameters wait for it
            self._differentiate(loss)
        return loss

    def _task_loss_alone(self, one: ActivePenalty, value: Tensor, output: Any) -> Any:
        """What a step trains on whose penalty is not finite."""
        loss = self.step.rerun().loss
        skip_value(self.module, self.loop, one.in_fit, loss, value)
        log_added(self.loop, None, like=value)
        return with_loss(output, loss)


@dataclass(frozen=True)
class _Task:
    """L(theta) and its gradient by tensor."""

    loss: Tensor
    gradients: Mapping[Tensor, Tensor | None]


def without_padding(difference: SecondDifference, module: nn.Module) -> list[Tensor]:
    """A difference's direction, zero where an embedding's ``padding_idx`` makes a row constant."""
    rows = padding_rows(module)
    v = difference.direction()
    for i, tensor in enumerate(difference.tensors):
        if tensor in rows:
            kept = torch.ones(tensor.shape, dtype=v[i].dtype, device=v[i].device)
            kept[rows[tensor]] = 0
            v[i] = v[i] * shard_like(kept, like=tensor)
    return v
