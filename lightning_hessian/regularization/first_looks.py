"""What is looked at once in a fit, for each penalty: warnings, and errors while nothing is lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_hessian.curvature.displacement import loss_gradient
from lightning_hessian.curvature.errors import OTHER_METHODS, HigherOrderError
from lightning_hessian.curvature.graph import (
    computes_in_half_precision,
    is_compiled,
    kinked_layers,
    kinks,
    without_hooks,
)
from lightning_hessian.curvature.sharding import is_dtensor, local, sum_over_shards
from lightning_hessian.penalties import SecondDifference, StepContext
from lightning_hessian.regularization.active_penalty import FitPenalty
from lightning_hessian.step.loop import TrainingLoop
from lightning_hessian.step.repeatability import layers_without_gradients


def try_backward(one: FitPenalty, term: Tensor, parameters: Iterable[Tensor]) -> None:
    """See that the term can be differentiated, while an error still leaves all gradients alone."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    # Only ``backward()`` reaches sharded parameters.
    can_be_tried = term.requires_grad and not is_compiled(term) and not any(map(is_dtensor, trained))
    if can_be_tried and one.is_first("backward"):
        with without_hooks(trained):
            torch.autograd.grad(term, trained, retain_graph=True, allow_unused=True)


def check_coefficients(
    one: FitPenalty, context: StepContext, again: Callable[[], StepContext], in_autocast: bool
) -> None:
    """See that the first Taylor coefficient of the loss is g'v: no operation has passed the coefficients by.

    Args:
        one: the penalty.
        context: its context.
        again: gives the context of a further run, for a graph that can be differentiated only once.
        in_autocast: whether the whole step runs under autocast.

    Raises:
        HigherOrderError: it is not.
    """
    mode = context.taylor
    if mode is None or not context.loss.requires_grad:
        return
    moved = [i for i, parts in enumerate(mode.parts) if any(part is not None for part in parts)]
    if not [i for i in moved if one.is_first(f"coefficients of tensor {i}")]:  # `keep` drops others in each step
        return
    trained = [parameter for parameter in context.parameters.values() if parameter.requires_grad]
    is_sharded = any(map(is_dtensor, trained))
    once = is_sharded or is_compiled(context.loss)
    if once:
        context = again()
        mode = context.taylor
        assert mode is not None
    if is_sharded:  # only a backward pass reaches the shards; it gives the mean gradient of all processes
        gradients = dict(zip(trained, loss_gradient(context.loss, trained, _SCALE, by_backward=True), strict=True))
        gradient = [gradients[tensor] for tensor in mode.tensors]
    else:
        with without_hooks(mode.tensors):
            found = torch.autograd.grad(context.loss * _SCALE, mode.tensors, retain_graph=not once, allow_unused=True)
        gradient = [None if g is None else g / _SCALE for g in found]
    # The mixed precision of FSDP2, and autocast inside a compiled part, leave no trace in the graph.
    is_half = once or in_autocast or computes_in_half_precision(context.loss)
    on_cpu = context.loss.device.type == "cpu"  # other devices may multiply float32 in a lower precision
    is_double = min(tensor.dtype.itemsize for tensor in [context.loss, *trained]) > 4
    tolerance = 0.2 if is_half else 1e-6 if is_double else 1e-3 if on_cpu else 1e-2
    for p, first in enumerate(mode.first(context.loss)):
        sums = torch.zeros(2, dtype=torch.float64, device=context.loss.device)
        for g, parts, tensor in zip(gradient, mode.parts, mode.tensors, strict=True):
            if g is not None and (part := parts[p]) is not None:
                product = (local(g) * part).double()
                sums += sum_over_shards(torch.stack([product.sum(), product.square().sum()]), like=tensor)
        slope, squares = sums.tolist()
        size = abs(slope) + math.sqrt(squares)
        value = torch.zeros_like(context.loss) if first is None else first.detach()
        coefficient = (context.mean_over_ranks(value) if is_sharded else value).item()
        if abs(coefficient - slope) > tolerance * size:
            raise HigherOrderError(
                f"{one.penalty!r} lost a part of the loss on its way: the first Taylor coefficient is not the slope of "
                "the loss. The forward pass has an operation that PyTorch does not show (TorchScript, an extension). "
                f"{OTHER_METHODS}"
            )


_SCALE = 2.0**10
"""Float16 cannot hold small gradients of a loss that is not scaled."""


