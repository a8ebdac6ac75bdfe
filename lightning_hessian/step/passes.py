"""One training step, run once for real, and again in silence as often as penalties on the inputs need."""

from __future__ import annotations

import copy
import difflib
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import Metric

from lightning_hessian.curvature import ProbeSource, higher_order, watch_losses
from lightning_hessian.penalties import InputPenalty, Penalty, StepContext
from lightning_hessian.step.batches import exchanged, select_inputs, tensors_in
from lightning_hessian.step.isolation import Snapshot, evaluation_mode


@dataclass(frozen=True)
class Pass:
    """What one run of the step gave.

    Args:
        output: what the step returned.
        loss: the scalar in it; None where the step skips the batch.
        losses: the calls of loss functions in it, where a penalty looks at them.
        inputs: for each penalty on the inputs that this run serves (by id), its inputs in the graph.
        context: the ``higher_order`` it ran in, if any.
    """

    output: Any
    loss: Tensor | None
    losses: watch_losses
    inputs: dict[int, tuple[Tensor, ...]]
    context: higher_order | None

    def outputs(self) -> Sequence[Tensor]:
        logits = self.output.get("logits") if isinstance(self.output, Mapping) else None
        if isinstance(logits, Tensor) and logits.requires_grad:
            return (logits,)
        return self.losses.outputs(self.loss) if self.loss is not None else ()


