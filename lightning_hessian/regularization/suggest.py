"""Suggests the strength at which a penalty's gradient is a given share of the task loss's gradient."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_hessian.arguments import is_number
from lightning_hessian.curvature import ProbeSource, select_parameters
from lightning_hessian.penalties import AscentDifference, DifferenceContext, InputPenalty, Penalty, SecondDifference
from lightning_hessian.regularization.differences import without_padding
from lightning_hessian.regularization.input_runs import PenaltyRuns, step_for
from lightning_hessian.regularization.task_loss import TaskStep, task_step
from lightning_hessian.step.batches import copied
from lightning_hessian.step.isolation import independent_copy, random_state_kept
from lightning_hessian.step.repeatable import BatchSkipped, StepRun

_FIRST = 1e-4
"""Where the search begins for penalties by differences: ``two_pass`` moves each weight by 0.014 there."""
_ROUNDS = 20
_TOLERANCE = 0.01
_ROUNDING = 16
"""Differences of gradients below so many units of rounding are no differences."""


@dataclass(frozen=True)
class StrengthSuggestion:
    """What :func:`suggest_strength` found. It can be passed as ``strength``; ``float()`` gives the number.

    Args:
        penalty: the penalty, as printed.
        share: the length of the penalty's gradient, as a share of the length of the task loss's gradient.
        by_batch: the strength with that share, for each batch.
    """

    penalty: str
    share: float
    by_batch: tuple[float, ...]

    @property
    def strength(self) -> float:
        """The median over the batches."""
        return statistics.median(self.by_batch)

    @property
    def low(self) -> float:
        """The least of all batches."""
        return min(self.by_batch)

    @property
    def high(self) -> float:
        """The largest of all batches."""
        return max(self.by_batch)

    def __float__(self) -> float:
        return self.strength

    def __str__(self) -> str:
        return (
            f"{self.penalty}: strength {self.strength:.3g} ({self.low:.2g} to {self.high:.2g} over "
            f"{len(self.by_batch)} batches)\n  makes its gradient {100 * self.share:.3g} % of the task loss's"
        )


def suggest_strength(
    module: nn.Module,
    batches: Iterable[Any],
    penalty: Penalty,
    share: float = 0.1,
    loss: Callable[[Any, Any], Any] | None = None,
) -> StrengthSuggestion:
    r"""The strength at which the penalty's gradient is a given share of the task loss's, at the present weights.

    For each batch, over all parameters that require a gradient,

    .. math:: s_b = \text{share} \cdot \lVert \nabla L_b \rVert_2 \, / \, \lVert \nabla P_b \rVert_2,

    where L is the task loss, and P is what the callback adds to it at strength 1 (``clamp`` included), with its probes.
    The suggestion is the median over the batches, with the smallest and the largest as its spread.

    A penalty of differences may have a step that depends on the strength (``two_pass``). Its s_b is the strength at
    which the gradient that the callback adds *at that strength* has the share. It is found by
    :math:`s \leftarrow s \cdot \text{share} / \text{share}(s)`, with bisection where kinks make the share jump, until s
    moves by less than 1 %.

    The suggestion is a start, not an optimum, and depends on the weights: asked on a fresh module, it is meant for the
    beginning of training. Derivatives by the inputs grow a hundred to a thousand times within the first epoch. A
    strength of a penalty on the inputs that suits a fresh module destroys training. Ask on a module that was trained
    for an epoch without a penalty.

    A penalty on the inputs uses the running statistics of batch norm in training mode. On a fresh module they are not
    yet those of the data; training moves them there within some twenty steps. So the copies first set them to the means
    over all the batches at the present weights. (A layer whose ``momentum`` is 0 keeps its statistics.)

    Each batch is computed on a copy of the module, in its own mode and precision. Weights, gradients, buffers, metrics,
    logs, the penalty and the global random state stay unchanged, also after an exception.

    Args:
        module: a LightningModule, or any module if ``loss`` is given, in the mode that you train in.
        batches: an iterable of batches as the training step gets them, such as a DataLoader. All are used, and each
            costs a penalized step (a penalty of differences costs a few). Of a long loader pass a part, such as
            ``itertools.islice(loader, 8)``; pass a single batch as ``[batch]``. A batch is left out if the step
            returns None, the loss or the penalty has no gradient, or no strength gives the share.
        penalty: for example ``HessianTrace()``. Ask for several penalties one at a time.
        share: the penalty's gradient in units of the task loss's, in (0, 1].
        loss: ``loss(module, batch)`` returns the task loss; by default the module's ``training_step``.

    Returns:
        The suggestion; it prints readably, and :class:`HessianRegularizer` takes it as ``strength``.

    Raises:
        ValueError: ``share`` is out of its range, a gradient is not finite, no batch is left, or the penalty cannot
            be computed on these parameters.
        MisconfigurationException: the step returns no differentiable loss, or optimization is manual and there is no
            ``loss``.
        HigherOrderError: an operator cannot be differentiated often enough.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)  # L = exp(w x), tr(H) = x^2 L, its gradient x^3 L, the loss's x L
        >>> batches = [torch.tensor([[0.5]]), torch.tensor([[1.0]]), torch.tensor([[2.0]])]
        >>> from lightning_hessian import HessianRegularizer, HessianTrace
        >>> found = suggest_strength(net, batches, HessianTrace(), loss=lambda net, x: net(x).exp().mean())
        >>> print(found)
        HessianTrace(probes=1, method='taylor', keep=1.0, drop='tensor'): strength 0.1 (0.025 to 0.4 over 3 batches)
          makes its gradient 10 % of the task loss's
        >>> regularizer = HessianRegularizer(HessianTrace(), strength=found)
    """
    if not isinstance(penalty, Penalty):
        raise ValueError(f"penalty={penalty!r} is not a Penalty. Pass an object such as HessianTrace(), one at a time.")
    if not is_number(share) or not 0 < float(share) <= 1:
        raise ValueError(
            f"share={share!r} must lie in (0, 1]: how large the penalty's gradient is to be, as a share of the task "
            "loss's. 0.1 is a start."
        )
    step = task_step(module, loss)
    parameters = dict(module.named_parameters())
    penalty.check(parameters)
    device = next(iter(select_parameters(parameters).values())).device
    found: list[float] = []
    left_out: list[str] = []
    with random_state_kept(device):
        moving = _moving_statistics(module) if isinstance(penalty, InputPenalty) else []
        if moving:
            batches = list(batches)
            module = _settled(module, moving, step, batches, device)
        for index, batch in enumerate(batches):
            try:
                with torch.enable_grad():
                    found.append(_Batch(module, penalty, step, batch, index).strength(share))
            except BatchSkipped:
                left_out.append("the step returned None")
            except _LeftOut as reason:
                left_out.append(str(reason))
    if not found:
        reasons = "; ".join(dict.fromkeys(left_out)) or "there is no batch"
        raise ValueError(f"No strength can be suggested for {penalty!r}: {reasons}.")
    return StrengthSuggestion(repr(penalty), float(share), tuple(found))


class _LeftOut(Exception):
    """Why a batch gives no strength."""


def _moving_statistics(module: nn.Module) -> list[str]:
    """The names of the batch norm layers whose running statistics follow the data."""
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.training and layer.running_mean is not None and layer.momentum != 0
    ]


def _settled(
    module: nn.Module, moving: Sequence[str], step: TaskStep, batches: Sequence[Any], device: Any
) -> nn.Module:
    """A copy whose running statistics are the means over the batches."""
    twin, runner = independent_copy(module), independent_copy(module)
    for name in moving:
        layer = cast(_BatchNorm, runner.get_submodule(name))
        layer.momentum = None  # the cumulative mean
        layer.reset_running_stats()
    with torch.enable_grad():
        for index, batch in enumerate(batches):
            step(runner, copied(move_data_to_device(batch, device)), index)
    for name in moving:
        twin.get_submodule(name).load_state_dict(runner.get_submodule(name).state_dict())
    return twin


class _Batch:
    """One batch, with its own copies of module and penalty, so that batches do not influence each other."""

    def __init__(self, module: nn.Module, penalty: Penalty, step: TaskStep, batch: Any, index: int) -> None:
        twin = independent_copy(module)
        self.index = index
        self.penalty = copy.deepcopy(penalty)
        self.parameters = dict(twin.named_parameters())
        self.trained = list(select_parameters(self.parameters).values())
        self.probes = ProbeSource(step=index, micro_batch=index)  # what the callback draws in its first steps
        batch = copied(move_data_to_device(batch, self.trained[0].device))
        self.step = step_for([self.penalty], twin, lambda batch: step(twin, batch, index), batch)
        with_graph = [] if penalty.needs.differences else [self.penalty]
        self.runs = PenaltyRuns(self.step, with_graph, [self.probes] * len(with_graph))

    def strength(self, share: float) -> float:
        """The strength at which the penalty's gradient has the share.

        Raises:
            BatchSkipped: the step has no loss for this batch.
            _LeftOut: no strength has it.
        """
        loss = self.runs.run().loss
        if self.penalty.needs.differences or self.runs.runs_again_for(self.penalty):
            self.runs.check_repeatable(loss, repr(self.penalty))
        task = self._gradient(loss)
        target = share * self._norm(task, "task loss")
        if target == 0:
            raise _LeftOut("the task loss has no gradient")
        if not self.penalty.needs.differences:
            return target / self._size(self._by_graph())
        # What is added need not be linear in the strength, nor continuous where there are kinks.
        strength, low, high = _FIRST, 0.0, math.inf
        for _ in range(_ROUNDS):
            size = self._size(self._by_differences(task, strength))
            low, high = (strength, high) if size < target else (low, strength)
            before, strength = strength, strength * target / size
            if not low <= strength <= high:
                strength = math.sqrt(low * high)
            if abs(strength - before) < _TOLERANCE * strength:
                return strength
        raise _LeftOut(f"its gradient was {share:.3g} of the task loss's at no strength tried, {before:.2g} at last")

    def _by_graph(self) -> list[Tensor]:
        with torch.autocast(self.trained[0].device.type, enabled=False), self.runs.explained(self.penalty):
            return self._gradient(self.penalty(self.runs.context(self.penalty)))

    def _by_differences(self, task: Sequence[Tensor], strength: float) -> list[Tensor]:
        """weight * [g(theta moved) - g(theta)], summed over the moves of all differences."""
        added = [torch.zeros_like(gradient) for gradient in task]
        rounding = 0.0
        context = DifferenceContext(
            parameters=self.parameters,
            strength=strength,
            probes=self.probes,
            hessian_vector_product=self._product,
        )
        gradients = dict(zip(self.trained, task, strict=True))
        for difference in self.penalty.differences(context):
            if isinstance(difference, AscentDifference):
                v = difference.displacement([gradients[tensor] for tensor in difference.tensors])
            else:
                v = without_padding(difference, self.step.module)
            add = partial(self._add, added, task, difference)
            for size in self.step.gradients_at(difference.tensors, v, difference.distances, add):
                rounding += difference.weight * size
        rounding *= _ROUNDING * torch.finfo(added[0].dtype).eps
        return added if self._norm(added, "penalty") > abs(rounding) else [torch.zeros_like(part) for part in added]

    def _add(
        self, added: list[Tensor], task: Sequence[Tensor], difference: SecondDifference | AscentDifference, run: StepRun
    ) -> float:
        """Add weight * [g(theta moved) - g(theta)]; the length of the first."""
        there = self._gradient(run.loss)
        for total, a, b in zip(added, there, task, strict=True):
            total.add_(a - b, alpha=difference.weight)
        return self._norm(there, f"loss moved by {difference.distances[0]:.2g}")

    def _product(self, difference: SecondDifference) -> Tensor:
        """Hv, over the tensors that the difference moves."""

        def gradient(run: StepRun) -> Tensor:
            return difference.flat_gradient(dict(zip(self.trained, self._gradient(run.loss), strict=True)))

        v = without_padding(difference, self.step.module)
        ahead, behind = self.step.gradients_at(difference.tensors, v, difference.distances, gradient)
        return (ahead - behind) / (2 * difference.distance)

    def _gradient(self, value: Tensor) -> list[Tensor]:
        # By backward(), which passes through reentrant checkpoints. The module is a copy: its gradients are not needed.
        for tensor in self.trained:
            tensor.grad = None
        if value.requires_grad:
            value.backward(retain_graph=not self.penalty.needs.differences)
        return [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in self.trained]

    def _size(self, added: Sequence[Tensor]) -> float:
        size = self._norm(added, f"penalty {self.penalty.name}")
        if size == 0:
            raise _LeftOut(
                "it has no gradient (the loss is linear or quadratic in the parameters, or piecewise linear as ReLU "
                "makes it; or clamp= holds the value; or the value was detached), so no strength changes the training"
            )
        return size

    def _norm(self, gradient: Sequence[Tensor], of: str) -> float:
        accumulation_dtype = torch.promote_types(gradient[0].dtype, torch.float32)
        norm = math.hypot(*(torch.linalg.vector_norm(part, dtype=accumulation_dtype).item() for part in gradient))
        if not math.isfinite(norm):
            raise ValueError(
                f"The gradient of the {of} is {norm} on batch {self.index}, so no strength can be suggested. Is the "
                "batch empty, or does something overflow or meet a point without a derivative (the root of 0)?"
            )
        return norm
