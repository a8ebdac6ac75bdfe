"""How penalties become part of a step's loss; the callback and the mixin share it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_hessian.curvature import ProbeSource, padding_rows
from lightning_hessian.curvature.displacement import GradientSum, is_sharded, local, local_part, movable
from lightning_hessian.penalties import Difference, InputPenalty, Penalty
from lightning_hessian.regularization.nonfinite import BackwardWatch
from lightning_hessian.step.passes import Passes, no_loss_again, same_loss

if TYPE_CHECKING:
    from lightning_hessian.regularization.callback import HessianRegularizer


_switched_off = ContextVar("_switched_off", default=False)


@contextmanager
def without_penalties() -> Iterator[None]:
    """Inside, a training step computes the task loss alone."""
    token = _switched_off.set(True)
    try:
        yield
    finally:
        _switched_off.reset(token)


def penalized(
    module: LightningModule,
    regularizers: Sequence[HessianRegularizer],
    step: Callable[[Any], Any],
    batch: Any = None,
    all_inputs: bool = False,
) -> Any:
    """Run ``step(batch)`` and add to the loss it returns the penalties of every regularizer that acts now.

    The penalties share their forward passes (see :class:`Passes`), and each sees the task loss alone. Where none acts,
    and outside of training (a validation step may call the training step), ``step(batch)`` is all that runs.

    Args:
        module: the LightningModule, attached to a Trainer.
        regularizers: what to add.
        step: computes the task loss: a scalar tensor, a mapping with "loss", or None to skip the batch.
        batch: what penalties on the inputs find them in.
        all_inputs: whether every tensor of the batch is an input.
    """
    if _switched_off.get():
        return step(batch)
    trainer = module.trainer
    # With manual optimization several optimizers may step in one batch, or ones that Lightning does not count.
    now = trainer.global_step if module.automatic_optimization else trainer.fit_loop.total_batch_idx
    strengths = [strength for regularizer in regularizers for strength in regularizer.strengths_at(now)]
    if not any(strengths) or not trainer.training or not torch.is_grad_enabled():
        return step(batch)
    count = trainer.fit_loop.total_batch_idx  # monotonic over epochs, and kept by checkpoints
    # Ranks draw probes of their own, but where they hold parts of one set of parameters.
    rank = 0 if any(map(is_sharded, module.parameters())) else trainer.global_rank
    log_skipped(module, regularizers)
    acting = [
        _Acting(regularizer, penalty, strength, name, ProbeSource(regularizer.seed, now, count, rank))
        for (name, regularizer, penalty), strength in zip(by_name(regularizers), strengths, strict=True)
        if strength > 0
    ]
    by_graph = [one for one in acting if not one.penalty.by_differences]
    by_differences = [one for one in acting if one.penalty.by_differences]
    penalties = [one.penalty for one in by_graph]
    passes = Passes(
        module,
        step,
        batch,
        penalties,
        loss_of,
        all_inputs,
        repeated=bool(by_differences),
        mean_over_ranks=functools.partial(_mean_over_ranks, trainer),
    )
    with passes.before.restored_on_error(), _state_restored_on_error([one.penalty for one in acting]):
        if by_differences:
            try:
                output = _with_differences(module, passes, by_graph, by_differences)
            except _Skipped as skipped:
                return skipped.output
            _watch_backward(module, passes, acting, output, None)
            return output
        task = passes.task()
        if task.loss is None:
            return task.output
        terms = _terms(module, passes, by_graph, task.loss)
        _log(module, "train/penalty", torch.zeros_like(task.loss) if terms is None else terms.detach())
        if terms is None:
            return task.output
        output = _with_loss(task.output, task.loss + terms)
        _watch_backward(module, passes, acting, output, task.loss.detach())
        return output


def _watch_backward(
    module: LightningModule, passes: Passes, acting: Sequence[_Acting], output: Any, task: Tensor | None
) -> None:
    """See that the step's gradient is finite when its backward pass is over; otherwise train on the task loss alone.

    Args:
        module: the LightningModule.
        passes: the runs of the step.
        acting: the penalties that it has.
        output: what it returns.
        task: the task loss of its run for real, to see that another run has the same; None where there was none at
            the parameters as they are.
    """
    loss = output if isinstance(output, Tensor) else output["loss"]
    # A scaler looks itself, and lowers its scale.
    if getattr(module.trainer.precision_plugin, "scaler", None) is not None or loss.grad_fn is None:
        return
    passes.forget_graphs()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    regularizer = acting[0].regularizer
    regularizer.total = None

    def when_over(watch: BackwardWatch) -> None:
        if _on_all_ranks(watch.is_finite(), module):
            return
        names = " or ".join(dict.fromkeys(one.name for one in acting))
        at = f"at step {module.trainer.global_step}"
        message = f"The gradient of the penalty {names} is not finite {at}, though its value is."
        # In manual optimization the loss may have other terms, of which nothing is known here.
        whole = module.automatic_optimization or (regularizer.total is not None and watch.is_all_of(regularizer.total))
        gradients = _task_gradient(passes, regularizer, parameters, task) if whole else None
        if _on_all_ranks(gradients is not None, module):
            assert gradients is not None
            if not _on_all_ranks(watch.replace(gradients, _mean_if_synchronized(module)), module):
                return  # the task loss's own gradient is not finite: training without a penalty would meet it, too
            did = "This step trains on the task loss alone"
        else:
            watch.undo()
            did = "The whole gradient of this backward pass is left out"
        if any(one.regularizer.on_nonfinite == "raise" for one in acting):
            watch.undo()
            raise FloatingPointError(f"{message} {_NO_DERIVATIVE} Change the loss there, or pass on_nonfinite='skip'.")
        first = {id(one.regularizer): one for one in reversed(acting)}
        if all(one.regularizer.nonfinite_steps == 0 for one in acting):
            rank_zero_warn(
                f"{message} {did}, and so does every later one like it; `train/{acting[0].penalty.name}_skipped` "
                f"counts them. {_NO_DERIVATIVE} Pass on_nonfinite='raise' to stop instead."
            )
        for one in first.values():
            one.regularizer.nonfinite_steps += 1
            one.regularizer.unlogged[f"train/{one.penalty.name}_skipped"] = float(one.regularizer.nonfinite_steps)

    BackwardWatch(loss, parameters, when_over)


_NO_DERIVATIVE = (
    "A higher derivative may not exist there (equal points in a distance, the root or the logarithm of 0), or overflow "
    "because training diverges (a high learning rate or strength)."
)


def _task_gradient(
    passes: Passes, regularizer: HessianRegularizer, parameters: Sequence[Tensor], task: Tensor | None
) -> Sequence[Tensor | None] | None:
    """The gradient of the task loss alone; None where the step does not give the same loss again."""
    try:
        run = passes.at_present(for_real=False)
    except MisconfigurationException:
        return None
    if run.loss is None or (task is not None and not same_loss(run.loss, task)):
        return None
    by_backward = any(map(is_sharded, parameters)) or regularizer.needs_backward(run.loss)
    return GradientSum(parameters, by_backward=by_backward).differentiate(run.loss)


def _mean_if_synchronized(module: LightningModule) -> Callable[[Tensor], Tensor] | None:
    synchronized = getattr(module.trainer.strategy.model, "require_backward_grad_sync", False)
    return functools.partial(_mean_over_ranks, module.trainer) if synchronized else None


def log_skipped(module: LightningModule, regularizers: Sequence[HessianRegularizer]) -> None:
    """Log what was counted when logging was not allowed."""
    for regularizer in regularizers:
        for name, value in regularizer.unlogged.items():
            _log(module, name, value, reduce=False)
        regularizer.unlogged = {}


def by_name(regularizers: Sequence[HessianRegularizer]) -> list[tuple[str, HessianRegularizer, Penalty]]:
    """Every penalty with its name in logs and checkpoints, which does not depend on which of them act."""
    listed = [(regularizer, penalty) for regularizer in regularizers for penalty in regularizer.penalties]
    names = _different([penalty.name for _, penalty in listed])
    return [(name, *entry) for name, entry in zip(names, listed, strict=True)]


@dataclass(frozen=True)
class _Acting:
    """A penalty on a step on which it acts."""

    regularizer: HessianRegularizer
    penalty: Penalty
    strength: float
    name: str
    probes: ProbeSource


def _terms(module: LightningModule, passes: Passes, acting: Sequence[_Acting], loss: Tensor) -> Tensor | None:
    """The sum of strength * penalty, with its graph; None where no penalty is finite."""
    parameters = list(module.parameters())
    terms: list[Tensor] = []
    # The derivatives of a loss computed under autocast are taken outside of it, as for any backward pass.
    with torch.autocast(loss.device.type, enabled=False):
        for one in acting:
            if passes.coupling and isinstance(one.penalty, InputPenalty):
                one.regularizer.say_own_pass(one.penalty, list(passes.coupling))
            if passes.runs_again_for(one.penalty):
                one.regularizer.check_repeatable(one.penalty, passes, loss, shared=True)
            with passes.explained(one.penalty):
                context = passes.context(one.penalty, one.probes)
                if isinstance(one.penalty, InputPenalty):
                    one.regularizer.warn_of_coupling(one.penalty, context)
                value = one.penalty.value(context)
                _log(module, f"curvature/{one.name}", value.detach())
                if _is_finite(value, module):
                    terms.append(one.strength * one.penalty.term(value))
                    one.regularizer.try_backward(one.penalty, terms[-1], parameters)
                else:
                    _report_nonfinite(module, one.regularizer, one.penalty, loss, value)
    return torch.stack(terms).sum() if terms else None


def _with_differences(
    module: LightningModule, passes: Passes, by_graph: Sequence[_Acting], by_differences: Sequence[_Acting]
) -> Any:
    """The step with penalties that are second differences of its loss, besides others.

    loss + sum_k w_k [L(theta + s_k v_k) + L(theta - s_k v_k) - 2 L(theta)] is a weighted sum of losses. Each is run and
    differentiated at once, so that one run's activations are there at a time, and what is returned has the sum of the
    gradients. Where the weights of L(theta) cancel, as in ``method="two_pass"`` by itself, it is not run at all.
    """
    trainer = module.trainer
    named = dict(module.named_parameters())
    # A gradient of a float16 loss may underflow: the Trainer's scale protects it here as it does in its own backward.
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = 1.0 if scaler is None else float(scaler.get_scale())

    def empty_sum() -> GradientSum:
        return GradientSum(list(named.values()), scale, by_backward=any(map(is_sharded, named.values())))

    def search(one: _Acting, difference: Difference) -> Tensor:
        product, _ = _along(module, passes, one, difference, empty_sum(), first=True, silent=True)
        return product

    listed = [
        (one, one.penalty.differences(named, one.strength, one.probes, functools.partial(search, one)))
        for one in by_differences
    ]
    at_rest = 1 - sum(2 * difference.weight for _, differences in listed for difference in differences)
    if math.isclose(at_rest, 0, abs_tol=1e-9):
        at_rest = 0.0
    total = empty_sum()
    added: Tensor | float = 0.0
    output: Any = None
    if by_graph or at_rest:
        task = passes.task()
        if task.loss is None:
            return task.output
        output = task.output
        for one in by_differences:
            one.regularizer.warn_of_kinks(one.penalty, module, task.loss)
        terms = _terms(module, passes, by_graph, task.loss) if by_graph else None
        added = 0.0 if terms is None else terms.detach()
        loss = at_rest * task.loss + (0.0 if terms is None else terms)
        _add(module, total, by_differences[0].regularizer, loss, 1.0)
        del task, terms, loss
    for one, differences in listed:
        values: list[Tensor] = []
        for difference in differences:
            product, returned = _along(module, passes, one, difference, total, first=output is None)
            output = returned if output is None else output
            values.append(product if difference.value is None else difference.value(product))
        value = torch.stack(values).mean()
        finite = _is_finite(value, module)
        if finite or scale == 1:
            _log(module, f"curvature/{one.name}", value)
        if not finite and scale == 1:
            return _task_loss_alone(module, passes, one, value, output)
        added = added + one.strength * value
    _log(module, "train/penalty", added)
    return _with_loss(output, total.loss())


def _along(
    module: LightningModule,
    passes: Passes,
    one: _Acting,
    difference: Difference,
    total: GradientSum,
    first: bool,
    silent: bool = False,
) -> tuple[Tensor, Any]:
    """Run and differentiate the step at both ends of a difference, which the total takes up.

    Args:
        first: whether the step has not been run before. It may still skip the batch, and this run is the one that
            counts.
        silent: for a search: this run does not count, and Hv is wanted.

    Returns:
        Hv over all ranks, or v'Hv on this one where that is the difference's value; what the step returned.
    """
    one.regularizer.warn_of_rounding(one.penalty, difference)
    v = without_padding(difference, module)
    whole, for_real = silent or difference.value is not None, first and not silent
    look = difference.gradient if whole else functools.partial(difference.slope, v)
    ends: list[Tensor] = []
    output: Any = None
    with movable(difference.tensors) as move:
        for sign in (1, -1):
            move(v, sign * difference.step)
            run = passes.at_present(for_real and not ends)
            if run.loss is None and first and not ends:
                raise _Skipped(run.output if for_real else passes.at_present(for_real=True).output)
            if run.loss is None:
                raise no_loss_again(one.penalty)
            output = output if ends else run.output
            value = run.loss.detach()
            ends.append(_add(module, total, one.regularizer, run.loss, difference.weight, look))
            del run
            finish = None
            if total.by_backward:
                finish = GradientSum(total.tensors, total.scale, by_backward=True).differentiate
            one.regularizer.check_repeatable(one.penalty, passes, value, difference.tensors, finish=finish)
    product = (ends[0] - ends[1]) / (2 * difference.step)
    return passes.mean_over_ranks(product) if whole else product, output


def without_padding(difference: Difference, module: LightningModule | nn.Module) -> list[Tensor]:
    """A difference's direction, zero where an embedding's ``padding_idx`` makes a row constant."""
    rows = padding_rows(module)
    v = difference.direction()
    for i, tensor in enumerate(difference.tensors):
        if tensor in rows:
            kept = torch.ones(tensor.shape, dtype=v[i].dtype, device=v[i].device)
            kept[rows[tensor]] = 0
            v[i] = v[i] * local_part(kept, like=tensor)
    return v


class _Skipped(Exception):
    """The step has no loss for this batch."""

    def __init__(self, output: Any) -> None:
        self.output = output


def _add(
    module: LightningModule,
    total: GradientSum,
    regularizer: HessianRegularizer,
    loss: Tensor,
    weight: float,
    look: Callable[[Mapping[Tensor, Tensor]], Any] | None = None,
) -> Any:
    if regularizer.needs_backward(loss):
        total.by_backward = True
        if getattr(module.trainer.strategy, "_ddp_kwargs", {}).get("static_graph"):
            raise MisconfigurationException(
                "DDP with static_graph=True counts the backward passes that reentrant checkpoints need, and would not "
                "reduce the gradients of a step that takes several. Pass use_reentrant=False to "
                "torch.utils.checkpoint.checkpoint, or leave static_graph off."
            )
    try:
        # As any backward pass, outside of autocast.
        with torch.autocast(loss.device.type, enabled=False):
            return total.add(loss, weight, look)
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise MisconfigurationException(
            "The loss passes through something that was computed before the step (or before `self.regularized`), and a "
            "penalty that runs the step several times differentiates that several times. Compute the whole forward "
            "pass inside, detach what comes from outside, or use method='autograd'."
        ) from error


def _task_loss_alone(module: LightningModule, passes: Passes, one: _Acting, value: Tensor, output: Any) -> Any:
    """What a step trains on whose penalty is not finite."""
    run = passes.at_present(for_real=False)
    if run.loss is None:
        raise no_loss_again(one.penalty)
    _report_nonfinite(module, one.regularizer, one.penalty, run.loss, value)
    _log(module, "train/penalty", torch.zeros_like(value))
    return _with_loss(output, run.loss)


def _with_loss(output: Any, loss: Tensor) -> Any:
    return loss if isinstance(output, Tensor) else {**output, "loss": loss}


def _different(names: Sequence[str]) -> list[str]:
    """The names, numbered from the second that is the same."""
    alike = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name}_{before + 1}" if before else name for name, before in zip(names, alike, strict=True)]


def loss_of(output: Any) -> Tensor | None:
    if output is None:
        return None
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        what = f"a {type(output).__name__}"
        if isinstance(output, Mapping):
            what = f"a dict without a tensor under 'loss' (its keys: {', '.join(map(str, output)) or 'none'})"
        raise MisconfigurationException(
            f"The training step returned {what}, so there is no loss to add a penalty to. "
            'Return the loss tensor, a dict {"loss": ...}, or None to skip the batch.'
        )
    if loss.numel() != 1:
        raise MisconfigurationException(
            f"The training step returned a loss of shape {tuple(loss.shape)}; a penalty needs a scalar. "
            "Reduce it, for example by `.mean()`."
        )
    if not loss.requires_grad:
        raise MisconfigurationException(
            "The loss that the training step returned has no graph, so neither it nor a penalty on its curvature "
            "can be differentiated. Compute it from the model's parameters, without `.detach()`, `.item()` or "
            "`torch.no_grad()` on the way."
        )
    return loss.reshape(())


def _mean_over_ranks(trainer: Trainer, tensor: Tensor) -> Tensor:
    # Lightning reduces in place.
    return tensor if trainer.world_size == 1 else trainer.strategy.reduce(tensor.clone(), reduce_op="mean")


@contextmanager
def _state_restored_on_error(penalties: Sequence[Penalty]) -> Iterator[None]:
    """Let every penalty go on from where it was if what happens inside fails."""
    before = [(penalty, penalty.state_dict()) for penalty in penalties]
    try:
        yield
    except BaseException:
        for penalty, state in before:
            penalty.load_state_dict(state)
        raise


def _is_finite(value: Tensor, module: LightningModule) -> bool:
    return _on_all_ranks(math.isfinite(value.item()), module)


def _on_all_ranks(finite: bool, module: LightningModule) -> bool:
    # All ranks drop the penalty or none: they average one gradient.
    trainer = module.trainer
    return finite if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(finite, all=True)


def _report_nonfinite(
    module: LightningModule, regularizer: HessianRegularizer, penalty: Penalty, loss: Tensor, value: Tensor
) -> None:
    if math.isfinite(value.item()):
        what, cause = "not finite on another process", "It is finite on this one."
    elif not math.isfinite(loss.item()):
        what, cause = str(value.item()), f"The task loss itself is not finite. {_why_not_finite(module)}"
    else:
        what, cause = (
            str(value.item()),
            (
                "The task loss is finite: its derivatives overflow, or meet a point where they do not exist "
                "(the square root or a norm at 0, for example)."
            ),
        )
    message = f"The penalty {penalty.name} is {what} at step {module.trainer.global_step}. {cause}"
    if regularizer.on_nonfinite == "raise":
        raise FloatingPointError(f"{message} Lower the learning rate or the strength, or pass on_nonfinite='skip'.")
    if regularizer.nonfinite_steps == 0:
        rank_zero_warn(
            f"{message} This step trains on the task loss alone, and so does every later one like it; "
            f"`train/{penalty.name}_skipped` counts them. Pass on_nonfinite='raise' to stop instead."
        )
    regularizer.nonfinite_steps += 1
    _log(module, f"train/{penalty.name}_skipped", float(regularizer.nonfinite_steps), reduce=False)


def _why_not_finite(module: LightningModule) -> str:
    for name, parameter in module.named_parameters():
        if not bool(local(parameter).isfinite().all()):
            return (
                f"The parameter {name!r} holds NaN or infinity already, so training has diverged in an earlier step: "
                "lower the learning rate or the strength."
            )
    return "The parameters are finite: look at the batch (is it empty, or are its numbers not finite?)."


def _log(module: LightningModule, name: str, value: Tensor | float, reduce: bool = True) -> None:
    several = reduce and module.trainer.world_size > 1
    # With the batch size given Lightning does not look for it, which a step that takes an iterator would not survive.
    module.log(name, value, on_step=True, on_epoch=False, sync_dist=several, batch_size=1)