def warn_of_kinks(one: FitPenalty, module: nn.Module, loss: Tensor) -> None:
    """Warn where a penalty needs smooth activations and the model has others."""
    if not one.penalty.needs.smooth or not one.is_first("kinks"):
        return
    # The graph of a compiled network does not tell.
    if found := sorted({*kinks(loss), *kinked_layers(module)}):
        rank_zero_warn(
            f"{one.penalty!r} differentiates twice by a small step, and the loss has kinks ({', '.join(found)}): where "
            "the step crosses one, the difference is noise that grows as the step shrinks. Take smooth activations "
            "(SiLU, GELU, softplus, tanh), method='taylor', or a HessianTrace with method='two_pass', whose "
            "step is larger, or method='gauss_newton'."
        )


def warn_of_rounding(one: FitPenalty, loop: TrainingLoop, difference: SecondDifference) -> None:
    """Warn where a step is so short that the precision of the forward pass does not see it."""
    if not one.is_first("rounding"):
        return
    dtype = forward_dtype(loop, difference.tensors[0])
    parts = [part for tensor in difference.tensors if (part := local(tensor)).numel()]  # a shard may be empty
    if not parts:
        return
    squares = torch.stack([part.square().mean() for part in parts]).mean()
    spacing = torch.finfo(dtype).eps * squares.sqrt().item()
    moved = max(part.abs().max().item() for part in difference.direction() if part.numel()) * difference.distance
    if moved < spacing:
        rank_zero_warn(
            f"{one.penalty!r} moves the parameters by {moved:.1e}, and {dtype} resolves about {spacing:.1e} of them: "
            "its value is rounding. Raise `step` (with method='two_pass' the strength, whose root it is), or use "
            "precision='32-true'."
        )


def forward_dtype(loop: TrainingLoop, parameter: Tensor) -> torch.dtype:
    """The type in which layers compute with a parameter now."""
    return loop.autocast_dtype(parameter.device.type) or parameter.dtype


def warn_of_coupling(one: FitPenalty, context: StepContext) -> None:
    """Warn where the samples are not independent, so that a sample has no input derivatives of its own."""
    if context.samples < 2 or not one.is_first("coupling"):
        return
    if context.couples():
        rank_zero_warn(
            "The samples of a batch are coupled: the outputs or the share of the loss of a sample depend on another "
            "sample's input (a root of the mean, mixup in the step, a contrastive loss, a layer whose first dimension "
            f"is not that of the samples?). {one.penalty.name} then mixes their derivatives and depends on the batch."
        )


def note_extra_forward(one: FitPenalty, layers: Sequence[str]) -> None:
    """Say why a penalty on the inputs costs a forward pass of its own."""
    if one.is_first("extra forward"):
        rank_zero_warn(
            f"Batch norm in training mode ({', '.join(layers[:4])}{', ...' if len(layers) > 4 else ''}) couples "
            f"the samples of a batch, so a sample has no input derivatives of its own. {one.penalty.name} is computed "
            "in a second forward pass, with the running statistics. (GroupNorm would need none.)"
        )


def check_runs_again(
    one: FitPenalty, module: nn.Module, check: Callable[[], list[str]], moved: Sequence[Tensor] = ()
) -> None:
    """See that the step can be run again, and warn where it uses the moved parameters as constants.

    Args:
        one: the penalty that needs further runs.
        module: the module.
        check: runs the step again, and returns the attributes that it has changed all the same.
        moved: the parameters that the penalty moves.

    Raises:
        MisconfigurationException: the step gives another loss when it is run again.
    """
    if not one.is_first("repeatable"):
        return
    with layers_without_gradients(module, moved) as found:
        changed = check()
    if changed:
        rank_zero_warn(
            f"Each run of the training step changes {', '.join(changed[:8])}, and {one.penalty!r} runs it several "
            "times. On this batch the loss is the same in all. If a later loss depends on what is kept there, "
            "register it as a buffer (`self.register_buffer`), which is rewound."
        )
    if found:
        rank_zero_warn(
            f"The training step calls the layers {', '.join(map(repr, sorted(found)[:4]))} under torch.no_grad() "
            f"(targets or keys from the same network?). {one.penalty!r} moves their parameters there, too, and an "
            "exact penalty holds what the step detaches constant: the two penalize different functions. Use a "
            "copy of the network for the constants, or HessianTrace()."
        )