class Passes:
    """The runs of one step that a list of penalties needs; they share them where they can.

    Penalties on the inputs look at the run for real, whose inputs are made leaves of the graph. Where batch norm in
    training mode couples the samples they share a second run instead, with the running statistics from before the
    step. Finite differences run the step again at other inputs. Every further run has the random numbers (dropout
    masks) and the buffers that the run for real began with, and leaves both as that one did; ``self.log`` and
    torchmetrics are silent in it.

    Args:
        module: the LightningModule.
        step: computes the loss from a batch.
        batch: the batch.
        penalties: those that act on this step.
        loss_of: finds the scalar loss in what the step returns.
        all_inputs: whether every tensor of the batch is an input for a penalty that does not choose.
        repeated: whether the step is going to be run more than once (:meth:`at_present`).
        context: run everything in this one; by default each run has its own, where a penalty needs it.
        mean_over_ranks: see :class:`StepContext`; by default there is one process.

    Attributes:
        before: the buffers and random states that the run for real begins with.
        coupling: the layers of batch norm in training mode, by name, if a penalty on the inputs is among them.

    Raises:
        MisconfigurationException: the inputs of a penalty cannot be found, or batch norm has no running statistics.
    """

    def __init__(
        self,
        module: nn.Module,
        step: Callable[[Any], Any],
        batch: Any,
        penalties: Sequence[Penalty],
        loss_of: Callable[[Any], Tensor | None],
        all_inputs: bool = False,
        repeated: bool = False,
        context: higher_order | None = None,
        mean_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self.module = module
        self.step = step
        self.batch = batch
        self.penalties = penalties
        self.loss_of = loss_of
        self.all_inputs = all_inputs
        self.repeated = repeated
        self.mean_over_ranks = mean_over_ranks
        self._watched = any(penalty.watches_losses for penalty in penalties)
        if repeated and isinstance(batch, Iterator):
            raise MisconfigurationException(
                "The training step takes the dataloader's iterator, so running it a second time would take another "
                "batch. Let it take a batch, or use method='autograd', which runs the step once."
            )
        self._given_context = context
        self._on_inputs = [penalty for penalty in penalties if isinstance(penalty, InputPenalty)]
        for penalty in self._on_inputs:
            check_layer(penalty, module)
        self._originals = {id(p): self._select(p) for p in self._on_inputs if p.layer is None}
        self.coupling = {
            name: layer
            for name, layer in (module.named_modules() if self._on_inputs else ())
            if isinstance(layer, _BatchNorm) and layer.training
        }
        self._refuse_batch_statistics()
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        kind = device.type
        self._autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self.before = Snapshot(module, device)
        self._task: Pass | None = None
        self._own: Pass | None = None
        self._has_run = False
        self._containers = batch if isinstance(batch, Iterator) else exchanged(batch, (), ())
        self._versions = [(x, x._version) for x in tensors_in(batch) if not x.is_inference()]

    def task(self) -> Pass:
        """Run the step for real."""
        self._task = self._run(self._sharing)
        context = self._task.context
        if context is not None and context.takes_gradients and context.derivatives < 3:
            # Fused norms before the gradient were not replaced: what the penalties look at is a run with three.
            with self.before.rewound(), _silent(self.module), torch.enable_grad():
                again = self._run(self._sharing, derivatives=3)
            self._task = replace(again, output=self._task.output)
        return self._task

    @property
    def _sharing(self) -> list[Penalty]:
        return [p for p in self.penalties if not (self.coupling and isinstance(p, InputPenalty))]

    def runs_again_for(self, penalty: Penalty) -> bool:
        """Whether a penalty looks at other runs than the one for real."""
        return isinstance(penalty, InputPenalty) and (bool(self.coupling) or penalty.derivatives == 1)

    def at_present(self, for_real: bool) -> Pass:
        """Run the step with the parameters as they are now, for nothing but its loss and first derivatives.

        Args:
            for_real: whether this is the run whose logs, metrics, buffers and random numbers count.

        Raises:
            MisconfigurationException: the step changes a parameter, so it cannot be run more than once.
        """
        before = [(name, parameter, parameter._version) for name, parameter in self.module.named_parameters()]
        run = self._run([]) if for_real else self._run_again([])
        for name, parameter, version in before:
            if parameter._version != version:
                raise MisconfigurationException(
                    f"The training step changes the parameter {name!r}, and is run several times here, which would "
                    "change it as often. Change it in `on_train_batch_end` (moving averages of weights, for example); "
                    "or train with method='autograd', and measure with CurvatureMonitor(loss=...)."
                )
        return run

    def forget_graphs(self) -> None:
        """Let go of the runs; the step can be run again."""
        self._task = self._own = None

    def check_repeatable(
        self, loss: Tensor, by: str, shared: bool = False, finish: Callable[[Tensor], Any] | None = None
    ) -> list[str]:
        """See that the step gives the same loss when it is run again, as every further run must.

        Args:
            loss: of the last run, with the parameters as they are now.
            by: what needs further runs, for the error.
            shared: whether that run served penalties (:meth:`task`).
            finish: called with the loss of the further run; sharded parameters wait for its backward pass.

        Returns:
            The attributes that the run has changed all the same, but for counters.

        Raises:
            MisconfigurationException: it does not; attributes that have changed are named.
        """
        before = attributes_of(self.module)
        with self.before.rewound(), _silent(self.module), torch.enable_grad():
            again = self._run(self._sharing if shared else []).loss
            if finish is not None and again is not None:
                finish(again)
        after = attributes_of(self.module)
        if again is None or not same_loss(loss, again):
            raise not_repeatable(by, before, after)
        return sorted(name for name, value in after.items() if not isinstance(value, int) and before.get(name) != value)

    def context(self, penalty: Penalty, probes: ProbeSource) -> StepContext:
        """What the penalty is computed from."""
        return self._context(self.serving(penalty), penalty, probes)

    def serving(self, penalty: Penalty) -> Pass:
        """The run that the penalty looks at."""
        if self._task is None:
            self._task = self.task()
        if not (self.coupling and isinstance(penalty, InputPenalty)):
            return self._task
        if self._own is None:
            self._own = self._run_again(self._on_inputs)
        return self._own

    @contextmanager
    def explained(self, penalty: Penalty) -> Iterator[None]:
        """Translate autograd's errors about missing derivatives, and the penalty's own about its context."""
        context = self.serving(penalty).context
        try:
            with context.explained() if context is not None else nullcontext():
                yield
        except ValueError as error:
            raise MisconfigurationException(f"The penalty {penalty.name} cannot be computed. {error}") from error

    def _context(self, run: Pass, penalty: Penalty, probes: ProbeSource) -> StepContext:
        if run.loss is None:
            raise no_loss_again(penalty)

        def moved(shifts: Sequence[Tensor]) -> StepContext:
            return self._context(self._run_again([penalty], shifts), penalty, probes)

        parameters = dict(self.module.named_parameters())
        own = run.inputs.get(id(penalty), ())
        everyones = {id(x): x for inputs in run.inputs.values() for x in inputs}
        inputs = own if isinstance(penalty, InputPenalty) else tuple(everyones.values())
        return StepContext(run.loss, parameters, probes, inputs, run.losses, run.outputs(), self.mean_over_ranks, moved)

    def _run_again(self, penalties: Sequence[Penalty], shifts: Sequence[Tensor] | None = None) -> Pass:
        independent = evaluation_mode(self.coupling.values() if penalties else ())
        with independent, self.before.rewound(), _silent(self.module), torch.enable_grad():
            return self._run(penalties, shifts)

    def _run(self, penalties: Sequence[Penalty], shifts: Sequence[Tensor] | None = None, derivatives: int = 1) -> Pass:
        inputs: dict[int, tuple[Tensor, ...]] = {}
        leaves: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of the batch's tensor: itself, and what stands for it
        with ExitStack() as stack:
            for penalty in penalties:
                if not isinstance(penalty, InputPenalty):
                    continue
                if penalty.layer is not None:
                    stack.enter_context(_layer_output(self.module, penalty, inputs, shifts))
                    continue
                originals = self._originals[id(penalty)]
                for index, x in enumerate(originals):
                    if id(x) not in leaves:
                        leaves[id(x)] = x, _leaf(x, None if shifts is None else shifts[index])
                inputs[id(penalty)] = tuple(leaves[id(x)][1] for x in originals)
            batch = self._fresh_batch({key: y for key, (_, y) in leaves.items()})
            derivatives = max([derivatives, *(penalty.derivatives for penalty in penalties)])
            context = self._given_context
            if context is None and derivatives > 1:
                context = higher_order(self.module, derivatives)
            if context is not None:
                stack.enter_context(context)
            losses = watch_losses()
            if self._watched:  # it costs a little for every operation
                stack.enter_context(losses)
            # The penalty's derivatives are taken without autocast; the step computes as it ever does.
            stack.enter_context(self._autocast)
            output = self.step(batch)
        return Pass(output, self.loss_of(output), losses, inputs, context)

    def _fresh_batch(self, leaves: Mapping[int, Tensor]) -> Any:
        """The batch with the leaves in their places; copies, because a step may change what it is handed."""
        if not self._on_inputs and not self.repeated:
            if not self._has_run:
                self._has_run = True
                return self.batch
            if isinstance(self.batch, Iterator) or any(x._version != version for x, version in self._versions):
                raise MisconfigurationException(
                    "The training step takes the dataloader's iterator or changes its batch in place, and has to be "
                    "run a second time, which would see another batch. Change a copy of the batch."
                )
            return exchanged(self._containers, (), ())
        tensors = list(tensors_in(self.batch))
        return exchanged(self.batch, tensors, [leaves.get(id(x), x).clone() for x in tensors])

    def _select(self, penalty: InputPenalty) -> tuple[Tensor, ...]:
        try:
            if self.all_inputs and penalty.inputs is None:
                return select_inputs(self.batch, lambda batch: list(tensors_in(batch)))
            return select_inputs(self.batch, penalty.inputs)
        except ValueError as error:
            embeddings = [name for name, layer in self.module.named_modules() if isinstance(layer, nn.Embedding)]
            hint = f" The embedding layers here: {', '.join(map(repr, embeddings))}." if embeddings else ""
            raise MisconfigurationException(f"The penalty {penalty.name} finds no input. {error}{hint}") from error

    def _refuse_batch_statistics(self) -> None:
        for name, layer in self.coupling.items():
            if layer.running_mean is None:
                raise MisconfigurationException(
                    f"The layer {name!r} has no running statistics, so it normalizes by the batch in evaluation mode "
                    "as well and couples the samples: a sample's own derivatives by its input do not exist. Pass "
                    "track_running_stats=True to it, or use GroupNorm."
                )


@contextmanager
def layers_without_gradients(module: nn.Module, parameters: Sequence[Tensor]) -> Iterator[set[str]]:
    """The names of the layers that own some of the parameters and are called under ``torch.no_grad()`` inside.

    Example:
        >>> layer = nn.Sequential(nn.Linear(2, 2))
        >>> with layers_without_gradients(layer, list(layer.parameters())) as found, torch.no_grad():
        ...     y = layer(torch.ones(1, 2))
        >>> found
        {'0'}
    """
    found: set[str] = set()
    wanted = {id(parameter) for parameter in parameters}

    def look(name: str) -> Callable[..., None]:
        return lambda layer, args: None if torch.is_grad_enabled() or _in_checkpoint() else found.add(name)

    handles = [
        layer.register_forward_pre_hook(look(name))
        for name, layer in module.named_modules()
        if any(id(parameter) in wanted for parameter in layer.parameters(recurse=False))
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _in_checkpoint() -> bool:
    """Whether a reentrant checkpoint is on the stack, whose first run has no gradients."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def same_loss(loss: Tensor, again: Tensor) -> bool:
    if loss.device.type != "cpu":  # some kernels add in another order each time
        return torch.allclose(loss, again, rtol=1e-3, equal_nan=True)
    return torch.equal(loss.detach().nan_to_num(), again.detach().nan_to_num())


_LIGHTNINGS = frozenset(vars(LightningModule()))


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """What identifies the present value of each attribute of a module's layers, by the attribute's name."""
    return {
        f"{prefix}.{name}" if prefix else name: _identity(value)
        for prefix, layer in module.named_modules()
        if not isinstance(layer, Metric)
        for name, value in vars(layer).items()
        if name not in _LIGHTNINGS
    }


@dataclass(frozen=True, eq=False)
class _Object:
    """Equal where it is the same object, unchanged; it is held, so that no other one can take its place in memory."""

    value: Any
    version: int | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Object) and self.value is other.value and self.version == other.version


def _identity(value: Any, depth: int = 3) -> Any:
    if isinstance(value, Tensor):
        return _Object(value, None if value.is_inference() else value._version)
    if isinstance(value, torch.Generator):
        return bytes(value.get_state().tolist())
    if depth and type(value) is dict:
        return {key: _identity(part, depth - 1) for key, part in value.items()}
    if depth and type(value) in (list, tuple, deque):
        return [_identity(part, depth - 1) for part in value]
    return value if isinstance(value, int | float | str | bytes) else _Object(value)


def not_repeatable(by: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> MisconfigurationException:
    """The error of a step that gives another loss when it is run again; attributes that have changed are named."""
    changed = sorted(name for name, value in after.items() if before.get(name) != value)
    found = f" Attributes that the run has changed: {', '.join(changed[:8])}." if changed else ""
    return MisconfigurationException(
        "The training step gives another loss when it is run again on the same batch with the same parameters, "
        f"buffers and random numbers, and {by} needs several runs: each would be of another function. The step keeps "
        f"a state of its own (a hidden state, a memory bank, a random generator).{found} Register what it keeps as a "
        "buffer (`self.register_buffer`), which is rewound, or use a penalty that runs the step once, such as "
        "HessianTrace()."
    )


def no_loss_again(penalty: Penalty) -> MisconfigurationException:
    """The error for a step that skips a batch which it did not skip before."""
    return MisconfigurationException(
        "The training step returned a loss for this batch and None when it was run again for the penalty "
        f"{penalty.name}. It must be a function of the batch and the random numbers alone."
    )


def check_layer(penalty: Penalty, module: nn.Module) -> None:
    """Refuse a penalty on the output of a layer that the module does not have.

    Raises:
        MisconfigurationException: near names are listed.
    """
    names = [name for name, _ in module.named_modules() if name]
    if isinstance(penalty, InputPenalty) and penalty.layer is not None and penalty.layer not in names:
        near = ", ".join(difflib.get_close_matches(penalty.layer, names, n=3, cutoff=0.0))
        raise MisconfigurationException(
            f"The penalty {penalty.name} cannot be computed. layer={penalty.layer!r} is not a layer of "
            f"{type(module).__name__}. Near names: {near}."
        )


def _leaf(x: Tensor, shift: Tensor | None) -> Tensor:
    """What stands for an input in the graph: x or x + shift, a tensor to differentiate by."""
    y = x if shift is None else x + shift
    # An input that was computed from parameters (embeddings) keeps its graph.
    return y if y.requires_grad else y.detach().requires_grad_()


@contextmanager
def _layer_output(
    module: nn.Module, penalty: InputPenalty, inputs: dict[int, tuple[Tensor, ...]], shifts: Sequence[Tensor] | None
) -> Iterator[None]:
    """Take the output of the penalty's layer, at its first call, for the input."""

    def take(layer: nn.Module, arguments: Any, output: Any) -> Any:
        if id(penalty) in inputs:
            return output
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() == 0:
            raise MisconfigurationException(
                f"The layer {penalty.layer!r} returns a {type(output).__name__}, by which {penalty.name} cannot be "
                "differentiated. Choose a layer that returns one floating-point tensor of shape (samples, ...)."
            )
        y = _leaf(output, None if shifts is None else shifts[0])
        inputs[id(penalty)] = (y,)
        return y.clone()

    handle = module.get_submodule(str(penalty.layer)).register_forward_hook(take)
    try:
        yield
        if id(penalty) not in inputs:
            raise MisconfigurationException(
                f"The step did not call the layer {penalty.layer!r}, whose output {penalty.name} is to take for the "
                "input. Choose a layer that the training step calls."
            )
    finally:
        handle.remove()


@contextmanager
def _silent(module: nn.Module) -> Iterator[None]:
    """Inside, ``self.log`` does nothing and torchmetrics are not updated: the step was counted already."""
    replaced: list[tuple[nn.Module, str, Any]] = []

    def replace(layer: nn.Module, name: str, by: Any) -> None:
        replaced.append((layer, name, layer.__dict__.get(name)))
        layer.__dict__[name] = by

    for layer in module.modules():
        if isinstance(layer, LightningModule):
            replace(layer, "log", _nothing)
            replace(layer, "log_dict", _nothing)
        elif isinstance(layer, Metric):
            # One that has seen nothing has no value to tell again: a copy of it runs.
            twin = copy.deepcopy(layer) if layer._update_count == 0 else None
            replace(layer, "update", _nothing if twin is None else twin.update)
            replace(layer, "forward", _forward(layer) if twin is None else twin.forward)
            replace(layer, "compute", _compute(layer) if twin is None else twin.compute)
            replace(layer, "reset", _nothing if twin is None else twin.reset)
    try:
        yield
    finally:
        for layer, name, before in reversed(replaced):
            if before is None:
                del layer.__dict__[name]
            else:
                layer.__dict__[name] = before


def _forward(metric: Metric) -> Callable[..., Any]:
    return lambda *args, **kwargs: _known(metric._forward_cache)


def _compute(metric: Metric) -> Callable[[], Any]:
    return lambda: _known(metric._computed)


def _known(value: Any) -> Any:
    return torch.nan if value is None else value


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Takes everything, does nothing."""
